//go:build !purego

package rans

import (
	"encoding/binary"
	"math/bits"
	"unsafe"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

// symbolArgs is the argument of the kernels.
type symbolArgs struct {
	table, src, dst, missing unsafe.Pointer
	turns                    uint64
	shift                    uint64
	mask, base               uint64
	value, common            uint64 // of the commonest symbol
}

const (
	symbolTurn   = 64      // words
	symbolWindow = 1 << 10 // values from the first one of the table on
)

// MapWords is Map for the values word>>shift & mask of the words of size bytes in src, straight from them. It does as
// many of the first ones as there is a fast way for, a multiple of 64, and says how many.
func (e *Encoder) MapWords(dst []uint8, src []byte, size int, shift uint8, mask uint16, patches []Patch) (int, []Patch) {
	v := e.table.Value
	turns := len(src) / size / symbolTurn
	if cpu.Active() < cpu.AVX512 || size > 4 || turns == 0 || v[len(v)-1]-v[0] >= symbolWindow {
		return 0, patches
	}
	e.windowOnce.Do(func() {
		for i := range e.window {
			e.window[i] = e.common
		}
		for s, x := range v {
			e.window[x-v[0]] = uint8(s)
		}
	})
	var missing [64]uint64
	a := symbolArgs{table: unsafe.Pointer(&e.window), missing: unsafe.Pointer(&missing), shift: uint64(shift),
		mask: uint64(mask), base: uint64(v[0]), value: uint64(e.value), common: uint64(e.common)}
	done := turns * symbolTurn
	_ = dst[:done]
	for at := 0; at < done; at += len(missing) * symbolTurn {
		a.src, a.dst = unsafe.Pointer(&src[at*size]), unsafe.Pointer(&dst[at])
		a.turns = uint64(min(len(missing), turns-at/symbolTurn))
		p := (*byte)(unsafe.Pointer(&a))
		switch size {
		case 1:
			symbols8(p)
		case 2:
			symbols16(p)
		case 4:
			symbols32(p)
		}
		for k, m := range missing[:a.turns] {
			for ; m != 0; m &= m - 1 {
				i := at + k*symbolTurn + bits.TrailingZeros64(m)
				word := uint32(0)
				switch size {
				case 1:
					word = uint32(src[i])
				case 2:
					word = uint32(binary.LittleEndian.Uint16(src[2*i:]))
				case 4:
					word = binary.LittleEndian.Uint32(src[4*i:])
				}
				patches = append(patches, Patch{uint16(i), uint16(word>>shift) & mask})
			}
		}
	}
	return done, patches
}
