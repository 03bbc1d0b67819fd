// Package planes cuts machine words into bit fields and puts them together again: the reversible part of every codec.
//
// A word of W bits (8, 16, 32 or 64, the zero low bits already shifted out) is a row of fields, each a contiguous run of
// bits. From the top of its run a field has sym bits that go to the entropy coder and rest bits that are packed as they
// are:
//
//	W-1                                 0
//	| .... | sym ...... | rest ... | .... |
//	                               ^ shift
//
// With rotate, the run is first rotated left by one bit, so that the sign of a float, its top bit, becomes the lowest bit
// of rest and sym begins with the exponent.
package planes

import "encoding/binary"

// Field is one bit field of a word.
type Field struct {
	Shift, Sym, Rest uint8
	Rotate           bool
}

// Bits is the width of the field.
func (f Field) Bits() uint { return uint(f.Sym) + uint(f.Rest) }

// MaxSym and MaxRest bound the parts of a field, MaxBits all of it.
const (
	MaxSym  = 12
	MaxRest = 15
	MaxBits = 24
)

// Load reads words of size bytes, little-endian, into dst, each shifted right by shift.
func Load(dst []uint64, src []byte, size int, shift uint8) {
	switch size {
	case 1:
		for i := range dst {
			dst[i] = uint64(src[i]) >> shift
		}
	case 2:
		for len(dst) >= 4 && len(src) >= 8 {
			v := binary.LittleEndian.Uint64(src)
			d := (*[4]uint64)(dst)
			d[0], d[1], d[2], d[3] = v&0xffff>>(shift&63), v>>16&0xffff>>(shift&63), v>>32&0xffff>>(shift&63), v>>48>>(shift&63)
			dst, src = dst[4:], src[8:]
		}
		for i := range dst {
			dst[i] = uint64(binary.LittleEndian.Uint16(src[2*i:])) >> shift
		}
	case 4:
		for i := range dst {
			dst[i] = uint64(binary.LittleEndian.Uint32(src[4*i:])) >> shift
		}
	default:
		for i := range dst {
			dst[i] = binary.LittleEndian.Uint64(src[8*i:]) >> shift
		}
	}
}

// Store writes words of size bytes, each shifted left by shift.
func Store(dst []byte, src []uint64, size int, shift uint8) {
	switch size {
	case 1:
		for i, v := range src {
			dst[i] = uint8(v << shift)
		}
	case 2:
		for i, v := range src {
			binary.LittleEndian.PutUint16(dst[2*i:], uint16(v<<shift))
		}
	case 4:
		for i, v := range src {
			binary.LittleEndian.PutUint32(dst[4*i:], uint32(v<<shift))
		}
	default:
		for i, v := range src {
			binary.LittleEndian.PutUint64(dst[8*i:], v<<shift)
		}
	}
}

// Split takes the field out of the words: sym[i] and, where the field has one, rest[i].
func (f Field) Split(sym, rest []uint16, words []uint64) {
	b := f.Bits()
	mask := uint32(1)<<b - 1
	left, right := uint(0), uint(31) // v<<left | v>>right is the rotation; b is at most 24
	if f.Rotate {
		left, right = 1, b-1
	}
	shift, low, restMask := uint(f.Shift), uint(f.Rest), uint16(1)<<f.Rest-1
	sym = sym[:len(words)]
	if f.Rest == 0 { // nothing to write there
		rest = sym
	}
	rest = rest[:len(words)]
	// Masked shift counts spare the compiler a comparison each.
	for i, w := range words {
		v := uint32(w>>(shift&63)) & mask
		v = (v<<(left&31) | v>>(right&31)) & mask
		rest[i] = uint16(v) & restMask
		sym[i] = uint16(v >> (low & 31))
	}
}

// Join puts the parts of the field into the words, whose bits there are zero.
func (f Field) Join(words []uint64, sym, rest []uint16) {
	b := f.Bits()
	sym = sym[:len(words)]
	for i := range words {
		v := uint32(sym[i]) << f.Rest
		if f.Rest > 0 {
			v |= uint32(rest[i])
		}
		if f.Rotate {
			v = v>>1 | v&1<<(b-1)
		}
		words[i] |= uint64(v) << f.Shift
	}
}

// PackedLen is the number of bytes n values of bits each take.
func PackedLen(n int, bits uint8) int { return (n*int(bits) + 7) / 8 }

// Pack appends the low bits of each value, the first value lowest, zero-padded to a byte. bits is at most 15.
func Pack(dst []byte, values []uint16, bits uint8) []byte {
	acc, n := uint64(0), uint(0)
	if bits == 8 {
		for _, v := range values {
			dst = append(dst, uint8(v))
		}
		return dst
	}
	for len(values) >= 4 { // four values at a time: at most 7 + 60 bits would overflow, so flush to under 4 bits first
		v := uint64(values[0]) | uint64(values[1])<<bits | uint64(values[2])<<(2*bits) | uint64(values[3])<<(3*bits)
		values = values[4:]
		acc |= v << n // n is 0 or 4: 4*bits is a multiple of 4
		n += 4 * uint(bits)
		whole := n / 8
		dst = binary.LittleEndian.AppendUint64(dst, acc)
		dst = dst[:len(dst)-8+int(whole)]
		acc, n = acc>>(8*whole), n%8
	}
	for _, v := range values {
		acc |= uint64(v) << n
		n += uint(bits)
	}
	for i := uint(0); i < n; i += 8 {
		dst = append(dst, uint8(acc>>i))
	}
	return dst
}

// Unpack is the inverse of Pack; src has PackedLen(len(values), bits) bytes.
func Unpack(values []uint16, src []byte, bits uint8) {
	if bits == 8 {
		src = src[:len(values)]
		for i, v := range src {
			values[i] = uint16(v)
		}
		return
	}
	mask := uint64(1)<<bits - 1
	i, pos := 0, 0
	for ; i+4 <= len(values) && pos>>3+8 <= len(src); i += 4 {
		v := binary.LittleEndian.Uint64(src[pos>>3:]) >> (pos & 7)
		pos += 4 * int(bits)
		o := values[i : i+4 : i+4]
		o[0], o[1], o[2], o[3] = uint16(v&mask), uint16(v>>bits&mask), uint16(v>>(2*bits)&mask), uint16(v>>(3*bits)&mask)
	}
	for ; i < len(values); i++ {
		v := uint32(0)
		for k := range uint(3) { // 15 bits touch at most three bytes
			if at := pos>>3 + int(k); at < len(src) {
				v |= uint32(src[at]) << (8 * k)
			}
		}
		values[i] = uint16(v >> (pos & 7) & uint32(mask))
		pos += int(bits)
	}
}

// JoinDirect is Join for a lone field of words of one or two bytes, straight into dst: sym, the packed rest,
// and shift zero bits below.
func (f Field) JoinDirect(dst []byte, sym []uint16, packed []byte, size int, shift uint8) {
	dst = dst[:size*len(sym)]
	up, out := f.Up(shift)&15, dst
	if size == 1 {
		for ; len(sym) >= 4 && len(out) >= 4; sym, out = sym[4:], out[4:] {
			s := (*[4]uint16)(sym)
			v := uint32(s[0]) | uint32(s[1])<<8 | uint32(s[2])<<16 | uint32(s[3])<<24
			binary.LittleEndian.PutUint32(out, v<<up) // no symbol fills more than its byte
		}
		for i, v := range sym {
			out[i] = uint8(v << up)
		}
	} else {
		for ; len(sym) >= 4 && len(out) >= 8; sym, out = sym[4:], out[8:] {
			s := (*[4]uint16)(sym)
			v := uint64(s[0]) | uint64(s[1])<<16 | uint64(s[2])<<32 | uint64(s[3])<<48
			binary.LittleEndian.PutUint64(out, v<<up)
		}
		for i, v := range sym {
			binary.LittleEndian.PutUint16(out[2*i:], v<<up)
		}
	}
	f.Merge(dst, packed, size, shift)
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}
