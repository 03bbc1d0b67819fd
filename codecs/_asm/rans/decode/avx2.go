package main

import (
	"fmt"

	"github.com/mmcloughlin/avo/attr"
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Offsets in rans.slotTables.
const (
	slotEntry  = 0        // 4096 dwords
	slotValue  = 4 * 4096 // 256 dwords
	slotField  = slotValue + 4*256
	slotShift  = slotField + 32
	slotKeep   = slotShift + 32
	slotBase   = slotKeep + 32
	slotByte   = slotBase + 32
	slotUp     = slotByte + 32 // 16 bytes each
	slotDown   = slotUp + 16
	slotAround = slotDown + 16
)

// valueForm is what the code in an entry is.
type valueForm int

const (
	element  valueForm = iota // the element, its rest zero
	nearby                    // how far the symbol's value is above the lowest one
	anywhere                  // the symbol
)

type slotForm struct {
	name  string
	size  int
	value valueForm
	rest  bool
}

var slotForms = []slotForm{
	{"Bytes", 1, element, false}, {"BytesRest", 1, element, true},
	{"Words", 2, nearby, false}, {"WordsRest", 2, nearby, true},
	{"WordsAnywhere", 2, anywhere, false}, {"WordsAnywhereRest", 2, anywhere, true},
}

func (f slotForm) doc() string {
	s := [][]string{{"bytes of the symbols alone", "bytes with a rest"}, {"words of the symbols alone", "words with a rest"}}[f.size-1]
	if f.rest {
		s = s[1:]
	}
	if f.size == 1 {
		return s[0]
	}
	return s[0] + map[valueForm]string{nearby: ", values within 256 of the lowest", anywhere: ", values anywhere"}[f.value]
}

// wanted says, for every mask of eight lanes, which of the next words each lane takes that wants one.
func wanted() Mem {
	m := GLOBL("wanted", attr.RODATA|attr.NOPTR)
	for mask := range 256 {
		v, next := uint64(0), uint64(0)
		for lane := range 8 {
			if mask>>lane&1 == 1 {
				v |= next << (8 * lane)
				next++
			}
		}
		DATA(8*mask, U64(v))
	}
	return m
}

func ymm() reg.VecVirtual { return YMM() }

// slots writes the AVX2 decoder, which looks entries up in a table of all slots: states are 32 bits, eight lanes a
// vector, kept on the stack, since registers are short.
func slots(f slotForm, streams int, wanted Mem) {
	args, tab := begin(fmt.Sprintf("slots%s%d", f.name, streams), fmt.Sprintf("decodes a.count turns of %d streams with a table of slots to %s.", streams, f.doc()))
	local := AllocLocal(128*streams + 32 + 8)
	slot, count := local.Offset(128*streams), local.Offset(128*streams+32)
	type stream struct{ src, rest, dst reg.GPVirtual }
	st := make([]stream, streams)
	for k := range st {
		s := &st[k]
		s.src, s.dst = GP64(), GP64()
		MOVQ(Mem{Base: args, Disp: argSrc + 8*k}, s.src)
		MOVQ(Mem{Base: args, Disp: argDst + 8*k}, s.dst)
		if f.rest {
			s.rest = GP64()
			MOVQ(Mem{Base: args, Disp: argRest + 8*k}, s.rest)
		}
		for v := range 4 {
			lo, hi := ymm(), ymm()
			VPMOVZXWD(Mem{Base: args, Disp: argState + 128*k + 16*v}, lo)
			VPMOVZXWD(Mem{Base: args, Disp: argState + 128*k + 64 + 16*v}, hi)
			VPSLLD(U8(16), hi, hi)
			VPOR(hi, lo, lo)
			VMOVDQU(lo, local.Offset(128*k+32*v))
		}
	}
	n := GP64()
	MOVQ(Mem{Base: args, Disp: argCount}, n)
	MOVQ(n, count)
	var step reg.GPVirtual // bytes of rest that eight elements take
	if f.rest {
		step = GP64()
		MOVQ(Mem{Base: args, Disp: argRestStep}, step)
		SHRQ(U8(2), step)
	}
	perm := GP64()
	LEAQ(wanted, perm)
	slotMask, codeMask, zero := ymm(), ymm(), ymm()
	VPCMPEQD(slotMask, slotMask, slotMask)
	VPSRLD(U8(24), slotMask, codeMask)
	VPSRLD(U8(20), slotMask, slotMask)
	VPXOR(zero, zero, zero)

	Label("turn")
	for k := range st {
		s := &st[k]
		var codes, rests [4]reg.VecVirtual
		for v := range 4 {
			state := local.Offset(128*k + 32*v)
			Comment(fmt.Sprintf("stream %d, lanes %d to %d: e := entry[x&4095]", k, 8*v, 8*v+7))
			x, e, t := ymm(), ymm(), ymm()
			VMOVDQU(state, x)
			VPAND(slotMask, x, t)
			VMOVDQU(t, slot)
			lookUp(tab, slotEntry, slot, e)
			Comment("x = x>>12*(e>>20) + e>>8&4095")
			y := ymm()
			VPSRLD(U8(20), e, t)
			VPSRLD(U8(12), x, y)
			VPMULLD(t, y, y)
			VPSRLD(U8(8), e, t)
			VPAND(slotMask, t, t)
			VPADDD(t, y, y)
			Comment("code := e&255")
			VPAND(codeMask, e, e)
			codes[v] = e
			Comment("if x < 1<<16 { x = x<<16 | *src; src++ }")
			need, mask, w, more := ymm(), GP64(), ymm(), ymm()
			VPCMPEQW(zero, y, need) // its sign is that of the upper half
			VMOVMSKPS(need, mask.As32())
			VPMOVZXBD(Mem{Base: perm, Index: mask, Scale: 8}, t)
			VPMOVZXWD(Mem{Base: s.src}, w)
			VPERMD(w, t, w)
			POPCNTL(mask.As32(), mask.As32())
			LEAQ(Mem{Base: s.src, Index: mask, Scale: 2}, s.src)
			VPSLLD(U8(16), y, more)
			VPOR(w, more, more)
			VBLENDVPS(need, more, y, y)
			VMOVDQU(y, state)
			if f.rest {
				Comment("r := rest[i]")
				r := ymm()
				if v&1 == 0 {
					VBROADCASTI128(Mem{Base: s.rest}, r)
				} else {
					VBROADCASTI128(Mem{Base: s.rest, Index: step, Scale: 1}, r)
					LEAQ(Mem{Base: s.rest, Index: step, Scale: 2}, s.rest)
				}
				VPSHUFB(Mem{Base: tab, Disp: slotField}, r, r)
				VPSRLVD(Mem{Base: tab, Disp: slotShift}, r, r)
				VPAND(Mem{Base: tab, Disp: slotKeep}, r, r)
				rests[v] = r
			}
			if v&1 == 1 {
				f.store(tab, Mem{Base: s.dst, Disp: 8 * f.size * (v - 1)}, codes[v-1:v+1], rests[v-1:v+1])
			}
		}
		ADDQ(U8(32*f.size), s.dst)
	}
	DECQ(count)
	JNZ(LabelRef("turn"))

	args = GP64()
	Load(Param("a"), args)
	low := ymm()
	VPCMPEQD(low, low, low)
	VPSRLD(U8(16), low, low)
	for k := range st {
		MOVQ(st[k].src, Mem{Base: args, Disp: argSrc + 8*k})
		for v := 0; v < 4; v += 2 {
			var lo, hi [2]reg.VecVirtual
			for i := range 2 {
				lo[i], hi[i] = ymm(), ymm()
				VMOVDQU(local.Offset(128*k+32*(v+i)), hi[i])
				VPAND(low, hi[i], lo[i])
				VPSRLD(U8(16), hi[i], hi[i])
			}
			for i, h := range [][2]reg.VecVirtual{lo, hi} {
				VPACKUSDW(h[1], h[0], h[0])
				VPERMQ(U8(0xd8), h[0], h[0])
				VMOVDQU(h[0], Mem{Base: args, Disp: argState + 128*k + 64*i + 16*v})
			}
		}
	}
	VZEROUPPER()
	RET()
}

// lookUp takes the eight entries that slot numbers, of a table at disp of tab. Loads and inserts beat VPGATHERDD where that is microcode, and lose little elsewhere.
func lookUp(tab reg.GPVirtual, disp int, slot Mem, e reg.VecVirtual) {
	upper := XMM()
	for half, out := range []reg.VecVirtual{e.AsX().(reg.VecVirtual), upper} {
		q := GP64()
		for n := range 4 {
			i := GP64()
			if n&1 == 0 {
				q = GP64()
				MOVQ(slot.Offset(16*half+4*n), q)
				MOVL(q.As32(), i.As32())
			} else {
				i = q
				SHRQ(U8(32), i)
			}
			entry := Mem{Base: tab, Index: i, Scale: 4, Disp: disp}
			if n == 0 {
				VMOVD(entry, out)
			} else {
				VPINSRD(U8(n), entry, out, out)
			}
		}
	}
	VINSERTI128(U8(1), upper, e, e)
}

// store makes sixteen elements of the codes in two vectors, and of their rest, and stores them.
func (f slotForm) store(tab reg.GPVirtual, dst Mem, codes, rests []reg.VecVirtual) {
	v, t := codes[0], ymm()
	switch f.value {
	case element:
		VPACKUSDW(codes[1], v, v)
	case nearby:
		Comment("v := base + code<<up")
		VPACKUSDW(codes[1], v, v)
		VPSLLW(Mem{Base: tab, Disp: slotUp}, v, v)
		VPADDW(Mem{Base: tab, Disp: slotBase}, v, v)
	case anywhere:
		Comment("v := value[code]")
		for i, c := range codes {
			all, value := ymm(), ymm()
			VPCMPEQD(c, c, all)
			VPXOR(c, c, value) // what was there before does not matter
			VPGATHERDD(all, Mem{Base: tab, Index: c, Scale: 4, Disp: slotValue}, value)
			codes[i] = value
		}
		v = codes[0]
		VPACKUSDW(codes[1], v, v)
	}
	if f.rest {
		Comment("v |= r; v = v>>1 | v<<15 // where the sign is the lowest bit of the rest; the bytes: v<<7")
		VPACKUSDW(rests[1], rests[0], t)
		VPOR(t, v, v)
		VPSRLW(Mem{Base: tab, Disp: slotDown}, v, t)
		VPSLLW(Mem{Base: tab, Disp: slotAround}, v, v)
		VPOR(t, v, v)
	}
	Comment("*dst = v; dst++ // packing goes by halves of a vector")
	if f.size == 1 {
		if f.rest {
			VPAND(Mem{Base: tab, Disp: slotByte}, v, v)
		}
		VPERMQ(U8(0xd8), v, v)
		VEXTRACTI128(U8(1), v, t.AsX())
		VPACKUSWB(t.AsX(), v.AsX(), v.AsX())
		VMOVDQU(v.AsX(), dst)
	} else {
		VPERMQ(U8(0xd8), v, v)
		VMOVDQU(v, dst)
	}
}
