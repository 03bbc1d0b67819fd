package core

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/codecs/reference"
)

// This file alone knows the bytes of a container; FORMAT.md describes them.

const (
	magic         = "BGSM"
	formatVersion = 1
	preamble      = 10 // magic, version, header length
	dataAlign     = 4096
	trailerMagic  = "BGSMEND\n"
	trailerLen    = 48
	codecTied     = "tied_ref"

	sectionSource = "source_header"
)

// header is the JSON header. The keys of the original format keep its names and meaning.
type header struct {
	Format      string            `json:"format"`
	Mode        string            `json:"mode"`
	ModelType   string            `json:"model_type"`
	BaseModel   *string           `json:"base_model"`
	TensorCount uint64            `json:"tensor_count"`
	Tensors     []headerTensor    `json:"tensors"`
	Metadata    map[string]string `json:"safetensors_metadata"`
	Writer      *string           `json:"writer"`
	Draft       *int64            `json:"draft"`
	Requires    []string          `json:"requires"`
	Sections    []headerSection   `json:"sections"`
	SHA256      string            `json:"sha256"`
}

type headerTensor struct {
	Name       string       `json:"name"`
	Shape      shape        `json:"shape"`
	DType      string       `json:"dtype"`
	Codec      string       `json:"codec"`
	Special    *string      `json:"special"`
	Compressed uint64       `json:"compressed_bytes"`
	Offset     uint64       `json:"offset"`
	MD5        string       `json:"md5"`
	Extra      *headerExtra `json:"extra"`
}

// shape is read with care: two bytes of text become eight.
type shape []uint64

// UnmarshalJSONFrom counts before it parses.
func (s *shape) UnmarshalJSONFrom(d *jsontext.Decoder) error {
	v, err := d.ReadValue()
	if err != nil {
		return err
	}
	if n := bytes.Count(v, []byte{','}) + 1; n > MaxDims {
		return fmt.Errorf("shape of %d dimensions; at most %d are allowed", n, MaxDims)
	}
	return json.Unmarshal(v, (*[]uint64)(s))
}

type headerExtra struct {
	Head     uint64 `json:"head"`
	Checksum string `json:"checksum"`
	BaseMD5  string `json:"base_md5"`
	TiedTo   string `json:"tied_to"`
	Shard    string `json:"shard"`

	SpecialKind string `json:"special_kind"` // of the original package
}

type headerSection struct {
	Kind     string `json:"kind"`
	Offset   uint64 `json:"offset"`
	Length   uint64 `json:"length"`
	Checksum string `json:"checksum"`
	Optional bool   `json:"optional"`
}

// entry is one tensor of a file, checked.
type entry struct {
	name       string
	dtype      codecs.DType
	shape      []uint64
	bytes      int64 // decoded
	codec      string
	special    string
	compressed int64
	offset     int64 // in the file
	md5        [16]byte
	head       int64
	checksum   uint64
	baseMD5    *[16]byte
	tiedTo     string // name of the tensor that holds the bytes, or ""
	shard      string // its file where that is another one

	blob reference.Blob // in a file of the original package
}

// needsBase reports whether the tensor is stored as a difference.
func (e *entry) needsBase() bool { return e.baseMD5 != nil || e.blob.Codec == reference.XOR }

// elements is the number of elements of the header's shape.
func (e *entry) elements() uint64 { return uint64(e.bytes) * 8 / uint64(storageBits(e.dtype)) }

// container is an open `.bs` file.
type container struct {
	name    string // as the caller named it, for messages
	src     io.ReaderAt
	size    int64
	header  header
	entries []entry
	byName  map[string]int
	source  []byte // length and text of the source's safetensors header
	data    int64  // where the data section begins
	sha256  []byte

	original   bool         // a file of the original package
	parity     *parityShape // or nil
	parityHash uint64       // the trailer's
}

// openContainer reads and checks everything but the payloads. It trusts nothing: lengths are checked against the file
// before anything is allocated.
func openContainer(name string, src io.ReaderAt, size int64) (*container, error) {
	c := &container{name: name, src: src, size: size}
	if err := c.open(); err != nil {
		return nil, at(err, name, "")
	}
	return c, nil
}

func (c *container) read(offset, n int64) ([]byte, error) {
	if offset < 0 || n < 0 || n > c.size-offset {
		return nil, failf(Truncated, "%d bytes at %d of a file of %d", n, offset, c.size)
	}
	b := make([]byte, n)
	got, err := c.src.ReadAt(b, offset)
	if got == len(b) {
		return b, nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return nil, err
}

func (c *container) open() error {
	pre, err := c.read(0, min(preamble, c.size))
	if err != nil {
		return err
	}
	n := min(len(pre), len(magic))
	if string(pre[:n]) != magic[:n] || n == 0 {
		return failf(Corrupt, "not a .bs file: it begins with %q, not %q", pre[:n], magic)
	}
	if len(pre) < preamble {
		return failf(Truncated, "a .bs file of %d bytes", len(pre))
	}
	v := binary.LittleEndian.Uint16(pre[4:])
	if v == 0 || v > originalVersions {
		return failf(UnsupportedVersion, "container version %d; this is BigSmall %s, which reads version %d: use a newer one", v, Version, formatVersion)
	}
	h := int64(binary.LittleEndian.Uint32(pre[6:]))
	if h > maxHeader {
		return failf(Corrupt, "header of %d bytes; at most %d are allowed", h, maxHeader)
	}
	trailer, err := c.readTrailer()
	if err != nil {
		return err
	}
	text, err := c.read(0, preamble+h)
	if err != nil {
		return err
	}
	c.data = preamble + h
	if trailer != nil {
		if c.data%codecs.Align != 0 {
			return failf(Corrupt, "data begins at byte %d, which is no multiple of %d", c.data, codecs.Align)
		}
		if err := trailer.check(c.size, c.data, text); err != nil {
			return err
		}
	}
	if err := unmarshal(text[preamble:], &c.header); err != nil {
		if trailer == nil && c.size == c.data {
			return failf(Truncated, "the file ends with its header")
		}
		return failf(Corrupt, "header is no proper JSON: %s", err)
	}
	if err := c.checkHeader(trailer); err != nil {
		return err
	}
	if c.original {
		return c.checkOriginal()
	}
	if v != formatVersion {
		return failf(UnsupportedVersion, "container version %d, written by %s; BigSmall %s reads version %d of its own: use a newer one", v, c.writerName(), Version, formatVersion)
	}
	return c.checkEntries()
}

// A trailer closes the chain of checksums: that of the header, which holds those of every payload's head, and all
// lengths.
type trailer struct {
	headerLen, dataLen uint64
	headerHash         uint64
	parityHash         uint64 // of the section, 0 without one
}

func (t trailer) append(dst []byte) []byte {
	start := len(dst)
	dst = append(dst, trailerMagic...)
	dst = binary.LittleEndian.AppendUint64(dst, t.headerLen)
	dst = binary.LittleEndian.AppendUint64(dst, t.dataLen)
	dst = binary.LittleEndian.AppendUint64(dst, t.headerHash)
	dst = binary.LittleEndian.AppendUint64(dst, t.parityHash)
	return binary.LittleEndian.AppendUint64(dst, xxh3.Hash(dst[start:]))
}

// readTrailer returns nil where the file does not end with an intact one.
func (c *container) readTrailer() (*trailer, error) {
	if c.size < preamble+trailerLen {
		return nil, nil
	}
	b, err := c.read(c.size-trailerLen, trailerLen)
	if err != nil {
		return nil, err
	}
	if string(b[:8]) != trailerMagic || xxh3.Hash(b[:40]) != binary.LittleEndian.Uint64(b[40:]) {
		return nil, nil
	}
	word := func(at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }
	return &trailer{word(8), word(16), word(24), word(32)}, nil
}

func (t *trailer) check(size, data int64, text []byte) error {
	if t.headerLen != uint64(data) || t.dataLen != uint64(size-data-trailerLen) {
		return failf(Corrupt, "the trailer tells of %d header and %d data bytes, the file has %d and %d",
			t.headerLen, t.dataLen, data, size-data-trailerLen)
	}
	if got := xxh3.Hash(text); got != t.headerHash {
		return failf(Checksum, "checksum of the header is %016x, not %016x", got, t.headerHash)
	}
	return nil
}

// writerName is what a message calls the program that wrote the file.
func (c *container) writerName() string {
	if c.header.Writer != nil {
		return strconv.Quote(*c.header.Writer)
	}
	return "the original bigsmall package"
}

func (c *container) checkHeader(t *trailer) error {
	h := &c.header
	ours := h.Writer != nil || h.Draft != nil
	for _, x := range h.Tensors {
		ours = ours || codecs.Known(x.Codec)
	}
	if !ours && t == nil {
		c.original = true
		return nil
	}
	if t == nil {
		todo := "fetch it again"
		for _, s := range h.Sections {
			if s.Kind == sectionParity {
				todo = "repair it by its parity, or " + todo
			}
		}
		return failf(Truncated, "the file does not end with a trailer: it is incomplete or damaged at its end; %s", todo)
	}
	c.parityHash = t.parityHash
	if h.Draft != nil && *h.Draft != Draft || ours && h.Draft == nil {
		d := int64(0)
		if h.Draft != nil {
			d = *h.Draft
		}
		return failf(UnsupportedVersion, "format draft %d, written by %s; BigSmall %s reads draft %d only: compress the source again",
			d, c.writerName(), Version, Draft)
	}
	for _, r := range h.Requires {
		return failf(UnsupportedFeature, "the file, written by %s, requires the feature %q: use a newer BigSmall", c.writerName(), r)
	}
	if h.TensorCount != uint64(len(h.Tensors)) {
		return failf(Corrupt, "tensor_count is %d, but %d tensors are listed", h.TensorCount, len(h.Tensors))
	}
	if h.SHA256 != "" {
		sum, err := hex.DecodeString(h.SHA256)
		if err != nil || len(sum) != 32 {
			return failf(Corrupt, "sha256 %q is no SHA-256", h.SHA256)
		}
		c.sha256 = sum
	}
	return nil
}

func parseHash(s string) (uint64, bool) {
	if len(s) != 16 {
		return 0, false
	}
	v, err := strconv.ParseUint(s, 16, 64)
	return v, err == nil
}

func parseMD5(s string) (sum [16]byte, ok bool) {
	if len(s) != 32 {
		return sum, false
	}
	_, err := hex.Decode(sum[:], []byte(s))
	return sum, err == nil
}

// checkEntries checks every entry and section; together they must tile the data section.
func (c *container) checkEntries() error {
	c.entries = make([]entry, len(c.header.Tensors))
	c.byName = make(map[string]int, len(c.entries))
	next := uint64(0)
	end := uint64(c.size - c.data - trailerLen)
	for i := range c.header.Tensors {
		x := &c.header.Tensors[i]
		e, err := c.checkEntry(x)
		if err == nil {
			if _, twice := c.byName[x.Name]; twice {
				err = failf(Corrupt, "listed twice")
			} else if x.Offset != next || x.Compressed > end-next {
				err = failf(Corrupt, "payload of %d bytes at offset %d, where %d is next and the data section has %d bytes",
					x.Compressed, x.Offset, next, end)
			}
		}
		if err != nil {
			return at(err, c.name, x.Name)
		}
		e.offset = c.data + int64(x.Offset)
		next += x.Compressed
		c.entries[i], c.byName[x.Name] = *e, i
	}
	for i := range c.entries {
		if err := c.checkTie(&c.entries[i]); err != nil {
			return at(err, c.name, c.entries[i].name)
		}
	}
	for _, s := range c.header.Sections {
		if s.Offset != next || s.Length > end-next || s.Length%codecs.Align != 0 {
			return failf(Corrupt, "section %q of %d bytes at offset %d, where %d is next and the data section has %d bytes",
				s.Kind, s.Length, s.Offset, next, end)
		}
		next += s.Length
		if err := c.readSection(s); err != nil {
			return err
		}
	}
	if next != end {
		return failf(Corrupt, "the data section has %d bytes, of which %d are accounted for", end, next)
	}
	if c.source == nil {
		return failf(Corrupt, "the section %q is missing", sectionSource)
	}
	if c.parity == nil && c.parityHash != 0 {
		return failf(UnsupportedFeature, "the trailer has the checksum of a section that is not there: a newer BigSmall wrote this file")
	}
	return nil
}

func (c *container) checkEntry(x *headerTensor) (*entry, error) {
	d, ok := codecs.ParseDType(x.DType)
	if !ok || d.String() != x.DType {
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
	extra := x.Extra
	if extra == nil {
		extra = &headerExtra{}
	}
	switch {
	case x.Codec == codecTied:
		if extra.TiedTo == "" || x.Compressed != 0 {
			return nil, failf(Corrupt, "tied tensor without a master, or with %d bytes of its own", x.Compressed)
		}
		e.tiedTo, e.shard = extra.TiedTo, extra.Shard
		if e.shard != "" && !plainName(e.shard) {
			return nil, failf(Corrupt, "shard %q is no plain file name", e.shard)
		}
		return e, nil
	case !codecs.Known(x.Codec):
		return nil, failf(UnsupportedCodec, "codec %q, written by %s, is unknown to BigSmall %s", x.Codec, c.writerName(), Version)
	case e.bytes == 0:
		if x.Compressed != 0 {
			return nil, failf(Corrupt, "%d bytes for a tensor without elements", x.Compressed)
		}
		return e, nil
	}
	if e.checksum, ok = parseHash(extra.Checksum); !ok {
		return nil, failf(Corrupt, "checksum %q", extra.Checksum)
	}
	e.head = int64(extra.Head)
	if extra.Head > x.Compressed || x.Compressed%codecs.Align != 0 {
		return nil, failf(Corrupt, "payload of %d bytes with a head of %d", x.Compressed, extra.Head)
	}
	// The head is what a reader allocates, and it bounds what a payload can decode to.
	if least, most := codecs.MinHead(d, e.bytes), codecs.MaxHead(e.bytes); e.head < least || e.head > most {
		return nil, failf(Corrupt, "head of %d bytes for a tensor of %d: it takes %d to %d", e.head, e.bytes, least, most)
	}
	if extra.BaseMD5 != "" {
		sum, ok := parseMD5(extra.BaseMD5)
		if !ok {
			return nil, failf(Corrupt, "base_md5 %q is no MD5", extra.BaseMD5)
		}
		e.baseMD5 = &sum
	}
	if (x.Codec == codecs.CodecDelta) != (e.baseMD5 != nil) {
		return nil, failf(Corrupt, "codec %s and base_md5 %q do not go together", x.Codec, extra.BaseMD5)
	}
	return e, nil
}

// checkTie makes sure that a tied tensor leads in one step to one that holds bytes, if that one is in this file.
func (c *container) checkTie(e *entry) error {
	if e.tiedTo == "" || e.shard != "" {
		return nil
	}
	i, ok := c.byName[e.tiedTo]
	if !ok {
		return failf(Corrupt, "tied to %q, which is not in the file", e.tiedTo)
	}
	if m := &c.entries[i]; m.tiedTo != "" || m.bytes != e.bytes || m.md5 != e.md5 {
		return failf(Corrupt, "tied to %q, which is another tensor", e.tiedTo)
	}
	return nil
}

func (c *container) readSection(s headerSection) error {
	if s.Kind != sectionSource && !s.Optional {
		return failf(UnsupportedFeature, "section %q, written by %s, is unknown to this version", s.Kind, c.writerName())
	}
	want, ok := parseHash(s.Checksum)
	if !ok {
		return failf(Corrupt, "section %q has the checksum %q", s.Kind, s.Checksum)
	}
	switch s.Kind {
	case sectionSource:
	case sectionParity:
		return c.readParity(s)
	default:
		return nil
	}
	if c.source != nil || s.Length > maxHeader {
		return failf(Corrupt, "section %q of %d bytes, or a second one", s.Kind, s.Length)
	}
	b, err := c.read(c.data+int64(s.Offset), int64(s.Length))
	if err != nil {
		return err
	}
	if got := xxh3.Hash(b); got != want {
		return failf(Checksum, "checksum of section %q is %016x, not %016x", s.Kind, got, want)
	}
	if c.source, err = unpackSection(b, sectionLimit(c.data)); err != nil {
		return err
	}
	src, err := c.sourceLayout()
	if err != nil {
		return failf(Corrupt, "section %q: %s", s.Kind, err)
	}
	return c.checkSource(src)
}

// readParity knows where the parity is; nothing of it is read. It is the last section, so that it covers the others.
func (c *container) readParity(s headerSection) error {
	if c.parity != nil || c.source == nil || int64(s.Offset+s.Length) != c.size-c.data-trailerLen {
		return failf(Corrupt, "section %q is not the last one", s.Kind)
	}
	for percent := range MaxParity {
		g := newParityShape(c.data+int64(s.Offset), percent+1)
		if g.size == c.size && hash(xxh3.Hash(g.head())) == s.Checksum {
			c.parity = &g
			return nil
		}
	}
	return failf(Corrupt, "section %q of %d bytes for %d: it is of no percentage", s.Kind, s.Length, c.data+int64(s.Offset))
}

// checkSource makes sure that the source's header and ours tell of the same tensors.
func (c *container) checkSource(src *source) error {
	if len(src.tensors) != len(c.entries) {
		return failf(Corrupt, "the source's header has %d tensors, the file %d", len(src.tensors), len(c.entries))
	}
	for _, t := range src.tensors {
		i, ok := c.byName[t.Name]
		if !ok || c.entries[i].dtype != t.DType || c.entries[i].bytes != t.End-t.Begin ||
			!slices.Equal(c.entries[i].shape, headerShape(t.DType, t.Shape)) {
			return &Error{Status: Corrupt, Tensor: t.Name, Msg: "the source's header and the file's do not agree"}
		}
	}
	return nil
}

// sourceLayout is the parsed header of the source file.
func (c *container) sourceLayout() (*source, error) {
	if len(c.source) < 8 || binary.LittleEndian.Uint64(c.source) != uint64(len(c.source)-8) {
		return nil, failf(Corrupt, "source header of %d bytes does not begin with its length", len(c.source))
	}
	return parseSource(c.source, -1)
}

// A section's content is u32 length of a zstd frame, u32 length of its content, the frame, zeros.
func packSection(content []byte) []byte {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBetterCompression))
	if err != nil {
		panic(err) // constant options
	}
	b := e.EncodeAll(content, make([]byte, 8))
	binary.LittleEndian.PutUint32(b, uint32(len(b)-8))
	binary.LittleEndian.PutUint32(b[4:], uint32(len(content)))
	for len(b)%codecs.Align != 0 {
		b = append(b, 0)
	}
	return b
}

// sectionLimit bounds the content of a section by where the data begins: a small file must not unpack to a large header.
func sectionLimit(data int64) int64 { return 4*data + 1<<20 }

func unpackSection(b []byte, limit int64) ([]byte, error) {
	if len(b) < 8 {
		return nil, failf(Corrupt, "section of %d bytes", len(b))
	}
	frame, size := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
	if int64(frame) > int64(len(b)-8) || int64(size) > min(limit, maxHeader+8) {
		return nil, failf(Corrupt, "section of %d bytes holds a frame of %d for %d", len(b), frame, size)
	}
	for _, v := range b[8+frame:] {
		if v != 0 {
			return nil, failf(Corrupt, "padding of a section is not zero")
		}
	}
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderLowmem(true))
	if err != nil {
		panic(err) // constant options
	}
	defer d.Close()
	out, err := d.DecodeAll(b[8:8+frame], make([]byte, 0, size))
	if err != nil || len(out) != int(size) {
		return nil, failf(Corrupt, "section's frame does not hold %d bytes", size)
	}
	return out, nil
}

func appendInts(b []byte, v []uint64) []byte {
	b = append(b, '[')
	for i, x := range v {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, x, 10)
	}
	return append(b, ']')
}

// appendHeader writes the header's JSON, keys in the order of FORMAT.md.
func appendHeader(b []byte, h *header) []byte {
	quote := func(key, s string) {
		b = append(append(b, key...), ':')
		b, _ = jsontext.AppendQuote(b, s)
		b = append(b, ',')
	}
	b = append(b, '{')
	quote(`"format"`, h.Format)
	quote(`"mode"`, h.Mode)
	quote(`"model_type"`, h.ModelType)
	if h.BaseModel != nil {
		quote(`"base_model"`, *h.BaseModel)
	} else {
		b = append(b, `"base_model":null,`...)
	}
	b = fmt.Appendf(b, `"tensor_count":%d,"tensors":[`, len(h.Tensors))
	for i, t := range h.Tensors {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendTensor(b, &t)
	}
	b = append(b, `],"safetensors_metadata":`...)
	if h.Metadata == nil {
		b = append(b, "null"...)
	} else {
		m, _ := json.Marshal(h.Metadata, json.Deterministic(true))
		b = append(b, m...)
	}
	b = append(b, ',')
	quote(`"writer"`, *h.Writer)
	b = fmt.Appendf(b, `"draft":%d,"requires":[],"sections":[`, *h.Draft)
	for i, s := range h.Sections {
		if i > 0 {
			b = append(b, ',')
		}
		b = fmt.Appendf(b, `{"kind":%q,"offset":%d,"length":%d,"checksum":%q,"optional":%v}`, s.Kind, s.Offset, s.Length, s.Checksum, s.Optional)
	}
	b = append(b, ']')
	if h.SHA256 != "" {
		b = fmt.Appendf(b, `,"sha256":%q`, h.SHA256)
	}
	return append(b, '}')
}

func appendTensor(b []byte, t *headerTensor) []byte {
	b = append(b, `{"name":`...)
	b, _ = jsontext.AppendQuote(b, t.Name)
	b = appendInts(append(b, `,"shape":`...), t.Shape)
	b = fmt.Appendf(b, `,"dtype":%q,"codec":%q,"special":`, t.DType, t.Codec)
	if t.Special == nil {
		b = append(b, "null"...)
	} else {
		b = strconv.AppendQuote(b, *t.Special)
	}
	b = fmt.Appendf(b, `,"compressed_bytes":%d,"offset":%d,"md5":%q,"extra":`, t.Compressed, t.Offset, t.MD5)
	switch x := t.Extra; {
	case x == nil:
		b = append(b, "null"...)
	case x.TiedTo != "":
		b = append(b, `{"tied_to":`...)
		b, _ = jsontext.AppendQuote(b, x.TiedTo)
		if x.Shard != "" {
			b = append(b, `,"shard":`...)
			b, _ = jsontext.AppendQuote(b, x.Shard)
		}
		b = append(b, '}')
	default:
		b = fmt.Appendf(b, `{"head":%d,"checksum":%q`, x.Head, x.Checksum)
		if x.BaseMD5 != "" {
			b = fmt.Appendf(b, `,"base_md5":%q`, x.BaseMD5)
		}
		b = append(b, '}')
	}
	return append(b, '}')
}

// family is the header's `format`: the float family that most tensors are of, the first of equals.
func family(tensors []sourceTensor) string {
	name := func(d codecs.DType) string {
		switch d {
		case codecs.F32:
			return "fp32"
		case codecs.F16:
			return "fp16"
		case codecs.BF16:
			return "bf16"
		case codecs.F8E4M3, codecs.F8E5M2, codecs.F8E4M3FNUZ, codecs.F8E5M2FNUZ, codecs.F8E8M0:
			return "fp8"
		case codecs.F4:
			return "fp4"
		}
		return ""
	}
	count, best := map[string]int{}, ""
	var order []string
	for _, t := range tensors {
		if n := name(t.DType); n != "" {
			if count[n]++; count[n] == 1 {
				order = append(order, n)
			}
		}
	}
	for _, n := range order {
		if best == "" || count[n] > count[best] {
			best = n
		}
	}
	if best == "" {
		return "bf16"
	}
	return best
}

// roundUp returns the next multiple of a power of two.
func roundUp(n, to int64) int64 { return n + (-n & (to - 1)) }
