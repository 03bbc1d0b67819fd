// Writes the kernels of MD5: blocks of 16 messages side by side.
package main

import (
	"fmt"
	"go/token"
	"go/types"
	"math"

	_ "bigsmall.dev/asm/ext"
	"github.com/mmcloughlin/avo/attr"
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Offsets in md5.args.
const (
	argState  = 0          // [4][16]uint32
	argWords  = 4 * 16 * 4 // [16][16]uint32
	argSrc    = argWords + 16*16*4
	argBlocks = argSrc + 16*8
)

var shifts = [4][4]uint64{{7, 12, 17, 22}, {5, 9, 14, 20}, {4, 11, 16, 23}, {6, 10, 15, 21}}

// word is which of the block's words step i takes.
func word(i int) int { return [4]int{i, 5*i + 1, 3*i + 5, 7 * i}[i/16] % 16 }

// step is the Go statement of step i. The four variables change places from step to step.
func step(i int) string {
	at := func(k int) byte { return "abcd"[(k+64-i)%4] }
	a, b, c, d := at(0), at(1), at(2), at(3)
	f := [4]string{
		fmt.Sprintf("%c&%c | ^%c&%c", b, c, b, d), fmt.Sprintf("%c&%c | %c&^%c", b, d, c, d),
		fmt.Sprintf("%c ^ %c ^ %c", b, c, d), fmt.Sprintf("%c ^ (%c | ^%c)", c, b, d),
	}[i/16]
	return fmt.Sprintf("%c = %c + bits.RotateLeft32(%c + (%s) + m[%d] + sines[%d], %d)", a, b, a, f, word(i), i, shifts[i/16][i%4])
}

func constants() Mem {
	m := GLOBL("sines", attr.RODATA|attr.NOPTR)
	for i := range 64 {
		DATA(4*i, U32(uint32(math.Floor(math.Abs(math.Sin(float64(i+1)))*(1<<32)))))
	}
	return m
}

// open loads what every kernel needs.
func open(name, doc string) (args, off, blocks reg.GPVirtual) {
	TEXT(name, NOSPLIT, "func(a *args)")
	Doc(doc)
	Pragma("noescape")
	args = Load(Param("a"), GP64()).(reg.GPVirtual)
	off, blocks = GP64(), GP64()
	XORQ(off, off)
	MOVQ(Mem{Base: args, Disp: argBlocks}, blocks)
	TESTQ(blocks, blocks)
	JZ(LabelRef("done"))
	return args, off, blocks
}

// repeat ends the loop over blocks.
func repeat(off, blocks reg.GPVirtual) {
	ADDQ(Imm(64), off)
	DECQ(blocks)
	JNZ(LabelRef("loop"))
}

// truth is the table of VPTERNLOGD for f(b, c, d) with d in the destination, c in the second and b in the third operand.
func truth(f func(b, c, d uint8) uint8) U8 {
	t := U8(0)
	for i := range 8 {
		t |= U8(f(uint8(i&1), uint8(i>>1&1), uint8(i>>2&1))&1) << i
	}
	return t
}

func avx512(k Mem) {
	args, off, blocks := open("blocksAVX512", "blocksAVX512 digests a.blocks blocks of every lane, from a.src on, into a.state.")
	var s [4]reg.VecVirtual
	for i := range s {
		s[i] = ZMM()
		VMOVDQU32(Mem{Base: args, Disp: argState + 64*i}, s[i])
	}
	Label("loop")
	Comment("m[i] = word i of all lanes: 16 x 16 words transposed")
	var row, m [16]reg.VecVirtual
	for i := range row {
		p := GP64()
		MOVQ(Mem{Base: args, Disp: argSrc + 8*i}, p)
		row[i] = ZMM()
		VMOVDQU32(Mem{Base: p, Index: off, Scale: 1}, row[i])
	}
	for q := 0; q < 16; q += 4 {
		copy(row[q:], quads(row[q:q+4], func() reg.VecVirtual { return ZMM() }))
	}
	for c := range 4 {
		half := func(imm uint64, a, b reg.VecVirtual) reg.VecVirtual {
			z := ZMM()
			VSHUFI32X4(Imm(imm), b, a, z)
			return z
		}
		a, b := half(0x44, row[c], row[4+c]), half(0xee, row[c], row[4+c])
		e, f := half(0x44, row[8+c], row[12+c]), half(0xee, row[8+c], row[12+c])
		m[c], m[4+c], m[8+c], m[12+c] = half(0x88, a, e), half(0xdd, a, e), half(0x88, b, f), half(0xdd, b, f)
	}
	table := [4]U8{
		truth(func(b, c, d uint8) uint8 { return b&c | ^b&d }),
		truth(func(b, c, d uint8) uint8 { return b&d | c&^d }),
		truth(func(b, c, d uint8) uint8 { return b ^ c ^ d }),
		truth(func(b, c, d uint8) uint8 { return c ^ (b | ^d) }),
	}
	f := ZMM()
	for i := range 64 {
		a, b, c, d := s[(64-i)%4], s[(65-i)%4], s[(66-i)%4], s[(67-i)%4]
		Comment(step(i))
		VPADDD_BCST(k.Offset(4*i), a, a)
		VPADDD(m[word(i)], a, a)
		VMOVDQA32(d, f)
		VPTERNLOGD(table[i/16], b, c, f)
		VPADDD(f, a, a)
		VPROLD(Imm(shifts[i/16][i%4]), a, a)
		VPADDD(b, a, a)
	}
	Comment("state += a, b, c, d")
	for i := range s {
		VPADDD(Mem{Base: args, Disp: argState + 64*i}, s[i], s[i])
		VMOVDQU32(s[i], Mem{Base: args, Disp: argState + 64*i})
	}
	repeat(off, blocks)
	VZEROUPPER()
	Label("done")
	RET()
}

// quads transposes, in every 128 bits of four rows, 4 x 4 words.
func quads(r []reg.VecVirtual, vec func() reg.VecVirtual) []reg.VecVirtual {
	t := []reg.VecVirtual{vec(), vec(), vec(), vec()}
	VPUNPCKLDQ(r[1], r[0], t[0])
	VPUNPCKHDQ(r[1], r[0], t[1])
	VPUNPCKLDQ(r[3], r[2], t[2])
	VPUNPCKHDQ(r[3], r[2], t[3])
	out := []reg.VecVirtual{vec(), vec(), vec(), vec()}
	VPUNPCKLQDQ(t[2], t[0], out[0])
	VPUNPCKHQDQ(t[2], t[0], out[1])
	VPUNPCKLQDQ(t[3], t[1], out[2])
	VPUNPCKHQDQ(t[3], t[1], out[3])
	return out
}

// avx2 keeps two sets of eight lanes: the steps of one alone wait for each other.
func avx2(k Mem) {
	args, off, blocks := open("blocksAVX2", "blocksAVX2 digests a.blocks blocks of every lane, from a.src on, into a.state.")
	// The words do not fit in registers.
	message := func(set, i int) Mem { return Mem{Base: args, Disp: argWords + 64*i + 32*set} }
	state := func(set, i int) Mem { return Mem{Base: args, Disp: argState + 64*i + 32*set} }
	ymm := func() reg.VecVirtual { return YMM() }
	Label("loop")
	Comment("m[i] = word i of all lanes: 8 x 8 words transposed at a time")
	for set := range 2 {
		for half := range 2 {
			row := make([]reg.VecVirtual, 8)
			for i := range row {
				p := GP64()
				MOVQ(Mem{Base: args, Disp: argSrc + 8*(8*set+i)}, p)
				row[i] = ymm()
				VMOVDQU(Mem{Base: p, Index: off, Scale: 1, Disp: 32 * half}, row[i])
			}
			lo, hi := quads(row[:4], ymm), quads(row[4:], ymm)
			for c := range 4 {
				y := ymm()
				VPERM2I128(Imm(0x20), hi[c], lo[c], y)
				VMOVDQU(y, message(set, 8*half+c))
				VPERM2I128(Imm(0x31), hi[c], lo[c], hi[c])
				VMOVDQU(hi[c], message(set, 8*half+4+c))
			}
		}
	}
	var s [2][4]reg.VecVirtual
	for set := range s {
		for i := range s[set] {
			s[set][i] = ymm()
			VMOVDQU(state(set, i), s[set][i])
		}
	}
	ones, sine := ymm(), ymm()
	VPCMPEQD(ones, ones, ones)
	for i := range 64 {
		Comment(step(i))
		VPBROADCASTD(k.Offset(4*i), sine)
		var f, t [2]reg.VecVirtual
		for set := range s {
			a, b, c, d := s[set][(64-i)%4], s[set][(65-i)%4], s[set][(66-i)%4], s[set][(67-i)%4]
			f[set], t[set] = ymm(), ymm()
			VPADDD(sine, a, a)
			VPADDD(message(set, word(i)), a, a)
			switch i / 16 {
			case 0: // b&c | ^b&d == d ^ b&(c^d)
				VPXOR(c, d, f[set])
				VPAND(b, f[set], f[set])
				VPXOR(d, f[set], f[set])
			case 1: // b&d | c&^d == c&^d + b&d: no bit is in both
				VPANDN(c, d, f[set])
				VPADDD(f[set], a, a)
				VPAND(b, d, f[set])
			case 2:
				VPXOR(c, d, f[set])
				VPXOR(b, f[set], f[set])
			case 3:
				VPXOR(ones, d, f[set])
				VPOR(b, f[set], f[set])
				VPXOR(c, f[set], f[set])
			}
		}
		for set := range s {
			a, b := s[set][(64-i)%4], s[set][(65-i)%4]
			n := shifts[i/16][i%4]
			VPADDD(f[set], a, a)
			VPSLLD(Imm(n), a, t[set])
			VPSRLD(Imm(32-n), a, a)
			VPOR(t[set], a, a)
			VPADDD(b, a, a)
		}
	}
	Comment("state += a, b, c, d")
	for set := range s {
		for i := range s[set] {
			VPADDD(state(set, i), s[set][i], s[set][i])
			VMOVDQU(s[set][i], state(set, i))
		}
	}
	repeat(off, blocks)
	VZEROUPPER()
	Label("done")
	RET()
}

func main() {
	// avo has to know the type of the argument, of which it takes only a pointer.
	args := types.NewTypeName(token.NoPos, nil, "args", nil)
	types.NewNamed(args, types.NewStruct(nil, nil), nil)
	types.Universe.Insert(args)
	ConstraintExpr("amd64,!purego")
	k := constants()
	avx512(k)
	avx2(k)
	Generate()
}
