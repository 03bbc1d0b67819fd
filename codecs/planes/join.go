package planes

import "encoding/binary"

// Join32 makes 32-bit words of their upper halves (16-bit, little-endian) and the two bytes below: as many as dst holds.
func Join32(dst, upper, mid, low []byte) {
	n := len(dst) / 4
	dst, upper, mid, low = dst[:4*n], upper[:2*n], mid[:n], low[:n]
	i := join32(dst, upper, mid, low)
	for ; i < n; i++ {
		w := uint32(binary.LittleEndian.Uint16(upper[2*i:]))<<16 | uint32(mid[i])<<8 | uint32(low[i])
		binary.LittleEndian.PutUint32(dst[4*i:], w)
	}
}
