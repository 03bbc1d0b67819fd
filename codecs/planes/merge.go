package planes

import "encoding/binary"

// Up is how many bits up a symbol stands in a word of JoinDirect.
func (f Field) Up(shift uint8) uint { return uint(f.Rest+shift) - uint(boolInt(f.Rotate)) }

// Merge puts the packed rest into words that have their symbols, where it is zero.
func (f Field) Merge(dst, packed []byte, size int, shift uint8) {
	r := uint(f.Rest)
	if r == 0 {
		return
	}
	ones := uint64(0x0001_0001_0001_0001)
	if size == 1 {
		ones = 0x0101_0101_0101_0101
	}
	drop, top, signs := uint(0), uint(0), uint64(0) // the rotation: the lowest bit of the rest goes to the top
	if f.Rotate {
		drop, top, signs = 1, f.Bits()-1, ones
	}
	one, two, four := uint64(1)<<r-1, uint64(1)<<(2*r)-1, uint64(1)<<(4*r)-1
	keep := one >> drop * ones
	half, bit := r/2, 4*r%8 // where the rest of the fifth word begins
	// Eight words at a time, whose rest is r bytes. Their parts move to where the words are, by halves.
	for len(dst) >= 8*size {
		var v, w uint64
		if len(packed) >= 16 {
			v, w = binary.LittleEndian.Uint64(packed), binary.LittleEndian.Uint64(packed[half&7:])
			packed = packed[r&15:]
		} else {
			var end [16]byte
			copy(end[:], packed)
			v, w = binary.LittleEndian.Uint64(end[:]), binary.LittleEndian.Uint64(end[half&7:])
			packed = packed[min(int(r), len(packed)):]
		}
		if size == 1 {
			v = apart(v, four, 32-4*r, 32)
			v = apart(v, two|two<<32, 16-2*r, 16)
			v = apart(v, one*0x0001_0001_0001_0001, 8-r, 8)
			v = (v>>(drop&63)&keep | v&signs<<(top&63)) << (shift & 63)
			binary.LittleEndian.PutUint64(dst, binary.LittleEndian.Uint64(dst)|v)
			dst = dst[8:]
			continue
		}
		v = apart(v, two, 32-2*r, 32)
		v = apart(v, one|one<<32, 16-r, 16)
		v = (v>>(drop&63)&keep | v&signs<<(top&63)) << (shift & 63)
		binary.LittleEndian.PutUint64(dst, binary.LittleEndian.Uint64(dst)|v)
		w = apart(w>>(bit&63), two, 32-2*r, 32)
		w = apart(w, one|one<<32, 16-r, 16)
		w = (w>>(drop&63)&keep | w&signs<<(top&63)) << (shift & 63)
		binary.LittleEndian.PutUint64(dst[8:], binary.LittleEndian.Uint64(dst[8:])|w)
		dst = dst[16:]
	}
	if len(dst) > 0 {
		var end [16]byte
		copy(end[:], dst)
		f.Merge(end[:8*size], packed, size, shift)
		copy(dst, end[:])
	}
}

// apart leaves the bits of mask where they are and moves as many above them up by n, to begin at width.
func apart(v, mask uint64, n, width uint) uint64 {
	return v&mask | v<<(n&63)&(mask<<(width&63))
}
