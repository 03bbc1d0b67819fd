package main

import (
	"fmt"

	"github.com/mmcloughlin/avo/attr"
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"

	"bigsmall.dev/asm/ext"
)

// Offsets in rans.wideTable: 256 bytes each.
const (
	wideAlias     = 256 * iota
	wideOffsetLow // of the offset
	wideOffsetTop // and 16 * threshold
	wideFreqLow   // of 16 * frequency
	wideFreqTop
	wideValueLow
	wideValueTop
	wideJoin // rans.restTable
)

// bytesOf is a constant of 64 bytes.
func bytesOf(name string, f func(i int) int) Mem {
	m := GLOBL(name, attr.RODATA|attr.NOPTR)
	for i := 0; i < 64; i += 8 {
		v := uint64(0)
		for k := range 8 {
			v |= uint64(f(i+k)) << (8 * k)
		}
		DATA(i, U64(v))
	}
	return m
}

// packing takes bytes of two vectors of words, and puts words together again from bytes in two vectors.
type packing struct {
	low, top Mem    // indexes of the lower and upper bytes of 64 words
	words    [2]Mem // of the words of either half
}

func newPacking() packing {
	return packing{
		bytesOf("packLow", func(i int) int { return 2 * i }),
		bytesOf("packTop", func(i int) int { return 2*i + 1 }),
		[2]Mem{
			bytesOf("wordsLow", func(i int) int { return i/2 + i%2*64 }),
			bytesOf("wordsTop", func(i int) int { return i/2 + i%2*64 + 32 }),
		},
	}
}

// pick is bytes of x and y, those that the indexes name.
func pick(index Mem, x, y reg.VecVirtual) reg.VecVirtual {
	v := ZMM()
	VMOVDQU64(index, v)
	VPERMI2B(y, x, v)
	return v
}

// wide writes the AVX-512 decoder for 65 to 256 symbols. Two streams are looked up together, a byte a symbol, each byte of
// a table in two permutes of 128 bytes; the states are those of alias, and move on in the same way.
func wide(f form, streams int, p packing) {
	args, table := begin(fmt.Sprintf("wide%s%d", f.name, streams), fmt.Sprintf("decodes a.count turns of %d streams with wide alias tables to %s.", streams, f.doc()))
	e := f.elements(args, table, wideJoin)
	ones := ZMM()
	VPTERNLOGD(U8(0xff), ones, ones, ones)
	high := ext.Dword("high4", 0xf000f000)
	st := openStreams(args, f, streams)
	n, count := GP64(), AllocLocal(8) // registers are short
	MOVQ(Mem{Base: args, Disp: argCount}, n)
	MOVQ(n, count)
	ahead := GP64()
	MOVQ(Mem{Base: args, Disp: argAhead}, ahead)

	// Half of these tables is in registers; there is no room for more.
	held := map[int][2]reg.VecVirtual{}
	for _, disp := range []int{wideAlias, wideOffsetLow, wideOffsetTop, wideFreqLow} {
		held[disp] = [2]reg.VecVirtual{load(table, disp), load(table, disp+128)}
	}
	// look is table[index]; upper has the indexes over 127.
	look := func(disp int, index reg.VecVirtual, upper reg.Register) reg.VecVirtual {
		var halves [2]reg.VecVirtual
		for i := range halves {
			first, second, v := Mem{Base: table, Disp: disp + 128*i}, Mem{Base: table, Disp: disp + 128*i + 64}, ZMM()
			if h, ok := held[disp]; ok {
				VMOVDQA64(index, v)
				VPERMI2B(second, h[i], v)
			} else {
				VMOVDQU64(first, v)
				VPERMT2B(second, index, v)
			}
			halves[i] = v
		}
		VMOVDQU8(halves[1], upper, halves[0])
		return halves[0]
	}

	Label("turn")
	Comment("prefetch(ahead); ahead += 64 // what is decoded next")
	for k := range lines(streams) {
		PREFETCHT1(Mem{Base: ahead, Disp: 64 * k})
	}
	for k := 0; k < streams; k += 2 {
		pair := []*stream{&st[k], &st[k]}[:min(2, streams-k)]
		other := pair[0]
		if len(pair) == 2 {
			pair[1] = &st[k+1]
			other = pair[1]
		}
		Comment(fmt.Sprintf("streams from %d on: bucket := lo&255", k))
		bucket := pick(p.low, pair[0].lo, other.lo)
		Comment("isAlias := lo>>8&15 >= threshold[bucket]")
		r := pick(p.top, pair[0].lo, other.lo)
		VPSLLW(U8(4), r, r)
		VPORD_BCST(ext.Dword("nibbles", 0x0f0f0f0f), r, r)
		upper, isAlias := K(), K()
		VPMOVB2M(bucket, upper)
		top := look(wideOffsetTop, bucket, upper)
		VPCMPUB(U8(5), top, r, isAlias)
		low := look(wideOffsetLow, bucket, upper)
		Comment("sym := bucket; if isAlias { sym = alias[bucket] }")
		alias := look(wideAlias, bucket, upper)
		VMOVDQU8(alias, isAlias, bucket)
		sym := bucket
		Comment("rank := lo>>8&15; if isAlias { rank += offset[bucket] }")
		var rank, freq [2]reg.VecVirtual
		for i, s := range pair {
			offset := pick(p.words[i], low, top)
			rank[i] = ZMM()
			VPSRLW(U8(8), s.lo, rank[i])
			VPANDD_BCST(ext.Dword("ranks", 0x000f000f), rank[i], rank[i])
			if i == 1 {
				KSHIFTRQ(U8(32), isAlias, isAlias)
			}
			VPADDW(offset, rank[i], isAlias, rank[i])
			VPANDD_BCST(ext.Dword("slots", 0x0fff0fff), rank[i], rank[i]) // the threshold is above
		}
		Comment("f := freq[sym] // frequency << 4")
		upperSym := K()
		VPMOVB2M(sym, upperSym)
		low, top = look(wideFreqLow, sym, upperSym), look(wideFreqTop, sym, upperSym)
		for i := range pair {
			freq[i] = pick(p.words[i], low, top)
		}
		for i, s := range pair {
			step(s, freq[i], rank[i], ZMM(), ones, high)
		}
		Comment("v := value[sym]")
		value := look(wideValueLow, sym, upperSym)
		if f.size == 2 {
			top = look(wideValueTop, sym, upperSym)
		}
		for i, s := range pair {
			switch {
			case f.size == 2:
				e.store(s, pick(p.words[i], value, top))
			case f.rest != noRest:
				half, v := value.AsY(), ZMM()
				if i == 1 {
					h := YMM()
					VEXTRACTI64X4(U8(1), value, h)
					half = h
				}
				VPMOVZXBW(half, v)
				e.store(s, v)
			case i == 0:
				Comment("*dst = v; dst++")
				VMOVDQU8(value.AsY(), Mem{Base: s.dst})
				ADDQ(U8(32), s.dst)
			default:
				VEXTRACTI64X4(U8(1), value, Mem{Base: s.dst})
				ADDQ(U8(32), s.dst)
			}
		}
	}
	ADDQ(Imm(uint64(64*lines(streams))), ahead)
	DECQ(count)
	JNZ(LabelRef("turn"))
	closeStreams(f, st, ahead)
}
