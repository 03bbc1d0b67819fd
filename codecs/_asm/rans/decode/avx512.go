package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"

	"bigsmall.dev/asm/ext"
)

// Offsets in rans.aliasTable.
const (
	tabEntry  = 0 // 64 words each
	tabOffset = 128
	tabFreq   = 256
	tabValue  = 384
	tabRest   = 512 // rans.restTable
)

// Offsets in rans.restTable: 64 bytes each.
const (
	restLow     = 0
	restHigh    = 64
	restShift   = 128
	restTurn    = 192
	restKeep    = 256
	restKeepTop = 320
)

type stream struct {
	src, rest, dst reg.GPVirtual
	lo, hi         reg.VecVirtual
}

// elements are the registers and constants that turn symbols and packed rest into elements.
type elements struct {
	form
	low, high, shift, turn, keep, keepTop reg.VecVirtual
	step                                  Mem // bytes of rest a turn takes; on the stack, since registers are short
}

func load(table reg.GPVirtual, disp int) reg.VecVirtual {
	v := ZMM()
	VMOVDQU16(Mem{Base: table, Disp: disp}, v)
	return v
}

// elements takes them from a restTable.
func (f form) elements(args, table reg.GPVirtual, rest int) *elements {
	e := &elements{form: f}
	if f.rest == noRest {
		return e
	}
	e.low, e.shift, e.keep = load(table, rest+restLow), load(table, rest+restShift), load(table, rest+restKeep)
	if f.size == 1 {
		e.keepTop = load(table, rest+restKeepTop)
	}
	if f.rest == wideRest {
		e.high, e.turn = load(table, rest+restHigh), load(table, rest+restTurn)
	}
	step := GP64()
	MOVQ(Mem{Base: args, Disp: argRestStep}, step)
	e.step = AllocLocal(8)
	MOVQ(step, e.step)
	return e
}

// store merges the rest into the values v and stores them.
func (e *elements) store(s *stream, v reg.VecVirtual) {
	rest := ZMM()
	switch e.rest {
	case narrowRest:
		Comment("r := rest[i] // rotated: the sign on top, the mantissa at the bottom")
		VMOVDQU8(Mem{Base: s.rest}, rest.AsY())
		VPERMB(rest, e.low, rest)
		ext.VPSHRDVW(e.shift, rest, rest)
		ADDQ(e.step, s.rest)
		Comment("v |= r & keep")
		VPTERNLOGD(U8(0xf8), e.keep, rest, v)
		if e.size == 1 {
			Comment("v |= r >> 8 & keepTop // the sign of a byte")
			VPSRLW(U8(8), rest, rest)
			VPTERNLOGD(U8(0xf8), e.keepTop, rest, v)
		}
	case wideRest:
		Comment("r := rest[i]; v |= r & keep")
		upper := ZMM()
		VPERMB(Mem{Base: s.rest}, e.low, rest)
		VPERMB(Mem{Base: s.rest}, e.high, upper)
		ext.VPSHRDVW(e.shift, upper, rest)
		ADDQ(e.step, s.rest)
		VPTERNLOGD(U8(0xf8), e.keep, rest, v)
		Comment("v = v>>1 | v<<15 // where the sign is the lowest bit of the rest")
		ext.VPSHRDVW(e.turn, v, v)
	}
	Comment("*dst = v; dst++")
	if e.size == 1 {
		VPMOVWB(v, Mem{Base: s.dst})
		ADDQ(U8(32), s.dst)
		return
	}
	if e.past {
		VMOVNTDQ(v, Mem{Base: s.dst})
	} else {
		VMOVDQU16(v, Mem{Base: s.dst})
	}
	ADDQ(U8(64), s.dst)
}

func openStreams(args reg.GPVirtual, f form, n int) []stream {
	st := make([]stream, n)
	for k := range st {
		s := &st[k]
		s.src, s.dst, s.lo, s.hi = GP64(), GP64(), ZMM(), ZMM()
		MOVQ(Mem{Base: args, Disp: argSrc + 8*k}, s.src)
		MOVQ(Mem{Base: args, Disp: argDst + 8*k}, s.dst)
		if f.rest != noRest {
			s.rest = GP64()
			MOVQ(Mem{Base: args, Disp: argRest + 8*k}, s.rest)
		}
		VMOVDQU16(Mem{Base: args, Disp: argState + 128*k}, s.lo)
		VMOVDQU16(Mem{Base: args, Disp: argState + 128*k + 64}, s.hi)
	}
	return st
}

func closeStreams(f form, st []stream, ahead reg.GPVirtual) {
	if f.past {
		SFENCE()
	}
	args := GP64()
	Load(Param("a"), args)
	MOVQ(ahead, Mem{Base: args, Disp: argAhead})
	for k := range st {
		s := &st[k]
		MOVQ(s.src, Mem{Base: args, Disp: argSrc + 8*k})
		VMOVDQU16(s.lo, Mem{Base: args, Disp: argState + 128*k})
		VMOVDQU16(s.hi, Mem{Base: args, Disp: argState + 128*k + 64})
	}
	VZEROUPPER()
	RET()
}

// alias writes the AVX-512 decoder for at most 64 symbols: streams blocks side by side, 32 symbols each a turn. All
// tables are in registers; states are two vectors of 16-bit halves.
func alias(f form, streams int) {
	args, table := begin(fmt.Sprintf("alias%s%d", f.name, streams), fmt.Sprintf("decodes a.count turns of %d streams with alias tables to %s.", streams, f.doc()))
	entry0, entry1 := load(table, tabEntry), load(table, tabEntry+64)
	off0, off1 := load(table, tabOffset), load(table, tabOffset+64)
	freq0, freq1 := load(table, tabFreq), load(table, tabFreq+64)
	value0, value1 := load(table, tabValue), load(table, tabValue+64)
	e := f.elements(args, table, tabRest)
	ones := ZMM()
	VPTERNLOGD(U8(0xff), ones, ones, ones)
	high := ext.Dword("high4", 0xf000f000)
	st := openStreams(args, f, streams)
	count := GP64()
	MOVQ(Mem{Base: args, Disp: argCount}, count)

	ahead := GP64()
	MOVQ(Mem{Base: args, Disp: argAhead}, ahead)

	Label("turn")
	for k := range st {
		s := &st[k]
		if k < lines(streams) {
			Comment("prefetch(ahead); ahead += 64 // what is decoded next")
			PREFETCHT1(Mem{Base: ahead, Disp: 64 * k})
		}
		Comment(fmt.Sprintf("stream %d: e := entry[lo&63] // the permute looks at six bits by itself", k))
		w := ZMM()
		VMOVDQA64(s.lo, w)
		VPERMI2W(entry1, entry0, w)
		Comment("isAlias := lo<<4 >= e")
		r, isAlias := ZMM(), K()
		VPSLLW(U8(4), s.lo, r)
		VPCMPUW(U8(5), w, r, isAlias)
		Comment("sym := lo&63; if isAlias { sym = e&63 }")
		sym := ZMM()
		VPBLENDMW(w, s.lo, isAlias, sym)
		Comment("f := freq[sym] // frequency << 4")
		freq := ZMM()
		VMOVDQA64(sym, freq)
		VPERMI2W(freq1, freq0, freq)
		Comment("rank := lo>>6&63; if isAlias { rank += offset[lo&63] }")
		rank := ZMM()
		VMOVDQA64(s.lo, rank)
		VPERMI2W_Z(off1, off0, isAlias, rank)
		VPSRLW(U8(10), r, r)
		VPADDW(r, rank, rank)
		step(s, freq, rank, r, ones, high)
		Comment("v := value[sym]")
		VPERMI2W(value1, value0, sym)
		e.store(s, sym)
	}
	ADDQ(Imm(uint64(64*lines(streams))), ahead)
	DECQ(count)
	JNZ(LabelRef("turn"))
	closeStreams(f, st, ahead)
}

// lines is how many cache lines are prefetched a turn: about as many as are read, 2/3 of the 64 bytes that a stream writes.
func lines(streams int) int { return (3*streams + 3) / 4 }

// step moves the states of a stream on. freq is four bits up.
func step(s *stream, freq, rank, part, ones reg.VecVirtual, high Mem) {
	Comment("part := f*(lo&^4095)>>16 + rank // less than 1<<16")
	VPANDD_BCST(high, s.lo, part)
	VPMULHUW(freq, part, part)
	VPADDW(rank, part, part)
	Comment("hi, lo = (f*hi + part)>>16, f*hi + part")
	VPMULLW(freq, s.hi, s.lo)
	VPMULHUW(freq, s.hi, s.hi)
	VPADDW(part, s.lo, s.lo)
	carry := K()
	VPCMPUW(U8(1), part, s.lo, carry)
	VPSUBW(ones, s.hi, carry, s.hi)
	Comment("if hi == 0 { hi = lo; lo = *src; src++ }")
	need, n, next := K(), GP64(), ZMM()
	VPTESTNMW(s.hi, s.hi, need)
	VMOVDQU16(Mem{Base: s.src}, next)
	KMOVD(need, n.As32())
	VMOVDQU16(s.lo, need, s.hi)
	ext.VPEXPANDW(next, need, s.lo)
	POPCNTL(n.As32(), n.As32())
	LEAQ(Mem{Base: s.src, Index: n, Scale: 2}, s.src)
}
