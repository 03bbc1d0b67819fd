package main

/*
#include <string.h>
#include "shim.h"
*/
import "C"

import (
	"fmt"
	"math"
	"unicode/utf8"
	"unsafe"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/core"
)

// memory is a caller's buffer as a slice.
func memory(p unsafe.Pointer, n C.size_t) ([]byte, error) {
	switch {
	case n == 0:
		return nil, nil
	case p == nil:
		return nil, invalid("a NULL buffer of %d bytes", n)
	case uint64(n) > math.MaxInt64:
		return nil, invalid("a buffer of %d bytes", n)
	}
	return unsafe.Slice((*byte)(p), int(n)), nil
}

// text copies a caller's string.
func text(p *C.char, what string) (string, error) {
	if p == nil {
		return "", invalid("%s is NULL", what)
	}
	s := C.GoString(p)
	if !utf8.ValidString(s) {
		return "", invalid("%s %q is not UTF-8", what, s)
	}
	return s, nil
}

// path is text, but keeps the bytes of names that are not UTF-8: they exist on disks.
func path(p *C.char, what string) (string, error) {
	if p == nil || *p == 0 {
		return "", invalid("%s is NULL or empty", what)
	}
	return C.GoString(p), nil
}

func optional(p *C.char) string {
	if p == nil {
		return ""
	}
	return C.GoString(p)
}

// put writes a text to a caller's buffer; *n becomes its whole length.
func put(b []byte, dst *C.char, room C.size_t, n *C.size_t) error {
	if n == nil {
		return invalid("len is NULL")
	}
	*n = C.size_t(len(b))
	if uint64(room) < uint64(len(b)) {
		return &core.Error{Status: core.DstTooSmall, Msg: fmt.Sprintf("room for %d bytes, %d are needed", room, len(b))}
	}
	out, err := memory(unsafe.Pointer(dst), C.size_t(len(b)))
	copy(out, b)
	return err
}

// sized checks the size member that begins a caller's struct. What a longer one asks for beyond what is known here (p not
// nil: it is read, not written) must be zero.
func sized(p unsafe.Pointer, have C.size_t, want uintptr, what string) error {
	if uintptr(have) < want || have > 1<<16 {
		return invalid("%s.size is %d, the struct has %d bytes: set it to sizeof", what, have, want)
	}
	if p != nil {
		for _, b := range unsafe.Slice((*byte)(p), int(have))[want:] {
			if b != 0 {
				return invalid("%s has members that this library, version %s, does not know", what, core.Version)
			}
		}
	}
	return nil
}

// element is struct k of a caller's array. A caller's struct may be longer than ours: the first one's size is the stride.
func element[T any](first *T, size C.size_t, k int) *T {
	return (*T)(unsafe.Add(unsafe.Pointer(first), uintptr(k)*uintptr(size)))
}

func jobOf(j *C.bs_job) (*core.Job, error) {
	if j == nil {
		return nil, nil
	}
	if err := sized(unsafe.Pointer(j), j.size, unsafe.Sizeof(*j), "bs_job"); err != nil {
		return nil, err
	}
	if j.workers < 0 || j.reserved != 0 {
		return nil, invalid("bs_job has %d workers and %d in its reserved member", j.workers, j.reserved)
	}
	return &core.Job{Workers: int(j.workers), Cancel: (*int32)(unsafe.Pointer(j.cancel)),
		Done: (*int64)(unsafe.Pointer(j.done)), Total: (*int64)(unsafe.Pointer(j.total))}, nil
}

func flags(f C.int32_t, o *core.Options) error {
	if f&^(C.BS_FLAG_SHA256|C.BS_FLAG_NO_REPLACE|C.BS_FLAG_FORCE|C.BS_FLAG_COMPAT_1_0) != 0 {
		return invalid("flags %#x are unknown", f)
	}
	o.SHA256, o.NoReplace, o.Force = f&C.BS_FLAG_SHA256 != 0, f&C.BS_FLAG_NO_REPLACE != 0, f&C.BS_FLAG_FORCE != 0
	o.Compat = f&C.BS_FLAG_COMPAT_1_0 != 0
	return nil
}

func compressOptions(o *C.bs_compress_options) (opts core.Options, err error) {
	if o == nil {
		return opts, nil
	}
	if err := sized(unsafe.Pointer(o), o.size, unsafe.Sizeof(*o), "bs_compress_options"); err != nil {
		return opts, err
	}
	if o.mode < 0 || o.mode >= C.int32_t(codecs.EndMode) {
		return opts, invalid("mode %d is unknown", o.mode)
	}
	opts.Mode, opts.Parity = codecs.Mode(o.mode), int(o.parity)
	if o.reserved != 0 {
		return opts, invalid("reserved bytes of bs_compress_options are set")
	}
	return opts, flags(o.flags, &opts)
}

func result(r core.Result, out *C.bs_result) error {
	if out == nil {
		return nil
	}
	out.source_bytes, out.output_bytes = C.uint64_t(r.SourceBytes), C.uint64_t(r.OutputBytes)
	out.n_tensors, out.n_files = C.uint64_t(r.Tensors), C.uint64_t(r.Files)
	return nil
}

func checkResult(out *C.bs_result) error {
	if out == nil {
		return nil
	}
	return sized(nil, out.size, unsafe.Sizeof(*out), "bs_result")
}
