// Command join writes the joining kernels of package planes.
package main

import (
	"github.com/mmcloughlin/avo/attr"
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

func main() {
	ConstraintExpr("amd64,!purego")
	for _, past := range []bool{false, true} {
		join32AVX2(past)
		join32AVX512(past)
	}
	Generate()
}

type pointers struct {
	dst, upper, mid, low, turns reg.Register
	past                        bool
}

func begin(name string, past bool) pointers {
	doc := " is Join32 of whole turns."
	if past {
		name, doc = name+"Past", " is Join32 of whole turns, stored past the caches: dst on 64 bytes."
	}
	TEXT(name, NOSPLIT, "func(dst, upper, mid, low *byte, turns uint64)")
	Pragma("noescape")
	Doc(name + doc)
	load := func(p string) reg.Register { return Load(Param(p), GP64()) }
	return pointers{load("dst"), load("upper"), load("mid"), load("low"), load("turns"), past}
}

// store writes a vector of the result.
func (p pointers) store(v reg.Register, at int) {
	to := Mem{Base: p.dst, Disp: at}
	switch {
	case p.past:
		VMOVNTDQ(v, to)
	case v.Size() == 64:
		VMOVDQU16(v, to)
	default:
		VMOVDQU(v, to)
	}
}

// end moves on by n words and closes the loop.
func (p pointers) end(n int) {
	SUBQ(I8(-4*n), p.dst) // 128 does not fit an addition's byte
	ADDQ(U8(2*n), p.upper)
	ADDQ(U8(n), p.mid)
	ADDQ(U8(n), p.low)
	DECQ(p.turns)
	JNZ(LabelRef("turn"))
	if p.past {
		SFENCE()
	}
	VZEROUPPER()
	RET()
}

func join32AVX512(past bool) {
	p := begin("join32AVX512", past)
	first, second := ZMM(), ZMM()
	VMOVDQU16(p.interleave("first", 0), first)
	VMOVDQU16(p.interleave("second", 16), second)

	Label("turn")
	Comment("w := mid[i]<<8 | low[i]")
	u, m, w, x := ZMM(), ZMM(), ZMM(), ZMM()
	VPMOVZXBW(Mem{Base: p.mid}, m)
	VPMOVZXBW(Mem{Base: p.low}, w)
	VPSLLW(U8(8), m, m)
	VPORQ(m, w, w)
	Comment("dst[i] = upper[i]<<16 | w")
	VMOVDQU16(Mem{Base: p.upper}, u)
	VMOVDQA64(w, x)
	VPERMT2W(u, first, w)
	VPERMT2W(u, second, x)
	p.store(w, 0)
	p.store(x, 64)
	p.end(32)
}

// interleave is the permutation that takes words from at on of two vectors in turn.
func (p pointers) interleave(name string, at int) Mem {
	if p.past {
		return NewDataAddr(Symbol{Name: name, Static: true}, 0)
	}
	m := GLOBL(name, attr.RODATA|attr.NOPTR)
	for i := range 16 {
		DATA(4*i, U16(at+i))
		DATA(4*i+2, U16(32+at+i))
	}
	return m
}

func join32AVX2(past bool) {
	p := begin("join32AVX2", past)

	Label("turn")
	Comment("w := mid[i]<<8 | low[i]")
	u, m, w, x, y := YMM(), YMM(), YMM(), YMM(), YMM()
	VPMOVZXBW(Mem{Base: p.mid}, m)
	VPMOVZXBW(Mem{Base: p.low}, w)
	VPSLLW(U8(8), m, m)
	VPOR(m, w, w)
	Comment("dst[i] = upper[i]<<16 | w // the unpacking works in each half by itself")
	VMOVDQU(Mem{Base: p.upper}, u)
	VPUNPCKLWD(u, w, x)
	VPUNPCKHWD(u, w, y)
	VPERM2I128(U8(0x20), y, x, u)
	VPERM2I128(U8(0x31), y, x, w)
	p.store(u, 0)
	p.store(w, 32)
	p.end(16)
}
