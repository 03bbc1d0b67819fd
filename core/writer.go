package core

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/zeebo/xxh3"

	"bigsmall.dev/bigsmall/codecs"
)

// Options of compressing.
type Options struct {
	Mode      codecs.Mode
	SHA256    bool // store the SHA-256 of the whole source
	NoReplace bool // refuse to replace an existing file
	Force     bool // replace a directory that is not empty
	Compat    bool // write what release 1.0.0 of the original package reads
	Parity    int  // percent of the file that is added so that it can be repaired; see Repair
}

func (o *Options) check() error {
	if o.Mode >= codecs.EndMode {
		return failf(InvalidArgument, "mode %d", o.Mode)
	}
	if o.Parity < 0 || o.Parity > MaxParity {
		return failf(InvalidArgument, "parity of %d percent: give 0 for none, up to %d", o.Parity, MaxParity)
	}
	return nil
}

var modeNames = map[codecs.Mode]string{codecs.Balanced: "balanced", codecs.Inference: "inference", codecs.Storage: "storage"}

// Result is what a compression or decompression did.
type Result struct {
	SourceBytes, OutputBytes int64
	Tensors, Files           int
}

func (r *Result) add(x Result) {
	r.SourceBytes += x.SourceBytes
	r.OutputBytes += x.OutputBytes
	r.Tensors += x.Tensors
	r.Files += x.Files
}

// writer writes one `.bs` file from front to back.
type writer struct {
	tmp      *temporary
	opts     Options
	source   *source
	head     header
	dataAt   int64 // where the data section begins
	entries  []int // what the entry of each of the source's tensors may take in the header
	next     int64 // offset in it of the next payload
	shared   ties
	shard    string // name of the file among its siblings, where ties may lead there
	srcBytes int64
}

// ties knows the tensors written so far by a fingerprint of their bytes, across the shards of a model.
type ties map[tieKey]tieMaster

type tieKey struct {
	bytes int64
	hash  uint64
	md5   [16]byte
}

type tieMaster struct{ shard, name string }

// headerReserve bounds the header of a file of these tensors, so that payloads can be written before it is known: every
// number as long as it can be. It also says what each tensor's entry may take; see tie.
func headerReserve(src *source, base string, shared ties) (total int64, entries []int) {
	longest := 0 // of what a tie adds
	quoted := func(s string) int { b, _ := jsontext.AppendQuote(nil, s); return len(b) }
	for _, t := range src.tensors {
		longest = max(longest, quoted(t.Name))
	}
	for _, m := range shared {
		longest = max(longest, quoted(m.name)+quoted(m.shard)+len(`,"shard":`))
	}
	rows, few := "wpe_delta", "lowcard"
	entries = make([]int, len(src.tensors))
	var buf []byte
	for i, t := range src.tensors {
		bytes := uint64(t.End - t.Begin)
		h := headerTensor{Name: t.Name, Shape: headerShape(t.DType, t.Shape), DType: t.DType.String(), Codec: codecs.CodecLowcard,
			Special: &few, Compressed: bytes + bytes/1024 + 4096, Offset: farthest(src), MD5: strings.Repeat("0", 32)}
		h.Extra = &headerExtra{Head: uint64(codecs.MaxHead(t.End - t.Begin)), Checksum: strings.Repeat("0", 16)}
		if codecs.RowsPossible(h.Shape, t.End-t.Begin) || base != "" {
			h.Codec, h.Special = codecs.CodecRowDelta, &rows
		}
		if base != "" {
			h.Extra.BaseMD5 = h.MD5
		}
		buf = appendTensor(buf[:0], &h)
		entries[i] = len(buf) + 1
		if bytes >= largeTie {
			entries[i] += min(longest, 2048)
		}
		total += int64(entries[i])
	}
	if src.metadata != nil {
		total += int64(len(src.metadata))
	}
	total += 750 + 6*int64(len(base))
	// A source's header with much padding must not unpack from a small file.
	return max(total, (int64(len(src.prefix))-1<<20)/4), entries
}

// farthest bounds the offsets of a file.
func farthest(src *source) uint64 {
	end := uint64(sourceSize(src)) + Bound(0, uint64(len(src.tensors)), 0)
	return end + end/1024
}

func sourceSize(s *source) int64 {
	if n := len(s.tensors); n > 0 {
		return s.tensors[n-1].End
	}
	return 0
}

func newWriter(target string, mode os.FileMode, src *source, base string, opts Options, shared ties, shard string) (*writer, error) {
	tmp, err := newTemporary(target, mode, opts.NoReplace)
	if err != nil {
		return nil, err
	}
	w := &writer{tmp: tmp, opts: opts, source: src, shared: shared, shard: shard}
	name, draft := "bigsmall "+Version, int64(Draft)
	w.head = header{Format: family(src.tensors), Mode: modeNames[opts.Mode], ModelType: "llm", Writer: &name, Draft: &draft}
	if isDiffusion(src.tensors) {
		w.head.ModelType = "diffusion"
	}
	if base != "" {
		w.head.ModelType, w.head.BaseModel = "delta", &base
	}
	if src.metadata != nil {
		if err := json.Unmarshal(src.metadata, &w.head.Metadata); err != nil {
			tmp.abandon()
			return nil, err
		}
	}
	align := int64(dataAlign)
	if sourceSize(src) == 0 { // no payloads to align
		align = codecs.Align
	}
	reserve, entries := headerReserve(src, base, shared)
	w.dataAt, w.entries = roundUp(preamble+reserve, align), entries
	if w.dataAt > preamble+maxHeader {
		tmp.abandon()
		return nil, failf(UnsupportedFeature, "the names and shapes of %d tensors need a header of more than %d bytes", len(src.tensors), maxHeader)
	}
	return w, nil
}

// isDiffusion looks for the names that diffusion models have, as the original package does.
func isDiffusion(tensors []sourceTensor) bool {
	for _, t := range tensors[:min(len(tensors), 200)] {
		name := strings.ToLower(t.Name)
		for _, s := range []string{"unet", "vae", "controlnet", "double_block", "transformer_block", "x_embedder", "joint_blocks", "time_embed"} {
			if strings.Contains(name, s) {
				return true
			}
		}
	}
	return false
}

// item is a tensor on its way into the file, number n of the source's.
type item struct {
	n     int
	spec  sourceTensor
	src   io.ReaderAt
	data  []byte // all of src, where it is in memory
	base  *baseTensor
	entry headerTensor

	xxh  *xxh3.Hasher // while it is digested
	hash uint64
	md5  [16]byte

	// The payload, as far as it is coded and not in the file. See pipeline.
	coded   bool
	head    []byte
	groups  [][]byte
	written int   // groups in the file,
	at      int64 // which end here, relative to the payload
}

// The bytes of an item as a message.

// readPiece is how many bytes of a file are read at once to be digested: 16 of them stay in cache.
const readPiece = 32 << 10

var hashers = sync.Pool{New: func() any { return xxh3.New() }}

func (it *item) size() (all, piece int64) { return it.spec.End - it.spec.Begin, readPiece }

func (it *item) make(dst []byte, off int64, _ *codecs.Scratch) error {
	return readAll(it.src, dst, off)
}

func (it *item) digest(b []byte) {
	if it.spec.End-it.spec.Begin <= readPiece {
		it.hash = xxh3.Hash(b)
		return
	}
	if it.xxh == nil {
		it.xxh = hashers.Get().(*xxh3.Hasher)
		it.xxh.Reset()
	}
	it.xxh.Write(b)
}

func (it *item) end(sum [16]byte, err error) error {
	it.md5 = sum
	if it.xxh != nil {
		it.hash = it.xxh.Sum64()
		hashers.Put(it.xxh)
		it.xxh = nil
	}
	return at(err, "", it.spec.Name)
}

// readAll fills dst with what stands at off.
func readAll(src io.ReaderAt, dst []byte, off int64) error {
	n, err := src.ReadAt(dst, off)
	if n == len(dst) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// copy hands the first n bytes of src to w, and looks between pieces whether the call is cancelled.
func (p *pool) copy(w io.Writer, src io.ReaderAt, n int64) error {
	buf := make([]byte, min(1<<20, n))
	for at := int64(0); at < n; {
		if p.cancelled() {
			return context.Canceled
		}
		b := buf[:min(int64(len(buf)), n-at)]
		if err := readAll(src, b, at); err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
		at += int64(len(b))
	}
	return nil
}

// windowBytes is how much of the source is digested before it is coded: what the page cache keeps until it is read again.
const windowBytes = 1 << 30

// put compresses tensors and appends them in this order.
func (w *writer) put(items []*item, p *pool) error {
	for len(items) > 0 {
		n, bytes := 0, int64(0)
		for n == 0 || n < len(items) && bytes < windowBytes {
			all, _ := items[n].size()
			bytes += all
			n++
		}
		messages := make([]message, n)
		for i, it := range items[:n] {
			messages[i] = it
		}
		if err := digestAll(messages, p); err != nil {
			return err
		}
		for _, it := range items[:n] {
			w.tie(it)
		}
		if err := w.encodeAll(items[:n], p); err != nil {
			return err
		}
		items = items[n:]
	}
	return nil
}

// smallestTie is from how many bytes on a tensor may be a tie: naming its master takes as much as a small payload. From
// largeTie on room is kept for a long name.
const (
	smallestTie = 512
	largeTie    = 1 << 16
)

// writePayload writes part of the payload that is next.
func (w *writer) writePayload(at int64, b []byte) error {
	_, err := w.tmp.WriteAt(b, w.dataAt+w.next+at)
	return err
}

// add ends the payload that is next.
func (w *writer) add(it *item) {
	it.entry.Offset = uint64(w.next)
	w.next += int64(it.entry.Compressed)
	w.head.Tensors = append(w.head.Tensors, it.entry)
	w.srcBytes += it.spec.End - it.spec.Begin
}

// tie fills in the entry, and makes it a tie where the same bytes were written already.
func (w *writer) tie(it *item) {
	it.entry = headerTensor{Name: it.spec.Name, Shape: headerShape(it.spec.DType, it.spec.Shape), DType: it.spec.DType.String(),
		Codec: codecs.CodecStored, MD5: hex.EncodeToString(it.md5[:])}
	if it.spec.End-it.spec.Begin < smallestTie {
		return
	}
	key := tieKey{it.spec.End - it.spec.Begin, it.hash, it.md5}
	m, ok := w.shared[key]
	if !ok {
		w.shared[key] = tieMaster{w.shard, it.spec.Name}
		return
	}
	special := "tied"
	tied := it.entry
	tied.Codec, tied.Special, tied.Extra = codecTied, &special, &headerExtra{TiedTo: m.name}
	if m.shard != w.shard {
		tied.Extra.Shard = m.shard
	}
	tied.Offset = farthest(w.source) // at most: it is not known yet
	if len(appendTensor(nil, &tied))+1 <= w.entries[it.n] {
		it.entry = tied
	}
}

func hash(sum uint64) string { return fmt.Sprintf("%016x", sum) }

// finish writes section, header and trailer, opens what was written as a reader would, and publishes the file. Where it
// fails nothing of the file remains.
func (w *writer) finish(sha256 []byte, p *pool) (size int64, err error) {
	published := false
	defer func() {
		if !published {
			w.tmp.abandon()
		}
	}()
	section := packSection(w.source.prefix)
	if _, err := w.tmp.WriteAt(section, w.dataAt+w.next); err != nil {
		return 0, err
	}
	w.head.Sections = []headerSection{{sectionSource, uint64(w.next), uint64(len(section)), hash(xxh3.Hash(section)), false}}
	w.next += int64(len(section))
	var parity parityShape
	if w.opts.Parity > 0 {
		parity = newParityShape(w.dataAt+w.next, w.opts.Parity)
		w.head.Sections = append(w.head.Sections, headerSection{sectionParity, uint64(w.next), uint64(parity.sectionLen()), hash(xxh3.Hash(parity.head())), true})
		w.next += parity.sectionLen()
	}
	w.head.SHA256 = hex.EncodeToString(sha256)
	text := append(make([]byte, 0, w.dataAt), magic...)
	text = binary.LittleEndian.AppendUint16(text, formatVersion)
	text = binary.LittleEndian.AppendUint32(text, uint32(w.dataAt-preamble))
	text = appendHeader(text, &w.head)
	if int64(len(text)) > w.dataAt {
		return 0, failf(Internal, "header of %d bytes outgrew its room of %d", len(text), w.dataAt)
	}
	text = append(text, bytes.Repeat([]byte{' '}, int(w.dataAt)-len(text))...)
	if _, err := w.tmp.WriteAt(text, 0); err != nil {
		return 0, err
	}
	end := trailer{headerLen: uint64(w.dataAt), dataLen: uint64(w.next), headerHash: xxh3.Hash(text)}
	if w.opts.Parity > 0 {
		if end.parityHash, err = writeParity(w.tmp.File, parity, p); err != nil {
			return 0, err
		}
	}
	if _, err := w.tmp.WriteAt(end.append(nil), w.dataAt+w.next); err != nil {
		return 0, err
	}
	size = w.dataAt + w.next + trailerLen
	if err := w.readBack(size); err != nil {
		return 0, failf(Internal, "the file does not open after writing: %s", err)
	}
	published = true // publish abandons it where it fails
	return size, w.tmp.publish()
}

// readBack checks everything of the file but its blocks, which were decoded as they were coded.
func (w *writer) readBack(size int64) error {
	c, err := openContainer("", w.tmp, size)
	if err != nil {
		return err
	}
	for i := range c.entries {
		e := &c.entries[i]
		if e.tiedTo != "" || e.bytes == 0 {
			continue
		}
		head, err := c.read(e.offset, e.head)
		if err != nil {
			return err
		}
		if _, err := codecs.ParseHead(head, e.checksum, e.dtype, e.bytes, e.compressed); err != nil {
			return err
		}
	}
	return nil
}

// Writer writes a `.bs` file from tensors in memory.
type Writer struct {
	w    *writer
	put  []bool
	done bool // finished, closed or failed
}

// Spec describes a tensor that will be put. Shape is that of the header: see bs_tensor_spec.
type Spec struct {
	Name  string
	DType codecs.DType
	Shape []uint64
}

// Create begins a file of exactly these tensors, in the order in which a safetensors file would hold them. metadata is a
// JSON object of strings, or empty.
func Create(path string, specs []Spec, metadata string, opts Options) (*Writer, error) {
	if opts.SHA256 || opts.Force {
		return nil, failf(InvalidArgument, "the flags for a SHA-256 and for directories go with files and directories, not with a writer")
	}
	if err := opts.check(); err != nil {
		return nil, err
	}
	src := &source{}
	seen := map[string]bool{}
	at := int64(0)
	for _, s := range specs {
		if !s.DType.Valid() {
			return nil, &Error{Status: InvalidArgument, Tensor: s.Name, Msg: fmt.Sprintf("dtype %d is unknown", s.DType)}
		}
		if seen[s.Name] || s.Name == "__metadata__" {
			return nil, &Error{Status: InvalidArgument, Tensor: s.Name, Msg: "the name stands twice, or is reserved"}
		}
		if !validText(s.Name) {
			return nil, &Error{Status: InvalidArgument, Msg: fmt.Sprintf("name %q is not UTF-8", s.Name)}
		}
		seen[s.Name] = true
		n, ok := byteSize(s.Shape, storageBits(s.DType))
		if !ok || len(s.Shape) > MaxDims || n > 1<<62 || at > 1<<62 {
			return nil, &Error{Status: InvalidArgument, Tensor: s.Name, Msg: fmt.Sprintf("shape %d is too large", s.Shape)}
		}
		shape := slices.Clone(s.Shape)
		if per := storageBits(s.DType) / s.DType.Bits(); s.DType == codecs.F4 && len(shape) > 0 {
			shape[len(shape)-1] *= uint64(per)
		} else if s.DType.Bits() < 8 {
			if n*8%uint64(s.DType.Bits()) != 0 {
				return nil, &Error{Status: InvalidArgument, Tensor: s.Name, Msg: fmt.Sprintf("%d bytes are no whole number of %s", n, s.DType)}
			}
			shape = []uint64{n * 8 / uint64(s.DType.Bits())}
		}
		src.tensors = append(src.tensors, sourceTensor{s.Name, s.DType, shape, at, at + int64(n)})
		at += int64(n)
	}
	if metadata != "" {
		var m map[string]string
		if err := json.Unmarshal([]byte(metadata), &m); err != nil {
			return nil, failf(InvalidArgument, "metadata is no JSON object of strings: %s", err)
		}
		var err error
		if src.metadata, err = marshalStrings(m); err != nil {
			return nil, err
		}
	}
	src.prefix = writeSource(src.tensors, src.metadata)
	w, err := newWriter(path, 0, src, "", opts, ties{}, "")
	if err != nil {
		return nil, inFile(err, path)
	}
	return &Writer{w: w, put: make([]bool, len(specs))}, nil
}

// inFile names the file an error is about.
func inFile(err error, file string) error { return at(err, file, "") }

// Put compresses tensor i of the specs. data must have its exact size.
func (w *Writer) Put(i int, data []byte, job *Job) error {
	if w.done {
		return failf(InvalidArgument, "the writer is finished, closed or failed before")
	}
	if i < 0 || i >= len(w.put) {
		return failf(NotFound, "tensor %d of %d", i, len(w.put))
	}
	spec := w.w.source.tensors[i]
	if w.put[i] {
		return &Error{Status: InvalidArgument, Tensor: spec.Name, Msg: "put twice"}
	}
	if n := spec.End - spec.Begin; n != int64(len(data)) {
		return &Error{Status: InvalidArgument, Tensor: spec.Name, Msg: fmt.Sprintf("%d bytes given, its shape and dtype take %d", len(data), n)}
	}
	p := newPool(job)
	p.total(int64(len(data)))
	if err := w.w.put([]*item{{n: i, spec: spec, src: memory(data), data: data}}, p); err != nil {
		w.Close() // part of a tensor may be in the file
		return inFile(err, w.w.tmp.target)
	}
	w.put[i] = true
	return nil
}

// Finish completes and publishes the file.
func (w *Writer) Finish() (Result, error) {
	if w.done {
		return Result{}, failf(InvalidArgument, "the writer is finished, closed or failed before")
	}
	for i, ok := range w.put {
		if !ok {
			return Result{}, &Error{Status: InvalidArgument, Tensor: w.w.source.tensors[i].Name, Msg: "was never put"}
		}
	}
	w.done = true
	n, err := w.w.finish(nil, newPool(nil))
	return Result{w.w.srcBytes + int64(len(w.w.source.prefix)), n, len(w.put), 1}, inFile(err, w.w.tmp.target)
}

// Close frees the writer; without a Finish before, nothing of the file remains.
func (w *Writer) Close() {
	if !w.done {
		w.done = true
		w.w.tmp.abandon()
	}
}

// Bound is the largest `.bs` file that source bytes in n tensors whose names take nameBytes bytes can become.
func Bound(sourceBytes, n, nameBytes uint64) uint64 {
	const perTensor = 512 + 64 // FORMAT.md; 64 for a block that is not full
	blocks := sourceBytes / codecs.BlockWords
	return sourceBytes + 4*4096 + perTensor*n + 12*nameBytes + 64*blocks
}
