package planes

import "encoding/binary"

// Cut is a part of a field, as it lies in words of Size bytes: Bits bits from Shift up; with Rotate, the bit Top comes
// below them as the lowest of the Bits.
type Cut struct {
	Size             int
	Shift, Bits, Top uint8
	Rotate           bool
}

// SymCut is where the symbols of the field lie in words of size bytes with shift zero bits below.
func (f Field) SymCut(size int, shift uint8) Cut {
	at := shift + f.Shift + f.Rest
	if f.Rotate { // the sign leaves the top, and what is below moves up
		at--
	}
	return Cut{Size: size, Shift: at, Bits: f.Sym}
}

// RestCut is where the rest lies.
func (f Field) RestCut(size int, shift uint8) Cut {
	at := shift + f.Shift
	return Cut{Size: size, Shift: at, Bits: f.Rest, Top: at + uint8(f.Bits()) - 1, Rotate: f.Rotate}
}

// At is value i of the words in src.
func (c Cut) At(src []byte, i int) uint16 {
	var w uint64
	switch src = src[i*c.Size:]; c.Size {
	case 1:
		w = uint64(src[0])
	case 2:
		w = uint64(binary.LittleEndian.Uint16(src))
	case 4:
		w = uint64(binary.LittleEndian.Uint32(src))
	default:
		w = binary.LittleEndian.Uint64(src)
	}
	return c.of(w)
}

func (c Cut) of(w uint64) uint16 {
	v := w >> (c.Shift & 63)
	if c.Rotate {
		v = v<<1 | w>>(c.Top&63)&1
	}
	return uint16(v) & (1<<c.Bits - 1)
}

// Values takes the values of all words in src.
func (c Cut) Values(dst []uint16, src []byte) {
	left, top := uint(0), uint(63) // a word whose top bit counts is one that rotates
	if c.Rotate {
		left, top = 1, uint(c.Top)
	}
	down, mask, sign := uint(c.Shift), uint16(1)<<c.Bits-1, uint16(left)
	switch c.Size {
	case 1:
		src = src[:len(dst)]
		for i, w := range src {
			dst[i] = (uint16(w)>>(down&15)<<(left&15) | uint16(w)>>(top&15)&sign) & mask
		}
	case 2:
		i := 0
		if c.Shift+c.Bits-uint8(left) <= 16 { // four at a time: nothing crosses over from one to the next
			const ones = 0x0001_0001_0001_0001
			keep, signs := uint64(mask>>left)*ones, uint64(sign)*ones
			for ; i+4 <= len(dst); i += 4 {
				w := binary.LittleEndian.Uint64(src[2*i:])
				w = w>>(down&63)&keep<<(left&63) | w>>(top&63)&signs
				q := dst[i : i+4 : i+4]
				q[0], q[1], q[2], q[3] = uint16(w), uint16(w>>16), uint16(w>>32), uint16(w>>48)
			}
		}
		for ; i < len(dst); i++ {
			w := uint64(binary.LittleEndian.Uint16(src[2*i:]))
			dst[i] = (uint16(w>>(down&63)<<(left&63)) | uint16(w>>(top&63))&sign) & mask
		}
	case 4:
		for i := range dst {
			w := uint64(binary.LittleEndian.Uint32(src[4*i:]))
			dst[i] = (uint16(w>>(down&63)<<(left&63)) | uint16(w>>(top&63))&sign) & mask
		}
	default:
		for i := range dst {
			w := binary.LittleEndian.Uint64(src[8*i:])
			dst[i] = (uint16(w>>(down&63)<<(left&63)) | uint16(w>>(top&63))&sign) & mask
		}
	}
}

// Append packs the values of all words in src as Pack does, width bits each.
func (c Cut) Append(dst, src []byte, width uint8) []byte {
	dst, n := c.appendKernel(dst, src, width)
	var part [256]uint16 // whole bytes of every width
	for src = src[n*c.Size:]; len(src) > 0; {
		values := part[:min(len(part), len(src)/c.Size)]
		c.Values(values, src)
		dst, src = Pack(dst, values, width), src[len(values)*c.Size:]
	}
	return dst
}

// Differing counts pairs of values that are not alike, one in the first half of src and one in the second, up to enough.
func (c Cut) Differing(src []byte, enough int) (n int) {
	half := len(src) / c.Size / 2 * c.Size
	a, b := src[:half], src[half:2*half]
	if c.Size == 4 && !c.Rotate { // two at a time
		mask := (uint64(1)<<c.Bits - 1) << (c.Shift & 31) & (1<<32 - 1)
		mask |= mask << 32
		for ; len(a) >= 8 && n < enough; a, b = a[8:], b[8:] {
			x := (binary.LittleEndian.Uint64(a) ^ binary.LittleEndian.Uint64(b)) & mask
			n += int((x&(1<<32-1)+(1<<32-1))>>32 + (x>>32+(1<<32-1))>>32)
		}
	}
	for i := 0; i < len(a)/c.Size && n < enough; i++ {
		if c.At(a, i) != c.At(b, i) {
			n++
		}
	}
	return n
}
