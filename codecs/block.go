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
	planePaired          // a symbol plane whose stream holds the mantissas too, and that mantissa plane
	endPlane
)

// Scratch is the reusable memory of one goroutine; it has no meaning between calls.
type Scratch struct {
	// For whoever moves blocks about: compressed bytes, a decoded block, a base's block.
	Input, Output, BaseBytes []byte

	words, base    []uint64
	sym, mant      []uint16
	rest           []uint16
	bytes, classes []uint8
	stream         []byte
	plane, coded   []byte
	packed         []byte
	patches        []rans.Patch
	decoder        *zstd.Decoder
	check          []byte
	raw, rawBase   []byte
}

// NewScratch allocates nothing yet.
func NewScratch() *Scratch { return &Scratch{} }

// words16 is room for the words of a block.
func (s *Scratch) words16() []byte { return room(&s.plane, 2*BlockWords+2*rans.Lanes) }

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
			zstd.WithDecoderMaxMemory(BlockWords*8), zstd.WithDecoderLowmem(true))
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

// DecodeBlock verifies and decodes block i from src into dst, both of exactly the block's size. base holds the base
// tensor's bytes of the block where NeedsBase.
func (p *Payload) DecodeBlock(i int, dst, src, base []byte, s *Scratch) error {
	if got := xxh3.Hash(src); got != p.hash[i] {
		return errorf(Checksum, "checksum of block %d of %d is %016x, not %016x", i, p.Blocks(), got, p.hash[i])
	}
	return p.decodeBlock(i, dst, src, base, s)
}

func (f *Format) decodeBlock(i int, dst, src, base []byte, s *Scratch) error {
	n, group, last := len(dst)/f.word, i/GroupBlocks, i == f.blocks()-1
	if src[1]|src[2]|src[3] != 0 || src[0] >= endBlock {
		return corrupt("kind %d of a block", src[0])
	}
	body := src[blockHead:]
	switch src[0] {
	case blockStored:
		if len(body) < len(dst) {
			return corrupt("stored block of %d bytes for %d", len(body), len(dst))
		}
		copy(dst, body)
		return zeroPadding(body[len(dst):], last)
	case blockZstd:
		if len(body) < 4 || int64(binary.LittleEndian.Uint32(body)) > int64(len(body)-4) {
			return corrupt("zstd block of %d bytes", len(body))
		}
		frame := body[4:][:binary.LittleEndian.Uint32(body)]
		if err := s.zstdDecode(dst, frame); err != nil {
			return err
		}
		return zeroPadding(body[4+len(frame):], last)
	}
	if f.transform == BaseDiff {
		return f.decodeDiff(dst, body, base, last, s)
	}
	if len(f.fields) == 0 {
		return corrupt("coded block of a payload without fields")
	}
	sym := room(&s.sym, n)
	if f.direct() {
		x := f.fields[0]
		packed, body, err := f.decodePlane(0, sym, nil, group, body, s)
		if err != nil {
			return err
		}
		x.JoinDirect(dst, sym, packed, f.word, f.shift)
		return zeroPadding(body, last)
	}
	words := room(&s.words, n)
	clear(words)
	mant, rest := room(&s.mant, n), room(&s.rest, n)
	for i, x := range f.fields {
		var packed []byte
		var err error
		if packed, body, err = f.decodePlane(i, sym, mant, group, body, s); err != nil {
			return err
		}
		if x.Rest > 0 {
			planes.Unpack(rest, packed, x.Rest)
		}
		x.Join(words, sym, mant, rest)
	}
	if !f.undo(words) {
		return corrupt("index outside the palette")
	}
	planes.Store(dst, words, f.word, 0)
	return zeroPadding(body, last)
}

// direct says that the one field can be joined straight into the destination.
func (f *Format) direct() bool {
	return f.transform == Plain && len(f.fields) == 1 && f.fields[0].Mant == 0 && f.word <= 2
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

// decodePlane decodes the parts of field i, the rest still packed, and returns what follows in the block.
func (f *Format) decodePlane(i int, sym, mant []uint16, group int, body []byte, s *Scratch) (packed, tail []byte, err error) {
	x := f.fields[i]
	m := f.sym[i]
	var tables []*rans.Decoder
	if len(m.tables) > 0 {
		tables = m.expand()[m.choice[group]:]
	}
	if x.Mant == 0 {
		if body, err = decodeSymbols(sym, uint(x.Sym), tables, nil, alone, nil, body, s); err != nil {
			return nil, nil, err
		}
		return takeBits(body, len(sym)*int(x.Rest))
	}
	pair := &rans.PairOf{Values: mant, Tables: f.mant[i].expand(), Class: f.mant[i].classes, Shift: classShift(x.Sym)}
	paired := len(body) > 0 && body[0] == planePaired
	if body, err = decodeSymbols(sym, uint(x.Sym), tables, nil, firstOfPair, pair, body, s); err != nil {
		return nil, nil, err
	}
	role := alone
	if paired {
		role = secondOfPair
	}
	if body, err = decodeSymbols(mant, uint(x.Mant), nil, nil, role, nil, body, s); err != nil {
		return nil, nil, err
	}
	return takeBits(body, len(sym)*int(x.Rest))
}

// The part a plane may play: that of a symbol plane with mantissas can be the first of a pair, whose stream holds both;
// the second then has nothing but its patches.
type planeRole int

const (
	alone planeRole = iota
	firstOfPair
	secondOfPair
)

// decodeSymbols decodes one plane, and the values of the second of a pair with the first.
func decodeSymbols(sym []uint16, symBits uint, tables []*rans.Decoder, classes []uint8, role planeRole, pair *rans.PairOf, body []byte,
	s *Scratch) ([]byte, error) {
	head, body, err := take(body, planeHead)
	if err != nil {
		return nil, err
	}
	kind, patches, size := head[0], int(binary.LittleEndian.Uint16(head[2:])), int64(binary.LittleEndian.Uint32(head[4:]))
	if kind >= endPlane || head[1] != 0 || patches > 0 && (kind == planeRaw || kind == planeZstd) ||
		kind == planePaired && role == alone || kind != planePaired && role == secondOfPair {
		return nil, corrupt("kind %d of a plane", kind)
	}
	if size > int64(len(body)) && kind != planeConstant {
		return nil, corrupt("plane of %d with %d bytes left", size, len(body))
	}
	var data []byte
	var carry [rans.Lanes]uint16
	carried := 0
	switch kind {
	case planeRaw, planeZstd:
		if symBits > 8 || kind == planeRaw && size != 0 {
			return nil, corrupt("plane of bytes with %d bits a symbol and size %d", symBits, size)
		}
		raw := room(&s.bytes, len(sym))
		if kind == planeRaw {
			raw, body, err = take(body, len(sym))
		} else if data, body, err = take(body, int(size)); err == nil {
			err = s.zstdDecode(raw, data)
		}
		if err != nil {
			return nil, err
		}
		for i, b := range raw {
			if b>>symBits != 0 {
				return nil, corrupt("symbol %d of %d bits", b, symBits)
			}
			sym[i] = uint16(b)
		}
		return body, nil
	case planeConstant:
		if size >= 1<<symBits {
			return nil, corrupt("symbol %d of %d bits", size, symBits)
		}
		for i := range sym {
			sym[i] = uint16(size)
		}
	case planePaired, planeRANS:
		if role == secondOfPair { // decoded with its first
			if size != 0 {
				return nil, corrupt("second plane of a pair with %d words", size)
			}
			break
		}
		if kind == planeRANS {
			pair = nil
		}
		if tables == nil {
			return nil, corrupt("coded plane without a table")
		}
		if data, body, err = take(body, rans.StateBytes+2*int(size)); err != nil {
			return nil, err
		}
		if carry, err = rans.Decode(sym, data, tables, classes, pair); err != nil {
			return nil, corrupt("%s", err)
		}
		carried = min(2*patches, rans.Lanes)
		for _, v := range carry[carried:] {
			if v != 0 {
				return nil, corrupt("a lane carries what nobody asked for")
			}
		}
	}
	if data, body, err = take(body, 4*patches-2*carried); err != nil {
		return nil, err
	}
	patch := func(i int) uint16 { // of the positions and then the symbols, the first 32 come from the lanes
		if i < carried {
			return carry[i]
		}
		return binary.LittleEndian.Uint16(data[2*(i-carried):])
	}
	last := -1
	for k := range patches {
		at, v := int(patch(k)), patch(patches+k)
		if at <= last || at >= len(sym) || uint(v) >= 1<<symBits {
			return nil, corrupt("patch %d sets symbol %d to %d", k, at, v)
		}
		sym[at], last = v, at
	}
	return body, nil
}

// decodeDiff decodes a block of differences to a base.
func (f *Format) decodeDiff(dst, body, base []byte, last bool, s *Scratch) error {
	if len(base) != len(dst) {
		return errorf(Internal, "base of %d bytes for a block of %d", len(base), len(dst))
	}
	n, width := len(dst)/f.word, f.width()
	sym, words, from := room(&s.sym, n), room(&s.words, n), room(&s.base, n)
	planes.Load(from, base, f.word, 0)
	var tables []*rans.Decoder
	if len(f.sym[0].tables) > 0 {
		tables = f.sym[0].expand()
	}
	body, err := decodeSymbols(sym, 7, tables, f.baseClasses(from, s), alone, nil, body, s)
	if err != nil {
		return err
	}
	total := 0
	for _, b := range sym {
		if uint(b) > width {
			return corrupt("difference of %d bits", b)
		}
		total += max(int(b)-1, 0)
	}
	raw, body, err := takeBits(body, total)
	if err != nil {
		return err
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
	return zeroPadding(body, last)
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
