//go:build !purego

package cpu

import "github.com/klauspost/cpuid/v2"

var detected = func() Tier {
	c := cpuid.CPU
	switch {
	case !c.Supports(cpuid.AVX2, cpuid.BMI2, cpuid.POPCNT):
		return Generic
	case !c.Supports(cpuid.AVX512F, cpuid.AVX512BW, cpuid.AVX512DQ, cpuid.AVX512VL, cpuid.AVX512VBMI, cpuid.AVX512VBMI2):
		return AVX2
	}
	return AVX512
}()
