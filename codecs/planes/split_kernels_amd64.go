//go:build !purego

package planes

import (
	"slices"
	"unsafe"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

// packArgs is the argument of the kernels.
type packArgs struct {
	src, dst      unsafe.Pointer
	turns         uint64
	step          uint64 // bytes of a turn
	down, up, top uint64 // shifts: the values are (word>>down<<up | word>>top) & mask
	pair          uint64 // 32 - 2*width
	mask, fold    [2]uint32
	low           uint64 // the low 2*width bits
	odd           uint64 // 4 where width is odd: the second quadword begins in the middle of a byte
	join          uint64 // the bytes that get their upper half from share
	from, share   [64]uint8
}

const (
	packTurn  = 32 // words
	packStore = 64 // bytes that a turn stores, of which 4*width count
)

// appendKernel packs the first words of src, a multiple of 32, and says how many.
func (c Cut) appendKernel(dst, src []byte, width uint8) ([]byte, int) {
	turns := len(src) / c.Size / packTurn
	// Values are multiplied as signed words, by 1 and 1<<width.
	if cpu.Active() < cpu.AVX512 || turns == 0 || width > 14 || c.Size > 4 || c.Rotate && int(c.Top) != 8*c.Size-1 {
		return dst, 0
	}
	dst = slices.Grow(dst, 4*int(width)*turns+packStore)
	a := packArgs{src: unsafe.Pointer(&src[0]), dst: unsafe.Pointer(&dst[:len(dst)+1][len(dst)]), turns: uint64(turns),
		step: 4 * uint64(width), down: uint64(c.Shift), top: 64, pair: 32 - 2*uint64(width), low: 1<<(2*width) - 1}
	if c.Rotate {
		a.up, a.top = 1, uint64(c.Top)
	}
	a.mask[0] = (1<<c.Bits - 1) * 0x10001
	a.fold[0] = 1 | 1<<width<<16
	half := int(width) / 2 // bytes of the first quadword, but for a half
	a.odd = 4 * uint64(width&1)
	for j := range 4 * int(width) {
		lane, at := j/int(width), j%int(width)
		second := at - half // byte of the second
		switch {
		case width&1 == 1 && second == 0:
			a.join |= 1 << j
			a.from[j], a.share[j] = uint8(16*lane+at), uint8(16*lane+8)
		case second < 0:
			a.from[j] = uint8(16*lane + at)
		default:
			a.from[j] = uint8(16*lane + 8 + second)
		}
	}
	p := (*byte)(unsafe.Pointer(&a))
	switch c.Size {
	case 1:
		pack8(p)
	case 2:
		pack16(p)
	case 4:
		pack32(p)
	}
	return dst[:len(dst)+4*int(width)*turns], turns * packTurn
}
