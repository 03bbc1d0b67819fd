package core

import (
	"crypto/md5"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/codecs/reference"
)

// Files that the original bigsmall package wrote, releases 1.0.0 to 4.0.0. They have no trailer, no source header and no
// checksum but the MD5 of every tensor, which is therefore compared whenever one is decoded. A tensor decodes as a whole only.

// originalVersions are the container versions that they have.
const originalVersions = 2

// checkOriginal checks the entries of such a file; together they must cover its data.
func (c *container) checkOriginal() error {
	h := &c.header
	if h.TensorCount != uint64(len(h.Tensors)) {
		return failf(Corrupt, "tensor_count is %d, but %d tensors are listed", h.TensorCount, len(h.Tensors))
	}
	c.entries = make([]entry, len(h.Tensors))
	c.byName = make(map[string]int, len(c.entries))
	end := uint64(c.size - c.data)
	order := make([]int, len(h.Tensors))
	for i := range h.Tensors {
		x := &h.Tensors[i]
		order[i] = i
		e, err := c.checkOriginalEntry(x, end)
		if err == nil {
			if _, twice := c.byName[x.Name]; twice {
				err = failf(Corrupt, "listed twice")
			}
		}
		if err != nil {
			return at(err, c.name, x.Name)
		}
		c.entries[i], c.byName[x.Name] = *e, i
	}
	slices.SortStableFunc(order, func(a, b int) int {
		x, y := &h.Tensors[a], &h.Tensors[b]
		switch {
		case x.Offset < y.Offset, x.Offset == y.Offset && x.Compressed < y.Compressed:
			return -1
		case x.Offset == y.Offset && x.Compressed == y.Compressed:
			return 0
		}
		return 1
	})
	next := uint64(0)
	for _, i := range order {
		x := &h.Tensors[i]
		if x.Offset != next {
			return at(failf(Corrupt, "payload at offset %d, where %d is next", x.Offset, next), c.name, x.Name)
		}
		next += x.Compressed
	}
	if next != end {
		return failf(Corrupt, "the data section has %d bytes, of which %d are accounted for", end, next)
	}
	for i := range c.entries {
		if err := c.checkTie(&c.entries[i]); err != nil {
			return at(err, c.name, c.entries[i].name)
		}
	}
	return c.makeSource()
}

func (c *container) checkOriginalEntry(x *headerTensor, end uint64) (*entry, error) {
	d, ok := codecs.ParseDType(x.DType)
	if !ok {
		return nil, failf(UnsupportedFeature, "dtype %q, written by %s, is unknown to this version", x.DType, c.writerName())
	}
	if len(x.Shape) > MaxDims {
		return nil, failf(Corrupt, "%d dimensions; at most %d are allowed", len(x.Shape), MaxDims)
	}
	n, ok := byteSize(x.Shape, storageBits(d))
	if !ok || n > 1<<62 {
		return nil, failf(Corrupt, "shape %d is too large", x.Shape)
	}
	e := &entry{name: x.Name, dtype: d, shape: x.Shape, bytes: int64(n), codec: x.Codec, compressed: int64(x.Compressed)}
	if e.shape == nil {
		e.shape = []uint64{}
	}
	if x.Special != nil {
		e.special = *x.Special
	}
	if e.md5, ok = parseMD5(x.MD5); !ok {
		return nil, failf(Corrupt, "md5 %q is no MD5", x.MD5)
	}
	if x.Compressed > end || x.Offset > end-x.Compressed {
		return nil, failf(Truncated, "payload of %d bytes at offset %d; the file has %d bytes of data: it is incomplete", x.Compressed, x.Offset, end)
	}
	e.offset = c.data + int64(x.Offset)
	extra := x.Extra
	if extra == nil {
		extra = &headerExtra{}
	}
	if x.Codec == codecTied {
		if extra.TiedTo == "" || x.Compressed != 0 {
			return nil, failf(Corrupt, "tied tensor without a master, or with %d bytes of its own", x.Compressed)
		}
		e.tiedTo = extra.TiedTo
		return e, nil
	}
	e.blob = reference.Blob{Codec: x.Codec, Kind: extra.SpecialKind, Elements: int64(e.elements())}
	if !e.blob.Known() {
		what := x.Codec
		if extra.SpecialKind != "" {
			what += " " + extra.SpecialKind
		}
		return nil, failf(UnsupportedCodec, "codec %q, written by %s, is unknown to BigSmall %s", what, c.writerName(), Version)
	}
	if !e.blob.Plausible(e.compressed, e.bytes) {
		return nil, failf(Corrupt, "%d bytes for %d elements", e.compressed, e.elements())
	}
	return e, nil
}

// addAliases adds tensors that are the same as others of the file.
func (c *container) addAliases(names map[string]string) error {
	for _, alias := range slices.Sorted(maps.Keys(names)) {
		i, ok := c.byName[names[alias]]
		_, twice := c.byName[alias]
		if !ok || twice || !c.original {
			return &Error{Status: Corrupt, File: c.name, Tensor: alias, Msg: fmt.Sprintf("should be the same as %q, which is not there, or is there itself", names[alias])}
		}
		e := c.entries[i]
		if e.tiedTo == "" {
			e.tiedTo = e.name
		}
		e.name, e.compressed = alias, 0
		c.byName[alias] = len(c.entries)
		c.entries = append(c.entries, e)
	}
	if len(names) == 0 {
		return nil
	}
	return c.makeSource()
}

// aliasesBeside adds what an index beside a shard says of it: whoever opens the shards one by one must not miss a tensor.
func (c *container) aliasesBeside() error {
	if !c.original {
		return nil
	}
	path := filepath.Join(filepath.Dir(c.name), IndexName)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	x, err := parseIndex(text)
	if err != nil {
		return inFile(err, path)
	}
	return c.addAliases(x.aliases()[filepath.Base(c.name)])
}

// makeSource makes the header that the source's file would have, as the safetensors library lays tensors out.
func (c *container) makeSource() error {
	src := &source{}
	all := slices.Clone(c.entries)
	slices.SortStableFunc(all, func(a, b entry) int { return codecs.CompareLayout(a.dtype, a.name, b.dtype, b.name) })
	next := int64(0)
	for _, e := range all {
		shape := slices.Clone(e.shape)
		if e.dtype == codecs.F4 && len(shape) > 0 {
			shape[len(shape)-1] *= 2
		}
		src.tensors = append(src.tensors, sourceTensor{e.name, e.dtype, shape, next, next + e.bytes})
		next += e.bytes
	}
	if c.header.Metadata != nil {
		var err error
		if src.metadata, err = marshalStrings(c.header.Metadata); err != nil {
			return err
		}
	}
	c.source = writeSource(src.tensors, src.metadata)
	_, err := c.sourceLayout()
	return err
}

// SkipMD5 leaves out the comparison of MD5s where tensors of the original package's files are decoded: nothing else tells
// then that they are damaged.
func (r *Reader) SkipMD5(skip bool) { r.skipMD5.Store(skip) }

// decodeOriginal decodes a tensor of such a file to dst, which has its size.
func (r *Reader) decodeOriginal(m tensor, dst []byte, p *pool) error {
	e := m.entry
	fail := func(err error) error { return at(err, m.file.name, e.name) }
	if e.blob.Codec == reference.XOR && r.base == nil {
		return fail(r.noBase(m.file))
	}
	blob, err := m.file.read(e.offset, e.compressed)
	if err != nil {
		return fail(err)
	}
	run := reference.Run(func(n int, f func(int) error) error {
		return p.run(n, func(i int, _ *codecs.Scratch) error { return f(i) })
	})
	if err := reference.Decode(dst, e.blob, blob, run); err != nil {
		if StatusOf(err) == Cancelled || StatusOf(err) == Internal {
			return fail(err)
		}
		return fail(failf(Corrupt, "%s: %s", e.codec, err))
	}
	if e.blob.Codec == reference.XOR {
		if err := r.addBase(e, dst); err != nil {
			return fail(err)
		}
	} else if r.skipMD5.Load() {
		return nil
	}
	if sum := md5.Sum(dst); sum != e.md5 {
		if e.blob.Codec == reference.XOR {
			return fail(failf(WrongBase, "MD5 of what it and the base %s give is %x, the header says %x: the base is another model or version, or the file is damaged",
				r.base.path, sum, e.md5))
		}
		return fail(failf(Checksum, "MD5 of the decoded bytes is %x, the header says %x", sum, e.md5))
	}
	return nil
}

// addBase makes the difference in dst the tensor.
func (r *Reader) addBase(e *entry, dst []byte) error {
	if err := r.base.has(e.name, e.dtype, e.bytes); err != nil {
		return err
	}
	t, err := r.base.find(e.name, e.dtype, e.bytes)
	if err != nil {
		return err
	}
	buf := make([]byte, min(1<<20, len(dst)))
	for off := 0; off < len(dst); off += len(buf) {
		b := buf[:min(len(buf), len(dst)-off)]
		if err := readAll(t, b, int64(off)); err != nil {
			return err
		}
		for i, x := range b {
			dst[off+i] ^= x
		}
	}
	return nil
}

// mostOriginal is how many bytes of tensors of such files are in memory at once, where they are not the caller's; one always is.
const mostOriginal = 512 << 20

// streamOriginals is streamAll for tensors of such files, by their numbers.
func (r *Reader) streamOriginals(numbers []int, p *pool, sink func(i int, off int64, b []byte, s *codecs.Scratch) error, verdict func(i int, err error) error) error {
	var mu sync.Mutex
	changed := sync.NewCond(&mu)
	used := int64(0)
	return p.run(len(numbers), func(k int, s *codecs.Scratch) error {
		i := numbers[k]
		m, err := r.master(r.tensors[i])
		if err == nil {
			n := m.entry.bytes
			mu.Lock()
			for used > 0 && used+n > mostOriginal {
				p.wait(changed)
			}
			used += n
			mu.Unlock()
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				used -= n
				changed.Broadcast()
			}()
			dst := make([]byte, n)
			if err = r.decodeOriginal(m, dst, p); err == nil {
				if err = sink(i, 0, dst, s); err == nil {
					p.done(n)
				}
			}
		}
		if err != nil && StatusOf(err) != Cancelled {
			err = verdict(i, err)
		}
		return err
	})
}
