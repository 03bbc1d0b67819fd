package codecs

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync"

	"github.com/zeebo/xxh3"

	"bigsmall.dev/bigsmall/codecs/planes"
	"bigsmall.dev/bigsmall/codecs/rans"
)

// Limits of the format; see SPEC.md.
const (
	BlockLog    = 16            // log2 of the words of a block
	BlockWords  = 1 << BlockLog // the last block of a payload may have fewer
	GroupBlocks = 4             // blocks that share their choice of tables
	MaxTables   = 16            // tables of a field
	maxFields   = 8
	maxPalette  = 16
	fixedHead   = 24
	fieldHead   = 8
	indexEntry  = 12
	classCount  = 256            // entries of a class map
	mostZstd    = 8 * BlockWords // bytes of a frame's content
	// Align is what payloads are padded to.
	Align = 64
)

// Transform says what the words of a payload are.
type Transform uint8

const (
	Plain    Transform = iota // the source's words, their Shift zero low bits left out
	Half                      // binary32 words that are exact binary16 numbers, as those
	Palette                   // indexes into a list of at most 16 distinct words
	RowDelta                  // differences to the word one row above, within a block
	BaseDiff                  // differences to the words of a base tensor
	endTransform
)

// A tableSet is the frequency tables for the symbols of a field, chosen by group (classes nil) or by class of each symbol.
type tableSet struct {
	tables  []*rans.Table
	classes *[classCount]uint8
	choice  []uint8 // per group, where classes is nil

	once     sync.Once
	decoders []*rans.Decoder
	set      *rans.Set // where classes is not nil
	mu       sync.Mutex
	encoders []*rans.Encoder
}

// expand prepares tables chosen by group for decoding to elements, the same at every call.
func (m *tableSet) expand(e rans.Element) []*rans.Decoder {
	m.once.Do(func() {
		m.decoders = make([]*rans.Decoder, len(m.tables))
		for i, t := range m.tables {
			m.decoders[i] = rans.NewDecoder(t, e)
		}
	})
	return m.decoders
}

// byClass prepares tables chosen by class.
func (m *tableSet) byClass() *rans.Set {
	m.once.Do(func() { m.set = rans.NewSet(m.tables) })
	return m.set
}

// Format is what the head of a payload says: how its blocks are to be read.
type Format struct {
	transform Transform
	shift     uint8
	word      int // bytes of a word in the source
	words     uint64
	param     uint32 // words of a row: of RowDelta, or of scales
	float     bool   // BaseDiff: words are floats, with the sign on top
	fields    []planes.Field
	palette   []uint64
	sym       []*tableSet // one a field; BaseDiff has one without a field
	scales    *scales     // choose the tables of the first field, or nil
}

// width is the number of bits of a word once it is transformed.
func (f *Format) width() uint {
	switch f.transform {
	case Half:
		return 16 - uint(f.shift)
	case Palette:
		return 8
	default:
		return uint(8*f.word) - uint(f.shift)
	}
}

func (f *Format) blocks() int { return int((f.words + BlockWords - 1) / BlockWords) }

func (f *Format) groups() int { return (f.blocks() + GroupBlocks - 1) / GroupBlocks }

// symBits is the width of the symbols of field i; the symbols of a BaseDiff are bit lengths.
func (f *Format) symBits(i int) uint {
	if f.transform == BaseDiff {
		return 7
	}
	return uint(f.fields[i].Sym)
}

// appendHead appends the head: everything but the blocks, their index included.
func (f *Format) appendHead(dst []byte, index []indexItem) []byte {
	start := len(dst)
	scaled := uint8(0)
	if f.scales != nil {
		scaled = 1
	}
	dst = append(dst, uint8(f.transform), f.shift, uint8(f.word), uint8(len(f.fields)), BlockLog, uint8(len(f.palette)), scaled, 0)
	dst = binary.LittleEndian.AppendUint64(dst, f.words)
	dst = binary.LittleEndian.AppendUint32(dst, f.param)
	dst = binary.LittleEndian.AppendUint32(dst, 0) // length of all that follows up to the index, below
	for i, x := range f.fields {
		rotate := uint8(0)
		if x.Rotate {
			rotate = 1
		}
		dst = append(dst, x.Shift, x.Sym, x.Rest, rotate, uint8(len(f.sym[i].tables)), 0, 0, 0)
	}
	if f.transform == BaseDiff {
		dst = append(dst, 0, 0, 0, 0, uint8(len(f.sym[0].tables)), 0, 0, 0)
	}
	for _, p := range f.palette {
		dst = append(dst, binary.LittleEndian.AppendUint64(nil, p)[:f.word]...)
	}
	for _, m := range f.sym {
		dst = m.append(dst)
	}
	if f.scales != nil {
		dst = f.scales.append(dst)
	}
	dst = pad(dst, start, 4)
	binary.LittleEndian.PutUint32(dst[start+20:], uint32(len(dst)-start-fixedHead))
	for _, e := range index {
		dst = binary.LittleEndian.AppendUint32(dst, e.length)
		dst = binary.LittleEndian.AppendUint64(dst, e.hash)
	}
	return pad(dst, start, 8)
}

func (m *tableSet) append(dst []byte) []byte {
	for _, t := range m.tables {
		dst = t.Append(dst)
	}
	if len(m.tables) < 2 {
		return dst
	}
	choices := m.choice
	if m.classes != nil {
		choices = m.classes[:]
	}
	for i := 0; i < len(choices); i += 2 { // four bits each
		b := choices[i]
		if i+1 < len(choices) {
			b |= choices[i+1] << 4
		}
		dst = append(dst, b)
	}
	return dst
}

func pad(dst []byte, start, to int) []byte {
	for (len(dst)-start)%to != 0 {
		dst = append(dst, 0)
	}
	return dst
}

type indexItem struct {
	length uint32
	hash   uint64
}

// Payload is the parsed head of a payload: it decodes blocks.
type Payload struct {
	Format
	headLen int64
	offset  []int64 // of each block, and the end
	hash    []uint64
}

// HeadFixed is how much of a head must be read to know with HeadLen how long it is.
const HeadFixed = fixedHead

// HeadLen is the length of the head that begins with these HeadFixed bytes.
func HeadLen(fixed []byte) int64 {
	words := binary.LittleEndian.Uint64(fixed[8:])
	blocks := words/BlockWords + min(1, words%BlockWords)
	const most = 1 << 40
	if blocks > most {
		return -1
	}
	n := fixedHead + int64(binary.LittleEndian.Uint32(fixed[20:])) + int64(blocks)*indexEntry
	return (n + 7) &^ 7
}

// ParseHead reads and checks a head. The payload is that of rawBytes bytes of the dtype and payloadLen long, head
// included; checksum is the XXH3-64 of the head.
func ParseHead(head []byte, checksum uint64, d DType, rawBytes, payloadLen int64) (*Payload, error) {
	if got := xxh3.Hash(head); got != checksum {
		return nil, errorf(Checksum, "checksum of the payload's head is %016x, not %016x", got, checksum)
	}
	if len(head) < fixedHead || HeadLen(head) != int64(len(head)) {
		return nil, corrupt("head of %d bytes does not have the length its fields say", len(head))
	}
	p := &Payload{headLen: int64(len(head))}
	f := &p.Format
	f.float = dtypes[d].sign
	f.transform, f.shift, f.word = Transform(head[0]), head[1], int(head[2])
	nFields, nPalette := int(head[3]), int(head[5])
	f.words, f.param = binary.LittleEndian.Uint64(head[8:]), binary.LittleEndian.Uint32(head[16:])
	switch {
	case f.transform >= endTransform:
		return nil, errorf(Unsupported, "transform %d is unknown", f.transform)
	case head[4] != BlockLog:
		return nil, errorf(Unsupported, "blocks of 2^%d words are unknown", head[4])
	case head[6] > 1 || head[7] != 0:
		return nil, corrupt("reserved bytes of the head are not zero")
	case f.word != dtypes[d].word:
		return nil, corrupt("words of %d bytes for dtype %s", f.word, d)
	case f.words > uint64(rawBytes) || f.words*uint64(f.word) != uint64(rawBytes):
		return nil, corrupt("%d words of %d bytes are not %d bytes", f.words, f.word, rawBytes)
	case nFields > maxFields, f.transform == BaseDiff && nFields != 0, nFields == 0 && f.transform != BaseDiff && f.transform != Plain:
		return nil, corrupt("%d fields", nFields)
	case (f.transform == Palette) != (nPalette > 0), nPalette > maxPalette:
		return nil, corrupt("palette of %d words", nPalette)
	case head[6] > 0 && (nFields == 0 || f.transform != Plain && f.transform != Half):
		return nil, corrupt("scales of %d fields with transform %d", nFields, f.transform)
	case (f.transform == RowDelta || head[6] > 0) != (f.param > 0):
		return nil, corrupt("rows of %d words", f.param)
	case f.transform == Half && f.word != 4:
		return nil, corrupt("narrowed words of %d bytes", f.word)
	case f.shift > 0 && (f.transform != Plain && f.transform != Half || nFields == 0), uint(f.shift) >= min(uint(8*f.word), 64),
		f.transform == Half && f.shift >= 16:
		return nil, corrupt("shift of %d bits", f.shift)
	}
	if binary.LittleEndian.Uint32(head[20:])%4 != 0 {
		return nil, corrupt("index at a byte that is no multiple of 4")
	}
	body := head[fixedHead : fixedHead+int(binary.LittleEndian.Uint32(head[20:]))]
	if err := f.parseBody(body, nFields, nPalette, head[6] > 0); err != nil {
		return nil, err
	}
	index := head[fixedHead+len(body):]
	n := f.blocks()
	for _, b := range index[indexEntry*n:] {
		if b != 0 {
			return nil, corrupt("padding of the head is not zero")
		}
	}
	p.offset, p.hash = make([]int64, n+1), make([]uint64, n)
	at := p.headLen
	for i := range n {
		p.offset[i] = at
		length := int64(binary.LittleEndian.Uint32(index[indexEntry*i:]))
		p.hash[i] = binary.LittleEndian.Uint64(index[indexEntry*i+4:])
		raw := min(p.BlockBytes(), rawBytes-int64(i)*p.BlockBytes())
		if length < blockHead || length%8 != 0 || length > blockHead+raw+Align+8 || length > payloadLen-at {
			return nil, corrupt("block %d of %d has length %d with %d bytes left", i, n, length, payloadLen-at)
		}
		at += length
	}
	p.offset[n] = at
	if n == 0 || at != payloadLen {
		return nil, corrupt("blocks end at byte %d of a payload of %d", at, payloadLen)
	}
	return p, nil
}

func (f *Format) parseBody(body []byte, nFields, nPalette int, scaled bool) error {
	nSets := nFields
	if f.transform == BaseDiff {
		nSets = 1
	}
	if len(body) < nSets*fieldHead+nPalette*f.word {
		return corrupt("head of %d bytes is too short for %d fields", len(body), nFields)
	}
	heads, rest := body[:nSets*fieldHead], body[nSets*fieldHead:]
	covered := uint64(0)
	for i := range nFields {
		h := heads[fieldHead*i:]
		x := planes.Field{Shift: h[0], Sym: h[1], Rest: h[2], Rotate: h[3] == 1}
		if x.Sym == 0 || x.Sym > planes.MaxSym || x.Rest > planes.MaxRest || x.Bits() > planes.MaxBits ||
			uint(x.Shift)+x.Bits() > f.width() || h[3] > 1 || x.Rotate && x.Rest == 0 {
			return corrupt("field %d is impossible", i)
		}
		run := (uint64(1)<<x.Bits() - 1) << x.Shift
		if covered&run != 0 {
			return corrupt("field %d overlaps another", i)
		}
		covered |= run
		f.fields = append(f.fields, x)
	}
	if nFields > 0 && bits.OnesCount64(covered) != int(f.width()) {
		return corrupt("fields hold %d of the %d bits of a word", bits.OnesCount64(covered), f.width())
	}
	for i := range nPalette {
		var b [8]byte
		copy(b[:], rest[:f.word])
		rest = rest[f.word:]
		v := binary.LittleEndian.Uint64(b[:])
		if i > 0 && v <= f.palette[i-1] {
			return corrupt("palette does not ascend")
		}
		f.palette = append(f.palette, v)
	}
	for i := range nSets {
		h := heads[fieldHead*i:]
		if f.transform == BaseDiff && h[0]|h[1]|h[2]|h[3] != 0 || h[5]|h[6]|h[7] != 0 {
			return corrupt("reserved bytes of the head are not zero")
		}
		var err error
		var m *tableSet
		// Bit lengths are chosen by class of the base's word, or symbols by scale; everything else by group.
		if m, rest, err = f.parseTables(rest, int(h[4]), f.symBits(i), f.transform == BaseDiff || scaled && i == 0); err != nil {
			return err
		}
		f.sym = append(f.sym, m)
	}
	if scaled {
		var err error
		if f.scales, rest, err = parseScales(rest, f.words, f.param); err != nil {
			return err
		}
	}
	if len(rest) >= 4 {
		return corrupt("%d bytes too many in the head", len(rest))
	}
	for _, b := range rest {
		if b != 0 {
			return corrupt("padding of the head is not zero")
		}
	}
	return nil
}

func (f *Format) parseTables(src []byte, n int, symBits uint, byClass bool) (*tableSet, []byte, error) {
	if n > MaxTables {
		return nil, nil, corrupt("%d tables", n)
	}
	m := &tableSet{}
	for range n {
		t, rest, err := rans.ParseTable(src, symBits)
		if err != nil {
			return nil, nil, corrupt("%s", err)
		}
		m.tables, src = append(m.tables, t), rest
	}
	count := f.groups()
	if byClass {
		count = classCount
		m.classes = new([classCount]uint8)
	}
	if n < 2 {
		if !byClass {
			m.choice = make([]uint8, count)
		}
		return m, src, nil
	}
	if len(src) < (count+1)/2 {
		return nil, nil, corrupt("choice of tables ends too early")
	}
	choice := make([]uint8, (count+1)/2*2)
	for i := range choice {
		if choice[i] = src[i/2] >> (4 * (i & 1)) & 15; int(choice[i]) >= n {
			return nil, nil, corrupt("table %d of %d is chosen", choice[i], n)
		}
	}
	if byClass {
		copy(m.classes[:], choice)
	} else {
		m.choice = choice[:count]
	}
	return m, src[(count+1)/2:], nil
}

// Blocks is the number of blocks.
func (p *Payload) Blocks() int { return len(p.hash) }

// NeedsBase reports whether blocks are differences to a base tensor.
func (p *Payload) NeedsBase() bool { return p.transform == BaseDiff }

// BlockSpan is where block i lies in the payload.
func (p *Payload) BlockSpan(i int) (offset, length int64) {
	return p.offset[i], p.offset[i+1] - p.offset[i]
}

// BlockBytes is the decoded size of every block but the last.
func (p *Payload) BlockBytes() int64 { return int64(BlockWords * p.word) }

func (p *Payload) String() string {
	return fmt.Sprintf("%d words of %d bytes, transform %d, fields %+v", p.words, p.word, p.transform, p.fields)
}
