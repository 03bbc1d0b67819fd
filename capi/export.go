package main

/*
#include <stdlib.h>
#include "shim.h"
*/
import "C"

import (
	"math"
	"sync"
	"unsafe"

	"github.com/go-json-experiment/json"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/codecs/cpu"
	"bigsmall.dev/bigsmall/core"
)

var version = sync.OnceValue(func() *C.char { return C.CString(core.Version) })

//export go_version
func go_version() *C.char { return version() }

//export go_workers
func go_workers() C.int32_t { return C.int32_t(core.Workers()) }

//export go_set_workers
func go_set_workers(n C.int32_t) C.int32_t {
	if n < 0 {
		return C.BS_INVALID_ARGUMENT
	}
	core.SetWorkers(int(n))
	return C.BS_OK
}

var tiers = sync.OnceValue(func() (names [cpu.AVX512 + 1]*C.char) {
	for t := range names {
		names[t] = C.CString(cpu.Tier(t).String())
	}
	return names
})

//export go_cpu
func go_cpu() *C.char { return tiers()[cpu.Active()] }

//export go_set_cpu
func go_set_cpu(name *C.char, e *C.bs_error) C.int32_t {
	return call(nil, e, func() error {
		if err := cpu.Use(optional(name)); err != nil {
			return invalid("%s", err)
		}
		return nil
	})
}

// open stores a new handle at the caller's address.
func open(out *unsafe.Pointer, make func() (*handle, error)) error {
	if out == nil {
		return invalid("the address for the handle is NULL")
	}
	*out = nil
	h, err := make()
	if err == nil {
		*out = newHandle(h)
	}
	return err
}

//export go_reader_open
func go_reader_open(name, base *C.char, out **C.bs_reader, e *C.bs_error) C.int32_t {
	return call(nil, e, func() error {
		return open((*unsafe.Pointer)(unsafe.Pointer(out)), func() (*handle, error) {
			p, err := path(name, "path")
			if err != nil {
				return nil, err
			}
			r, err := core.Open(p, optional(base))
			return &handle{reader: r}, err
		})
	})
}

//export go_reader_open_memory
func go_reader_open_memory(files *C.bs_memory_file, n C.size_t, base *C.char, out **C.bs_reader, e *C.bs_error) C.int32_t {
	return call(nil, e, func() error {
		return open((*unsafe.Pointer)(unsafe.Pointer(out)), func() (*handle, error) {
			if n == 0 || files == nil || n > maxItems {
				return nil, invalid("%d files at %p", n, files)
			}
			list := make([]core.MemoryFile, n)
			for k := range list {
				f := element(files, files.size, k)
				if f.size != files.size {
					return nil, invalid("file %d has the size %d, the first one %d", k, f.size, files.size)
				}
				if err := sized(unsafe.Pointer(f), f.size, unsafe.Sizeof(*f), "bs_memory_file"); err != nil {
					return nil, err
				}
				b, err := memory(f.src, f.src_len)
				if err != nil {
					return nil, err
				}
				list[k] = core.MemoryFile{Name: optional(f.name), Src: b}
			}
			r, err := core.OpenMemory(list, optional(base))
			return &handle{reader: r}, err
		})
	})
}

//export go_reader_close
func go_reader_close(r *C.bs_reader) {
	closing(unsafe.Pointer(r), func(h *handle) { h.reader.Close() })
}

// reading calls f with the reader of a handle.
func reading(r *C.bs_reader, e *C.bs_error, f func(*core.Reader) error) C.int32_t {
	h := handleOf(unsafe.Pointer(r))
	return call(h, e, func() error {
		if h == nil || h.reader == nil {
			return invalid("reader is NULL, or none")
		}
		return f(h.reader)
	})
}

// maxItems bounds the length of a caller's list, before anything of that size is allocated.
const maxItems = 1 << 26

// index makes an index of a caller's, which core checks further.
func index(i C.uint64_t) int { return int(min(uint64(i), math.MaxInt)) }

//export go_reader_count
func go_reader_count(r *C.bs_reader, count *C.uint64_t, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		if count == nil {
			return invalid("count is NULL")
		}
		*count = C.uint64_t(r.Len())
		return nil
	})
}

//export go_reader_find
func go_reader_find(r *C.bs_reader, name *C.char, at *C.uint64_t, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		s, err := text(name, "name")
		if err != nil {
			return err
		}
		if at == nil {
			return invalid("index is NULL")
		}
		i, err := r.Find(s)
		*at = C.uint64_t(i)
		return err
	})
}

//export go_reader_describe
func go_reader_describe(r *C.bs_reader, i C.uint64_t, out *C.bs_tensor, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		if out == nil {
			return invalid("tensor is NULL")
		}
		if err := sized(nil, out.size, unsafe.Sizeof(*out), "bs_tensor"); err != nil {
			return err
		}
		t, err := r.Tensor(index(i))
		if err != nil {
			return err
		}
		out.n_bytes, out.payload_bytes, out.dtype, out.n_dims = C.uint64_t(t.Bytes), C.uint64_t(t.Payload), C.int32_t(t.DType), C.int32_t(len(t.Shape))
		n := C.uint64_t(1)
		for k, d := range t.Shape {
			out.shape[k] = C.uint64_t(d)
			n *= C.uint64_t(d)
		}
		out.n_elements = n
		return nil
	})
}

//export go_reader_locate
func go_reader_locate(r *C.bs_reader, i C.uint64_t, file, offset, n *C.uint64_t, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		if file == nil || offset == nil || n == nil {
			return invalid("file, offset or n_bytes is NULL")
		}
		f, off, size, err := r.Locate(index(i))
		*file, *offset, *n = C.uint64_t(f), C.uint64_t(off), C.uint64_t(size)
		return err
	})
}

//export go_reader_name
func go_reader_name(r *C.bs_reader, i C.uint64_t, dst *C.char, room C.size_t, n *C.size_t, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		t, err := r.Tensor(index(i))
		if err != nil {
			return err
		}
		return put([]byte(t.Name), dst, room, n)
	})
}

//export go_reader_metadata
func go_reader_metadata(r *C.bs_reader, dst *C.char, room C.size_t, n *C.size_t, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		b, err := r.Metadata()
		if err != nil {
			return err
		}
		return put(b, dst, room, n)
	})
}

//export go_reader_info
func go_reader_info(r *C.bs_reader, dst *C.char, room C.size_t, n *C.size_t, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		b, err := r.Info()
		if err != nil {
			return err
		}
		return put(b, dst, room, n)
	})
}

//export go_reader_breakdown
func go_reader_breakdown(r *C.bs_reader, modes C.int32_t, dst *C.char, room C.size_t, n *C.size_t, j *C.bs_job, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		job, err := jobOf(j)
		if err != nil {
			return err
		}
		b, err := r.Breakdown(modes != 0, job)
		if err != nil {
			return err
		}
		return put(b, dst, room, n)
	})
}

//export go_reader_decode
func go_reader_decode(r *C.bs_reader, i C.uint64_t, dst unsafe.Pointer, room C.size_t, j *C.bs_job, e *C.bs_error) C.int32_t {
	return decoding(r, dst, room, j, e, func(r *core.Reader, b []byte, job *core.Job) error {
		return r.Decode(index(i), b, job)
	})
}

//export go_reader_decode_verified
func go_reader_decode_verified(r *C.bs_reader, i C.uint64_t, dst unsafe.Pointer, room C.size_t, j *C.bs_job, e *C.bs_error) C.int32_t {
	return decoding(r, dst, room, j, e, func(r *core.Reader, b []byte, job *core.Job) error {
		return r.DecodeVerified(index(i), b, job)
	})
}

//export go_reader_decode_range
func go_reader_decode_range(r *C.bs_reader, i, first, count C.uint64_t, dst unsafe.Pointer, room C.size_t, j *C.bs_job, e *C.bs_error) C.int32_t {
	return decoding(r, dst, room, j, e, func(r *core.Reader, b []byte, job *core.Job) error {
		return r.DecodeRange(index(i), uint64(first), uint64(count), b, job)
	})
}

func decoding(r *C.bs_reader, dst unsafe.Pointer, room C.size_t, j *C.bs_job, e *C.bs_error, f func(*core.Reader, []byte, *core.Job) error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		job, err := jobOf(j)
		if err != nil {
			return err
		}
		b, err := memory(dst, room)
		if err != nil {
			return err
		}
		return f(r, b, job)
	})
}

//export go_reader_decode_many
func go_reader_decode_many(r *C.bs_reader, items *C.bs_decode_item, n C.size_t, j *C.bs_job, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		job, err := jobOf(j)
		if err != nil {
			return err
		}
		if n > 0 && items == nil || n > maxItems {
			return invalid("%d items at %p", n, items)
		}
		list := make([]core.Item, n)
		for k, it := range unsafe.Slice(items, int(n)) {
			b, err := memory(it.dst, it.dst_cap)
			if err != nil {
				return err
			}
			list[k] = core.Item{Index: index(it.index), Dst: b}
		}
		return r.DecodeMany(list, job)
	})
}

//export go_compress_bound
func go_compress_bound(source, n, names C.uint64_t) C.uint64_t {
	return C.uint64_t(core.Bound(uint64(source), uint64(n), uint64(names)))
}

//export go_writer_open
func go_writer_open(name *C.char, specs *C.bs_tensor_spec, n C.size_t, metadata *C.char, o *C.bs_compress_options, out **C.bs_writer, e *C.bs_error) C.int32_t {
	return call(nil, e, func() error {
		return open((*unsafe.Pointer)(unsafe.Pointer(out)), func() (*handle, error) {
			p, err := path(name, "path")
			if err != nil {
				return nil, err
			}
			opts, err := compressOptions(o)
			if err != nil {
				return nil, err
			}
			if n > 0 && specs == nil || n > maxItems {
				return nil, invalid("%d specs at %p", n, specs)
			}
			list := make([]core.Spec, n)
			for k := range list {
				s := element(specs, specs.size, k)
				if s.size != specs.size {
					return nil, invalid("spec %d has the size %d, the first one %d", k, s.size, specs.size)
				}
				if list[k], err = spec(s); err != nil {
					return nil, err
				}
			}
			w, err := core.Create(p, list, optional(metadata), opts)
			return &handle{writer: w}, err
		})
	})
}

func spec(s *C.bs_tensor_spec) (core.Spec, error) {
	if err := sized(unsafe.Pointer(s), s.size, unsafe.Sizeof(*s), "bs_tensor_spec"); err != nil {
		return core.Spec{}, err
	}
	name, err := text(s.name, "name of a tensor")
	if err != nil {
		return core.Spec{}, err
	}
	if s.n_dims < 0 || s.n_dims > C.BS_MAX_DIMS || s.n_dims > 0 && s.shape == nil {
		return core.Spec{}, invalid("tensor %q has %d dimensions, or a NULL shape", name, s.n_dims)
	}
	if s.dtype < 0 || s.dtype > math.MaxUint8 {
		return core.Spec{}, invalid("tensor %q has the dtype %d", name, s.dtype)
	}
	shape := make([]uint64, s.n_dims)
	for k, d := range unsafe.Slice((*uint64)(unsafe.Pointer(s.shape)), int(s.n_dims)) {
		shape[k] = d
	}
	return core.Spec{Name: name, DType: codecs.DType(s.dtype), Shape: shape}, nil
}

func writing(w *C.bs_writer, e *C.bs_error, f func(*core.Writer) error) C.int32_t {
	h := handleOf(unsafe.Pointer(w))
	return call(h, e, func() error {
		if h == nil || h.writer == nil {
			return invalid("writer is NULL, or none")
		}
		return f(h.writer)
	})
}

//export go_writer_put
func go_writer_put(w *C.bs_writer, i C.uint64_t, src unsafe.Pointer, n C.size_t, j *C.bs_job, e *C.bs_error) C.int32_t {
	return writing(w, e, func(w *core.Writer) error {
		job, err := jobOf(j)
		if err != nil {
			return err
		}
		b, err := memory(src, n)
		if err != nil {
			return err
		}
		return w.Put(index(i), b, job)
	})
}

//export go_writer_finish
func go_writer_finish(w *C.bs_writer, out *C.bs_result, e *C.bs_error) C.int32_t {
	return writing(w, e, func(w *core.Writer) error {
		if err := checkResult(out); err != nil {
			return err
		}
		r, err := w.Finish()
		if err != nil {
			return err
		}
		return result(r, out)
	})
}

//export go_writer_close
func go_writer_close(w *C.bs_writer) {
	closing(unsafe.Pointer(w), func(h *handle) { h.writer.Close() })
}

// converting is what the functions on whole files share: paths, job and result.
func converting(src, dst *C.char, j *C.bs_job, out *C.bs_result, e *C.bs_error, f func(src, dst string, job *core.Job) (core.Result, error)) C.int32_t {
	return call(nil, e, func() error {
		from, err := path(src, "src")
		if err != nil {
			return err
		}
		to, err := path(dst, "dst")
		if err != nil {
			return err
		}
		job, err := jobOf(j)
		if err != nil {
			return err
		}
		if err := checkResult(out); err != nil {
			return err
		}
		r, err := f(from, to, job)
		if err != nil {
			return err
		}
		return result(r, out)
	})
}

//export go_compress
func go_compress(src, dst *C.char, o *C.bs_compress_options, j *C.bs_job, out *C.bs_result, e *C.bs_error) C.int32_t {
	return converting(src, dst, j, out, e, func(src, dst string, job *core.Job) (core.Result, error) {
		opts, err := compressOptions(o)
		if err != nil {
			return core.Result{}, err
		}
		return core.Compress(src, dst, opts, job)
	})
}

//export go_compress_delta
func go_compress_delta(src, base, dst *C.char, o *C.bs_compress_options, j *C.bs_job, out *C.bs_result, e *C.bs_error) C.int32_t {
	return converting(src, dst, j, out, e, func(src, dst string, job *core.Job) (core.Result, error) {
		opts, err := compressOptions(o)
		if err != nil {
			return core.Result{}, err
		}
		from, err := path(base, "base")
		if err != nil {
			return core.Result{}, err
		}
		return core.CompressDelta(src, from, dst, opts, job)
	})
}

//export go_decompress
func go_decompress(src, dst *C.char, o *C.bs_decompress_options, j *C.bs_job, out *C.bs_result, e *C.bs_error) C.int32_t {
	return converting(src, dst, j, out, e, func(src, dst string, job *core.Job) (core.Result, error) {
		var opts core.Options
		base := ""
		if o != nil {
			if err := sized(unsafe.Pointer(o), o.size, unsafe.Sizeof(*o), "bs_decompress_options"); err != nil {
				return core.Result{}, err
			}
			if err := flags(o.flags, &opts); err != nil {
				return core.Result{}, err
			}
			base = optional(o.base)
		}
		return core.Decompress(src, dst, base, opts, job)
	})
}

//export go_verify
func go_verify(name, source, base *C.char, j *C.bs_job, out *C.bs_verify_result, dst *C.char, room C.size_t, n *C.size_t, e *C.bs_error) C.int32_t {
	return call(nil, e, func() error {
		p, err := path(name, "path")
		if err != nil {
			return err
		}
		job, err := jobOf(j)
		if err != nil {
			return err
		}
		b, err := memory(unsafe.Pointer(dst), room)
		if err != nil {
			return err
		}
		if out == nil {
			return invalid("result is NULL")
		}
		if err := sized(nil, out.size, unsafe.Sizeof(*out), "bs_verify_result"); err != nil {
			return err
		}
		rep, err := core.Verify(p, optional(source), optional(base), job)
		if err != nil {
			return err
		}
		out.n_tensors, out.n_bad = C.uint64_t(rep.Tensors), C.uint64_t(len(rep.Bad))
		used := 0
		for _, x := range rep.Bad {
			line, err := json.Marshal(x)
			if err != nil {
				return err
			}
			if line = append(line, '\n'); len(line) > len(b)-used {
				break
			}
			used += copy(b[used:], line)
		}
		if n != nil {
			*n = C.size_t(used)
		}
		return nil
	})
}

//export go_repair
func go_repair(name, dst *C.char, j *C.bs_job, out *C.bs_repair_result, e *C.bs_error) C.int32_t {
	return call(nil, e, func() error {
		p, err := path(name, "path")
		if err != nil {
			return err
		}
		job, err := jobOf(j)
		if err != nil {
			return err
		}
		if out != nil {
			if err := sized(nil, out.size, unsafe.Sizeof(*out), "bs_repair_result"); err != nil {
				return err
			}
		}
		did, err := core.Repair(p, optional(dst), job)
		if out != nil {
			out.n_files, out.n_repaired, out.n_pieces = C.uint64_t(did.Files), C.uint64_t(did.Repaired), C.uint64_t(did.Pieces)
		}
		return err
	})
}

//export go_convert
func go_convert(src, dst, base *C.char, o *C.bs_compress_options, j *C.bs_job, out *C.bs_result, e *C.bs_error) C.int32_t {
	return converting(src, dst, j, out, e, func(src, dst string, job *core.Job) (core.Result, error) {
		opts, err := compressOptions(o)
		if err != nil {
			return core.Result{}, err
		}
		return core.Convert(src, dst, optional(base), opts, job)
	})
}

//export go_reader_skip_md5
func go_reader_skip_md5(r *C.bs_reader, skip C.int32_t, e *C.bs_error) C.int32_t {
	return reading(r, e, func(r *core.Reader) error {
		r.SkipMD5(skip != 0)
		return nil
	})
}
