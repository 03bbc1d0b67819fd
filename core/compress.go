package core

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Compress compresses a `.safetensors` file to a `.bs` file, or a model directory to a new directory.
func Compress(src, dst string, opts Options, job *Job) (Result, error) {
	return compress(src, "", dst, opts, newPool(job))
}

// CompressDelta compresses a fine-tune as its difference to a base model: `.safetensors`, `.bs` or directory.
func CompressDelta(src, basePath, dst string, opts Options, job *Job) (Result, error) {
	return compress(src, basePath, dst, opts, newPool(job))
}

func compress(src, basePath, dst string, opts Options, p *pool) (Result, error) {
	if err := opts.check(); err != nil {
		return Result{}, err
	}
	info, err := os.Stat(src)
	if err != nil {
		return Result{}, inFile(err, src)
	}
	if err := notTheBase(dst, basePath); err != nil {
		return Result{}, err
	}
	if info.IsDir() {
		return compressTree(src, basePath, dst, opts, p)
	}
	p.total(info.Size())
	var b *base
	if basePath != "" {
		if b, err = openBase(basePath); err != nil {
			return Result{}, err
		}
		defer b.Close()
	}
	return compressFile(src, dst, b, opts, ties{}, "", p)
}

// baseName is what a header calls the base: a name, never a path.
func baseName(path string) string {
	abs, err := filepath.Abs(path)
	if err != nil {
		abs = path
	}
	name := filepath.Base(abs)
	ext := filepath.Ext(name)
	if ext != ".safetensors" && ext != ".bs" {
		return name
	}
	if stem := strings.TrimSuffix(name, ext); !strings.HasPrefix(stem, "model") {
		return stem
	}
	return filepath.Base(filepath.Dir(abs)) // model.safetensors says nothing, its directory does
}

// openRegular opens a file that is one: to open a FIFO would wait for its other end.
func openRegular(path string) (*os.File, os.FileInfo, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, inFile(err, path)
	}
	if !info.Mode().IsRegular() {
		return nil, nil, &Error{Status: InvalidArgument, File: path, Msg: "is no regular file"}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, inFile(err, path)
	}
	if info, err = f.Stat(); err != nil {
		f.Close()
		return nil, nil, inFile(err, path)
	}
	return f, info, nil
}

// sameFile reports whether both paths lead to one file.
func sameFile(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// notTheBase refuses a target that is the base of a delta or lies within it: without its base nothing of a delta is left.
func notTheBase(dst, basePath string) error {
	if basePath == "" {
		return nil
	}
	if sameFile(dst, basePath) || within(dst, basePath) || within(basePath, dst) {
		return failf(InvalidArgument, "%s is the base %s, or one lies within the other: choose another target", dst, basePath)
	}
	if info, err := os.Stat(basePath); err != nil || !info.IsDir() {
		return nil
	}
	t, _ := readTree(basePath) // whatever else is wrong with it shows when it is opened
	return t.notThrough(dst)
}

// notThrough refuses a target that links in the tree lead into: what they lead to would be replaced.
func (t *tree) notThrough(dst string) error {
	if _, err := os.Stat(dst); err != nil {
		return nil
	}
	for _, path := range slices.Concat(t.dirs, t.files) {
		path = filepath.Join(t.root, path)
		if within(path, dst) {
			return failf(InvalidArgument, "%s links into %s: choose another target", path, dst)
		}
	}
	return nil
}

// compressFile compresses one file. shared and shard tie it to its siblings; see ties.
func compressFile(src, dst string, b *base, opts Options, shared ties, shard string, p *pool) (res Result, err error) {
	if sameFile(src, dst) {
		return res, failf(InvalidArgument, "%s and %s are the same file", src, dst)
	}
	f, before, err := openRegular(src)
	if err != nil {
		return res, err
	}
	defer f.Close()
	layout, err := readSource(f, before.Size())
	if err != nil {
		return res, inFile(err, src)
	}
	if opts.Compat {
		if b != nil {
			return res, failf(InvalidArgument, "differences to a base have no form for release 1.0")
		}
		p.done(int64(len(layout.prefix)))
		n, err := writeCompat(dst, before.Mode(), layout, func(t sourceTensor, dst []byte, _ int) error {
			return readAll(f, dst, int64(len(layout.prefix))+t.Begin)
		}, func() error { return unchanged(f, before, src) }, opts, p)
		return Result{before.Size(), n, len(layout.tensors), 1}, inFile(err, src)
	}
	name, matched, floats := "", 0, 0
	items := make([]*item, len(layout.tensors))
	for i, t := range layout.tensors {
		items[i] = &item{n: i, spec: t, src: io.NewSectionReader(f, int64(len(layout.prefix))+t.Begin, t.End-t.Begin)}
		if b == nil || t.Begin == t.End {
			continue
		}
		float := t.DType.IsFloat()
		if float {
			floats++
		}
		if items[i].base, err = b.find(t.Name, t.DType, t.End-t.Begin); err != nil {
			return res, err
		}
		if items[i].base != nil {
			if float {
				matched++
			}
		}
	}
	if b != nil {
		name = baseName(b.path)
		if floats > 0 && matched == 0 {
			return res, &Error{Status: WrongBase, File: src, Msg: fmt.Sprintf("none of its %d float tensors has the name, dtype and size of one in %s: it is another model", floats, b.path)}
		}
	}
	if b != nil {
		tensors := make([]*baseTensor, len(items))
		for i, it := range items {
			tensors[i] = it.base
		}
		if err := b.identify(tensors, p); err != nil {
			return res, err
		}
	}
	w, err := newWriter(dst, before.Mode(), layout, name, opts, shared, shard)
	if err != nil {
		return res, inFile(err, dst)
	}
	published := false
	defer func() {
		if !published {
			w.tmp.abandon()
		}
	}()
	p.done(int64(len(layout.prefix)))
	if err := w.put(items, p); err != nil {
		return res, inFile(err, src)
	}
	var sum []byte
	if opts.SHA256 {
		h := sha256.New()
		if err := p.copy(h, f, before.Size()); err != nil {
			return res, inFile(err, src)
		}
		sum = h.Sum(nil)
	}
	if err := unchanged(f, before, src); err != nil {
		return res, err
	}
	if b != nil {
		if err := b.unchanged(); err != nil {
			return res, err
		}
	}
	published = true // finish abandons it where it fails
	n, err := w.finish(sum, p)
	if err != nil {
		return res, inFile(err, dst)
	}
	return Result{before.Size(), n, len(layout.tensors), 1}, nil
}

// unchanged makes sure that a source is what it was when it was opened.
func unchanged(f *os.File, before os.FileInfo, src string) error {
	after, err := f.Stat()
	if err != nil {
		return inFile(err, src)
	}
	if after.Size() != before.Size() || !after.ModTime().Equal(before.ModTime()) {
		return wasChanged(src)
	}
	return nil
}

func wasChanged(file string) error {
	return &Error{Status: InvalidArgument, File: file, Msg: "was changed while it was read: nothing was written"}
}

// tree is what a directory holds, links followed: paths relative to it, sorted.
type tree struct {
	root  string
	dirs  []string
	files []string

	aliases map[string]map[string]string // by file; see shardIndex
}

func readTree(root string) (*tree, error) {
	t := &tree{root: root}
	var walk func(rel string, above []os.FileInfo) error
	walk = func(rel string, above []os.FileInfo) error {
		dir := filepath.Join(root, rel)
		info, err := os.Stat(dir)
		if err != nil {
			return err
		}
		for _, a := range above {
			if os.SameFile(a, info) {
				return failf(InvalidArgument, "%s links to a directory above it", dir)
			}
		}
		above = append(above, info)
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			path := filepath.Join(rel, e.Name())
			info, err := os.Stat(filepath.Join(root, path))
			if err != nil {
				return err
			}
			switch {
			case info.IsDir():
				t.dirs = append(t.dirs, path)
				if err := walk(path, above); err != nil {
					return err
				}
			case info.Mode().IsRegular():
				t.files = append(t.files, path)
			default:
				return failf(InvalidArgument, "%s is neither file nor directory", filepath.Join(root, path))
			}
		}
		return nil
	}
	return t, walk("", nil)
}

// within reports whether path lies in dir or is it, links followed as far as the path exists.
func within(path, dir string) bool {
	real := func(p string) string {
		p, _ = filepath.Abs(p)
		rest := ""
		for {
			if r, err := filepath.EvalSymlinks(p); err == nil {
				return filepath.Join(r, rest)
			}
			up := filepath.Dir(p)
			if up == p {
				return filepath.Join(p, rest)
			}
			rest = filepath.Join(filepath.Base(p), rest)
			p = up
		}
	}
	rel, err := filepath.Rel(real(dir), real(path))
	return err == nil && rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator))
}

// newTree builds a directory beside dst and gives it its name once build is through.
func newTree(t *tree, dst string, force bool, build func(tmp string) error) error {
	if within(dst, t.root) || within(t.root, dst) {
		return failf(InvalidArgument, "%s and %s lie within each other: choose a target elsewhere", t.root, dst)
	}
	if err := t.notThrough(dst); err != nil {
		return err
	}
	info, err := os.Stat(t.root)
	if err != nil {
		return err
	}
	tmp, err := newTemporaryTree(dst, info.Mode(), force)
	if err != nil {
		return err
	}
	if err := build(tmp.name); err != nil {
		tmp.abandon()
		return err
	}
	return tmp.publish()
}

// copyFile copies contents and permissions.
func copyFile(src, dst string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, info.Mode().Perm()|0o200)
	if err != nil {
		return err
	}
	if _, err = io.Copy(out, in); err == nil {
		err = unchanged(in, info, src)
	}
	if e := out.Sync(); err == nil {
		err = e
	}
	if e := out.Close(); err == nil {
		err = e
	}
	return err
}

const (
	sourceExt = ".safetensors"
	ourExt    = ".bs"
)

// compressTree compresses every safetensors file of a directory and copies everything else.
func compressTree(src, basePath, dst string, opts Options, p *pool) (res Result, err error) {
	t, err := readTree(src)
	if err != nil {
		return res, inFile(err, src)
	}
	total, weights := int64(0), 0
	for _, f := range t.files {
		if strings.HasSuffix(f, ourExt) || filepath.Base(f) == IndexName {
			return res, failf(InvalidArgument, "%s holds %s already: compress a directory of .safetensors files", src, f)
		}
		if strings.HasSuffix(f, sourceExt) {
			weights++
			if info, err := os.Stat(filepath.Join(src, f)); err == nil {
				total += info.Size()
			}
		}
	}
	if weights == 0 {
		return res, failf(InvalidArgument, "%s holds no %s file", src, sourceExt)
	}
	p.total(total)
	err = newTree(t, dst, opts.Force, func(tmp string) error {
		for _, d := range t.dirs {
			if err := os.MkdirAll(filepath.Join(tmp, d), 0o755); err != nil {
				return err
			}
		}
		for _, dir := range append([]string{"."}, t.dirs...) {
			r, err := compressFolder(t, dir, tmp, basePath, opts, p)
			if err != nil {
				return err
			}
			res.add(r)
		}
		return nil
	})
	return res, inFile(err, dst)
}

// compressFolder does the files that lie directly in one folder of the tree.
func compressFolder(t *tree, dir, tmp, basePath string, opts Options, p *pool) (res Result, err error) {
	var indexes []sourceIndex
	group := map[string]int{} // shard -> the index that lists it
	var shards []string
	for _, f := range t.files {
		if filepath.Dir(f) != dir {
			continue
		}
		switch path := filepath.Join(t.root, f); {
		case indexName.MatchString(f):
			text, err := os.ReadFile(path)
			if err != nil {
				return res, err
			}
			x := sourceIndex{filepath.Base(f), string(text)}
			if _, err := x.shards(); err == nil {
				indexes = append(indexes, x)
				break
			}
			// Not an index after all: a file like any other.
			if err := copyFile(path, filepath.Join(tmp, f)); err != nil {
				return res, err
			}
		case strings.HasSuffix(f, sourceExt):
			shards = append(shards, filepath.Base(f))
		default:
			if err := copyFile(path, filepath.Join(tmp, f)); err != nil {
				return res, err
			}
		}
	}
	for i, x := range indexes {
		files, err := x.shards()
		if err != nil {
			return res, inFile(err, filepath.Join(t.root, dir, x.Name))
		}
		for _, s := range files {
			if !slices.Contains(shards, s) {
				return res, &Error{Status: InvalidArgument, File: filepath.Join(t.root, dir, x.Name), Msg: fmt.Sprintf(
					"lists the shard %s, which is not there: complete the model, or remove the index", s)}
			}
			if _, ok := group[s]; !ok {
				group[s] = i
			}
		}
	}
	var b *base
	if basePath != "" && len(shards) > 0 {
		if b, err = openBase(folderBase(basePath, dir)); err != nil {
			return res, err
		}
		defer b.Close()
	}
	shared := make([]ties, len(indexes))
	for i := range shared {
		shared[i] = ties{}
	}
	var done []string
	for _, s := range shards {
		name := strings.TrimSuffix(s, sourceExt) + ourExt
		known, shard := ties{}, ""
		if g, ok := group[s]; ok {
			known, shard = shared[g], name
		}
		r, err := compressFile(filepath.Join(t.root, dir, s), filepath.Join(tmp, dir, name), b, opts, known, shard, p)
		if err != nil {
			return res, err
		}
		done = append(done, name)
		res.add(r)
	}
	if len(indexes) == 0 {
		return res, nil
	}
	// Several indexes are variants of one model; the plain one, whose name is shortest, is what a reader opens.
	slices.SortStableFunc(indexes, func(a, b sourceIndex) int { return len(a.Name) - len(b.Name) })
	main, err := indexes[0].shards()
	if err != nil {
		return res, err
	}
	var names []string
	for _, s := range main {
		if n := strings.TrimSuffix(s, sourceExt) + ourExt; slices.Contains(done, n) {
			names = append(names, n)
		}
	}
	text, err := makeIndex(filepath.Join(tmp, dir), names, indexes, opts)
	if err != nil {
		return res, err
	}
	return res, os.WriteFile(filepath.Join(tmp, dir, IndexName), text, 0o644)
}
