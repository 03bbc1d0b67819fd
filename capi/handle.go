package main

/*
#include <stdlib.h>
#include "shim.h"
*/
import "C"

import (
	"runtime/cgo"
	"unsafe"
)

// C never sees a Go pointer: a handle is a small block of C memory that holds the number of a cgo.Handle.

func newHandle(h *handle) unsafe.Pointer {
	p := C.malloc(C.size_t(unsafe.Sizeof(cgo.Handle(0))))
	*(*cgo.Handle)(p) = cgo.NewHandle(h)
	return p
}

// handleOf is nil for what is none, as far as that can be told: a closed one may be any memory.
func handleOf(p unsafe.Pointer) (h *handle) {
	if p == nil {
		return nil
	}
	_ = guarded(func() error {
		h = (*(*cgo.Handle)(p)).Value().(*handle)
		return nil
	})
	return h
}

// closing ends a handle, after f.
func closing(p unsafe.Pointer, f func(*handle)) {
	call(nil, nil, func() error {
		if h := handleOf(p); h != nil {
			(*(*cgo.Handle)(p)).Delete()
			C.free(p)
			f(h)
		}
		return nil
	})
}
