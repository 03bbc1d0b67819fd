package core

import (
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unicode/utf8"

	"github.com/go-json-experiment/json"

	"bigsmall.dev/bigsmall/codecs"
)

// IndexName is the file that lists the shards of a model directory.
const IndexName = "bigsmall.index.json"

// Reader decodes the tensors of a `.bs` file or of a model directory. It is safe for use by many goroutines at once.
type Reader struct {
	path    string
	files   []*container
	closers []io.Closer
	tensors []tensor
	byName  map[string]int
	base    *base
	skipMD5 atomic.Bool

	mu       sync.Mutex
	recent   []*payload          // a few, most recent last: slices of one tensor come in runs
	siblings map[string]*sibling // files that ties lead to
	dir      string              // where they are, or ""
}

type tensor struct {
	file  *container
	entry *entry
}

type sibling struct {
	c   *container
	f   *os.File
	err error
}

// Open opens a `.bs` file or a directory of them; only headers are read. basePath is the base model of a delta, or "".
func Open(path, basePath string) (*Reader, error) {
	r := &Reader{path: path}
	info, err := os.Stat(path)
	if err != nil {
		return nil, inFile(err, path)
	}
	names, index := []string{path}, &shardIndex{}
	if info.IsDir() {
		if names, index, err = shardFiles(path); err != nil {
			return nil, err
		}
	}
	aliases := index.aliases()
	for _, name := range names {
		if err = r.add(name, aliases[filepath.Base(name)]); err != nil {
			break
		}
	}
	if err == nil && !info.IsDir() {
		err = r.files[0].aliasesBeside()
	}
	if err == nil {
		err = r.index(filepath.Dir(names[0]))
		if e, ok := err.(*Error); ok && len(index.shards()) > 0 {
			e.Status, e.Msg = Corrupt, "another shard holds a tensor of that name too: one of them is of another model"
		}
	}
	if err == nil {
		err = index.check(filepath.Join(path, IndexName), func(shard, tensor string) bool {
			i, ok := r.byName[tensor]
			return ok && filepath.Base(r.tensors[i].file.name) == shard
		})
	}
	return r.withBase(basePath, err)
}

// openFile is Open of a file to which an index adds tensors.
func openFile(path, basePath string, aliases map[string]string) (*Reader, error) {
	r := &Reader{path: path}
	err := r.add(path, aliases)
	if err == nil {
		err = r.index(filepath.Dir(path))
	}
	return r.withBase(basePath, err)
}

// withBase ends the opening of a reader: with its base, where there is one, or with the error that came up before.
func (r *Reader) withBase(basePath string, err error) (*Reader, error) {
	if err == nil && basePath != "" {
		r.base, err = openBase(basePath)
	}
	if err == nil {
		err = r.checkBase()
	}
	if err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// MemoryFile is a whole `.bs` file in memory. Name is its file name within its model, "" for a lone file. A last one may be the
// text of the model's bigsmall.index.json, and has that name.
type MemoryFile struct {
	Name string
	Src  []byte
}

// OpenMemory opens files in memory as one model. Opening reads all of a file but its payloads; decoding a tensor reads the
// payload that Locate tells, which must be there and unchanged meanwhile. basePath is as in Open.
func OpenMemory(files []MemoryFile, basePath string) (*Reader, error) {
	r := &Reader{}
	var names []string
	index := &shardIndex{}
	if n := len(files) - 1; n > 0 && filepath.Base(files[n].Name) == IndexName {
		var err error
		if index, err = parseIndex(files[n].Src); err != nil {
			return nil, inFile(err, files[n].Name)
		}
		files = files[:n]
	}
	aliases := index.aliases()
	for _, f := range files {
		c, err := openContainer(f.Name, memory(f.Src), int64(len(f.Src)))
		if err == nil {
			err = c.addAliases(aliases[filepath.Base(f.Name)])
		}
		if err != nil {
			return nil, err
		}
		r.files, names = append(r.files, c), append(names, f.Name)
	}
	if len(files) == 0 {
		return nil, failf(InvalidArgument, "no file to open")
	}
	err := allNumbers(names)
	if err == nil {
		err = r.index("")
	}
	return r.withBase(basePath, err)
}

func (r *Reader) add(name string, aliases map[string]string) error {
	f, info, err := openRegular(name)
	if err != nil {
		return err
	}
	r.closers = append(r.closers, f)
	c, err := openContainer(name, f, info.Size())
	if err != nil {
		return err
	}
	r.files = append(r.files, c)
	return c.addAliases(aliases)
}

func (r *Reader) index(dir string) error {
	r.dir, r.byName = dir, map[string]int{}
	for _, c := range r.files {
		for i := range c.entries {
			e := &c.entries[i]
			if j, twice := r.byName[e.name]; twice {
				return &Error{Status: InvalidArgument, File: c.name, Tensor: e.name,
					Msg: fmt.Sprintf("%s holds a tensor of that name too: open one of the files by itself", r.tensors[j].file.name)}
			}
			r.byName[e.name] = len(r.tensors)
			r.tensors = append(r.tensors, tensor{c, e})
		}
	}
	return nil
}

// ourFiles are the paths of the `.bs` files of a directory.
func ourFiles(dir string) (paths []string, err error) {
	all, err := os.ReadDir(dir)
	for _, e := range all {
		if name := e.Name(); strings.HasSuffix(name, ourExt) && !strings.HasPrefix(name, ".") {
			paths = append(paths, filepath.Join(dir, name))
		}
	}
	return paths, err
}

// shardFiles are the `.bs` files of a directory, those that its index lists, else all of them, and the index.
func shardFiles(dir string) (names []string, index *shardIndex, err error) {
	text, err := os.ReadFile(filepath.Join(dir, IndexName))
	index = &shardIndex{}
	if err == nil {
		if index, err = parseIndex(text); err != nil {
			return nil, nil, inFile(err, filepath.Join(dir, IndexName))
		}
	}
	if errors.Is(err, os.ErrNotExist) || err == nil && len(index.shards()) == 0 {
		if names, err = ourFiles(dir); err != nil {
			return nil, nil, err
		}
		if len(names) == 0 {
			return nil, nil, &Error{Status: IO, File: dir, Msg: "holds no .bs file itself; name the folder in it that does", Err: os.ErrNotExist}
		}
		return names, index, inFile(allNumbers(names), dir)
	}
	if err != nil {
		return nil, nil, err
	}
	if names = index.unlisted(dir); len(names) > 0 {
		return names, &shardIndex{}, inFile(allNumbers(names), dir)
	}
	for _, s := range index.shards() {
		names = append(names, filepath.Join(dir, s))
	}
	return names, index, inFile(allNumbers(names), dir)
}

// numbered matches the names of shards, which say of how many they are one: model-00002-of-00005.bs.
var numbered = regexp.MustCompile(`^(.*)-([0-9]{1,9})-of-([0-9]{1,9})(\.[^-]*)$`)

// allNumbers makes sure that no shard of a numbered set is missing: of a model without an index only the names tell.
func allNumbers(names []string) error {
	have := map[[3]string]map[int]bool{} // prefix, number of shards, suffix
	for _, name := range names {
		if m := numbered.FindStringSubmatch(filepath.Base(name)); m != nil {
			set := [3]string{m[1], m[3], m[4]}
			if have[set] == nil {
				have[set] = map[int]bool{}
			}
			i, _ := strconv.Atoi(m[2]) // nine digits at most
			have[set][i] = true
		}
	}
	for set, numbers := range have {
		all, _ := strconv.Atoi(set[1])
		// Some count from 0.
		first := 1
		if numbers[0] {
			first = 0
		}
		for i := first; i < first+all; i++ {
			if !numbers[i] {
				return &Error{Status: IO, Err: os.ErrNotExist, Msg: fmt.Sprintf("of the %d shards %s-...-of-%s%s number %d is missing: complete the model, or open the files one by one",
					all, set[0], set[1], set[2], i)}
			}
		}
	}
	return nil
}

// Close frees the files. Nothing else may use the reader any more.
func (r *Reader) Close() {
	for _, c := range r.closers {
		c.Close()
	}
	for _, s := range r.siblings {
		if s.f != nil {
			s.f.Close()
		}
	}
	if r.base != nil {
		r.base.Close()
	}
}

// Len is the number of tensors.
func (r *Reader) Len() int { return len(r.tensors) }

// Find is the index of the tensor of that name.
func (r *Reader) Find(name string) (int, error) {
	if i, ok := r.byName[name]; ok {
		return i, nil
	}
	return 0, &Error{Status: NotFound, File: r.path, Msg: fmt.Sprintf("holds no tensor %q", name)}
}

// Tensor describes a tensor.
type Tensor struct {
	Name    string
	DType   codecs.DType
	Shape   []uint64
	Bytes   int64 // decoded
	Payload int64 // in the file; 0 for a tensor stored under another name
}

// Tensor describes tensor i.
func (r *Reader) Tensor(i int) (Tensor, error) {
	if i < 0 || i >= len(r.tensors) {
		return Tensor{}, &Error{Status: NotFound, File: r.path, Msg: fmt.Sprintf("tensor %d of %d", i, len(r.tensors))}
	}
	e := r.tensors[i].entry
	return Tensor{e.name, e.dtype, e.shape, e.bytes, e.compressed}, nil
}

// Locate tells where the compressed bytes of tensor i stand: in which file, in the order of Info's, and where in it. Of a
// tensor stored under another name they are the other's; a tensor without elements has none.
func (r *Reader) Locate(i int) (file int, offset, n int64, err error) {
	if _, err := r.Tensor(i); err != nil {
		return 0, 0, 0, err
	}
	m, err := r.master(r.tensors[i])
	if err != nil {
		return 0, 0, 0, err
	}
	if file = slices.Index(r.files, m.file); file < 0 {
		return 0, 0, 0, &Error{Status: NotFound, File: r.path, Tensor: r.tensors[i].entry.name,
			Msg: fmt.Sprintf("its bytes are in the shard %s: open the directory instead", m.file.name)}
	}
	return file, m.entry.offset, m.entry.compressed, nil
}

// Metadata is the source's `__metadata__` as a JSON object, or "null". Shards have their keys joined.
func (r *Reader) Metadata() ([]byte, error) {
	var all map[string]string
	for _, c := range r.files {
		if all == nil && c.header.Metadata != nil {
			all = map[string]string{}
		}
		for k, v := range c.header.Metadata {
			if _, ok := all[k]; !ok {
				all[k] = v
			}
		}
	}
	return json.Marshal(all, json.Deterministic(true), json.FormatNilMapAsNull(true))
}

// master is where a tensor's bytes stand: the tensor itself, or the one it is tied to.
func (r *Reader) master(t tensor) (tensor, error) {
	e := t.entry
	if e.tiedTo == "" {
		return t, nil
	}
	c := t.file
	if e.shard != "" {
		var err error
		if c, err = r.sibling(e.shard); err != nil {
			f := asError(err)
			return t, &Error{Status: f.Status, File: t.file.name, Tensor: e.name, Err: f.Err,
				Msg: fmt.Sprintf("its bytes are those of %q in the shard %s: %s", e.tiedTo, e.shard, f)}
		}
	}
	i, ok := c.byName[e.tiedTo]
	if !ok || c.entries[i].tiedTo != "" || c.entries[i].bytes != e.bytes || c.entries[i].md5 != e.md5 {
		return t, &Error{Status: Corrupt, File: t.file.name, Tensor: e.name,
			Msg: fmt.Sprintf("its bytes should be those of %q in %s, which holds another tensor or none", e.tiedTo, c.name)}
	}
	return tensor{c, &c.entries[i]}, nil
}

// sibling opens the shard of that name in the directory of the file.
func (r *Reader) sibling(name string) (*container, error) {
	for _, c := range r.files {
		if filepath.Base(c.name) == name {
			return c, nil
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if s, ok := r.siblings[name]; ok {
		return s.c, s.err
	}
	s := &sibling{}
	if r.dir == "" {
		s.err = failf(InvalidArgument, "not reachable from a file in memory; open the file by its path")
	} else {
		var info os.FileInfo
		if s.f, info, s.err = openRegular(filepath.Join(r.dir, name)); s.err == nil {
			s.c, s.err = openContainer(filepath.Join(r.dir, name), s.f, info.Size())
		}
	}
	if r.siblings == nil {
		r.siblings = map[string]*sibling{}
	}
	r.siblings[name] = s
	return s.c, s.err
}

// payload is a tensor whose head is parsed; one of the original package, which has none, is decoded as a whole.
type payload struct {
	*codecs.Payload
	tensor
	base *baseTensor
	raw  []byte
}

// BlockBytes is the size of a decoded block. A tie may be of another dtype: its blocks are its master's.
func (t tensor) BlockBytes() int64 { return int64(codecs.BlockWords * t.entry.dtype.WordBytes()) }

// BlockBytes is that of the tensor.
func (p *payload) BlockBytes() int64 { return p.tensor.BlockBytes() }

// FaultHook, where a test set it, is called with the name of every tensor that is about to be decoded.
var FaultHook func(tensor string)

func (r *Reader) openPayload(t tensor, pool *pool) (*payload, error) {
	if FaultHook != nil {
		FaultHook(t.entry.name)
	}
	m, err := r.master(t)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*payload, error) { return nil, at(err, m.file.name, m.entry.name) }
	if m.file.original {
		out := &payload{tensor: m, raw: make([]byte, m.entry.bytes)}
		return out, r.decodeOriginal(m, out.raw, pool)
	}
	head, err := m.file.read(m.entry.offset, m.entry.head)
	if err != nil {
		return fail(err)
	}
	p, err := codecs.ParseHead(head, m.entry.checksum, m.entry.dtype, m.entry.bytes, m.entry.compressed)
	if err != nil {
		return fail(err)
	}
	if p.NeedsBase() != (m.entry.baseMD5 != nil) {
		return fail(failf(Corrupt, "codec %s with a payload of another kind", m.entry.codec))
	}
	out := &payload{Payload: p, tensor: m}
	if p.NeedsBase() {
		if r.base == nil {
			return fail(r.noBase(m.file))
		}
		if out.base, err = r.base.tensor(m.entry.name, m.entry.dtype, m.entry.bytes, m.entry.baseMD5, pool); err != nil {
			return fail(err)
		}
	}
	return out, nil
}

func (r *Reader) noBase(c *container) error {
	name := "another model"
	if c.header.BaseModel != nil && *c.header.BaseModel != "" {
		name = fmt.Sprintf("the model %q", *c.header.BaseModel)
	}
	return &Error{Status: WrongBase, File: c.name, Msg: fmt.Sprintf("holds differences to %s: pass it as the base", name)}
}

// checkBase makes sure, where a base was given, that it has every tensor that differences were taken to. That its bytes
// are the right ones is checked before a tensor is decoded.
func (r *Reader) checkBase() error {
	if r.base == nil {
		return nil
	}
	for _, t := range r.tensors {
		if t.entry.needsBase() {
			if err := r.base.has(t.entry.name, t.entry.dtype, t.entry.bytes); err != nil {
				return at(err, t.file.name, t.entry.name)
			}
		}
	}
	return nil
}

// cached is openPayload with a memory of the last few.
func (r *Reader) cached(t tensor, pool *pool) (*payload, error) {
	m, err := r.master(t)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	for i, p := range r.recent {
		if p.entry == m.entry {
			r.recent = append(slices.Delete(r.recent, i, i+1), p)
			r.mu.Unlock()
			return p, nil
		}
	}
	r.mu.Unlock()
	p, err := r.openPayload(t, pool)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.recent) == 8 {
		r.recent = slices.Delete(r.recent, 0, 1)
	}
	if p.raw != nil { // whole tensors: one will do
		r.recent = slices.DeleteFunc(r.recent, func(q *payload) bool { return q.raw != nil })
	}
	r.recent = append(r.recent, p)
	return p, nil
}

// memory is a file that lies in memory.
type memory []byte

// ReadAt implements io.ReaderAt.
func (m memory) ReadAt(b []byte, off int64) (int, error) {
	if off >= int64(len(m)) {
		return 0, io.EOF
	}
	n := copy(b, m[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// inputSlack is what a buffer has behind the bytes that were read, for the kernels to read over.
const inputSlack = 4096

// readBlocks reads blocks first to last-1 at once: into the buffer, or, from memory, nowhere.
func (p *payload) readBlocks(first, last int, s *codecs.Scratch) ([]byte, error) {
	from, _ := p.BlockSpan(first)
	end, n := p.BlockSpan(last - 1)
	size := end + n - from
	from += p.entry.offset
	if m, ok := p.file.src.(memory); ok {
		return m[from : from+size], nil // openContainer checked that it is there
	}
	s.Input = slices.Grow(s.Input[:0], int(size)+inputSlack)
	buf := s.Input[:size]
	got, err := p.file.src.ReadAt(buf, from)
	if got == len(buf) {
		return buf, nil
	}
	return nil, shortRead(err)
}

// shortRead is the error of a read that gave too little.
func shortRead(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// decode decodes the tensor's bytes from lo to hi, within blocks first to last-1, into dst: the blocks of a group together,
// but those of which only a part is wanted.
func (p *payload) decode(first, last int, lo, hi int64, dst []byte, s *codecs.Scratch) error {
	if p.raw != nil {
		copy(dst, p.raw[lo:hi])
		return nil
	}
	src, err := p.readBlocks(first, last, s)
	if err != nil {
		return at(err, p.file.name, p.entry.name)
	}
	start, _ := p.BlockSpan(first)
	for b := first; b < last; {
		from, run := int64(b)*p.BlockBytes(), 1
		whole := func(k int) bool { // is all of block k wanted?
			a := int64(k) * p.BlockBytes()
			return k < last && a >= lo && min(a+p.BlockBytes(), p.entry.bytes) <= hi
		}
		for whole(b) && whole(b+run) && (b+run)%codecs.GroupBlocks != 0 {
			run++
		}
		to := min(from+int64(run)*p.BlockBytes(), p.entry.bytes)
		a, z := max(from, lo), min(to, hi)
		out := dst[a-lo : z-lo]
		if !whole(b) {
			s.Output = slices.Grow(s.Output[:0], int(to-from))[:to-from]
			out = s.Output
		}
		var base []byte
		if p.base != nil {
			if base, err = p.base.block(from, to, s); err != nil {
				return err
			}
		}
		off, _ := p.BlockSpan(b)
		end, n := p.BlockSpan(b + run - 1)
		if err := p.DecodeBlocks(b, out, src[off-start:end+n-start], base, s); err != nil {
			return at(err, p.file.name, p.entry.name)
		}
		if !whole(b) {
			copy(dst[a-lo:z-lo], out[a-from:z-from])
		}
		b += run
	}
	return nil
}

// piece is a run of blocks of a request.
type piece struct {
	r           *request
	first, last int
}

// request is bytes lo to hi of a tensor on their way to dst. Its payload is opened by whoever comes first and let go by
// whoever finishes last, so that tables do not pile up.
type request struct {
	tensor
	lo, hi int64
	dst    []byte
	open   sync.Once
	p      *payload
	whole  bool // decoded to dst at once
	err    error
	left   atomic.Int32
}

// largerThanCaches is from where on a request is stored past them.
const largerThanCaches = 16 << 20

// decodeAll runs requests, block by block, over the pool.
func (r *Reader) decodeAll(requests []*request, p *pool) error {
	var pieces []piece
	total := int64(0)
	for _, q := range requests {
		if q.hi == q.lo {
			continue
		}
		total += q.hi - q.lo
		m, err := r.master(q.tensor) // a tie may be of another dtype: its blocks are its master's
		if err != nil {
			return err
		}
		word := m.BlockBytes()
		first, last := int(q.lo/word), int((q.hi+word-1)/word)
		if m.file.original { // who waited for another to decode all of it would be missed there
			pieces = append(pieces, piece{q, first, last})
			q.left.Add(1)
			continue
		}
		for b := first; b < last; {
			next := min((b/codecs.GroupBlocks+1)*codecs.GroupBlocks, last)
			pieces = append(pieces, piece{q, b, next})
			q.left.Add(1)
			b = next
		}
		hugePages(q.dst)
	}
	p.total(total)
	past := total >= largerThanCaches
	return p.run(len(pieces), func(i int, s *codecs.Scratch) error {
		q := pieces[i].r
		s.Past = past
		defer func() { s.Past = false }()
		q.open.Do(func() {
			m, err := r.master(q.tensor)
			switch {
			case err != nil:
				q.err = err
			case m.file.original && q.lo == 0 && q.hi == m.entry.bytes:
				q.whole, q.err = true, r.decodeOriginal(m, q.dst[:q.hi], p)
			case len(requests) == 1:
				q.p, q.err = r.cached(q.tensor, p)
			default:
				q.p, q.err = r.openPayload(q.tensor, p)
			}
		})
		if q.err != nil {
			return q.err
		}
		if q.whole {
			p.done(q.hi)
			return nil
		}
		word := q.p.BlockBytes()
		lo, hi := max(q.lo, int64(pieces[i].first)*word), min(q.hi, int64(pieces[i].last)*word)
		err := q.p.decode(pieces[i].first, pieces[i].last, lo, hi, q.dst[lo-q.lo:hi-q.lo], s)
		if q.left.Add(-1) == 0 {
			q.p = nil
		}
		p.done(hi - lo)
		return err
	})
}

// request is a whole tensor for a destination of so many bytes.
func (r *Reader) request(i int, dst []byte, room int64) (*request, error) {
	if _, err := r.Tensor(i); err != nil {
		return nil, err
	}
	t := r.tensors[i]
	if room < t.entry.bytes {
		return nil, &Error{Status: DstTooSmall, File: t.file.name, Tensor: t.entry.name,
			Msg: fmt.Sprintf("room for %d bytes, %d are needed", room, t.entry.bytes)}
	}
	return &request{tensor: t, hi: t.entry.bytes, dst: dst}, nil
}

// Decode decodes tensor i into dst, little-endian and in C order.
func (r *Reader) Decode(i int, dst []byte, job *Job) error {
	return r.DecodeMany([]Item{{i, dst}}, job)
}

// Item is one request of DecodeMany.
type Item struct {
	Index int
	Dst   []byte
}

// DecodeMany decodes many tensors at once over all workers.
func (r *Reader) DecodeMany(items []Item, job *Job) error {
	requests := make([]*request, len(items))
	for k, it := range items {
		q, err := r.request(it.Index, it.Dst, int64(len(it.Dst)))
		if err != nil {
			return err
		}
		requests[k] = q
	}
	return r.decodeAll(requests, newPool(job))
}

// DecodeRange decodes elements first to first+count-1 of the flattened tensor; only their blocks are read.
func (r *Reader) DecodeRange(i int, first, count uint64, dst []byte, job *Job) error {
	if _, err := r.Tensor(i); err != nil {
		return err
	}
	t := r.tensors[i]
	size := uint64(storageBits(t.entry.dtype) / 8)
	if n := t.entry.elements(); first > n || count > n-first {
		return &Error{Status: InvalidArgument, File: t.file.name, Tensor: t.entry.name,
			Msg: fmt.Sprintf("elements %d to %d of %d", first, first+count, n)}
	}
	if uint64(len(dst)) < count*size {
		return &Error{Status: DstTooSmall, File: t.file.name, Tensor: t.entry.name,
			Msg: fmt.Sprintf("room for %d bytes, %d are needed", len(dst), count*size)}
	}
	q := &request{tensor: t, lo: int64(first * size), hi: int64((first + count) * size), dst: dst}
	return r.decodeAll([]*request{q}, newPool(job))
}

// DecodeVerified is Decode, and compares the MD5 of what was decoded with the header's.
func (r *Reader) DecodeVerified(i int, dst []byte, job *Job) error {
	if err := r.Decode(i, dst, job); err != nil {
		return err
	}
	t := r.tensors[i]
	if sum := md5.Sum(dst[:t.entry.bytes]); sum != t.entry.md5 {
		return at(failf(Checksum, "MD5 of the decoded bytes is %x, the header says %x", sum, t.entry.md5), t.file.name, t.entry.name)
	}
	return nil
}

// validText reports whether s is UTF-8 without NUL.
func validText(s string) bool { return utf8.ValidString(s) && !strings.ContainsRune(s, 0) }
