// Command symbols writes, for AVX-512, the step from words to symbols of a table.
package main

import (
	"fmt"

	"bigsmall.dev/asm/ext"
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Offsets in rans.symbolArgs.
const (
	argTable = 8 * iota
	argSrc
	argDst
	argMissing
	argTurns
	argShift
	argMask
	argBase
	argValue
	argCommon
)

const windows = 8 // of 128 values each, which is what one VPERMI2B looks up

// all broadcasts a word.
func all(from Mem) reg.VecVirtual {
	v := ZMM()
	VPBROADCASTW(from, v)
	return v
}

// both is one mask of those of two vectors.
func both(test func(i int, k reg.OpmaskVirtual)) reg.OpmaskVirtual {
	lo, hi, k := K(), K(), K()
	test(0, lo)
	test(1, hi)
	KUNPCKDQ(lo, hi, k)
	return k
}

func symbols(size int) {
	name := fmt.Sprintf("symbols%d", 8*size)
	TEXT(name, NOSPLIT, "func(a *byte)")
	Pragma("noescape")
	Doc(fmt.Sprintf("%s looks up the symbols of a.turns times 64 words of %d bytes, and which of them have none.", name, size))
	args := Load(Param("a"), GP64())
	arg := func(disp int) reg.GPVirtual {
		r := GP64()
		MOVQ(Mem{Base: args, Disp: disp}, r)
		return r
	}
	table, src, dst, missing, turns := arg(argTable), arg(argSrc), arg(argDst), arg(argMissing), arg(argTurns)
	shift := XMM()
	MOVQ(Mem{Base: args, Disp: argShift}, shift)
	mask, base, value := all(Mem{Base: args, Disp: argMask}), all(Mem{Base: args, Disp: argBase}), all(Mem{Base: args, Disp: argValue})
	common := ZMM()
	VPBROADCASTB(Mem{Base: args, Disp: argCommon}, common)
	limit := all(ext.Dword("limit", 128*windows))
	low, high := ZMM(), ZMM()
	VMOVDQU64(ext.Words("lowBytes", pick(0)), low)
	VMOVDQU64(ext.Words("highBytes", pick(1)), high)
	one, two := ZMM(), ZMM()
	VPBROADCASTD(ext.Dword("ones", 0x01010101), one)
	VPADDB(one, one, two)
	var lower [windows]reg.VecVirtual
	for i := range lower {
		lower[i] = ZMM()
		VMOVDQU64(Mem{Base: table, Disp: 128 * i}, lower[i])
	}

	Label("turn")
	Comment("value := word>>shift&mask")
	v := [2]reg.VecVirtual{ZMM(), ZMM()}
	for i := range v {
		switch size {
		case 1:
			VPMOVZXBW(Mem{Base: src, Disp: 32 * i}, v[i])
			VPSRLW(shift, v[i], v[i])
		case 2:
			VMOVDQU64(Mem{Base: src, Disp: 64 * i}, v[i])
			VPSRLW(shift, v[i], v[i])
		case 4:
			w := ZMM()
			VMOVDQU64(Mem{Base: src, Disp: 128 * i}, v[i])
			VMOVDQU64(Mem{Base: src, Disp: 128*i + 64}, w)
			VPSRLD(shift, v[i], v[i])
			VPSRLD(shift, w, w)
			VPMOVDW(v[i], v[i].AsY())
			VPMOVDW(w, w.AsY())
			VINSERTI64X4(U8(1), w.AsY(), v[i], v[i])
		}
		VPANDD(mask, v[i], v[i])
	}
	Comment("other := value != commonest; at := value - base; inside := at < 1024")
	other := both(func(i int, k reg.OpmaskVirtual) { VPCMPUW(U8(4), value, v[i], k) })
	for i := range v {
		VPSUBW(base, v[i], v[i])
	}
	inside := both(func(i int, k reg.OpmaskVirtual) { VPCMPUW(U8(1), limit, v[i], k) })
	lo, hi := ZMM(), v[0]
	VMOVDQA64(low, lo)
	VPERMI2B(v[1], v[0], lo)
	VPERMT2B(v[1], high, hi)
	Comment("symbol := table[at] // eight look-ups by seven bits, and a choice by each of the three bits above")
	bit := [3]reg.OpmaskVirtual{K(), K(), K()}
	VPMOVB2M(lo, bit[0])
	VPTESTMB(one, hi, bit[1])
	VPTESTMB(two, hi, bit[2])
	var look func(first, level int) reg.VecVirtual
	look = func(first, level int) reg.VecVirtual {
		if level < 0 {
			s := ZMM()
			VMOVDQA64(lo, s)
			VPERMI2B(Mem{Base: table, Disp: 128*first + 64}, lower[first], s)
			return s
		}
		s, t := look(first, level-1), look(first+1<<level, level-1)
		VMOVDQU8(t, bit[level], s)
		return s
	}
	s := look(0, len(bit)-1)
	Comment("if !inside { symbol = common }; missing := symbol == common && other")
	KNOTQ(inside, inside)
	VMOVDQU8(common, inside, s)
	VMOVDQU64(s, Mem{Base: dst})
	none := K()
	VPCMPEQB(common, s, other, none)
	KMOVQ(none, Mem{Base: missing})
	ADDQ(U32(64*size), src)
	ADDQ(U8(64), dst)
	ADDQ(U8(8), missing)
	DECQ(turns)
	JNZ(LabelRef("turn"))
	VZEROUPPER()
	RET()
}

// pick are the bytes of two vectors of words, the low ones or the high ones.
func pick(high uint16) (w [32]uint16) {
	for i := range uint16(32) {
		w[i] = 4*i + high | (4*i+2+high)<<8
	}
	return w
}

func main() {
	ConstraintExpr("amd64,!purego")
	for _, size := range []int{1, 2, 4} {
		symbols(size)
	}
	Generate()
}
