package core

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/bits"
	"slices"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"bigsmall.dev/bigsmall/codecs"
)

// maxHeader bounds every JSON header that is read, ours and the source's: the limit of safetensors.
const maxHeader = 100_000_000

// MaxDims is the most dimensions a tensor may have.
const MaxDims = 64

// source is a parsed `.safetensors` header.
type source struct {
	prefix   []byte // length and header text, exactly as they stand in the file
	tensors  []sourceTensor
	metadata jsontext.Value // the object, or nil
}

type sourceTensor struct {
	Name  string
	DType codecs.DType
	Shape []uint64 // as safetensors spells it
	Begin int64    // in the data section
	End   int64
}

// readSource reads and checks the header of a safetensors file of the given size. Its tensors come back in the order of
// their data; together they must cover the data section without gaps, as safetensors itself demands.
func readSource(r io.ReaderAt, size int64) (*source, error) {
	var n [8]byte
	if _, err := io.ReadFull(io.NewSectionReader(r, 0, size), n[:]); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, failf(InvalidArgument, "not a safetensors file: %d bytes", size)
		}
		return nil, err
	}
	h := binary.LittleEndian.Uint64(n[:])
	if h > maxHeader || h < 2 || int64(h) > size-8 {
		if what := otherKind(n[:]); what != "" {
			return nil, failf(InvalidArgument, "not a safetensors file but %s", what)
		}
		return nil, failf(InvalidArgument, "not a safetensors file: header of %d bytes in a file of %d", h, size)
	}
	prefix := make([]byte, 8+h)
	if _, err := io.ReadFull(io.NewSectionReader(r, 0, size), prefix); err != nil {
		return nil, err
	}
	return parseSource(prefix, size-int64(len(prefix)))
}

// otherKind names what a file is that people take for safetensors, by its first eight bytes.
func otherKind(head []byte) string {
	for start, what := range map[string]string{
		magic: "a .bs file already", "version ": "a Git LFS pointer: run git lfs pull", "PK\x03\x04": "a PyTorch checkpoint or another zip file: convert it first",
		"\x80\x02": "a pickled checkpoint: convert it first", "<!DOCTYP": "an HTML page: the download went wrong", "<html": "an HTML page: the download went wrong",
		"GGUF": "a GGUF file",
	} {
		if bytes.HasPrefix(head, []byte(start)) {
			return what
		}
	}
	return ""
}

// parseSource parses a header followed by data bytes, or, where that is negative, by as many as its tensors need.
func parseSource(prefix []byte, data int64) (*source, error) {
	s := &source{prefix: prefix}
	limit := uint64(1 << 62)
	if data >= 0 {
		limit = uint64(data)
	}
	if err := boundJSON(prefix[8:]); err != nil {
		return nil, failf(InvalidArgument, "not a safetensors file: %s", err)
	}
	d := jsontext.NewDecoder(bytes.NewBuffer(prefix[8:len(prefix):len(prefix)]))
	bad := func(err error) error {
		return failf(InvalidArgument, "not a safetensors file: header is no proper JSON: %s", err)
	}
	if t, err := d.ReadToken(); err != nil || t.Kind() != '{' {
		return nil, bad(errors.Join(err, errors.New("no object")))
	}
	for d.PeekKind() == '"' {
		key, err := d.ReadToken()
		if err != nil {
			return nil, bad(err)
		}
		name := key.String()
		value, err := d.ReadValue()
		if err != nil {
			return nil, bad(err)
		}
		if name == "__metadata__" {
			var m map[string]string
			if err := json.Unmarshal(value, &m); err != nil {
				return nil, bad(err)
			}
			if value.Kind() == '{' {
				s.metadata = slices.Clone(value)
			}
			continue
		}
		var x struct {
			DType   string     `json:"dtype"`
			Shape   *shape     `json:"shape"`
			Offsets *[2]uint64 `json:"data_offsets"`
		}
		if err := json.Unmarshal(value, &x); err != nil || x.Shape == nil || x.Offsets == nil {
			return nil, &Error{Status: InvalidArgument, Tensor: name, Msg: "not a safetensors file: dtype, shape and data_offsets are not what they should be", Err: err}
		}
		dt, ok := codecs.ParseDType(x.DType)
		if !ok || dt.Source() != x.DType {
			return nil, &Error{Status: UnsupportedFeature, Tensor: name, Msg: "dtype " + x.DType + " is unknown to this version"}
		}
		if x.Offsets[0] > x.Offsets[1] || x.Offsets[1] > limit {
			return nil, at(failf(InvalidArgument, "data_offsets [%d, %d] with %d data bytes in the file", x.Offsets[0], x.Offsets[1], data), "", name)
		}
		n, ok := byteSize(*x.Shape, dt.Bits())
		if !ok || n != x.Offsets[1]-x.Offsets[0] {
			return nil, at(failf(InvalidArgument, "shape %d of %s does not take the %d bytes it has", *x.Shape, x.DType, x.Offsets[1]-x.Offsets[0]), "", name)
		}
		s.tensors = append(s.tensors, sourceTensor{name, dt, *x.Shape, int64(x.Offsets[0]), int64(x.Offsets[1])})
	}
	if _, err := d.ReadToken(); err != nil {
		return nil, bad(err)
	}
	if _, err := d.ReadToken(); !errors.Is(err, io.EOF) {
		return nil, bad(errors.New("something follows the object"))
	}
	slices.SortStableFunc(s.tensors, func(a, b sourceTensor) int {
		if a.Begin != b.Begin {
			return int(min(max(a.Begin-b.Begin, -1), 1))
		}
		return int(min(max(a.End-b.End, -1), 1)) // those without elements first
	})
	end := int64(0)
	for _, t := range s.tensors {
		if t.Begin != end {
			return nil, at(failf(InvalidArgument, "data begins at byte %d, where byte %d is next: safetensors allows no gaps or overlaps", t.Begin, end), "", t.Name)
		}
		end = t.End
	}
	if data >= 0 && end != data {
		return nil, failf(InvalidArgument, "tensors end at byte %d of %d data bytes: the file is incomplete or has bytes too many", end, data)
	}
	return s, nil
}

// byteSize is the number of bytes of a tensor; ok is false where that overflows or is no whole number.
func byteSize(shape []uint64, bitsPerValue int) (n uint64, ok bool) {
	n = 1
	for _, d := range shape {
		if d == 0 {
			return 0, true
		}
	}
	for _, d := range shape {
		hi, lo := bits.Mul64(n, d)
		if hi != 0 {
			return 0, false
		}
		n = lo
	}
	hi, lo := bits.Mul64(n, uint64(bitsPerValue))
	return lo / 8, hi == 0 && lo%8 == 0 && lo < 1<<63
}

// headerShape is the shape a `.bs` header has for a tensor: safetensors' own, but F4 with its last dimension halved, as
// torch packs it, and otherwise sub-byte types as plain bytes.
func headerShape(d codecs.DType, shape []uint64) []uint64 {
	if d.Bits() >= 8 {
		return shape
	}
	n, _ := byteSize(shape, d.Bits())
	if last := len(shape) - 1; d == codecs.F4 && last >= 0 && shape[last]%2 == 0 {
		shape = slices.Clone(shape)
		shape[last] /= 2
		return shape
	}
	return []uint64{n}
}

// storageBits is the size of one element of a header's shape.
func storageBits(d codecs.DType) int { return max(d.Bits(), 8) }

// writeSource makes the header of a safetensors file as the safetensors library writes it.
func writeSource(tensors []sourceTensor, metadata jsontext.Value) []byte {
	b := append(make([]byte, 8), '{')
	if len(metadata) > 0 {
		b = append(append(b, `"__metadata__":`...), metadata...)
	}
	for _, t := range tensors {
		if len(b) > 9 {
			b = append(b, ',')
		}
		b, _ = jsontext.AppendQuote(b, t.Name)
		b = append(append(append(b, `:{"dtype":"`...), t.DType.Source()...), `","shape":`...)
		b = appendInts(b, t.Shape)
		b = appendInts(append(b, `,"data_offsets":`...), []uint64{uint64(t.Begin), uint64(t.End)})
		b = append(b, '}')
	}
	b = append(b, '}')
	for len(b)%8 != 0 {
		b = append(b, ' ')
	}
	binary.LittleEndian.PutUint64(b, uint64(len(b)-8))
	return b
}
