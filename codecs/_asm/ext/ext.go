// Package ext has the instructions that avo 0.5 lacks and Go's assembler knows, and what all generators use.
package ext

import (
	"github.com/mmcloughlin/avo/attr"
	"github.com/mmcloughlin/avo/build"
	"github.com/mmcloughlin/avo/ir"
	"github.com/mmcloughlin/avo/operand"
)

// emit adds an instruction. The last operand is written; merge says that it is read as well.
func emit(op string, merge bool, ops ...operand.Op) {
	i := &ir.Instruction{Opcode: op, Operands: ops, ISA: []string{"AVX512VBMI2"}}
	last := len(ops) - 1
	for n, o := range ops {
		if n < last || merge {
			i.Inputs = append(i.Inputs, o)
		}
	}
	i.Outputs = []operand.Op{ops[last]}
	build.Instruction(i)
}

// VPSHLDW: dst = high words of (hi:lo) << n.
func VPSHLDW(n int, lo, hi, dst operand.Op) { emit("VPSHLDW", false, operand.U8(n), lo, hi, dst) }

// VPSHRDVW: lo = low words of (hi:lo) >> n[i]; with hi = lo a rotation.
func VPSHRDVW(n, hi, lo operand.Op) { emit("VPSHRDVW", true, n, hi, lo) }

// VPEXPANDW: where k, dst takes the next words of src.
func VPEXPANDW(src, k, dst operand.Op) { emit("VPEXPANDW", true, src, k, dst) }

// VPCOMPRESSW: the words of src where k move to the low end of dst, zeros above.
func VPCOMPRESSW(src, k, dst operand.Op) { emit("VPCOMPRESSW.Z", false, src, k, dst) }

var constants = map[string]operand.Mem{}

// Dword is a constant in memory, to broadcast.
func Dword(name string, v uint32) operand.Mem {
	m, ok := constants[name]
	if !ok {
		m = build.GLOBL(name, attr.RODATA|attr.NOPTR)
		build.DATA(0, operand.U32(v))
		constants[name] = m
	}
	return m
}

// Words is a vector of constants in memory.
func Words(name string, v [32]uint16) operand.Mem {
	m, ok := constants[name]
	if !ok {
		m = build.GLOBL(name, attr.RODATA|attr.NOPTR)
		for i, w := range v {
			build.DATA(2*i, operand.U16(w))
		}
		constants[name] = m
	}
	return m
}
