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

func handleOf(p unsafe.Pointer) *handle {
	if p == nil {
		return nil
	}
	return (*(*cgo.Handle)(p)).Value().(*handle)
}

func freeHandle(p unsafe.Pointer) {
	(*(*cgo.Handle)(p)).Delete()
	C.free(p)
}
