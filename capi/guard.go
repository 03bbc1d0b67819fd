// Package main is libbigsmall: the C functions of include/bigsmall.h, translated to calls of core. No arithmetic, no loops
// over data.
//
// shim.c holds the public functions; each tests the fork flag and calls the export of the same name in export.go.
package main

/*
#cgo CFLAGS: -std=c99 -Wall -Wextra -Wno-unused-parameter
#include <stdlib.h>
#include <string.h>
#include "shim.h"
*/
import "C"

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"bigsmall.dev/bigsmall/core"
)

func main() {}

// reportOnce prints the first stack only: a broken handle may be called again and again.
var reportOnce sync.Once

// call runs f, turns its error or panic into a status, and poisons the handle a panic happened on. h may be nil.
func call(h *handle, e *C.bs_error, f func() error) (status C.int32_t) {
	var err error
	if h != nil && h.poisoned.Load() {
		err = &core.Error{Status: core.Poisoned, Msg: "an earlier fault made this handle unusable: close it"}
	} else {
		err = guarded(f)
	}
	var fault *core.PanicError
	if errors.As(err, &fault) {
		if h != nil {
			h.poisoned.Store(true)
		}
		reportOnce.Do(func() { fmt.Fprintf(os.Stderr, "bigsmall: fault: %v\n%s", fault.Value, fault.Stack) })
	}
	return report(e, err)
}

func guarded(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if v := recover(); v != nil {
			err = &core.PanicError{Value: v, Stack: debug.Stack()}
		}
	}()
	return f()
}

// report fills in the caller's error.
func report(e *C.bs_error, err error) C.int32_t {
	if err == nil {
		return C.BS_OK
	}
	x := core.AsError(err)
	if e != nil {
		e.status, e.os_error = C.int32_t(x.Status), C.int32_t(x.Errno())
		text := strings.ToValidUTF8(x.Error(), "?")
		room := len(e.text) - 1
		if len(text) > room { // cut between characters
			for room > 0 && text[room]&0xc0 == 0x80 {
				room--
			}
			text = text[:room]
		}
		dst := unsafe.Slice((*byte)(unsafe.Pointer(&e.text[0])), len(e.text))
		dst[copy(dst, text)] = 0
	}
	return C.int32_t(x.Status)
}

func invalid(format string, args ...any) error {
	return &core.Error{Status: core.InvalidArgument, Msg: fmt.Sprintf(format, args...)}
}

// A handle is what a bs_reader, bs_writer, bs_weight or bs_weight_batch stands for.
type handle struct {
	reader   *core.Reader
	writer   *core.Writer
	weight   *core.Weight
	batch    *core.Batch
	module   *cudaModule // of the device of the weight or batch
	poisoned atomic.Bool
}
