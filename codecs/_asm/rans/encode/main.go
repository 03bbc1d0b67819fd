// Command encode writes the rANS coder for AVX-512.
//
// The 32 states of a block are two vectors of words, the low and the high halves, lane i at place 31-i: a coder goes
// backwards, so the words leave in the order of the places, and the output grows upwards, to be reversed at the end.
package main

import (
	"fmt"

	"bigsmall.dev/asm/ext"
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Offsets in rans.encodeArgs.
const (
	argTables  = 0
	argTurns   = 8
	argSymbols = 16
	argOut     = 48
	argState   = 80
)

// Offsets in rans.narrowTables, 64 words each. Those in wideTables are 256 words of frequencies << 4, 256 of starts, and the
// slots from wideSlots on.
const (
	tabFreq  = 128 * iota // frequency << 4
	tabRcpLo              // low halves of the floats a little below 1/frequency
	tabRcpHi              // high halves
	tabOwn                // slots in the own bucket
	tabAlias              // rank + alias is the place among all aliased slots
	tabTree               // where aliased pieces begin, a binary search tree
	tabLeaf               // place<<6 + leaf is the slot
	tabRoot               // the root of the tree, 32 times
)

func words(v uint16) Mem { return ext.Dword(fmt.Sprintf("words%d", v), uint32(v)<<16|uint32(v)) }

func zmm(from Mem) reg.VecVirtual {
	v := ZMM()
	VMOVDQU64(from, v)
	return v
}

func all(v Mem) reg.VecVirtual {
	r := ZMM()
	VPBROADCASTD(v, r)
	return r
}

// lookup is table[index], a table of 64 words.
func lookup(table [2]Op, index reg.VecVirtual) reg.VecVirtual {
	v := ZMM()
	VMOVDQA64(index, v)
	VPERMI2W(table[1], table[0], v)
	return v
}

type stream struct {
	symbols, out reg.GPVirtual
	lo, hi       reg.VecVirtual
}

// constants are what dividing needs.
type constants struct{ low, one, fifteen reg.VecVirtual }

// divide takes the words of x = hi<<16|lo, below f<<20, and gives the low words of q = x/f, those of q>>4 and the rest.
// float makes the two vectors of quotients of the two of x.
func (c *constants) divide(lo, hi, f reg.VecVirtual, float func(x [2]reg.VecVirtual)) (q, q4, rank reg.VecVirtual) {
	Comment("q := uint32(float32(x) / f) // rounded down, and so at most one too low")
	var x [2]reg.VecVirtual
	x[0], x[1] = ZMM(), ZMM()
	VPUNPCKLWD(hi, lo, x[0])
	VPUNPCKHWD(hi, lo, x[1])
	for i := range x {
		VCVTUDQ2PS_RZ_SAE(x[i], x[i])
	}
	float(x)
	for i := range x {
		VCVTTPS2UDQ(x[i], x[i])
	}
	Comment("q4 := q >> 4 // fits into words, as q < 1<<20")
	t := ZMM()
	q4 = ZMM()
	VPSRLD(U8(4), x[0], q4)
	VPSRLD(U8(4), x[1], t)
	VPACKUSDW(t, q4, q4)
	q = x[0]
	VPERMT2W(x[1], c.low, q)
	Comment("rank := x - q*f // modulo 2^16: it is less than 2*f")
	rank = ZMM()
	VPMULLW(f, q, rank)
	VPSUBW(rank, lo, rank)
	Comment("if rank >= f { rank -= f; q++; q4 = q>>4 }")
	over, carry := K(), K()
	VPCMPUW(U8(5), f, rank, over)
	VPSUBW(f, rank, over, rank)
	VPADDW(c.one, q, over, q)
	VPTESTNMW(c.fifteen, q, over, carry)
	VPADDW(c.one, q4, carry, q4)
	return q, q4, rank
}

// renormalise lets a word leave where x >= f<<20.
func (s *stream) renormalise(f16 reg.VecVirtual) {
	Comment("if hi >= f<<4 { *out++ = lo; lo, hi = hi, 0 }")
	full, count, w, bits := K(), GP64(), ZMM(), GP32()
	VPCMPUW(U8(5), f16, s.hi, full)
	ext.VPCOMPRESSW(s.lo, full, w)
	VMOVDQU64(w, Mem{Base: s.out})
	KMOVD(full, bits)
	POPCNTL(bits, count.As32())
	LEAQ(Mem{Base: s.out, Index: count, Scale: 2}, s.out)
	VMOVDQU16(s.hi, full, s.lo)
	VPSUBW(s.hi, s.hi, full, s.hi)
}

// begin opens a kernel for so many blocks.
func begin(form string, streams int, doc string) (args, tab, turns reg.GPVirtual, c constants) {
	name := fmt.Sprintf("encode%s%d", form, streams)
	TEXT(name, NOSPLIT, "func(a *byte)")
	Pragma("noescape")
	Doc(fmt.Sprintf("%s codes a.turns times 32 symbols, the last first, of %d blocks with one table of at most %s.", name, streams, doc))
	args, tab, turns = GP64(), GP64(), GP64()
	Load(Param("a"), args)
	MOVQ(Mem{Base: args, Disp: argTables}, tab)
	MOVQ(Mem{Base: args, Disp: argTurns}, turns)
	return args, tab, turns, constants{zmm(ext.Words("lowWords", lowWords())), all(words(1)), all(words(15))}
}

// tables loads tables of 64 words, the upper halves of the first few not: those are looked up in memory, as there are too
// few registers.
func tables(tab reg.GPVirtual, inMemory int, at ...int) [][2]Op {
	out := make([][2]Op, len(at))
	for i, disp := range at {
		upper := Mem{Base: tab, Disp: disp + 64}
		out[i] = [2]Op{zmm(Mem{Base: tab, Disp: disp}), upper}
		if i >= inMemory {
			out[i][1] = zmm(upper)
		}
	}
	return out
}

// turn writes the loop over all turns of all blocks and what follows it. code is given the symbols, as words, lane 31
// first, and leaves the new state.
func turn(args, turns reg.GPVirtual, streams int, code func(s *stream, sym reg.VecVirtual)) {
	back, bytes, tmp := zmm(ext.Words("backwards", backwards())), K(), GP64()
	MOVQ(U64(0x5555555555555555), tmp)
	KMOVQ(tmp, bytes)
	st := make([]stream, streams)
	for k := range st {
		s := &st[k]
		s.symbols, s.out = GP64(), GP64()
		MOVQ(Mem{Base: args, Disp: argSymbols + 8*k}, s.symbols)
		MOVQ(Mem{Base: args, Disp: argOut + 8*k}, s.out)
		s.lo, s.hi = zmm(Mem{Base: args, Disp: argState + 128*k}), zmm(Mem{Base: args, Disp: argState + 128*k + 64})
	}
	Label("turn")
	for k := range st {
		s := &st[k]
		Comment(fmt.Sprintf("block %d: s := symbols[lane]", k))
		sym := ZMM()
		VMOVDQU8(Mem{Base: s.symbols}, sym.AsY())
		SUBQ(U8(32), s.symbols)
		VPERMB_Z(sym, back, bytes, sym)
		code(s, sym)
	}
	DECQ(turns)
	JNZ(LabelRef("turn"))
	Load(Param("a"), args)
	for k := range st {
		s := &st[k]
		MOVQ(s.out, Mem{Base: args, Disp: argOut + 8*k})
		VMOVDQU64(s.lo, Mem{Base: args, Disp: argState + 128*k})
		VMOVDQU64(s.hi, Mem{Base: args, Disp: argState + 128*k + 64})
	}
	VZEROUPPER()
	RET()
}

// narrow is the form for tables of the alias layout. The slot of an aliased rank is found by a binary search in
// registers: a look-up in a table of all slots would take twice as long as everything else.
func narrow(streams int) {
	args, tab, turns, c := begin("Narrow", streams, "64 symbols")
	t := tables(tab, max(0, 2*streams-3), tabFreq, tabRcpLo, tabRcpHi, tabOwn, tabAlias, tabTree, tabLeaf)
	freq, rcpLo, rcpHi, own, alias, tree, leaf := t[0], t[1], t[2], t[3], t[4], t[5], t[6]
	turn(args, turns, streams, func(s *stream, sym reg.VecVirtual) {
		f := lookup(freq, sym)
		s.renormalise(f)
		VPSRLW(U8(4), f, f)
		q, q4, rank := c.divide(s.lo, s.hi, f, func(x [2]reg.VecVirtual) {
			lo, hi := lookup(rcpLo, sym), lookup(rcpHi, sym)
			r := ZMM()
			VPUNPCKLWD(hi, lo, r)
			VMULPS_RZ_SAE(r, x[0], x[0])
			VPUNPCKHWD(hi, lo, lo)
			VMULPS_RZ_SAE(lo, x[1], x[1])
		})
		Comment("aliased := rank >= own[s]; place := rank + alias[s]; slot := rank<<6 | s")
		aliased, place, slot := K(), lookup(alias, sym), ZMM()
		VPCMPUW(U8(5), lookup(own, sym), rank, aliased)
		VPADDW(rank, place, place)
		VPSLLW(U8(6), rank, slot)
		VPORQ(sym, slot, slot)
		Comment("n := 1; for range 6 { n = 2*n + boolInt(place < tree[n]) }")
		n, d := ZMM(), ZMM()
		VPSUBW(Mem{Base: tab, Disp: tabRoot}, place, d)
		ext.VPSHLDW(1, d, c.one, n)
		for level := 1; level < 6; level++ {
			VPERMW(tree[level/5], n, d)
			VPSUBW(d, place, d)
			ext.VPSHLDW(1, d, n, n)
		}
		Comment("if aliased { slot = place<<6 + leaf[n-64] }")
		VPSLLW(U8(6), place, aliased, slot)
		VPERMI2W_Z(leaf[1], leaf[0], aliased, n)
		VPADDW(n, slot, slot)
		s.next(q, q4, slot)
	})
}

const wideSlots = 1024

// wide is the form for tables of more symbols. Slots are looked up: a search would take as long.
func wide(streams int) {
	args, tab, turns, c := begin("Wide", streams, "256 symbols")
	t := tables(tab, 8, 0, 128, 256, 384, 512, 640, 768, 896)
	zero, quarter, half := ZMM(), all(words(64)), all(words(128))
	VPXORD(zero, zero, zero)
	turn(args, turns, streams, func(s *stream, sym reg.VecVirtual) {
		Comment("f, first := freq[s], start[s] // four look-ups each by six bits, and a choice by each of the two bits above")
		bits := [2]reg.OpmaskVirtual{K(), K()}
		VPTESTMW(quarter, sym, bits[0])
		VPTESTMW(half, sym, bits[1])
		look := func(t [][2]Op) reg.VecVirtual {
			var got [2]reg.VecVirtual
			for i := range got {
				got[i] = lookup(t[2*i], sym)
				VMOVDQU16(lookup(t[2*i+1], sym), bits[0], got[i])
			}
			VMOVDQU16(got[1], bits[1], got[0])
			return got[0]
		}
		f := look(t[:4])
		s.renormalise(f)
		VPSRLW(U8(4), f, f)
		q, q4, rank := c.divide(s.lo, s.hi, f, func(x [2]reg.VecVirtual) {
			d := ZMM()
			VPUNPCKLWD(zero, f, d)
			VCVTUDQ2PS(d, d)
			VDIVPS_RZ_SAE(d, x[0], x[0])
			VPUNPCKHWD(zero, f, d)
			VCVTUDQ2PS(d, d)
			VDIVPS_RZ_SAE(d, x[1], x[1])
		})
		Comment("slot := slots[first+rank] // two bytes too many are read")
		at := look(t[4:])
		VPADDW(rank, at, at)
		var slot [2]reg.VecVirtual
		for i, unpack := range []func(...Op){VPUNPCKLWD, VPUNPCKHWD} {
			index, every := ZMM(), K()
			slot[i] = ZMM()
			unpack(zero, at, index)
			VPTESTNMD(zero, zero, every)
			VPXORD(zero, zero, slot[i])
			VPGATHERDD(Mem{Base: tab, Index: index, Scale: 2, Disp: wideSlots}, every, slot[i])
		}
		VPERMT2W(slot[1], c.low, slot[0])
		s.next(q, q4, slot[0])
	})
}

func (s *stream) next(q, q4, slot reg.VecVirtual) {
	Comment("x = q<<12 | slot")
	VPSLLW(U8(12), q, q)
	VPORQ(slot, q, s.lo)
	VMOVDQA64(q4, s.hi)
}

// lowWords picks the low words of two vectors that VPUNPCKLWD and VPUNPCKHWD made, in the order before.
func lowWords() (w [32]uint16) {
	for i := range w {
		w[i] = uint16(i/8*8+i%4*2) + uint16(i%8/4*32)
	}
	return w
}

// backwards are the bytes 31, 30, ... 0, one a word.
func backwards() (w [32]uint16) {
	for i := range w {
		w[i] = uint16(31 - i)
	}
	return w
}

func main() {
	ConstraintExpr("amd64,!purego")
	for streams := 1; streams <= 4; streams++ {
		narrow(streams)
	}
	for streams := 1; streams <= 4; streams++ {
		wide(streams)
	}
	Generate()
}
