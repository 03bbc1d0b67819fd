package main

/*
#include "shim.h"
*/
import "C"

import (
	"unsafe"

	"bigsmall.dev/bigsmall/core"
)

//export go_cuda_available
func go_cuda_available(e *C.bs_error) C.int32_t { return call(nil, e, cudaReady) }

// onCUDA runs f with the device that a caller's job names.
func onCUDA(j *C.bs_cuda_job, f func(*cudaDevice) error) error {
	var job C.bs_cuda_job
	if j != nil {
		if err := sized(unsafe.Pointer(j), j.size, unsafe.Sizeof(*j), "bs_cuda_job"); err != nil {
			return err
		}
		job = *j
	}
	host, err := memory(job.host, job.host_bytes)
	if err != nil {
		return err
	}
	if job.device == 0 && job.device_bytes != 0 {
		return invalid("device memory at 0, of %d bytes", job.device_bytes)
	}
	d, err := openCUDA(job.stream, host, uint64(job.device), uint64(job.device_bytes))
	if err != nil {
		return err
	}
	defer d.Close()
	return f(d)
}

func room(n C.size_t) int64 { return int64(min(uint64(n), 1<<62)) }

//export go_reader_decode_cuda
func go_reader_decode_cuda(r *C.bs_reader, items *C.bs_cuda_item, n C.size_t, cuda *C.bs_cuda_job, j *C.bs_job, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		job, err := jobOf(j)
		if err != nil {
			return err
		}
		if n > 0 && items == nil || n > maxItems {
			return invalid("%d items at %p", n, items)
		}
		list := make([]core.DeviceItem, n)
		for k, it := range unsafe.Slice(items, int(n)) {
			list[k] = core.DeviceItem{Index: index(it.index), Dst: uint64(it.dst), Cap: room(it.dst_cap)}
		}
		return onCUDA(cuda, func(d *cudaDevice) error { return r.DecodeDevice(list, d, job) })
	})
}

//export go_reader_weight_bytes
func go_reader_weight_bytes(r *C.bs_reader, i C.uint64_t, out *C.size_t, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		if out == nil {
			return invalid("n_bytes is NULL")
		}
		n, err := r.WeightBytes(index(i))
		*out = C.size_t(n)
		return err
	})
}

//export go_weight_open
func go_weight_open(r *C.bs_reader, i, device C.uint64_t, deviceRoom C.size_t, cuda *C.bs_cuda_job, j *C.bs_job, out **C.bs_weight, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		job, err := jobOf(j)
		if err != nil {
			return err
		}
		return open((*unsafe.Pointer)(unsafe.Pointer(out)), func() (*handle, error) {
			h := &handle{}
			err := onCUDA(cuda, func(d *cudaDevice) (err error) {
				h.weight, err = r.OpenWeight(index(i), uint64(device), room(deviceRoom), d, job)
				h.module = d.module
				return err
			})
			return h, err
		})
	})
}

// launching runs f with the handle of a weight or batch and what starts its kernels on a stream.
func launching(p unsafe.Pointer, stream unsafe.Pointer, e *C.bs_error, f func(*handle, core.Launcher) error) C.int32_t {
	h := handleOf(p)
	return call(h, e, func() error {
		if h == nil || h.weight == nil && h.batch == nil {
			return invalid("the weight is NULL, or none")
		}
		return f(h, func(kernel string, ctas int, args ...any) error { return h.module.launch(stream, kernel, ctas, args) })
	})
}

//export go_weight_decode
func go_weight_decode(w *C.bs_weight, first, count, dst C.uint64_t, dstRoom C.size_t, stream unsafe.Pointer, e *C.bs_error) C.int32_t {
	return launching(unsafe.Pointer(w), stream, e, func(h *handle, launch core.Launcher) error {
		return h.weight.Decode(uint64(first), uint64(count), uint64(dst), room(dstRoom), launch)
	})
}

//export go_weight_gather
func go_weight_gather(w *C.bs_weight, ids, n, row, dst C.uint64_t, dstRoom C.size_t, stream unsafe.Pointer, e *C.bs_error) C.int32_t {
	return launching(unsafe.Pointer(w), stream, e, func(h *handle, launch core.Launcher) error {
		return h.weight.Gather(uint64(ids), uint64(n), uint64(row), uint64(dst), room(dstRoom), launch)
	})
}

//export go_weight_close
func go_weight_close(w *C.bs_weight) { closing(unsafe.Pointer(w), func(*handle) {}) }

// weightsOf are the weights of a caller's list of handles.
func weightsOf(list **C.bs_weight, n C.size_t) ([]*core.Weight, error) {
	if n == 0 || list == nil || n > maxItems {
		return nil, invalid("%d weights at %p", n, list)
	}
	weights := make([]*core.Weight, n)
	for k, w := range unsafe.Slice(list, int(n)) {
		h := handleOf(unsafe.Pointer(w))
		if h == nil || h.weight == nil {
			return nil, invalid("weight %d is NULL, or none", k)
		}
		weights[k] = h.weight
	}
	return weights, nil
}

//export go_weight_batch_bytes
func go_weight_batch_bytes(list **C.bs_weight, n C.size_t, out *C.size_t, e *C.bs_error) C.int32_t {
	return call(nil, e, func() error {
		if out == nil {
			return invalid("n_bytes is NULL")
		}
		weights, err := weightsOf(list, n)
		*out = C.size_t(core.BatchBytes(weights))
		return err
	})
}

//export go_weight_batch_open
func go_weight_batch_open(list **C.bs_weight, dst *C.uint64_t, n C.size_t, device C.uint64_t, deviceRoom C.size_t, cuda *C.bs_cuda_job, out **C.bs_weight_batch, e *C.bs_error) C.int32_t {
	return call(nil, e, func() error {
		return open((*unsafe.Pointer)(unsafe.Pointer(out)), func() (*handle, error) {
			weights, err := weightsOf(list, n)
			if err != nil {
				return nil, err
			}
			if dst == nil {
				return nil, invalid("dst is NULL")
			}
			places := make([]uint64, n)
			for k, p := range unsafe.Slice(dst, int(n)) {
				places[k] = uint64(p)
			}
			h := &handle{}
			err = onCUDA(cuda, func(d *cudaDevice) (err error) {
				for k, w := range unsafe.Slice(list, int(n)) {
					if handleOf(unsafe.Pointer(w)).module != d.module {
						return invalid("weight %d is in another CUDA context than the one that is current", k)
					}
				}
				h.batch, err = core.OpenBatch(weights, places, uint64(device), room(deviceRoom), d)
				h.module = d.module
				return err
			})
			return h, err
		})
	})
}

//export go_weight_batch_decode
func go_weight_batch_decode(b *C.bs_weight_batch, stream unsafe.Pointer, e *C.bs_error) C.int32_t {
	return launching(unsafe.Pointer(b), stream, e, func(h *handle, launch core.Launcher) error { return h.batch.Decode(launch) })
}

//export go_weight_batch_close
func go_weight_batch_close(b *C.bs_weight_batch) { closing(unsafe.Pointer(b), func(*handle) {}) }

//export go_reader_plan
func go_reader_plan(r *C.bs_reader, i C.uint64_t, payload unsafe.Pointer, payloadRoom C.size_t, program unsafe.Pointer, programRoom C.size_t, payloadLen, programLen *C.size_t, j *C.bs_job, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		job, err := jobOf(j)
		if err != nil {
			return err
		}
		if payloadLen == nil || programLen == nil {
			return invalid("payload_len or program_len is NULL")
		}
		a, err := memory(payload, payloadRoom)
		if err != nil {
			return err
		}
		b, err := memory(program, programRoom)
		if err != nil {
			return err
		}
		n, m, err := r.Plan(index(i), a, b, job)
		*payloadLen, *programLen = C.size_t(n), C.size_t(m)
		return err
	})
}
