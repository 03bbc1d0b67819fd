package core

import (
	"crypto/md5"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"bigsmall.dev/bigsmall/codecs"
)

// base is the model that a delta is a difference to: `.safetensors` files or a `.bs` Reader.
type base struct {
	path     string
	reader   *Reader
	files    []*os.File
	infos    []os.FileInfo // of files, when they were opened
	mu       sync.Mutex
	plain    map[string]*baseTensor // of safetensors files
	prefixes [][]byte               // and their headers
	seen     map[string]*baseTensor
}

// baseTensor gives the bytes of one tensor of the base.
type baseTensor struct {
	name  string
	dtype codecs.DType
	bytes int64
	src   io.ReaderAt // of the raw bytes; nil where it is in
	in    *Reader     // a .bs file, as
	at    tensor
	once  sync.Once
	md5   [16]byte
	err   error
	known bool // md5 comes from a header whose checksum held
}

func openBase(path string) (*base, error) {
	b := &base{path: path, seen: map[string]*baseTensor{}}
	info, err := os.Stat(path)
	if err != nil {
		return nil, inFile(err, path)
	}
	var plain []string
	if info.IsDir() {
		if plain, err = filepath.Glob(filepath.Join(globQuote(path), "*.safetensors")); err != nil {
			return nil, err
		}
	} else if isSafetensors(path) {
		plain = []string{path}
	}
	if len(plain) == 0 {
		b.reader, err = Open(path, "")
		return b, err
	}
	b.plain = map[string]*baseTensor{}
	for _, name := range plain {
		if err := b.addPlain(name); err != nil {
			b.Close()
			return nil, inFile(err, name)
		}
	}
	return b, nil
}

// folderBase is the base for a folder of a tree: the folder of that name in it, else all of it.
func folderBase(basePath, dir string) string {
	if basePath == "" {
		return ""
	}
	if info, err := os.Stat(filepath.Join(basePath, dir)); err == nil && info.IsDir() {
		return filepath.Join(basePath, dir)
	}
	return basePath
}

// isSafetensors looks at the first bytes rather than at the name.
func isSafetensors(path string) bool {
	f, _, err := openRegular(path)
	if err != nil {
		return false
	}
	defer f.Close()
	var head [4]byte
	_, err = io.ReadFull(f, head[:])
	return err != nil || string(head[:]) != magic
}

func globQuote(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

func (b *base) addPlain(name string) error {
	f, info, err := openRegular(name)
	if err != nil {
		return err
	}
	b.files, b.infos = append(b.files, f), append(b.infos, info)
	src, err := readSource(f, info.Size())
	if err != nil {
		return err
	}
	b.prefixes = append(b.prefixes, src.prefix)
	for _, t := range src.tensors {
		if _, twice := b.plain[t.Name]; twice {
			return &Error{Status: InvalidArgument, Tensor: t.Name, Msg: "another file beside it holds a tensor of that name too: name one of the files"}
		}
		n := t.End - t.Begin
		b.plain[t.Name] = &baseTensor{name: t.Name, dtype: t.DType, bytes: n,
			src: io.NewSectionReader(f, int64(len(src.prefix))+t.Begin, n)}
	}
	return nil
}

// unchanged makes sure that the base is what was identified: it is read again to be coded against.
func (b *base) unchanged() error {
	for i, f := range b.files {
		if err := unchanged(f, b.infos[i], f.Name()); err != nil {
			return err
		}
	}
	return nil
}

func (b *base) Close() {
	for _, f := range b.files {
		f.Close()
	}
	if b.reader != nil {
		b.reader.Close()
	}
}

// find is the tensor of that name, dtype and size, or nil.
func (b *base) find(name string, d codecs.DType, bytes int64) (*baseTensor, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	t := b.plain[name]
	if t == nil {
		t = b.seen[name]
	}
	if t == nil && b.reader != nil {
		i, ok := b.reader.byName[name]
		if !ok {
			return nil, nil
		}
		p := b.reader.tensors[i]
		t = &baseTensor{name: name, dtype: p.entry.dtype, bytes: p.entry.bytes, md5: p.entry.md5, known: true, in: b.reader, at: p}
		b.seen[name] = t
	}
	if t == nil || t.dtype != d || t.bytes != bytes {
		return nil, nil
	}
	return t, nil
}

func (b *base) has(name string, d codecs.DType, bytes int64) error {
	t, err := b.find(name, d, bytes)
	if err == nil && t == nil {
		err = &Error{Status: WrongBase, Msg: fmt.Sprintf("the base %s has no such tensor of %d bytes of %s: it is another model", b.path, bytes, d)}
	}
	return err
}

// tensor is find, and makes sure that the base's bytes are those that differences were taken to.
func (b *base) tensor(name string, d codecs.DType, bytes int64, want *[16]byte, p *pool) (*baseTensor, error) {
	if err := b.has(name, d, bytes); err != nil {
		return nil, err
	}
	t, err := b.find(name, d, bytes)
	if err != nil {
		return nil, err
	}
	sum, err := t.identity(p)
	if err != nil {
		return nil, err
	}
	if sum != *want {
		return nil, &Error{Status: WrongBase, Msg: fmt.Sprintf("the tensor in the base %s has the MD5 %x, not %x: it is another model or version", b.path, sum, *want)}
	}
	return t, nil
}

// identity is the MD5 of the tensor's bytes.
func (t *baseTensor) identity(p *pool) ([16]byte, error) {
	t.once.Do(func() {
		if t.known {
			return
		}
		h := md5.New()
		t.err = p.copy(h, t.src, t.bytes)
		copy(t.md5[:], h.Sum(nil))
	})
	return t.md5, t.err
}

// identify computes the MD5 of tensors that are not known yet, many side by side. Some may be nil.
func (b *base) identify(tensors []*baseTensor, p *pool) error {
	var messages []message
	for _, t := range tensors {
		if t != nil && !t.known {
			messages = append(messages, &identifying{t, b})
		}
	}
	return digestAll(messages, p)
}

type identifying struct {
	*baseTensor
	of *base
}

func (t *identifying) size() (all, piece int64) { return t.bytes, readPiece }

func (t *identifying) make(dst []byte, off int64, _ *codecs.Scratch) error {
	return readAll(t.src, dst, off)
}

func (t *identifying) digest([]byte) {}

func (t *identifying) end(sum [16]byte, err error) error {
	if err == nil {
		t.once.Do(func() { t.md5 = sum })
	}
	return inFile(err, t.of.path)
}

// block gives bytes lo to hi, which are whole blocks of the tensor.
func (t *baseTensor) block(lo, hi int64, s *codecs.Scratch) ([]byte, error) {
	s.BaseBytes = slices.Grow(s.BaseBytes[:0], int(hi-lo))[:hi-lo]
	_, err := t.ReadAt(s.BaseBytes, lo)
	return s.BaseBytes, err
}

// scratches serves ReadAt, which has no scratch of its own.
var scratches = sync.Pool{New: func() any { return codecs.NewScratch() }}

// ReadAt makes the tensor's bytes a source.
func (t *baseTensor) ReadAt(dst []byte, off int64) (int, error) {
	if t.in == nil {
		n, err := t.src.ReadAt(dst, off)
		if n == len(dst) {
			err = nil
		}
		return n, err
	}
	n := min(int64(len(dst)), t.bytes-off)
	if n > 0 {
		s := scratches.Get().(*codecs.Scratch)
		defer scratches.Put(s)
		p, err := t.in.cached(t.at, newPool(&Job{Workers: 1}))
		if err != nil {
			return 0, err
		}
		per := p.BlockBytes()
		if err := p.decode(int(off/per), int((off+n+per-1)/per), off, off+n, dst[:n], s); err != nil {
			return 0, err
		}
	}
	if n < int64(len(dst)) {
		return int(n), io.EOF
	}
	return int(n), nil
}
