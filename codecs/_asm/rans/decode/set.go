package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"

	"bigsmall.dev/asm/ext"
)

// Offsets in rans.setTurns.
const (
	setSlots = 8 * iota
	setValue
	setClasses
	setSrc
	setDst
	setCount
	setState
)

// setArgs loads all arguments but the states.
func setArgs(name string) (args, slots, value, classes, src, dst, count reg.GPVirtual) {
	TEXT(name, NOSPLIT, "func(a *byte)")
	Pragma("noescape")
	Doc(name + " decodes a.count turns of a stream, each symbol with the table that its class says.")
	args = GP64()
	Load(Param("a"), args)
	for disp, r := range []*reg.GPVirtual{&slots, &value, &classes, &src, &dst, &count} {
		*r = GP64()
		MOVQ(Mem{Base: args, Disp: 8 * disp}, *r)
	}
	return
}

// set512 writes the AVX-512 decoder by classes: 16 lanes a vector, entries and values gathered.
func set512() {
	args, slots, value, classes, src, dst, count := setArgs("setTurns512")
	low12, low8 := ZMM(), ZMM()
	VPBROADCASTD(ext.Dword("slotMask", 4095), low12)
	VPBROADCASTD(ext.Dword("codeMask", 255), low8)
	bound := ZMM()
	VPBROADCASTD(ext.Dword("lower", 1<<16), bound)
	var x [2]reg.VecVirtual
	for v := range x {
		x[v] = ZMM()
		VMOVDQU32(Mem{Base: args, Disp: setState + 64*v}, x[v])
	}

	Label("turn")
	for v := range x {
		x := x[v]
		Comment("e := slots[class][x&4095]")
		at, class, e := ZMM(), ZMM(), ZMM()
		VPMOVZXBD(Mem{Base: classes, Disp: 16 * v}, class)
		VPSLLD(U8(12), class, at)
		VPANDD(low12, x, e)
		VPADDD(e, at, at)
		all := K()
		KXNORW(all, all, all)
		VPXORD(e, e, e)
		VPGATHERDD(Mem{Base: slots, Index: at, Scale: 4}, all, e)
		Comment("x = x>>12*(e>>20) + e>>8&4095")
		t := ZMM()
		VPSRLD(U8(12), x, x)
		VPSRLD(U8(20), e, t)
		VPMULLD(t, x, x)
		VPSRLD(U8(8), e, t)
		VPANDD(low12, t, t)
		VPADDD(t, x, x)
		Comment("*dst = value[class][e&255]")
		VPSLLD(U8(8), class, class)
		VPANDD(low8, e, e)
		VPADDD(class, e, e)
		symbol := ZMM()
		every := K()
		KXNORW(every, every, every)
		VPXORD(symbol, symbol, symbol)
		VPGATHERDD(Mem{Base: value, Index: e, Scale: 4}, every, symbol)
		VPMOVDW(symbol, symbol.AsY())
		VMOVDQU(symbol.AsY(), Mem{Base: dst, Disp: 32 * v})
		Comment("if x < 1<<16 { x = x<<16 | *src; src++ }")
		need, n, w := K(), GP64(), ZMM()
		VPCMPUD(U8(1), bound, x, need)
		VPMOVZXWD(Mem{Base: src}, w)
		VPEXPANDD_Z(w, need, w)
		VPSLLD(U8(16), x, need, x)
		VPORD(w, x, x)
		KMOVW(need, n.As32())
		POPCNTL(n.As32(), n.As32())
		LEAQ(Mem{Base: src, Index: n, Scale: 2}, src)
	}
	ADDQ(U8(32), classes)
	ADDQ(U8(64), dst)
	DECQ(count)
	JNZ(LabelRef("turn"))

	args = GP64()
	Load(Param("a"), args)
	MOVQ(src, Mem{Base: args, Disp: setSrc})
	for v := range x {
		VMOVDQU32(x[v], Mem{Base: args, Disp: setState + 64*v})
	}
	VZEROUPPER()
	RET()
}

// set256 writes the same for AVX2: eight lanes a vector.
func set256(wanted Mem) {
	args, slots, value, classes, src, dst, count := setArgs("setTurns256")
	slot := AllocLocal(32)
	perm := GP64()
	LEAQ(wanted, perm)
	low12, zero := ymm(), ymm()
	VPCMPEQD(low12, low12, low12)
	VPSRLD(U8(20), low12, low12)
	VPXOR(zero, zero, zero)
	var x [4]reg.VecVirtual
	for v := range x {
		x[v] = ymm()
		VMOVDQU(Mem{Base: args, Disp: setState + 32*v}, x[v])
	}

	Label("turn")
	var symbols [4]reg.VecVirtual
	for v := range x {
		x := x[v]
		Comment("e := slots[class][x&4095]")
		at, class, e := ymm(), ymm(), ymm()
		VPMOVZXBD(Mem{Base: classes, Disp: 8 * v}, class)
		VPSLLD(U8(12), class, at)
		VPAND(low12, x, e)
		VPADDD(e, at, at)
		VMOVDQU(at, slot)
		lookUp(slots, 0, slot, e)
		Comment("x = x>>12*(e>>20) + e>>8&4095")
		t := ymm()
		VPSRLD(U8(12), x, x)
		VPSRLD(U8(20), e, t)
		VPMULLD(t, x, x)
		VPSRLD(U8(8), e, t)
		VPAND(low12, t, t)
		VPADDD(t, x, x)
		Comment("symbol := value[class][e&255]")
		VPSLLD(U8(24), e, e)
		VPSRLD(U8(24), e, e)
		VPSLLD(U8(8), class, class)
		VPADDD(class, e, e)
		VMOVDQU(e, slot)
		symbols[v] = ymm()
		lookUp(value, 0, slot, symbols[v])
		Comment("if x < 1<<16 { x = x<<16 | *src; src++ }")
		need, mask, w, more := ymm(), GP64(), ymm(), ymm()
		VPCMPEQW(zero, x, need) // its sign is that of the upper half
		VMOVMSKPS(need, mask.As32())
		VPMOVZXBD(Mem{Base: perm, Index: mask, Scale: 8}, t)
		VPMOVZXWD(Mem{Base: src}, w)
		VPERMD(w, t, w)
		POPCNTL(mask.As32(), mask.As32())
		LEAQ(Mem{Base: src, Index: mask, Scale: 2}, src)
		VPSLLD(U8(16), x, more)
		VPOR(w, more, more)
		VBLENDVPS(need, more, x, x)
		if v&1 == 1 {
			VPACKUSDW(symbols[v], symbols[v-1], t)
			VPERMQ(U8(0xd8), t, t)
			VMOVDQU(t, Mem{Base: dst, Disp: 16 * (v - 1)})
		}
	}
	ADDQ(U8(32), classes)
	ADDQ(U8(64), dst)
	DECQ(count)
	JNZ(LabelRef("turn"))

	args = GP64()
	Load(Param("a"), args)
	MOVQ(src, Mem{Base: args, Disp: setSrc})
	for v := range x {
		VMOVDQU(x[v], Mem{Base: args, Disp: setState + 32*v})
	}
	VZEROUPPER()
	RET()
}
