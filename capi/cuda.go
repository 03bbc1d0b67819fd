package main

/*
#cgo linux LDFLAGS: -ldl -lpthread
#include <stdlib.h>
#include "cuda_driver.h"
*/
import "C"

import (
	"fmt"
	"sync"
	"unsafe"

	"bigsmall.dev/bigsmall/codecs/gpu"
	"bigsmall.dev/bigsmall/core"
)

// What the kernels need: PTX of compute capability 7.5, and a driver of CUDA 11, older than which nobody has tried.
const (
	leastCapability = 75
	leastDriver     = 11000
)

func noDevice(format string, args ...any) error {
	return &core.Error{Status: core.NoDevice, Msg: fmt.Sprintf(format, args...) + "; decode on the CPU and copy"}
}

// cudaError is what a function of the driver returned.
func cudaError(r C.int, function, advice string) error {
	if r == 0 {
		return nil
	}
	const unsupportedPTX, noImage = 222, 209
	text := fmt.Sprintf("%s failed with %s (%d)", function, C.GoString(C.cuda_error_name(r)), r)
	switch {
	case r == unsupportedPTX || r == noImage:
		return noDevice("%s: the driver is too old for this library", text)
	case r == 2:
		advice = ": the device or the host has no memory left for it; free some, or load fewer tensors at a time"
	}
	return &core.Error{Status: core.DeviceFailed, Msg: "CUDA: " + text + advice}
}

// cudaReady loads the driver and looks whether there is a device that decodes.
func cudaReady() error {
	if why := C.cuda_load(); why != nil {
		return noDevice("%s", C.GoString(why))
	}
	if r := C.cuda_init(); r != 0 {
		return noDevice("the CUDA driver does not start: %s (%d)", C.GoString(C.cuda_error_name(r)), r)
	}
	var version, count C.int
	if r := C.cuda_driver_version(&version); r != 0 || version < leastDriver {
		return noDevice("the driver is of CUDA %d.%d, %d.%d is needed", version/1000, version%1000/10, leastDriver/1000, leastDriver%1000/10)
	}
	if r := C.cuda_device_count(&count); r != 0 || count == 0 {
		return noDevice("there is no CUDA device")
	}
	best := C.int(0)
	for i := range count {
		var c C.int
		if C.cuda_capability(i, &c) == 0 {
			best = max(best, c)
		}
	}
	return capable(best)
}

func capable(c C.int) error {
	if c < leastCapability {
		return noDevice("the device has the compute capability %d.%d, %d.%d is needed", c/10, c%10, leastCapability/10, leastCapability%10)
	}
	return nil
}

// cudaModule is the kernels, loaded into a context.
type cudaModule struct {
	functions map[string]unsafe.Pointer
}

var modules struct {
	sync.Mutex
	of map[C.uint64_t]*cudaModule
}

// currentModule gives the kernels of this thread's context. A context is taken to live as long as the process, as those of
// the runtime API and of torch do.
func currentModule() (*cudaModule, error) {
	if err := cudaReady(); err != nil {
		return nil, err
	}
	var context C.uint64_t
	var device, c C.int
	if r := C.cuda_current(&context, &device); r != 0 || context == 0 {
		return nil, noDevice("no CUDA context is current in this thread: call cudaSetDevice, or torch.cuda.init, in it first")
	}
	modules.Lock()
	defer modules.Unlock()
	if m := modules.of[context]; m != nil {
		return m, nil
	}
	if err := cudaError(C.cuda_capability(device, &c), "cuDeviceGetAttribute", ""); err != nil {
		return nil, err
	}
	if err := capable(c); err != nil {
		return nil, err
	}
	text := C.CString(gpu.PTX)
	defer C.free(unsafe.Pointer(text))
	var module unsafe.Pointer
	if err := cudaError(C.cuda_module_load(&module, text), "cuModuleLoadData", ""); err != nil {
		return nil, err
	}
	m := &cudaModule{functions: map[string]unsafe.Pointer{}}
	for _, name := range []string{gpu.Decode8, gpu.Decode16, gpu.Decode32, gpu.Restart, gpu.Verify, gpu.Gather} {
		var f unsafe.Pointer
		s := C.CString(name)
		r := C.cuda_function(&f, module, s)
		C.free(unsafe.Pointer(s))
		if err := cudaError(r, "cuModuleGetFunction", " for "+name); err != nil {
			return nil, err
		}
		m.functions[name] = f
	}
	if modules.of == nil {
		modules.of = map[C.uint64_t]*cudaModule{}
	}
	modules.of[context] = m
	return m, nil
}

// launch starts a kernel: nothing else happens here, so that it may stand in a stream that is being captured.
func (m *cudaModule) launch(stream unsafe.Pointer, kernel string, ctas int, args []any) error {
	var list [8]C.uint64_t
	for i, a := range args {
		switch v := a.(type) {
		case uint64:
			list[i] = C.uint64_t(v)
		case uint32:
			list[i] = C.uint64_t(v)
		}
	}
	r := C.cuda_launch(m.functions[kernel], C.uint(ctas), gpu.Threads, stream, &list[0], C.int(len(args)))
	return cudaError(r, "cuLaunchKernel", " for "+kernel)
}

// cudaDevice is a core.Device: the current context, the caller's stream for kernels and one of its own for copies.
type cudaDevice struct {
	module         *cudaModule
	stream, copies unsafe.Pointer
	host           []byte // what is left of the caller's memory
	device, room   uint64

	ownHost   []unsafe.Pointer
	ownDevice []C.uint64_t
	events    map[unsafe.Pointer]bool // not waited for yet
}

const cudaAlign = 256

func openCUDA(stream unsafe.Pointer, host []byte, device, room uint64) (*cudaDevice, error) {
	m, err := currentModule()
	if err != nil {
		return nil, err
	}
	d := &cudaDevice{module: m, stream: stream, host: host, device: device, room: room, events: map[unsafe.Pointer]bool{}}
	if err := cudaError(C.cuda_stream_create(&d.copies), "cuStreamCreate", ""); err != nil {
		return nil, err
	}
	// Memory that the caller gave may be in use by what his stream has to do yet.
	e, err := d.Mark()
	if err == nil {
		err = cudaError(C.cuda_stream_wait(d.copies, e.(unsafe.Pointer)), "cuStreamWaitEvent", "")
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// HostMemory implements core.Device. Memory is C's: copies go on while Go's own may move or go.
func (d *cudaDevice) HostMemory(n int) ([]byte, error) {
	if n == 0 {
		return nil, nil
	}
	if skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(d.host))) % cudaAlign); len(d.host) >= skip+n {
		b := d.host[skip : skip+n : skip+n]
		d.host = d.host[skip+n:]
		return b, nil
	}
	var p unsafe.Pointer
	if err := cudaError(C.cuda_host_alloc(&p, C.size_t(n)), "cuMemHostAlloc", fmt.Sprintf(" for %d bytes", n)); err != nil {
		return nil, err
	}
	d.ownHost = append(d.ownHost, p)
	return unsafe.Slice((*byte)(p), n), nil
}

// DeviceMemory implements core.Device.
func (d *cudaDevice) DeviceMemory(n int) (uint64, error) {
	if skip := -d.device % cudaAlign; d.room >= skip+uint64(n) {
		p := d.device + skip
		d.device, d.room = p+uint64(n), d.room-skip-uint64(n)
		return p, nil
	}
	var p C.uint64_t
	if err := cudaError(C.cuda_alloc(&p, C.size_t(n)), "cuMemAlloc", fmt.Sprintf(" for %d bytes", n)); err != nil {
		return 0, err
	}
	d.ownDevice = append(d.ownDevice, p)
	return uint64(p), nil
}

// PageLocked implements core.Device.
func (d *cudaDevice) PageLocked(b []byte) bool {
	return C.cuda_page_locked(unsafe.Pointer(&b[0])) != 0 && C.cuda_page_locked(unsafe.Pointer(&b[len(b)-1])) != 0
}

// Copy implements core.Device.
func (d *cudaDevice) Copy(dst uint64, src []byte) error {
	if len(src) == 0 {
		return nil
	}
	r := C.cuda_copy_to(C.uint64_t(dst), unsafe.Pointer(&src[0]), C.size_t(len(src)), d.copies)
	return cudaError(r, "cuMemcpyHtoDAsync", fmt.Sprintf(" for %d bytes", len(src)))
}

// CopyBack implements core.Device.
func (d *cudaDevice) CopyBack(dst []byte, src uint64) error {
	if len(dst) == 0 {
		return nil
	}
	r := C.cuda_copy_from(unsafe.Pointer(&dst[0]), C.uint64_t(src), C.size_t(len(dst)), d.stream)
	return cudaError(r, "cuMemcpyDtoHAsync", fmt.Sprintf(" for %d bytes", len(dst)))
}

// Fill implements core.Device.
func (d *cudaDevice) Fill(dst uint64, value uint32, n int) error {
	return cudaError(C.cuda_fill(C.uint64_t(dst), C.uint(value), C.size_t(n), d.stream), "cuMemsetD32Async", "")
}

// CopiesDone implements core.Device.
func (d *cudaDevice) CopiesDone() error {
	var e unsafe.Pointer
	if err := cudaError(C.cuda_event_record(&e, d.copies), "cuEventRecord", ""); err != nil {
		return err
	}
	defer C.cuda_event_destroy(e) // which the driver does when it has come
	return cudaError(C.cuda_stream_wait(d.stream, e), "cuStreamWaitEvent", "")
}

// Mark implements core.Device.
func (d *cudaDevice) Mark() (core.Event, error) {
	var e unsafe.Pointer
	if err := cudaError(C.cuda_event_record(&e, d.stream), "cuEventRecord", ""); err != nil {
		return nil, err
	}
	d.events[e] = true
	return e, nil
}

// Wait implements core.Device.
func (d *cudaDevice) Wait(event core.Event) error {
	e := event.(unsafe.Pointer)
	r := C.cuda_event_sync(e)
	C.cuda_event_destroy(e)
	delete(d.events, e)
	return cudaError(r, "cuEventSynchronize", "")
}

// Launch implements core.Device.
func (d *cudaDevice) Launch(kernel string, ctas int, args ...any) error {
	return d.module.launch(d.stream, kernel, ctas, args)
}

// Sync implements core.Device.
func (d *cudaDevice) Sync() error {
	r := C.cuda_stream_sync(d.copies)
	if q := C.cuda_stream_sync(d.stream); r == 0 {
		r = q
	}
	return cudaError(r, "cuStreamSynchronize", "")
}

// Close waits for the device and frees what was taken.
func (d *cudaDevice) Close() {
	_ = d.Sync() // whoever asked before has its error
	for e := range d.events {
		C.cuda_event_destroy(e)
	}
	for _, p := range d.ownHost {
		C.cuda_host_free(p)
	}
	for _, p := range d.ownDevice {
		C.cuda_free(p)
	}
	C.cuda_stream_destroy(d.copies)
}
