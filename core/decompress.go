package core

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

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
	return decompressFile(src, dst, basePath, nil, opts, true, p)
}

// decompressFile restores one file; total says that it is all there is to do. aliases are further tensors of it.
func decompressFile(src, dst, basePath string, aliases map[string]string, opts Options, total bool, p *pool) (res Result, err error) {
	if sameFile(src, dst) {
		return res, failf(InvalidArgument, "%s and %s are the same file", src, dst)
	}
	r, err := openFile(src, basePath, aliases)
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
	err = r.streamAll(p, func(i int, off int64, b []byte, _ *codecs.Scratch) error {
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
		if t.entry.needsBase() {
			need = append(need, t)
		}
	}
	if len(need) > 0 && r.base == nil {
		return r.noBase(need[0].file)
	}
	need = slices.DeleteFunc(need, func(t tensor) bool { return t.entry.baseMD5 == nil }) // of those the result tells
	var tensors []*baseTensor
	for _, t := range need {
		b, err := r.base.find(t.entry.name, t.entry.dtype, t.entry.bytes)
		if err != nil {
			return at(err, t.file.name, t.entry.name)
		}
		tensors = append(tensors, b)
	}
	if err := r.base.identify(tensors, p); err != nil {
		return err
	}
	for _, t := range need {
		e := t.entry
		if _, err := r.base.tensor(e.name, e.dtype, e.bytes, e.baseMD5, p); err != nil {
			return at(err, t.file.name, e.name)
		}
	}
	return nil
}

// streamAll decodes every tensor, hands its bytes to sink piece by piece, in any order and many at once, and compares the
// MD5. What goes wrong with tensor i goes through verdict, and ends everything where that returns an error.
func (r *Reader) streamAll(p *pool, sink func(i int, off int64, b []byte, s *codecs.Scratch) error, verdict func(i int, err error) error) error {
	var messages []message
	var originals []int
	for i, t := range r.tensors {
		if t.file.original && t.entry.bytes > 0 {
			originals = append(originals, i)
			continue
		}
		messages = append(messages, &decoding{tensor: t, i: i, r: r, pool: p, sink: sink, verdict: verdict})
	}
	if err := r.streamOriginals(originals, p, sink, verdict); err != nil {
		return err
	}
	return digestAll(messages, p)
}

// decoding is a tensor on its way out of a file.
type decoding struct {
	tensor
	i       int
	r       *Reader
	pool    *pool
	sink    func(i int, off int64, b []byte, s *codecs.Scratch) error
	verdict func(i int, err error) error
	open    sync.Once
	payload *payload
	err     error
}

// pieceBlocks is how many blocks are decoded at once.
const pieceBlocks = 4

func (d *decoding) size() (all, piece int64) {
	m, err := d.r.master(d.tensor) // a tie may be of another dtype: its blocks are its master's
	if err != nil {
		m = d.tensor // make fails
	}
	return d.entry.bytes, int64(pieceBlocks * codecs.BlockWords * m.entry.dtype.WordBytes())
}

func (d *decoding) make(dst []byte, off int64, s *codecs.Scratch) error {
	d.open.Do(func() { d.payload, d.err = d.r.openPayload(d.tensor, d.pool) })
	if d.err != nil {
		return d.err
	}
	q, end := d.payload, off+int64(len(dst))
	first, last := off/q.BlockBytes(), (end+q.BlockBytes()-1)/q.BlockBytes()
	if err := q.decode(int(first), int(last), off, end, dst, s); err != nil {
		return at(err, d.file.name, d.entry.name)
	}
	if err := d.sink(d.i, off, dst, s); err != nil {
		return err
	}
	d.pool.done(int64(len(dst)))
	return nil
}

func (d *decoding) digest([]byte) {}

func (d *decoding) end(sum [16]byte, err error) error {
	d.payload = nil // tables would pile up
	if err == nil && sum != d.entry.md5 {
		err = at(failf(Checksum, "MD5 of the decoded bytes is %x, the header says %x", sum, d.entry.md5), d.file.name, d.entry.name)
	}
	if err != nil && StatusOf(err) != Cancelled {
		err = d.verdict(d.i, err)
	}
	return err
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
	err = newTree(t, dst, opts.Force, func(tmp string) error {
		for _, d := range t.dirs {
			if err := os.MkdirAll(filepath.Join(tmp, d), 0o755); err != nil {
				return err
			}
		}
		for _, f := range t.files {
			in, out := filepath.Join(src, f), filepath.Join(tmp, f)
			switch {
			case strings.HasSuffix(f, ourExt):
				r, err := decompressFile(in, strings.TrimSuffix(out, ourExt)+sourceExt, folderBase(basePath, filepath.Dir(f)), t.aliases[f], Options{NoReplace: true}, false, p)
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
	if len(x.Metadata.Sources) == 0 && len(x.shards()) > 1 { // of the original package, which keeps none
		s, err := x.madeSource()
		if err != nil {
			return err
		}
		x.Metadata.Sources = append(x.Metadata.Sources, s)
	}
	for _, s := range x.Metadata.Sources {
		if err := os.WriteFile(filepath.Join(dir, s.Name), []byte(s.Text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
