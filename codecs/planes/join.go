package planes

import (
	"encoding/binary"
	"unsafe"
)

// Join32 makes 32-bit words of their upper halves (16-bit, little-endian) and the two bytes below: as many as dst holds.
// With past they are stored past the caches, where that can be.
func Join32(dst, upper, mid, low []byte, past bool) {
	n := len(dst) / 4
	dst, upper, mid, low = dst[:4*n], upper[:2*n], mid[:n], low[:n]
	head := 0
	if past { // from the first line of the caches on
		skew := -int(uintptr(unsafe.Pointer(unsafe.SliceData(dst)))) & 63
		past = skew%4 == 0
		head = min(skew/4, n)
	}
	join32Generic(dst[:4*head], upper, mid, low)
	dst, upper, mid, low = dst[4*head:], upper[2*head:], mid[head:], low[head:]
	done := join32(dst, upper, mid, low, past)
	join32Generic(dst[4*done:], upper[2*done:], mid[done:], low[done:])
}

func join32Generic(dst, upper, mid, low []byte) {
	for i := range len(dst) / 4 {
		w := uint32(binary.LittleEndian.Uint16(upper[2*i:]))<<16 | uint32(mid[i])<<8 | uint32(low[i])
		binary.LittleEndian.PutUint32(dst[4*i:], w)
	}
}
