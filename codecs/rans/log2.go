package rans

import "math/bits"

// Every decision of an encoder is integer arithmetic, so that a file depends on its input alone: logarithms are in units
// of 2^-16 bits, from a table that is itself made of integers.

const (
	// LogOne is one bit in the fixed point of Log2.
	LogOne   = 1 << logFrac
	logFrac  = 16
	logIndex = 11
)

// logTable[i] is log2(1 + i/2048).
var logTable = func() (t [1<<logIndex + 1]uint32) {
	for i := range t {
		// Squaring a number in [1,2) doubles its logarithm: each carry past 2 is the next bit of it.
		x := uint64(1)<<31 + uint64(i)<<(31-logIndex) // 1.31 fixed point
		if x == 1<<32 {
			t[i] = LogOne
			continue
		}
		frac := uint32(0)
		for range logFrac + 2 {
			x = x * x >> 31
			frac <<= 1
			if x >= 1<<32 {
				frac |= 1
				x >>= 1
			}
		}
		t[i] = (frac + 2) >> 2
	}
	return t
}()

// Log2 is log2(x) in units of 2^-16, by linear interpolation (error below 4 units); Log2(0) is 0.
func Log2(x uint64) uint64 {
	if x == 0 {
		return 0
	}
	whole := uint64(bits.Len64(x) - 1)
	m := x << (63 - whole) << 1 // the fraction, left aligned
	i := m >> (64 - logIndex)
	rem := m << logIndex >> 48 // next 16 bits
	lo, hi := uint64(logTable[i]), uint64(logTable[i+1])
	return whole<<logFrac + lo + (hi-lo)*rem>>16
}

// slotLogs are the logarithms of frequencies.
var slotLogs = func() (t [Slots + 1]uint32) {
	for i := range t {
		t[i] = uint32(Log2(uint64(i)))
	}
	return t
}()

// slotLog is Log2 of a frequency.
func slotLog(f uint16) uint64 { return uint64(slotLogs[f]) }
