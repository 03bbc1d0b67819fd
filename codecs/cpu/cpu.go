// Package cpu says which kernels run: those of the best instruction set this CPU has, or of a lesser one that was asked for.
package cpu

import (
	"fmt"
	"os"
	"sync/atomic"
)

// Tier is a set of kernels. Each includes those before it.
type Tier int32

const (
	Generic Tier = iota // plain Go
	AVX2
	AVX512 // with VBMI2: Ice Lake, Zen 4 and later
)

var names = [...]string{"generic", "avx2", "avx512"}

func (t Tier) String() string { return names[t] }

var active atomic.Int32

func init() {
	active.Store(int32(detected))
	if name := os.Getenv("BIGSMALL_CPU"); name != "" {
		_ = Use(name) // a wrong name is reported where it is passed through the API
	}
}

// Active is the tier in use.
func Active() Tier { return Tier(active.Load()) }

// Best is the highest tier of this machine and this build.
func Best() Tier { return detected }

// Use chooses a tier by name, "" the best one. A tier that the CPU or the build lacks is an error and changes nothing.
func Use(name string) error {
	if name == "" {
		active.Store(int32(detected))
		return nil
	}
	for t, n := range names {
		if n != name {
			continue
		}
		if Tier(t) > detected {
			return fmt.Errorf("this machine or build has no %s kernels, at most %s", name, detected)
		}
		active.Store(int32(t))
		return nil
	}
	return fmt.Errorf("%q is none of generic, avx2, avx512", name)
}
