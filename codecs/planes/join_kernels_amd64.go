//go:build !purego

package planes

import (
	"unsafe"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

// join32 joins what makes whole turns of the tier in use, and says how many words that were.
func join32(dst, upper, mid, low []byte, past bool) int {
	kernel, per := join32AVX2, 16
	switch tier := cpu.Active(); {
	case tier >= cpu.AVX512 && past:
		kernel, per = join32AVX512Past, 32
	case tier >= cpu.AVX512:
		kernel, per = join32AVX512, 32
	case tier < cpu.AVX2:
		return 0
	case past:
		kernel = join32AVX2Past
	}
	n := len(mid) / per
	if n > 0 {
		kernel(unsafe.SliceData(dst), unsafe.SliceData(upper), unsafe.SliceData(mid), unsafe.SliceData(low), uint64(n))
	}
	return n * per
}
