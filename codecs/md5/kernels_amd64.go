//go:build amd64 && !purego

package md5

import "bigsmall.dev/bigsmall/codecs/cpu"

// fewest is from how many messages on 16 lanes are faster than one after another.
const fewest = 2

func kernels() func(*args) {
	switch tier := cpu.Active(); {
	case tier >= cpu.AVX512:
		return blocksAVX512
	case tier >= cpu.AVX2:
		return blocksAVX2
	}
	return nil
}
