// Command split writes, for AVX-512, the packing of the low bits of a field.
package main

import (
	"fmt"

	"bigsmall.dev/asm/ext"
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Offsets in planes.packArgs.
const (
	argSrc   = 0
	argDst   = 8
	argTurns = 16
	argStep  = 24 // bytes of a turn: 4 * bits
	argDown  = 32 // shifts
	argUp    = 40
	argTop   = 48
	argPair  = 56  // 32 - 2*bits
	argMask  = 64  // twice, as words
	argFold  = 72  // 1 and 1<<bits, as words
	argLow   = 80  // the low 2*bits of a quadword
	argOdd   = 88  // 4 where bits is odd
	argJoin  = 96  // which bytes get the other half of a shared byte
	argFrom  = 104 // 64 bytes: where each byte comes from
	argShare = 168 // 64 bytes: where the other half comes from
)

func pack(size int) {
	name := fmt.Sprintf("pack%d", 8*size)
	TEXT(name, NOSPLIT, "func(a *byte)")
	Pragma("noescape")
	Doc(fmt.Sprintf("%s packs bits of a.turns times 32 words of %d bytes. A turn stores 64 bytes.", name, size))
	args := Load(Param("a"), GP64())
	arg := func(disp int) reg.GPVirtual {
		r := GP64()
		MOVQ(Mem{Base: args, Disp: disp}, r)
		return r
	}
	src, dst, turns, step := arg(argSrc), arg(argDst), arg(argTurns), arg(argStep)
	count := func(disp int) reg.VecVirtual {
		x := XMM()
		MOVQ(Mem{Base: args, Disp: disp}, x)
		return x
	}
	down, up, top, pair := count(argDown), count(argUp), count(argTop), count(argPair)
	dword := func(disp int) reg.VecVirtual {
		v := ZMM()
		VPBROADCASTD(Mem{Base: args, Disp: disp}, v)
		return v
	}
	mask, fold := dword(argMask), dword(argFold)
	low, odd := ZMM(), ZMM()
	VPBROADCASTQ(Mem{Base: args, Disp: argLow}, low)
	VPXORD(odd, odd, odd)
	upper, eight := K(), GP32()
	MOVL(U32(0xaa), eight)
	KMOVW(eight, upper)
	VPBROADCASTQ(Mem{Base: args, Disp: argOdd}, upper, odd)
	join := K()
	KMOVQ(Mem{Base: args, Disp: argJoin}, join)
	from, share := ZMM(), ZMM()
	VMOVDQU64(Mem{Base: args, Disp: argFrom}, from)
	VMOVDQU64(Mem{Base: args, Disp: argShare}, share)
	even := ZMM()
	if size == 4 {
		VMOVDQU64(ext.Words("evenWords", evenWords()), even)
	}

	Label("turn")
	Comment("v := (word>>down<<up | word>>top) & mask")
	take := func(disp int, right, left func(...Op)) reg.VecVirtual {
		v, w := ZMM(), ZMM()
		VMOVDQU64(Mem{Base: src, Disp: disp}, w)
		right(down, w, v)
		left(up, v, v)
		right(top, w, w)
		VPTERNLOGD(U8(0xa8), mask, w, v)
		return v
	}
	var v reg.VecVirtual
	switch size {
	case 1:
		v = ZMM()
		w := ZMM()
		VPMOVZXBW(Mem{Base: src}, w)
		VPSRLW(down, w, v)
		VPSLLW(up, v, v)
		VPSRLW(top, w, w)
		VPTERNLOGD(U8(0xa8), mask, w, v)
	case 2:
		v = take(0, VPSRLW, VPSLLW)
	case 4:
		v = take(0, VPSRLD, VPSLLD)
		VPERMT2W(take(64, VPSRLD, VPSLLD), even, v)
	}
	Comment("two values a doubleword, four a quadword")
	VPMADDWD(fold, v, v)
	w := ZMM()
	VPSRLQ(pair, v, w)
	VPTERNLOGQ(U8(0xe4), low, w, v) // v where low, else w
	Comment("eight values in bits bytes: two quadwords, which share one where bits is odd")
	VPSLLVQ(odd, v, v)
	VPERMB(v, from, w)
	VPERMB_Z(v, share, join, v)
	VPORQ(v, w, w)
	VMOVDQU64(w, Mem{Base: dst})
	ADDQ(U32(32*size), src)
	ADDQ(step, dst)
	DECQ(turns)
	JNZ(LabelRef("turn"))
	VZEROUPPER()
	RET()
}

func evenWords() (w [32]uint16) {
	for i := range w {
		w[i] = uint16(2 * i)
	}
	return w
}

func main() {
	ConstraintExpr("amd64,!purego")
	for _, size := range []int{1, 2, 4} {
		pack(size)
	}
	Generate()
}
