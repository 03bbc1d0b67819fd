//go:build bsfault

package main

import "bigsmall.dev/bigsmall/core"

// A library built with this tag panics while it decodes a tensor named __panic__: how the tests reach what a fault does.
func init() {
	core.FaultHook = func(tensor string) {
		if tensor == "__panic__" {
			panic("injected fault")
		}
	}
}
