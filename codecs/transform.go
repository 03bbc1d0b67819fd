package codecs

import (
	"encoding/binary"
	"math/bits"
)

// Half: a binary32 number that is exact in binary16 is written as that. NaN payloads map to the ten bits that binary16
// has, and must have no others. Returns ok false where anything would be lost.
func toHalf(w uint32) (h uint16, ok bool) {
	sign, exp, mant := uint16(w>>16&0x8000), w>>23&0xff, w&0x7fffff
	switch {
	case exp == 0:
		return sign, mant == 0 // a subnormal binary32 is far below the range
	case exp == 0xff:
		return sign | 0x7c00 | uint16(mant>>13), mant&0x1fff == 0
	case exp >= 127-14 && exp <= 127+15:
		return sign | uint16(exp-112)<<10 | uint16(mant>>13), mant&0x1fff == 0
	case exp >= 127-24 && exp < 127-14: // subnormal binary16: the leading one becomes explicit
		drop := 126 - exp // 14 to 23
		full := mant | 0x800000
		return sign | uint16(full>>drop), full&(1<<drop-1) == 0
	}
	return 0, false
}

func fromHalf(h uint16) uint32 {
	sign, exp, mant := uint32(h&0x8000)<<16, uint32(h>>10&31), uint32(h&0x3ff)
	switch {
	case exp == 31:
		return sign | 0xff<<23 | mant<<13
	case exp > 0:
		return sign | (exp+112)<<23 | mant<<13
	case mant == 0:
		return sign
	}
	up := uint32(bits.LeadingZeros16(uint16(mant))) - 5 // 1 to 10: shifts the leading one to bit 10
	return sign | (113-up)<<23 | mant<<(13+up)&0x7fffff
}

// widen makes binary32 numbers of as many binary16 numbers, both little-endian.
func widen(dst, src []byte) {
	n := len(dst) / 4
	dst, src = dst[:4*n], src[:2*n]
	for i := range n {
		h := binary.LittleEndian.Uint16(src[2*i:])
		w := uint32(h&0x8000)<<16 | (uint32(h&0x7fff)<<13 + 112<<23)
		if e := h & 0x7c00; e == 0 || e == 0x7c00 {
			w = fromHalf(h)
		}
		binary.LittleEndian.PutUint32(dst[4*i:], w)
	}
}

// ordered maps the bits of a float to integers that ascend with the number; unordered maps them back.
func ordered(w uint64, width uint) uint64 {
	top := uint64(1) << (width - 1)
	if w&top != 0 {
		return ^w & (top<<1 - 1)
	}
	return w | top
}

func unordered(o uint64, width uint) uint64 {
	top := uint64(1) << (width - 1)
	if o&top == 0 {
		return ^o & (top<<1 - 1)
	}
	return o &^ top
}

// zigzag folds a difference modulo 2^width so that small ones of either sign become small numbers.
func zigzag(d uint64, width uint) uint64 {
	mask := ^uint64(0) >> (64 - width)
	d &= mask
	return (d<<1 ^ -(d >> (width - 1))) & mask
}

func unzigzag(z uint64, width uint) uint64 {
	return (z>>1 ^ -(z & 1)) & (^uint64(0) >> (64 - width))
}

// apply turns the source's words of one block, in place, into those that the fields cut up.
func (f *Format) apply(words []uint64) {
	switch f.transform {
	case Plain:
		if f.shift > 0 {
			for i := range words {
				words[i] >>= f.shift
			}
		}
	case Half:
		for i, w := range words {
			h, _ := toHalf(uint32(w))
			words[i] = uint64(h) >> f.shift
		}
	case Palette:
		for i, w := range words {
			k := 0
			for k < len(f.palette)-1 && f.palette[k] < w {
				k++
			}
			words[i] = uint64(k)
		}
	case RowDelta:
		mask := ^uint64(0) >> (64 - 8*uint(f.word))
		for i := len(words) - 1; i >= int(f.param); i-- {
			words[i] = (words[i] - words[i-int(f.param)]) & mask
		}
	}
}

// undo is the inverse of apply. It reports whether every word was one that apply makes.
func (f *Format) undo(words []uint64) bool {
	switch f.transform {
	case Plain:
		if f.shift > 0 {
			for i := range words {
				words[i] <<= f.shift
			}
		}
	case Half:
		for i, w := range words {
			words[i] = uint64(fromHalf(uint16(w << f.shift)))
		}
	case Palette:
		for i, w := range words {
			if w >= uint64(len(f.palette)) {
				return false
			}
			words[i] = f.palette[w]
		}
	case RowDelta:
		for i := int(f.param); i < len(words); i++ { // the mask is Store's
			words[i] += words[i-int(f.param)]
		}
	}
	return true
}
