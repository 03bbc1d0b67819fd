package core

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"sync"

	"github.com/go-json-experiment/json"
)

// Report is what Verify found.
type Report struct {
	Tensors int
	Bad     []Problem
}

// Problem is one damaged or different tensor.
type Problem struct {
	File    string `json:"file"`
	Tensor  string `json:"tensor"`
	Problem string `json:"problem"`
}

// Verify decodes everything and checks every checksum and MD5; with a source (a `.safetensors` file or directory) it
// compares with that too. An error means that the check could not run: the file cannot be read or is no `.bs` file.
// Damage is reported, that of a header as a problem without a tensor.
func Verify(path, sourcePath, basePath string, job *Job) (Report, error) {
	r, err := Open(path, basePath)
	if err != nil {
		if e := asError(err); (e.Status == Corrupt || e.Status == Truncated || e.Status == Checksum) && !isSafetensors(e.File) {
			return Report{Bad: []Problem{{e.File, e.Tensor, e.Msg}}}, nil
		}
		return Report{}, err
	}
	defer r.Close()
	p := newPool(job)
	if err := r.checkIdentities(p); err != nil {
		return Report{}, err
	}
	rep := Report{Tensors: len(r.tensors)}
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
				rep.Bad = append(rep.Bad, Problem{path, name, "is in the source only"})
			}
		}
	}
	total := int64(0)
	for _, t := range r.tensors {
		total += t.entry.bytes
	}
	p.total(total)
	var mu sync.Mutex
	err = r.streamAll(p, func(i int, off int64, b []byte) error {
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
		same, err := equalAt(t.src, off, b)
		if err == nil && !same {
			err = failf(Checksum, "differs from the source in bytes %d to %d", off, off+int64(len(b)))
		}
		return err
	}, func(i int, err error) error {
		if s := StatusOf(err); s == IO || s == Internal {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		rep.Bad = append(rep.Bad, Problem{r.tensors[i].file.name, r.tensors[i].entry.name, asError(err).Msg})
		return nil
	})
	slices.SortFunc(rep.Bad, func(a, b Problem) int {
		return bytes.Compare([]byte(a.File+"\x00"+a.Tensor), []byte(b.File+"\x00"+b.Tensor))
	})
	return rep, err
}

func equalAt(r io.ReaderAt, off int64, b []byte) (bool, error) {
	buf := make([]byte, min(len(b), 1<<20))
	for len(b) > 0 {
		n := min(len(b), len(buf))
		if _, err := r.ReadAt(buf[:n], off); err != nil && err != io.EOF {
			return false, err
		}
		if !bytes.Equal(buf[:n], b[:n]) {
			return false, nil
		}
		b, off = b[n:], off+int64(n)
	}
	return true, nil
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
		SourceBytes int64        `json:"source_bytes"`
		SHA256      *string      `json:"sha256"`
		Files       []string     `json:"files"`
		Tensors     []tensorInfo `json:"tensors"`
	}{Path: r.path, Format: c.header.Format, Mode: c.header.Mode, ModelType: c.header.ModelType, BaseModel: c.header.BaseModel}
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
		all.Files = append(all.Files, c.name)
		all.FileBytes += c.size
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
			e.compressed, e.codec, special, fmt.Sprintf("%x", e.md5), filepath.Base(t.file.name)})
	}
	return json.Marshal(all)
}
