package core

import (
	"bytes"
	"crypto/md5"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/codecs/reference"
)

// Writing files that release 1.0.0 of the original package reads.

// unreadable are the dtypes that its decompress fails on, whatever they are coded with.
var unreadable = []codecs.DType{codecs.F64, codecs.U32, codecs.U64, codecs.C64, codecs.F8E8M0, codecs.F8E4M3FNUZ, codecs.F8E5M2FNUZ,
	codecs.F4, codecs.F6E2M3, codecs.F6E3M2}

// fetcher gives the bytes of one of a source's tensors, by so many threads.
type fetcher func(t sourceTensor, dst []byte, workers int) error

// compatTensor is a tensor on its way into such a file.
type compatTensor struct {
	spec    sourceTensor
	md5     [16]byte
	encoded reference.Encoded
}

// writeCompat writes such a file of a source's tensors. Its header begins the file and is not known before, so room is kept
// for it, which spaces fill. last is called before the file gets its name.
func writeCompat(dst string, mode os.FileMode, src *source, fetch fetcher, last func() error, opts Options, p *pool) (size int64, err error) {
	if opts.Parity > 0 || opts.SHA256 {
		return 0, failf(InvalidArgument, "files for release 1.0 hold neither parity nor a SHA-256")
	}
	tensors := slices.Clone(src.tensors)
	slices.SortFunc(tensors, func(a, b sourceTensor) int { return strings.Compare(a.Name, b.Name) })
	reserve, longest := int64(1000+len(src.metadata)), 0 // of the names that a tie may give
	for _, t := range tensors {
		if slices.Contains(unreadable, t.DType) {
			return 0, at(failf(UnsupportedFeature, "release 1.0 does not decode dtype %s, nor any other tensor of a file that has it", t.DType), "", t.Name)
		}
		quoted, err := jsontext.AppendQuote(nil, t.Name)
		if err != nil {
			return 0, at(err, "", t.Name)
		}
		reserve += 500 + int64(len(quoted)) + 21*int64(len(t.Shape))
		longest = max(longest, len(quoted))
	}
	reserve += int64(len(tensors) * longest)
	tmp, err := newTemporary(dst, mode, opts.NoReplace)
	if err != nil {
		return 0, err
	}
	published := false
	defer func() {
		if !published {
			tmp.abandon()
		}
	}()
	dataAt := preamble + reserve
	var header bytes.Buffer
	modelType := "llm"
	if isDiffusion(src.tensors) {
		modelType = "diffusion"
	}
	fmt.Fprintf(&header, `{"format":%q,"mode":%q,"model_type":%q,"base_model":null,"tensor_count":%d,"tensors":[`, family(tensors), modeNames[opts.Mode], modelType, len(tensors))
	next, seen := int64(0), map[tieKey]string{}
	for begin := 0; begin < len(tensors); {
		end, total := begin, int64(0)
		for end < len(tensors) && (end == begin || total+tensors[end].End-tensors[end].Begin <= mostOriginal/4 && end-begin < 4*p.width()) {
			total += tensors[end].End - tensors[end].Begin
			end++
		}
		batch := make([]compatTensor, end-begin)
		err := p.run(len(batch), func(i int, _ *codecs.Scratch) error {
			x := &batch[i]
			x.spec = tensors[begin+i]
			raw := make([]byte, x.spec.End-x.spec.Begin)
			if err := fetch(x.spec, raw, 1); err != nil {
				return at(err, "", x.spec.Name)
			}
			x.md5 = md5.Sum(raw)
			var err error
			if x.encoded, err = reference.Encode(raw, x.spec.DType.String(), storageBits(x.spec.DType)/8); err != nil {
				return at(failf(UnsupportedFeature, "release 1.0 cannot hold it: %s", err), "", x.spec.Name)
			}
			p.done(int64(len(raw)))
			return nil
		})
		if err != nil {
			return 0, err
		}
		for i := range batch {
			x := &batch[i]
			n := x.spec.End - x.spec.Begin
			key := tieKey{n, uint64(storageBits(x.spec.DType)), x.md5}
			codec, special, extra := x.encoded.Codec, "null", x.encoded.Extra
			if x.encoded.Kind != "" {
				special = fmt.Sprintf("%q", x.encoded.Kind)
			}
			blob := x.encoded.Blob
			if first, ok := seen[key]; ok && n >= smallestTie {
				quoted, err := jsontext.AppendQuote(nil, first)
				if err != nil {
					return 0, err
				}
				codec, special, extra, blob = codecTied, `"tied"`, `{"tied_to":`+string(quoted)+`}`, nil
			} else {
				seen[key] = x.spec.Name
			}
			if begin+i > 0 {
				header.WriteByte(',')
			}
			quoted, err := jsontext.AppendQuote(nil, x.spec.Name)
			if err != nil {
				return 0, err
			}
			fmt.Fprintf(&header, `{"name":%s,"shape":%s,"dtype":%q,"codec":%q,"special":%s,"compressed_bytes":%d,"offset":%d,"md5":%q,"extra":%s}`,
				quoted, appendInts(nil, x.spec.Shape), x.spec.DType, codec, special, len(blob), next, hex.EncodeToString(x.md5[:]), extra)
			if _, err := tmp.WriteAt(blob, dataAt+next); err != nil {
				return 0, err
			}
			next += int64(len(blob))
		}
		begin = end
	}
	metadata := "null"
	if src.metadata != nil {
		metadata = string(src.metadata)
	}
	fmt.Fprintf(&header, `],"safetensors_metadata":%s}`, metadata)
	if int64(header.Len()) > reserve || reserve > math.MaxUint32 {
		return 0, failf(Internal, "header of %d bytes outgrew its room of %d", header.Len(), reserve)
	}
	text := append(make([]byte, 0, dataAt), magic...)
	text = binary.LittleEndian.AppendUint16(text, formatVersion)
	text = binary.LittleEndian.AppendUint32(text, uint32(reserve))
	text = append(text, header.Bytes()...)
	text = append(text, bytes.Repeat([]byte{' '}, int(dataAt)-len(text))...)
	if _, err := tmp.WriteAt(text, 0); err != nil {
		return 0, err
	}
	size = dataAt + next
	c, err := openContainer("", tmp, size)
	if err == nil && !c.original {
		err = failf(Internal, "not what was meant")
	}
	if err != nil {
		return 0, failf(Internal, "the file does not open after writing: %s", err)
	}
	if err := last(); err != nil {
		return 0, err
	}
	published = true // publish abandons it where it fails
	return size, tmp.publish()
}

// Convert writes a `.bs` file or directory, of this package or the original one, anew: with other options, and tensors that
// are the same by their MD5s, without a safetensors file in between. basePath is the base model of a delta, or "": what is
// written is a difference to it again.
func Convert(src, dst, basePath string, opts Options, job *Job) (Result, error) {
	p := newPool(job)
	if err := opts.check(); err != nil {
		return Result{}, err
	}
	if err := notTheBase(dst, basePath); err != nil {
		return Result{}, err
	}
	info, err := os.Stat(src)
	if err != nil {
		return Result{}, inFile(err, src)
	}
	if info.IsDir() {
		return convertTree(src, dst, basePath, opts, p)
	}
	return convertFile(src, dst, basePath, nil, opts, ties{}, "", true, p)
}

func convertFile(src, dst, basePath string, aliases map[string]string, opts Options, shared ties, shard string, total bool, p *pool) (res Result, err error) {
	if sameFile(src, dst) {
		return res, failf(InvalidArgument, "%s and %s are the same file", src, dst)
	}
	info, err := os.Stat(src)
	if err != nil {
		return res, inFile(err, src)
	}
	r, err := openFile(src, basePath, aliases)
	if err != nil {
		return res, err
	}
	defer r.Close()
	if err := r.checkIdentities(p); err != nil {
		return res, err
	}
	c := r.files[0]
	layout, err := c.sourceLayout()
	if err != nil {
		return res, inFile(err, src)
	}
	if total {
		p.total(sourceSize(layout))
	}
	fetch := func(t sourceTensor, dst []byte, workers int) error {
		q, err := r.request(r.byName[t.Name], dst, int64(len(dst)))
		if err != nil {
			return err
		}
		if err := r.decodeAll([]*request{q}, newPool(&Job{Workers: workers, Cancel: p.job.Cancel})); err != nil {
			return err
		}
		if sum := md5.Sum(dst); sum != q.entry.md5 {
			return failf(Checksum, "MD5 of the decoded bytes is %x, the header says %x", sum, q.entry.md5)
		}
		return nil
	}
	if opts.Compat {
		n, err := writeCompat(dst, info.Mode(), layout, fetch, func() error { return nil }, opts, p)
		return Result{c.size, n, len(layout.tensors), 1}, inFile(err, dst)
	}
	if opts.SHA256 && c.sha256 == nil {
		return res, failf(InvalidArgument, "%s holds no SHA-256 of its source, which alone could tell it", src)
	}
	name := ""
	if r.base != nil {
		name = baseName(r.base.path)
	}
	w, err := newWriter(dst, info.Mode(), layout, name, opts, shared, shard)
	if err != nil {
		return res, inFile(err, dst)
	}
	published := false
	defer func() {
		if !published {
			w.tmp.abandon()
		}
	}()
	for i, t := range layout.tensors {
		data := make([]byte, t.End-t.Begin)
		if err := fetch(t, data, p.width()); err != nil {
			return res, inFile(at(err, "", t.Name), src)
		}
		it := &item{n: i, spec: t, src: memory(data), data: data}
		if r.base != nil && len(data) > 0 {
			if it.base, err = r.base.find(t.Name, t.DType, int64(len(data))); err != nil {
				return res, err
			}
			if err := r.base.identify([]*baseTensor{it.base}, p); err != nil {
				return res, err
			}
		}
		if err := w.put([]*item{it}, p); err != nil {
			return res, inFile(err, dst)
		}
	}
	published = true // finish abandons it where it fails
	n, err := w.finish(c.sha256, p)
	if err != nil {
		return res, inFile(err, dst)
	}
	return Result{c.size, n, len(layout.tensors), 1}, nil
}

// convertTree converts every `.bs` file of a directory, makes its indexes anew, and copies everything else but the original
// package's binary index, which would tell of other files.
func convertTree(src, dst, basePath string, opts Options, p *pool) (res Result, err error) {
	t, err := readTree(src)
	if err != nil {
		return res, inFile(err, src)
	}
	if !slices.ContainsFunc(t.files, func(f string) bool { return strings.HasSuffix(f, ourExt) }) {
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
		for _, dir := range append([]string{"."}, t.dirs...) {
			r, err := convertFolder(t, dir, tmp, folderBase(basePath, dir), opts, p)
			if err != nil {
				return err
			}
			res.add(r)
		}
		return nil
	})
	return res, inFile(err, dst)
}

func convertFolder(t *tree, dir, tmp, basePath string, opts Options, p *pool) (res Result, err error) {
	var index *shardIndex
	var files []string
	for _, f := range t.files {
		if filepath.Dir(f) != dir {
			continue
		}
		in := filepath.Join(t.root, f)
		switch {
		case filepath.Base(f) == IndexName:
			text, err := os.ReadFile(in)
			if err != nil {
				return res, err
			}
			if index, err = parseIndex(text); err != nil {
				return res, inFile(err, in)
			}
		case strings.HasSuffix(f, ourExt):
			files = append(files, f)
		case filepath.Base(f) != binaryIndexName:
			if err := copyFile(in, filepath.Join(tmp, f)); err != nil {
				return res, err
			}
		}
	}
	shared := ties{}
	for _, f := range files {
		known, shard := ties{}, ""
		if index != nil && slices.Contains(index.shards(), filepath.Base(f)) && !opts.Compat {
			known, shard = shared, filepath.Base(f)
		}
		r, err := convertFile(filepath.Join(t.root, f), filepath.Join(tmp, f), basePath, t.aliases[f], opts, known, shard, false, p)
		if err != nil {
			return res, err
		}
		res.add(r)
	}
	if index == nil {
		return res, nil
	}
	sources := index.Metadata.Sources
	if len(sources) == 0 && len(index.shards()) > 1 {
		made, err := index.madeSource()
		if err != nil {
			return res, err
		}
		sources = append(sources, made)
	}
	text, err := makeIndex(filepath.Join(tmp, dir), index.shards(), sources, opts)
	if err != nil {
		return res, err
	}
	return res, os.WriteFile(filepath.Join(tmp, dir, IndexName), text, 0o644)
}

// binaryIndexName is a file that release 4.0.0 puts beside its index.
const binaryIndexName = "bigsmall.index.bin"
