package codecs

import (
	"encoding/binary"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"

	"bigsmall.dev/bigsmall/codecs/planes"
	"bigsmall.dev/bigsmall/codecs/rans"
)

// This file reads the bytes of a block and writeblock.go writes them; no other knows them. SPEC.md draws them.

const (
	blockHead = 4 // kind and three zero bytes
	planeHead = 8 // kind, zero, u16 patches, u32 size
)

// Kinds of blocks.
const (
	blockStored = iota // the source's bytes
	blockCoded         // planes, field by field
	blockZstd          // the source's bytes in one zstd frame
	endBlock
)

// Kinds of planes.
const (
	planeRaw      = iota // one byte a symbol
	planeConstant        // one symbol, patches apart
	planeRANS            // states and words
	planeZstd            // one byte a symbol, in one zstd frame
	endPlane
)

// Scratch is the reusable memory of one goroutine; it has no meaning between calls.
type Scratch struct {
	// For whoever moves blocks about: compressed bytes, a decoded block, a base's block.
	Input, Output, BaseBytes []byte
	// Past says that the destinations are more than the caches hold, and nothing is in need of them soon.
	Past bool

	words, base    []uint64
	sym            []uint16
	rest           []uint16
	bytes, classes []uint8
	stream         []byte
	decoder        *zstd.Decoder
	patches        []rans.Patch
	check          []byte
	encode         encodeScratch

	blocks   [GroupBlocks]block
	batch    [3]rans.Batch // one a field of joinChunks
	ahead    []byte        // what lies behind the blocks that are decoded
	parts    []byte
	symBytes []byte
}

// NewScratch allocates nothing yet.
func NewScratch() *Scratch { return &Scratch{} }

// room gives the slice n elements, with any content.
func room[T any](s *[]T, n int) []T {
	if cap(*s) < n {
		*s = make([]T, n)
	}
	return (*s)[:n]
}

func (s *Scratch) zstdDecode(dst, src []byte) error {
	if s.decoder == nil {
		var err error
		s.decoder, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecodeAllCapLimit(true),
			zstd.WithDecoderMaxMemory(mostZstd), zstd.WithDecoderLowmem(true))
		if err != nil {
			return errorf(Internal, "zstd: %s", err)
		}
	}
	out, err := s.decoder.DecodeAll(src, dst[:0:len(dst)])
	if err != nil || len(out) != len(dst) {
		return corrupt("zstd frame of %d bytes does not hold %d", len(src), len(dst))
	}
	return nil
}

// DecodeBlocks verifies and decodes the blocks from first on, which must be of one group, into dst. src has their bytes,
// one block after the other, dst room for exactly their words; base holds the base tensor's bytes of the same words where
// NeedsBase. src may be read, without any effect, up to its capacity: some bytes behind it spare the kernels care.
func (p *Payload) DecodeBlocks(first int, dst, src, base []byte, s *Scratch) error {
	var blocks [GroupBlocks][]byte
	n := 0
	if err := p.Verify(first, src); err != nil {
		return err
	}
	for ; len(src) > 0; n++ {
		_, length := p.BlockSpan(first + n)
		blocks[n], src = src[:length], src[length:]
	}
	s.ahead = src[:cap(src)]
	return p.decodeBlocks(first, dst, blocks[:n], base, s)
}

// Verify compares the checksums of the blocks from first on, whose bytes src has.
func (p *Payload) Verify(first int, src []byte) error {
	for b := first; len(src) > 0; b++ {
		_, length := p.BlockSpan(b)
		if got := xxh3.Hash(src[:length]); got != p.hash[b] {
			return errorf(Checksum, "checksum of block %d of %d is %016x, not %016x", b, p.Blocks(), got, p.hash[b])
		}
		src = src[length:]
	}
	return nil
}

// block is a coded block, cut into its planes but not decoded.
type block struct {
	dst    []byte
	first  uint64 // number of its first word
	n      int    // words
	fields [maxFields]struct {
		sym  plane
		rest []byte // packed
	}
}

// decodeBlocks decodes blocks of one group, the first of them number first.
func (f *Format) decodeBlocks(first int, dst []byte, blocks [][]byte, base []byte, s *Scratch) error {
	per, coded := BlockWords*f.word, 0
	for k, src := range blocks {
		out, last := dst[k*per:min((k+1)*per, len(dst))], first+k == f.blocks()-1
		if src[1]|src[2]|src[3] != 0 || src[0] >= endBlock {
			return corrupt("kind %d of a block", src[0])
		}
		body := src[blockHead:]
		switch src[0] {
		case blockStored:
			if len(body) < len(out) {
				return corrupt("stored block of %d bytes for %d", len(body), len(out))
			}
			copy(out, body)
			body = body[len(out):]
		case blockZstd:
			if len(body) < 4 || int64(binary.LittleEndian.Uint32(body)) > int64(len(body)-4) {
				return corrupt("zstd block of %d bytes", len(body))
			}
			frame := body[4:][:binary.LittleEndian.Uint32(body)]
			if err := s.zstdDecode(out, frame); err != nil {
				return err
			}
			body = body[4+len(frame):]
		default:
			var err error
			if f.transform == BaseDiff {
				body, err = f.decodeDiff(out, body, base[k*per:], s)
			} else {
				b := &s.blocks[coded]
				b.dst, b.first, b.n = out, uint64(first+k)*BlockWords, len(out)/f.word
				body, err = f.cut(b, body)
				coded++
			}
			if err != nil {
				return err
			}
		}
		if err := zeroPadding(body, last); err != nil {
			return err
		}
	}
	if coded == 0 {
		return nil
	}
	switch f.join() {
	case joinSymbols:
		return f.joinSymbols(s.blocks[:coded], first/GroupBlocks, s)
	case joinBytes, joinHalves:
		return f.joinChunks(s.blocks[:coded], first/GroupBlocks, s)
	}
	for k := range coded {
		if err := f.joinFields(&s.blocks[k], first/GroupBlocks, s); err != nil {
			return err
		}
	}
	return nil
}

// join says how the words of a format come together.
func (f *Format) join() joinForm {
	switch {
	case f.transform == Half && len(f.fields) == 1:
		if f.element(0, joinHalves).Joins() {
			return joinHalves
		}
	case f.transform != Plain:
	case len(f.fields) == 1 && f.word <= 2:
		if f.element(0, joinSymbols).Joins() {
			return joinSymbols
		}
	case len(f.fields) == 3 && f.word == 4:
		upper, mid, low := f.fields[0], f.fields[1], f.fields[2]
		if f.shift == 0 && f.element(0, joinBytes).Joins() && upper.Shift == 16 && upper.Bits() == 16 &&
			mid == (planes.Field{Shift: 8, Sym: 8}) && low == (planes.Field{Sym: 8}) {
			return joinBytes
		}
	}
	return joinFields
}

type joinForm int

const (
	joinFields  joinForm = iota // field by field, in words of 64 bits
	joinSymbols                 // symbols and rest become words as they are decoded
	joinBytes                   // the upper halves too, and two planes of bytes join them
	joinHalves                  // binary16 numbers too, and are made binary32
)

// element is what the coder makes of the symbols of field i.
func (f *Format) element(i int, j joinForm) rans.Element {
	x := f.fields[i]
	x.Shift = 0
	switch {
	case j == joinSymbols:
		return rans.Element{Field: x, Size: f.word, Shift: f.shift}
	case j == joinHalves:
		return rans.Element{Field: x, Size: 2, Shift: f.shift}
	case j == joinBytes && i == 0:
		return rans.Element{Field: x, Size: 2}
	case j == joinBytes:
		return rans.Element{Field: x, Size: 1}
	}
	return rans.Symbols
}

// zeroPadding checks what follows the content of a block: up to 7 zeros, and in the last block those that pad the payload.
func zeroPadding(b []byte, last bool) error {
	if len(b) >= 8 && !last || len(b) >= Align {
		return corrupt("%d bytes too many in a block", len(b))
	}
	for _, v := range b {
		if v != 0 {
			return corrupt("padding of a block is not zero")
		}
	}
	return nil
}

// takeBits cuts a string of bits off body, whose last byte is filled up with zeros.
func takeBits(body []byte, n int) (head, tail []byte, err error) {
	if head, tail, err = take(body, (n+7)/8); err == nil && n%8 != 0 && head[n/8]>>(n%8) != 0 {
		err = corrupt("padding of a string of %d bits is not zero", n)
	}
	return head, tail, err
}

// take cuts n bytes and their padding to four off body.
func take(body []byte, n int) (head, tail []byte, err error) {
	if n > len(body) {
		return nil, nil, corrupt("block ends %d bytes too early", n-len(body))
	}
	head, tail = body[:n], body[n:]
	pad := min(-n&3, len(tail))
	for _, v := range tail[:pad] {
		if v != 0 {
			return nil, nil, corrupt("padding inside a block is not zero")
		}
	}
	return head, tail[pad:], nil
}

// plane is one string of symbols, as it stands in a block.
type plane struct {
	kind    uint8
	symBits uint
	symbol  uint16 // of a constant plane
	data    []byte // bytes, a frame, or states and words
	patches int
	carried int    // of the 2*patches numbers, those in the lanes
	listed  []byte // the others
}

// cut cuts a coded block into its planes, and returns what follows them.
func (f *Format) cut(b *block, body []byte) (tail []byte, err error) {
	if len(f.fields) == 0 {
		return nil, corrupt("coded block of a payload without fields")
	}
	for i, x := range f.fields {
		p := &b.fields[i]
		if body, err = p.sym.cut(body, b.n, uint(x.Sym), len(f.sym[i].tables) > 0); err != nil {
			return nil, err
		}
		if p.rest, body, err = takeBits(body, b.n*int(x.Rest)); err != nil {
			return nil, err
		}
	}
	return body, nil
}

// cut takes a plane of n symbols off body.
func (p *plane) cut(body []byte, n int, symBits uint, hasTables bool) ([]byte, error) {
	head, body, err := take(body, planeHead)
	if err != nil {
		return nil, err
	}
	size := int64(binary.LittleEndian.Uint32(head[4:]))
	*p = plane{kind: head[0], symBits: symBits, patches: int(binary.LittleEndian.Uint16(head[2:]))}
	if p.kind >= endPlane || head[1] != 0 || p.patches > 0 && (p.kind == planeRaw || p.kind == planeZstd) {
		return nil, corrupt("kind %d of a plane", p.kind)
	}
	if size > int64(len(body)) && p.kind != planeConstant {
		return nil, corrupt("plane of %d with %d bytes left", size, len(body))
	}
	switch p.kind {
	case planeRaw, planeZstd:
		if symBits > 8 || p.kind == planeRaw && size != 0 {
			return nil, corrupt("plane of bytes with %d bits a symbol and size %d", symBits, size)
		}
		if p.kind == planeRaw {
			size = int64(n)
		}
		p.data, body, err = take(body, int(size))
	case planeConstant:
		if size >= 1<<symBits {
			return nil, corrupt("symbol %d of %d bits", size, symBits)
		}
		p.symbol = uint16(size)
	case planeRANS:
		if !hasTables {
			return nil, corrupt("coded plane without a table")
		}
		p.data, body, err = take(body, rans.StateBytes+2*int(size))
		p.carried = min(2*p.patches, rans.Lanes)
	}
	if err == nil {
		p.listed, body, err = take(body, 4*p.patches-2*p.carried)
	}
	return body, err
}

// fixes are the patches of a plane of n symbols, the carried ones from the lanes of its stream.
func (p *plane) fixes(n int, carry *[rans.Lanes]uint16, s *Scratch) ([]rans.Patch, error) {
	for _, v := range carry[p.carried:] {
		if v != 0 {
			return nil, corrupt("a lane carries what nobody asked for")
		}
	}
	number := func(i int) uint16 { // of the positions and then the symbols
		if i < p.carried {
			return carry[i]
		}
		return binary.LittleEndian.Uint16(p.listed[2*(i-p.carried):])
	}
	list, last := s.patches[:0], -1
	for k := range p.patches {
		x := rans.Patch{At: number(k), Value: number(p.patches + k)}
		if int(x.At) <= last || int(x.At) >= n || uint(x.Value) >= 1<<p.symBits {
			return nil, corrupt("patch %d sets symbol %d to %d", k, x.At, x.Value)
		}
		last = int(x.At)
		list = append(list, x)
	}
	s.patches = list
	return list, nil
}

// bytes are the symbols of a plane of bytes.
func (p *plane) bytes(n int, s *Scratch) ([]byte, error) {
	raw := p.data
	if p.kind == planeZstd {
		raw = room(&s.bytes, n)
		if err := s.zstdDecode(raw, p.data); err != nil {
			return nil, err
		}
	}
	if p.symBits < 8 {
		for _, b := range raw {
			if b>>p.symBits != 0 {
				return nil, corrupt("symbol %d of %d bits", b, p.symBits)
			}
		}
	}
	return raw, nil
}

// fill decodes a plane without a stream, patches and all.
func (p *plane) fill(sym []uint16, s *Scratch) error {
	switch p.kind {
	case planeRaw, planeZstd:
		raw, err := p.bytes(len(sym), s)
		if err != nil {
			return err
		}
		for i, b := range raw {
			sym[i] = uint16(b)
		}
	case planeConstant:
		for i := range sym {
			sym[i] = p.symbol
		}
	}
	return p.patch(sym, &[rans.Lanes]uint16{}, s)
}

// patch puts the patches in their places.
func (p *plane) patch(sym []uint16, carry *[rans.Lanes]uint16, s *Scratch) error {
	list, err := p.fixes(len(sym), carry, s)
	for _, x := range list {
		sym[x.At] = x.Value
	}
	return err
}

// patchWords is patch where symbols are words already: those of field i.
func (f *Format) patchWords(b *block, i int, carry *[rans.Lanes]uint16, s *Scratch) error {
	list, err := b.fields[i].sym.fixes(b.n, carry, s)
	x := f.fields[i]
	up := x.Shift + x.Rest + f.shift
	if x.Rotate {
		up--
	}
	mask := (uint32(1)<<x.Sym - 1) << up
	for _, p := range list {
		v, at := uint32(p.Value)<<up, int(p.At)
		switch {
		case f.transform == Half:
			w := b.dst[4*at:]
			h, _ := toHalf(binary.LittleEndian.Uint32(w))
			binary.LittleEndian.PutUint32(w, fromHalf(h&^uint16(mask)|uint16(v)))
		case f.word == 1:
			b.dst[at] = b.dst[at]&^uint8(mask) | uint8(v)
		case f.word == 2:
			w := b.dst[2*at:]
			binary.LittleEndian.PutUint16(w, binary.LittleEndian.Uint16(w)&^uint16(mask)|uint16(v))
		default:
			w := b.dst[4*at:]
			binary.LittleEndian.PutUint32(w, binary.LittleEndian.Uint32(w)&^mask|v)
		}
	}
	return err
}

// decoder is the table that group chose for field i.
func (f *Format) decoder(i, group int) *rans.Decoder {
	m := f.sym[i]
	return m.expand(f.element(i, f.join()))[m.choice[group]]
}

// joinSymbols decodes blocks of one field into their words, all streams of the coder side by side.
func (f *Format) joinSymbols(blocks []block, group int, s *Scratch) error {
	x, batch := f.fields[0], &s.batch[0]
	batch.Reset()
	batch.Past, batch.Ahead = s.Past, s.ahead
	var coded [GroupBlocks]*block
	n := 0
	for k := range blocks {
		b := &blocks[k]
		if p := &b.fields[0]; p.sym.kind == planeRANS && f.scales == nil {
			if err := batch.Add(p.sym.data, p.rest, b.n); err != nil {
				return corrupt("%s", err)
			}
			batch.Target(n, b.dst)
			coded[n] = b
			n++
		} else {
			sym := room(&s.sym, b.n)
			if err := f.symbols(sym, 0, group, b, s); err != nil {
				return err
			}
			x.JoinDirect(b.dst, sym, p.rest, f.word, f.shift)
		}
	}
	if n == 0 {
		return nil
	}
	batch.Next(f.decoder(0, group), BlockWords)
	for k, b := range coded[:n] {
		carry, err := batch.Close(k)
		if err != nil {
			return corrupt("%s", err)
		}
		if err := f.patchWords(b, 0, &carry, s); err != nil {
			return err
		}
	}
	return nil
}

// chunkWords is how many words of a block joinChunks has in hand: the parts of four blocks stay in the second cache, and the
// coder begins seldom enough.
const chunkWords = 1 << 14

// joinChunks decodes blocks of 32-bit words, a chunk at a time: their upper halves and two planes of bytes, or binary16.
func (f *Format) joinChunks(blocks []block, group int, s *Scratch) error {
	bytesOf := [3]int{2, 1, 1}
	size := bytesOf[:len(f.fields)]
	var parts [GroupBlocks][3]struct {
		data   []byte // all of the part, or a chunk's room where it is coded
		stream int    // of the field's batch, or -1
	}
	used := 0
	take := func(n int) []byte {
		used += n
		return s.parts[used-n : used]
	}
	s.parts = room(&s.parts, GroupBlocks*4*BlockWords)
	for i := range size {
		s.batch[i].Reset()
		for k, n := 0, 0; k < len(blocks); k++ {
			b, part := &blocks[k], &parts[k][i]
			p := &b.fields[i]
			if part.stream = -1; p.sym.kind == planeRANS && f.sym[i].classes == nil {
				if err := s.batch[i].Add(p.sym.data, p.rest, b.n); err != nil {
					return corrupt("%s", err)
				}
				part.stream = n
				n++
				part.data = take(chunkWords * size[i])
				continue
			}
			if i > 0 && p.sym.kind == planeRaw {
				part.data = p.sym.data
				continue
			}
			sym := room(&s.sym, b.n)
			if err := f.symbols(sym, i, group, b, s); err != nil {
				return err
			}
			part.data = take(b.n * size[i])
			x := f.fields[i]
			x.Shift = 0
			x.JoinDirect(part.data, sym, p.rest, size[i], f.shift)
		}
	}
	for at := 0; at < blocks[0].n; at += chunkWords { // only a last block is shorter than the first
		for i := range size {
			any := false
			for k := range blocks {
				if n := parts[k][i].stream; n >= 0 {
					s.batch[i].Target(n, parts[k][i].data)
					any = true
				}
			}
			if any {
				s.batch[i].Next(f.decoder(i, group), chunkWords)
			}
		}
		for k := range blocks {
			b := &blocks[k]
			n := min(chunkWords, b.n-at)
			if n <= 0 {
				break
			}
			var part [3][]byte
			for i := range size {
				p := &parts[k][i]
				if part[i] = p.data; p.stream < 0 {
					part[i] = p.data[at*size[i]:]
				}
			}
			if dst := b.dst[4*at : 4*(at+n)]; f.transform == Half {
				widen(dst, part[0])
			} else {
				planes.Join32(dst, part[0], part[1], part[2], s.Past)
			}
		}
	}
	for k := range blocks {
		for i := range size {
			if n := parts[k][i].stream; n >= 0 {
				carry, err := s.batch[i].Close(n)
				if err != nil {
					return corrupt("%s", err)
				}
				if err := f.patchWords(&blocks[k], i, &carry, s); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// joinFields decodes a block of any fields and any transform.
func (f *Format) joinFields(b *block, group int, s *Scratch) error {
	sym, rest := room(&s.sym, b.n), room(&s.rest, b.n)
	words := room(&s.words, b.n)
	clear(words)
	for i, x := range f.fields {
		if err := f.symbols(sym, i, group, b, s); err != nil {
			return err
		}
		if x.Rest > 0 {
			planes.Unpack(rest, b.fields[i].rest, x.Rest)
		}
		x.Join(words, sym, rest)
	}
	if !f.undo(words) {
		return corrupt("index outside the palette")
	}
	planes.Store(b.dst, words, f.word, 0)
	return nil
}

// symbols decodes the symbols of field i.
func (f *Format) symbols(sym []uint16, i, group int, b *block, s *Scratch) error {
	p := &b.fields[i].sym
	var carry [rans.Lanes]uint16
	var err error
	switch {
	case p.kind != planeRANS:
		return p.fill(sym, s)
	case f.sym[i].classes != nil:
		carry, err = f.sym[i].byClass().Decode(sym, p.data, f.scaleClasses(b.first, b.n, s))
	default:
		carry, err = decodeSymbols(sym, p.data, f.decoder(i, group), s)
	}
	if err != nil {
		return corrupt("%s", err)
	}
	return p.patch(sym, &carry, s)
}

// decodeSymbols decodes a stream of one table.
func decodeSymbols(sym []uint16, src []byte, d *rans.Decoder, s *Scratch) (carry [rans.Lanes]uint16, err error) {
	batch, out := &s.batch[0], room(&s.symBytes, 2*len(sym))
	batch.Reset()
	if err := batch.Add(src, nil, len(sym)); err != nil {
		return carry, err
	}
	batch.Target(0, out)
	batch.Next(d, BlockWords)
	for i := range sym {
		sym[i] = binary.LittleEndian.Uint16(out[2*i:])
	}
	return batch.Close(0)
}

// decodeDiff decodes a block of differences to a base, and returns what follows.
func (f *Format) decodeDiff(dst, body, base []byte, s *Scratch) ([]byte, error) {
	n, width := len(dst)/f.word, f.width()
	if len(base) < len(dst) {
		return nil, errorf(Internal, "base of %d bytes for a block of %d", len(base), len(dst))
	}
	sym, words, from := room(&s.sym, n), room(&s.words, n), room(&s.base, n)
	planes.Load(from, base, f.word, 0)
	var p plane
	body, err := p.cut(body, n, 7, len(f.sym[0].tables) > 0)
	if err != nil {
		return nil, err
	}
	if p.kind == planeRANS {
		carry, err := f.sym[0].byClass().Decode(sym, p.data, f.baseClasses(from, s))
		if err != nil {
			return nil, corrupt("%s", err)
		}
		err = p.patch(sym, &carry, s)
		if err != nil {
			return nil, err
		}
	} else if err := p.fill(sym, s); err != nil {
		return nil, err
	}
	total := 0
	for _, b := range sym {
		if uint(b) > width {
			return nil, corrupt("difference of %d bits", b)
		}
		total += max(int(b)-1, 0)
	}
	raw, body, err := takeBits(body, total)
	if err != nil {
		return nil, err
	}
	r := bitReader{src: raw}
	for i, b := range sym {
		z := uint64(0)
		if b > 0 {
			z = 1<<(b-1) | r.get(uint(b-1))
		}
		if f.float {
			words[i] = unordered((ordered(from[i], width)+unzigzag(z, width))&(^uint64(0)>>(64-width)), width)
		} else {
			words[i] = from[i] + unzigzag(z, width)
		}
	}
	planes.Store(dst, words, f.word, 0)
	return body, nil
}

// baseClasses looks up the class of every word of the base: by its top eight bits after the sign, the exponent of most
// floats.
func (f *Format) baseClasses(base []uint64, s *Scratch) []uint8 {
	classes, shift := room(&s.classes, len(base)), f.baseShift()
	m := f.sym[0].classes
	for i, b := range base {
		classes[i] = m[uint8(b>>shift)]
	}
	return classes
}

func (f *Format) baseShift() uint {
	w := f.width()
	return w - min(w, 9)
}

type bitReader struct {
	src []byte
	acc uint64
	n   uint
}

// get takes n bits, at most 63; past the end they are zero.
func (r *bitReader) get(n uint) uint64 {
	if n > 32 {
		low := r.get(32)
		return low | r.get(n-32)<<32
	}
	for r.n < n {
		if len(r.src) == 0 {
			r.n = 64
			break
		}
		if len(r.src) >= 4 {
			r.acc |= uint64(binary.LittleEndian.Uint32(r.src)) << r.n
			r.src, r.n = r.src[4:], r.n+32
			continue
		}
		r.acc |= uint64(r.src[0]) << r.n
		r.src, r.n = r.src[1:], r.n+8
	}
	v := r.acc & (1<<n - 1)
	r.acc >>= n
	r.n -= n
	return v
}
