package core

import (
	"bytes"
	"crypto/md5"
	"crypto/sha256"
	"os"
	"path/filepath"
	"strings"

	"bigsmall.dev/bigsmall/codecs"
)

// Decompress restores a `.safetensors` file, or a directory of them, byte for byte. Every tensor's MD5 is checked before
// the target appears. basePath is the base model of a delta, or "".
func Decompress(src, dst, basePath string, opts Options, job *Job) (Result, error) {
	p := newPool(job)
	if err := notTheBase(dst, basePath); err != nil {
		return Result{}, err
	}
	info, err := os.Stat(src)
	if err != nil {
		return Result{}, inFile(err, src)
	}
	if info.IsDir() {
		return decompressTree(src, dst, basePath, opts, p)
	}
	return decompressFile(src, dst, basePath, opts, true, p)
}

// decompressFile restores one file; total says that it is all there is to do.
func decompressFile(src, dst, basePath string, opts Options, total bool, p *pool) (res Result, err error) {
	if sameFile(src, dst) {
		return res, failf(InvalidArgument, "%s and %s are the same file", src, dst)
	}
	r, err := Open(src, basePath)
	if err != nil {
		return res, err
	}
	defer r.Close()
	c := r.files[0]
	layout, err := c.sourceLayout()
	if err != nil {
		return res, inFile(err, src)
	}
	if err := r.checkIdentities(p); err != nil {
		return res, err
	}
	mode := os.FileMode(0o644)
	if info, err := os.Stat(src); err == nil {
		mode = info.Mode()
	}
	tmp, err := newTemporary(dst, mode, opts.NoReplace)
	if err != nil {
		return res, inFile(err, dst)
	}
	published := false
	defer func() {
		if !published {
			tmp.abandon()
		}
	}()
	if _, err := tmp.WriteAt(layout.prefix, 0); err != nil {
		return res, inFile(err, dst)
	}
	start := map[string]int64{}
	for _, t := range layout.tensors {
		start[t.Name] = int64(len(layout.prefix)) + t.Begin
	}
	size := int64(len(layout.prefix)) + sourceSize(layout)
	if total {
		p.total(size)
	}
	p.done(int64(len(layout.prefix)))
	err = r.streamAll(p, func(i int, off int64, b []byte) error {
		_, err := tmp.WriteAt(b, start[r.tensors[i].entry.name]+off)
		return inFile(err, dst)
	}, func(_ int, err error) error { return err })
	if err != nil {
		return res, err
	}
	if c.sha256 != nil {
		h := sha256.New()
		if err := p.copy(h, tmp, size); err != nil {
			return res, inFile(err, dst)
		}
		if sum := h.Sum(nil); !bytes.Equal(sum, c.sha256) {
			return res, inFile(failf(Checksum, "SHA-256 of the restored file is %x, not %x", sum, c.sha256), src)
		}
	}
	published = true
	if err := tmp.publish(); err != nil {
		return res, inFile(err, dst)
	}
	return Result{c.size, size, len(c.entries), 1}, nil
}

// checkIdentities makes sure, before anything is written, that the base is the right one for every tensor.
func (r *Reader) checkIdentities(p *pool) error {
	var need []tensor
	for _, t := range r.tensors {
		if t.entry.baseMD5 != nil {
			need = append(need, t)
		}
	}
	if len(need) > 0 && r.base == nil {
		return r.noBase(need[0].file)
	}
	return p.run(len(need), func(i int, _ *codecs.Scratch) error {
		e := need[i].entry
		_, err := r.base.tensor(e.name, e.dtype, e.bytes, e.baseMD5, p)
		return at(err, need[i].file.name, e.name)
	})
}

// streamAll decodes every tensor and hands its bytes to sink, in order and a few MiB at a time; then it compares the MD5.
// What goes wrong with tensor i goes through verdict, and ends everything where that returns an error.
func (r *Reader) streamAll(p *pool, sink func(i int, off int64, b []byte) error, verdict func(i int, err error) error) error {
	one := func(i int) error {
		err := r.stream(i, p, func(off int64, b []byte) error { return sink(i, off, b) })
		if err != nil && StatusOf(err) != Cancelled {
			err = verdict(i, err)
		}
		return err
	}
	size := func(i int) int64 { return r.tensors[i].entry.bytes }
	return batches(len(r.tensors), size, func(lo, hi int) error {
		return p.run(hi-lo, func(i int, _ *codecs.Scratch) error { return one(lo + i) })
	})
}

// stream decodes tensor i piece by piece.
func (r *Reader) stream(i int, p *pool, sink func(off int64, b []byte) error) error {
	t := r.tensors[i]
	sum := md5.New()
	if t.entry.bytes > 0 {
		q, err := r.openPayload(t)
		if err != nil {
			return err
		}
		const run = codecs.GroupBlocks
		per := q.BlockBytes() * run
		groups := int((t.entry.bytes + per - 1) / per)
		window := p.window(per)
		buf := make([]byte, min(int64(window)*per, t.entry.bytes))
		for first := 0; first < groups; first += window {
			lo := int64(first) * per
			hi := min(lo+int64(window)*per, t.entry.bytes)
			out := buf[:hi-lo]
			err := p.run(min(window, groups-first), func(k int, s *codecs.Scratch) error {
				a := lo + int64(k)*per
				z := min(a+per, hi)
				b := (first + k) * run
				return q.decode(b, min(b+run, q.Blocks()), a, z, out[a-lo:z-lo], s)
			})
			if err != nil {
				return at(err, t.file.name, t.entry.name)
			}
			err = p.run(2, func(k int, _ *codecs.Scratch) error {
				if k == 0 {
					sum.Write(out)
					return nil
				}
				return sink(lo, out)
			})
			if err != nil {
				return err
			}
			p.done(hi - lo)
		}
	}
	if got := [16]byte(sum.Sum(nil)); got != t.entry.md5 {
		return at(failf(Checksum, "MD5 of the decoded bytes is %x, the header says %x", got, t.entry.md5), t.file.name, t.entry.name)
	}
	return nil
}

// window is how many groups of that many bytes are in flight at once: enough for all threads, at most 32 MiB beyond
// that.
func (p *pool) window(per int64) int {
	return max(p.width(), min(4*p.width(), int(smallTensor/per)))
}

// decompressTree restores a directory.
func decompressTree(src, dst, basePath string, opts Options, p *pool) (res Result, err error) {
	t, err := readTree(src)
	if err != nil {
		return res, inFile(err, src)
	}
	found := false
	for _, f := range t.files {
		found = found || strings.HasSuffix(f, ourExt)
	}
	if !found {
		return res, failf(InvalidArgument, "%s holds no %s file", src, ourExt)
	}
	if err := t.check(src, p); err != nil {
		return res, err
	}
	err = newTree(src, dst, opts.Force, func(tmp string) error {
		for _, d := range t.dirs {
			if err := os.MkdirAll(filepath.Join(tmp, d), 0o755); err != nil {
				return err
			}
		}
		for _, f := range t.files {
			in, out := filepath.Join(src, f), filepath.Join(tmp, f)
			switch {
			case strings.HasSuffix(f, ourExt):
				r, err := decompressFile(in, strings.TrimSuffix(out, ourExt)+sourceExt, folderBase(basePath, filepath.Dir(f)), Options{NoReplace: true}, false, p)
				if err != nil {
					return err
				}
				res.add(r)
			case filepath.Base(f) == IndexName:
				if err := restoreIndexes(in, filepath.Dir(out)); err != nil {
					return err
				}
			default:
				if err := copyFile(in, out); err != nil {
					return err
				}
			}
		}
		return nil
	})
	return res, inFile(err, dst)
}

// restoreIndexes writes the source's indexes that a bigsmall.index.json holds.
func restoreIndexes(path, dir string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	x, err := parseIndex(text)
	if err != nil {
		return inFile(err, path)
	}
	for _, s := range x.Metadata.Sources {
		if filepath.Base(s.Name) != s.Name || !strings.HasSuffix(s.Name, indexExt) {
			return inFile(failf(Corrupt, "index %q is no plain file name", s.Name), path)
		}
		if err := os.WriteFile(filepath.Join(dir, s.Name), []byte(s.Text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
