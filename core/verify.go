package core

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"

	"bigsmall.dev/bigsmall/codecs"
)

// Report is what Verify found.
type Report struct {
	Tensors int
	Bad     []Problem
}

// Problem is one damaged or different tensor, or, with an empty name, what is wrong with all of a file.
type Problem struct {
	File    string `json:"file"`
	Tensor  string `json:"tensor"`
	Problem string `json:"problem"`
	Blocks  []int  `json:"blocks,omitempty"` // of 65,536 words, whose checksums differ
}

// add reports something once: what is wrong with a tensor comes up again with those that are tied to it.
func (rep *Report) add(x Problem) {
	if !slices.ContainsFunc(rep.Bad, func(y Problem) bool { return x.File == y.File && x.Tensor == y.Tensor && x.Problem == y.Problem }) {
		rep.Bad = append(rep.Bad, x)
	}
}

// Verify decodes everything and checks every checksum and MD5; with a source (a `.safetensors` file or directory) it
// compares with that too. An error means that the check could not run: the file cannot be read or is no `.bs` file.
// Damage is reported, that of a header as a problem without a tensor.
func Verify(path, sourcePath, basePath string, job *Job) (Report, error) {
	p := newPool(job)
	info, err := os.Stat(path)
	if err != nil {
		return Report{}, inFile(err, path)
	}
	if !info.IsDir() {
		return verifyFile(path, sourcePath, basePath, true, p)
	}
	t, err := readTree(path)
	if err != nil {
		return Report{}, inFile(err, path)
	}
	rep, found := Report{}, false
	if err := t.check(path, p); err != nil {
		e, damage := damaged(err)
		if !damage {
			return rep, err
		}
		rep.add(e)
	}
	// A file beside another, or in a folder, stands against the one of the same name.
	beside := func(root, file string) string {
		if info, err := os.Stat(root); root == "" || err != nil || !info.IsDir() {
			return root
		}
		return filepath.Join(root, strings.TrimSuffix(file, ourExt)+sourceExt)
	}
	for _, f := range t.files {
		if !strings.HasSuffix(f, ourExt) {
			continue
		}
		found = true
		one, err := verifyFile(filepath.Join(path, f), beside(sourcePath, f), folderBase(basePath, filepath.Dir(f)), false, p)
		if err != nil {
			return rep, err
		}
		rep.Tensors += one.Tensors
		for _, x := range one.Bad {
			rep.add(x)
		}
	}
	if !found {
		return rep, &Error{Status: IO, File: path, Msg: "holds no .bs file", Err: os.ErrNotExist}
	}
	return rep, nil
}

// damaged turns what says that a file of ours is damaged into an entry of a report.
func damaged(err error) (Problem, bool) {
	e := asError(err)
	missing := e.Status == IO && e.Tensor != "" && errors.Is(err, os.ErrNotExist) // the sibling of a tie
	if !missing && (e.Status != Corrupt && e.Status != Truncated && e.Status != Checksum || isSafetensors(e.File)) {
		return Problem{}, false
	}
	return Problem{strings.ToValidUTF8(e.File, "?"), e.Tensor, e.Msg, nil}, true
}

// allBlocks names all damaged blocks of a tensor of which one is.
func (r *Reader) allBlocks(i int, x *Problem) {
	t, err := r.master(r.tensors[i])
	if err != nil || t.file.original {
		return
	}
	if bad, err := t.file.badBlocks(t.entry, codecs.NewScratch()); err == nil && len(bad) > 0 {
		x.Blocks = bad
		x.Problem = fmt.Sprintf("checksums of %s differ, of %d in all", blockNumbers(bad), (t.entry.bytes-1)/int64(codecs.BlockWords*t.entry.dtype.WordBytes())+1)
	}
}

func verifyFile(path, sourcePath, basePath string, total bool, p *pool) (Report, error) {
	r, err := Open(path, basePath)
	if err != nil {
		if x, damage := damaged(err); damage {
			return Report{Bad: []Problem{x}}, nil
		}
		return Report{}, err
	}
	defer r.Close()
	if err := r.checkIdentities(p); err != nil {
		return Report{}, err
	}
	rep := Report{Tensors: len(r.tensors)}
	report := func(tensor, format string, args ...any) {
		rep.add(Problem{strings.ToValidUTF8(path, "?"), tensor, fmt.Sprintf(format, args...), nil})
	}
	var src *base
	if sourcePath != "" {
		if src, err = openBase(sourcePath); err != nil {
			return Report{}, err
		}
		defer src.Close()
		if src.plain == nil {
			return Report{}, failf(InvalidArgument, "%s is no safetensors file or directory of them", sourcePath)
		}
		for name := range src.plain {
			if _, ok := r.byName[name]; !ok {
				report(name, "is in the source only")
			}
		}
	}
	if total {
		p.total(r.files[0].sourceBytes() - int64(len(r.files[0].source)))
	}
	var mu sync.Mutex
	err = r.streamAll(p, func(i int, off int64, b []byte, s *codecs.Scratch) error {
		if src == nil {
			return nil
		}
		e := r.tensors[i].entry
		t, err := src.find(e.name, e.dtype, e.bytes)
		if err != nil {
			return err
		}
		if t == nil {
			return failf(Checksum, "the source has no such tensor of %d bytes of %s", e.bytes, e.dtype)
		}
		same, err := equalAt(t.src, off, b, s)
		if err == nil && !same {
			err = failf(Checksum, "differs from the source in bytes %d to %d", off, off+int64(len(b)))
		}
		return err
	}, func(i int, err error) error {
		x, damage := damaged(at(err, r.tensors[i].file.name, r.tensors[i].entry.name))
		if !damage {
			return err
		}
		if StatusOf(err) != Truncated {
			r.allBlocks(i, &x)
		}
		mu.Lock()
		defer mu.Unlock()
		rep.add(x)
		return nil
	})
	if err == nil {
		if err = r.files[0].checkParity(p); err != nil {
			if x, damage := damaged(err); damage {
				rep.add(x)
				err = nil
			}
		}
	}
	if err == nil && len(rep.Bad) == 0 {
		if src != nil && len(src.prefixes) == 1 && !bytes.Equal(src.prefixes[0], r.files[0].source) {
			report("", "the source has another header: shapes, metadata or the order of tensors differ")
		}
		err = r.checkSHA256(report, p)
	}
	slices.SortFunc(rep.Bad, func(a, b Problem) int { return strings.Compare(a.Tensor, b.Tensor) })
	return rep, err
}

// shaWindow is how many bytes are decoded at once where a digest takes them in their order.
const shaWindow = 32 << 20

// checkSHA256 compares the SHA-256 of the source, where the file has it, with that of what it decodes to, in the order of
// the source.
func (r *Reader) checkSHA256(report func(tensor, format string, args ...any), p *pool) error {
	c := r.files[0]
	if c.sha256 == nil {
		return nil
	}
	layout, err := c.sourceLayout()
	if err != nil {
		return err
	}
	h := sha256.New()
	h.Write(layout.prefix)
	silent := newPool(&Job{Workers: p.width(), Cancel: p.job.Cancel}) // the progress is made already
	buf := make([]byte, min(shaWindow, sourceSize(layout)))
	for _, t := range layout.tensors {
		for lo := int64(0); lo < t.End-t.Begin; lo += shaWindow {
			hi := min(lo+shaWindow, t.End-t.Begin)
			one := &request{tensor: r.tensors[r.byName[t.Name]], lo: lo, hi: hi, dst: buf[:hi-lo]}
			if err := r.decodeAll([]*request{one}, silent); err != nil {
				return err
			}
			h.Write(one.dst)
		}
	}
	if sum := h.Sum(nil); !bytes.Equal(sum, c.sha256) {
		report("", "SHA-256 of the source is %x, the header says %x", sum, c.sha256)
	}
	return nil
}

// equalAt reports whether the bytes of r from off on are b.
func equalAt(r io.ReaderAt, off int64, b []byte, s *codecs.Scratch) (bool, error) {
	s.Output = slices.Grow(s.Output[:0], len(b))[:len(b)]
	if _, err := r.ReadAt(s.Output, off); err != nil && err != io.EOF {
		return false, err
	}
	return bytes.Equal(s.Output, b), nil
}

// Info is everything the headers say, as one JSON object; bs_reader_info documents it.
func (r *Reader) Info() ([]byte, error) {
	type tensorInfo struct {
		Name        string   `json:"name"`
		Shape       []uint64 `json:"shape"`
		DType       string   `json:"dtype"`
		SourceDType string   `json:"source_dtype"`
		SourceShape []uint64 `json:"source_shape"`
		Bytes       int64    `json:"n_bytes"`
		Compressed  int64    `json:"compressed_bytes"`
		Codec       string   `json:"codec"`
		Special     *string  `json:"special"`
		MD5         string   `json:"md5"`
		File        string   `json:"file"`
	}
	c := r.files[0]
	all := struct {
		Path        string       `json:"path"`
		Format      string       `json:"format"`
		Mode        string       `json:"mode"`
		ModelType   string       `json:"model_type"`
		BaseModel   *string      `json:"base_model"`
		Writer      string       `json:"writer"`
		FileBytes   int64        `json:"file_bytes"`
		ParityBytes int64        `json:"parity_bytes"`
		SourceBytes int64        `json:"source_bytes"`
		SHA256      *string      `json:"sha256"`
		Files       []string     `json:"files"`
		Tensors     []tensorInfo `json:"tensors"`
	}{Path: strings.ToValidUTF8(r.path, "?"), Format: c.header.Format, Mode: c.header.Mode, ModelType: c.header.ModelType, BaseModel: c.header.BaseModel}
	if c.header.Writer != nil {
		all.Writer = *c.header.Writer
	}
	if c.sha256 != nil && len(r.files) == 1 {
		sum := hex.EncodeToString(c.sha256)
		all.SHA256 = &sum
	}
	all.Tensors = make([]tensorInfo, 0, len(r.tensors))
	shapes := map[string][]uint64{}
	for _, c := range r.files {
		all.Files = append(all.Files, strings.ToValidUTF8(c.name, "?"))
		all.FileBytes += c.size
		if c.parity != nil {
			all.ParityBytes += c.parity.sectionLen()
		}
		all.SourceBytes += c.sourceBytes()
		src, err := c.sourceLayout()
		if err != nil {
			return nil, inFile(err, c.name)
		}
		for _, t := range src.tensors {
			shapes[t.Name] = t.Shape
		}
	}
	for _, t := range r.tensors {
		e := t.entry
		var special *string
		if e.special != "" {
			special = &e.special
		}
		all.Tensors = append(all.Tensors, tensorInfo{e.name, e.shape, e.dtype.String(), e.dtype.Source(), shapes[e.name], e.bytes,
			e.compressed, e.codec, special, fmt.Sprintf("%x", e.md5), strings.ToValidUTF8(filepath.Base(t.file.name), "?")})
	}
	return json.Marshal(all)
}
