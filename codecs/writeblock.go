package codecs

import (
	"bytes"
	"encoding/binary"
	"math/bits"

	"github.com/klauspost/compress/zstd"

	"bigsmall.dev/bigsmall/codecs/planes"
	"bigsmall.dev/bigsmall/codecs/rans"
)

// zstdPool lends encoders of one level. The best level keeps tens of MiB in each, so there are few, and who finds none
// waits: nothing is locked while one is held.
type zstdPool struct {
	idle chan *zstd.Encoder
}

var zstdPools = map[zstd.EncoderLevel]*zstdPool{
	zstd.SpeedFastest: newZstdPool(zstd.SpeedFastest, 16), zstd.SpeedDefault: newZstdPool(zstd.SpeedDefault, 16),
	zstd.SpeedBestCompression: newZstdPool(zstd.SpeedBestCompression, 4),
}

func newZstdPool(level zstd.EncoderLevel, n int) *zstdPool {
	p := &zstdPool{make(chan *zstd.Encoder, n)}
	for range n { // what they need they allocate at first use
		e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(level), zstd.WithEncoderCRC(false),
			zstd.WithWindowSize(mostZstd), zstd.WithLowerEncoderMem(true), zstd.WithAllLitEntropyCompression(level == numbersLevel))
		if err != nil {
			panic(err) // constant options
		}
		p.idle <- e
	}
	return p
}

// numbersLevel is for few numbers that seldom repeat: it looks for nothing but their frequencies, and does that always.
const numbersLevel = zstd.SpeedFastest

func zstdEncode(dst, src []byte, level zstd.EncoderLevel) []byte {
	p := zstdPools[level]
	e := <-p.idle
	defer func() { p.idle <- e }()
	return e.EncodeAll(src, dst)
}

// plan is what an encoder decided about one plane, beside its tables.
type plan struct {
	zstd bool // try zstd where symbols are bytes
	rans bool // try the coder
}

// encodeScratch is the part of a Scratch that encoding one group needs beside what decoding has.
type encodeScratch struct {
	raw, base []byte
	trial     []byte
	compact   []byte
	counts    hist
	byScale   []uint32
	sums      [2][]uint64
	values    []uint16
	weights   []uint32
	lanes     [GroupBlocks]lane
	one       [1]lane // for a plane alone
}

// A lane holds what belongs to one block of a group.
type lane struct {
	source
	index   []uint8 // symbols of a table
	patches []rans.Patch
	words   []byte // room for the coder
	block   []byte
}

// encodeGroup appends consecutive blocks of the words in raw, from block first on, all of one group, and says where each
// ends. It
// keeps the smallest of the ways that the format and the plans allow.
func (f *Format) encodeGroup(dst []byte, ends *[GroupBlocks]int, first int, raw, base []byte, plans []plan, whole bool, level zstd.EncoderLevel, s *Scratch) []byte {
	var raws [GroupBlocks][]byte
	n, g := f.divide(&raws, raw), first/GroupBlocks
	lanes := s.encode.lanes[:n]
	for i := range lanes {
		l := &lanes[i]
		l.block = append(l.block[:0], blockCoded, 0, 0, 0)
	}
	if f.sideBySide() {
		for i, x := range f.fields {
			for k := range lanes {
				lanes[k].source = source{n: len(raws[k]) / f.word, raw: raws[k], cut: x.SymCut(f.word, f.shift), bits: uint(x.Sym)}
			}
			encodePlanes(lanes, f.coders(i, g, plans), nil, plans[i].zstd, level, s)
			if x.Rest > 0 {
				rest := x.RestCut(f.word, f.shift)
				for k := range lanes {
					l := &lanes[k]
					l.block = pad(rest.Append(l.block, raws[k], x.Rest), 0, 4)
				}
			}
		}
	} else {
		var bases [GroupBlocks][]byte
		f.divide(&bases, base)
		for k := range lanes {
			l := &lanes[k]
			if f.transform == BaseDiff {
				l.block = f.encodeDiff(l.block, raws[k], bases[k], s)
			} else {
				l.block = f.encodeWords(l.block, g, uint64(first+k)*BlockWords, raws[k], plans, level, s)
			}
		}
	}
	for k := range lanes {
		start := len(dst)
		dst = f.appendSmallest(dst, lanes[k].block, raws[k], whole, level, s)
		dst = pad(dst, start, 8)
		ends[k] = len(dst)
	}
	return dst
}

// divide cuts the bytes of words into blocks and says how many there are.
func (f *Format) divide(blocks *[GroupBlocks][]byte, raw []byte) (n int) {
	for ; len(raw) > 0; n++ {
		size := min(len(raw), BlockWords*f.word)
		blocks[n], raw = raw[:size], raw[size:]
	}
	return n
}

// sideBySide says that all parts can be cut straight out of the source's words, those of many blocks at once.
func (f *Format) sideBySide() bool { return f.transform == Plain && f.scales == nil }

// encodeWords appends a block, its first word number first, whose words have to be transformed first, or whose tables are
// chosen by scale.
func (f *Format) encodeWords(dst []byte, g int, first uint64, raw []byte, plans []plan, level zstd.EncoderLevel, s *Scratch) []byte {
	n := len(raw) / f.word
	words := room(&s.words, n)
	planes.Load(words, raw, f.word, 0)
	f.apply(words)
	sym, rest := room(&s.sym, n), room(&s.rest, n)
	for i, x := range f.fields {
		x.Split(sym, rest, words)
		var classes []uint8
		if i == 0 && f.scales != nil {
			classes = f.scaleClasses(first, n, s)
		}
		dst = encodeSymbols(dst, sym, uint(x.Sym), f.coders(i, g, plans), classes, plans[i].zstd, level, s)
		if x.Rest > 0 {
			dst = pad(planes.Pack(dst, rest, x.Rest), 0, 4)
		}
	}
	return dst
}

// appendSmallest appends the coded block, or the source's bytes as they are or by zstd where that is smaller.
func (f *Format) appendSmallest(dst, coded, raw []byte, whole bool, level zstd.EncoderLevel, s *Scratch) []byte {
	stored := blockHead + len(raw)
	isCoded := len(coded) > blockHead && len(coded) <= stored
	size := stored
	if isCoded {
		size = len(coded)
	}
	if whole {
		s.stream = zstdEncode(s.stream[:0], raw, level)
		if blockHead+4+len(s.stream) < size {
			dst = append(dst, blockZstd, 0, 0, 0)
			dst = binary.LittleEndian.AppendUint32(dst, uint32(len(s.stream)))
			return append(dst, s.stream...)
		}
	}
	if isCoded {
		return append(dst, coded...)
	}
	return append(append(dst, blockStored, 0, 0, 0), raw...)
}

// coders are the tables for field i in a group, or nil where the coder is not worth trying.
func (f *Format) coders(i, group int, plans []plan) []*rans.Encoder {
	m := f.sym[i]
	if !plans[i].rans || len(m.tables) == 0 {
		return nil
	}
	encoders := m.encode(uint(f.fields[i].Sym))
	if m.classes != nil {
		return encoders
	}
	return encoders[m.choice[group]:]
}

// encode prepares the tables for encoding values of symBits.
func (m *tableSet) encode(symBits uint) []*rans.Encoder {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.encoders == nil {
		for _, t := range m.tables {
			m.encoders = append(m.encoders, rans.NewEncoder(t, symBits))
		}
	}
	return m.encoders
}

// source is the symbols of a block on their way into it.
type source struct {
	n    int
	bits uint
	sym  []uint16 // the symbols, or nil: then they are
	raw  []byte   // what cut takes from here
	cut  planes.Cut

	best   int // bytes of the smallest form yet
	kind   uint8
	common uint16
	coded  bool // by stream, whose Coded begins with the block
	stream rans.Stream
}

func (p *source) at(i int) uint16 {
	if p.sym != nil {
		return p.sym[i]
	}
	return p.cut.At(p.raw, i)
}

// values are all symbols; they may be overwritten by the next call for another plane.
func (p *source) values(s *Scratch) []uint16 {
	if p.sym != nil {
		return p.sym
	}
	v := room(&s.encode.values, p.n)
	p.cut.Values(v, p.raw)
	return v
}

// encodeSymbols appends one plane in its smallest form.
func encodeSymbols(dst []byte, sym []uint16, symBits uint, tables []*rans.Encoder, classes []uint8, tryZstd bool,
	level zstd.EncoderLevel, s *Scratch) []byte {
	one := s.encode.one[:]
	one[0].source, one[0].block = source{n: len(sym), sym: sym, bits: symBits}, dst
	encodePlanes(one, tables, classes, tryZstd, level, s)
	dst, one[0].block = one[0].block, nil
	return dst
}

// encodePlanes appends to each block its plane in its smallest form. With classes, the blocks are one.
func encodePlanes(lanes []lane, tables []*rans.Encoder, classes []uint8, tryZstd bool, level zstd.EncoderLevel, s *Scratch) {
	var streams [GroupBlocks]*rans.Stream
	n := 0
	for k := range lanes {
		l := &lanes[k]
		l.bound(tables != nil, s)
		l.coded = tables != nil && l.best > rans.StateBytes && l.mapSymbols(tables, classes, s)
		if !l.coded {
			continue
		}
		l.stream = rans.Stream{Symbols: l.index[:l.n], Carry: carried(l.patches), Coded: planeHeader(l.block, 0, 0, 0), Scratch: room(&l.words, 2*l.n+2*rans.Lanes)}
		if classes == nil {
			streams[n] = &l.stream
			n++
		} else {
			l.stream.Coded = rans.EncodeSet(l.stream.Coded, l.stream.Symbols, tables, classes, &l.stream.Carry, l.stream.Scratch)
		}
	}
	if n > 0 {
		tables[0].Encode(streams[:n]...)
	}
	for k := range lanes {
		l := &lanes[k]
		if l.coded {
			size := len(l.stream.Coded) - len(l.block) - planeHead + max(4*len(l.patches)-2*rans.Lanes, 0)
			if size < l.best {
				l.best, l.kind = size, planeRANS
			}
		}
		l.append(tryZstd, level, s)
	}
}

// bound finds what a plane takes without the coder: one symbol and patches, or a byte a symbol.
func (l *lane) bound(coder bool, s *Scratch) {
	others := l.n
	l.common = l.at(0)
	if !coder || l.nearlyConstant() {
		if l.bits <= 8 && l.varied() {
			l.best, l.kind = l.n, planeRaw
			return
		}
		sym := l.values(s)
		l.common, others = commonest(sym), 0
		for _, v := range sym {
			if v != l.common {
				others++
			}
		}
	}
	l.best, l.kind = 4*others, planeConstant
	if l.bits <= 8 && l.n < l.best {
		l.best, l.kind = l.n, planeRaw
	}
}

// varied says that more than a quarter of the symbols are not the commonest: of two that differ, one at least is not.
func (l *lane) varied() bool {
	if l.sym == nil {
		return l.cut.Differing(l.raw, l.n/4+1) > l.n/4
	}
	differ, half := 0, l.n/2
	for i, v := range l.sym[:half] {
		if v != l.sym[half+i] {
			if differ++; 4*differ > l.n {
				return true
			}
		}
	}
	return false
}

// nearlyConstant looks at 32 symbols: the count that decides costs a tenth of the encoder's time.
func (l *lane) nearlyConstant() bool {
	step := max(l.n/32, 1)
	first, same := l.at(l.n/2), 0
	for i := 0; i < l.n; i += step {
		if l.at(i) == first {
			same++
		}
	}
	return same*step*2 > l.n || l.n < 4096
}

// mapSymbols fills index and patches, and says whether coding may pay.
func (l *lane) mapSymbols(tables []*rans.Encoder, classes []uint8, s *Scratch) bool {
	index, done := room(&l.index, l.n), 0
	l.patches = l.patches[:0]
	switch {
	case classes != nil:
		l.patches = mapClasses(index, l.sym, tables, classes, l.patches)
	case l.sym == nil:
		done, l.patches = tables[0].MapWords(index, l.raw, l.cut.Size, l.cut.Shift, 1<<l.cut.Bits-1, l.patches)
		rest, before := room(&s.encode.values, l.n-done), len(l.patches)
		l.cut.Values(rest, l.raw[done*l.cut.Size:])
		l.patches = tables[0].Map(index[done:], rest, l.patches)
		for i := range l.patches[before:] {
			l.patches[before+i].At += uint16(done)
		}
	default:
		l.patches = tables[0].Map(index, l.sym, l.patches)
	}
	return 4*len(l.patches) < l.best
}

// append appends the plane in the smallest form that was found, or by zstd where that is smaller yet.
func (l *lane) append(tryZstd bool, level zstd.EncoderLevel, s *Scratch) {
	start := len(l.block)
	if tryZstd && l.bits <= 8 && l.best > rans.StateBytes {
		s.bytes = l.appendBytes(s.bytes[:0])
		s.stream = zstdEncode(s.stream[:0], s.bytes, level)
		if len(s.stream) < l.best {
			l.kind = planeZstd
		}
	}
	switch l.kind {
	case planeRaw:
		l.block = l.appendBytes(planeHeader(l.block, planeRaw, 0, 0))
	case planeZstd:
		l.block = append(planeHeader(l.block, planeZstd, 0, len(s.stream)), s.stream...)
	case planeConstant:
		l.patches = l.patches[:0]
		for i, v := range l.values(s) {
			if v != l.common {
				l.patches = append(l.patches, rans.Patch{At: uint16(i), Value: v})
			}
		}
		l.block = planeHeader(l.block, planeConstant, len(l.patches), int(l.common))
	case planeRANS:
		words := (len(l.stream.Coded) - start - planeHead - rans.StateBytes) / 2
		planeHeader(l.stream.Coded[:start], planeRANS, len(l.patches), words)
		l.block = l.stream.Coded
	}
	l.block = pad(l.block, start, 4)
	switch l.kind {
	case planeConstant:
		l.block = appendPatches(l.block, l.patches, 0)
	case planeRANS:
		l.block = appendPatches(l.block, l.patches, rans.Lanes)
	}
	l.block = pad(l.block, start, 4)
}

// trial says how large the plane becomes without zstd and with it.
func (l *lane) trial(tables []*rans.Encoder, s *Scratch) (sizes [2]int) {
	encodePlanes(s.encode.one[:], tables, nil, false, trialLevel, s)
	sizes = [2]int{len(l.block), len(l.block)}
	if l.best > rans.StateBytes {
		s.bytes = l.appendBytes(s.bytes[:0])
		if s.stream = zstdEncode(s.stream[:0], s.bytes, trialLevel); len(s.stream) < l.best {
			sizes[1] = planeHead + (len(s.stream)+3)&^3
		}
	}
	return sizes
}

// appendBytes appends the symbols, a byte each.
func (l *lane) appendBytes(dst []byte) []byte {
	if l.sym == nil {
		return l.cut.Append(dst, l.raw, 8)
	}
	for _, v := range l.sym {
		dst = append(dst, uint8(v))
	}
	return dst
}

// carried are the first words of the patches, which ride in the coder's lanes.
func carried(patches []rans.Patch) (carry [rans.Lanes]uint16) {
	for i := range carry {
		if i < 2*len(patches) {
			carry[i] = patchWord(patches, i)
		}
	}
	return carry
}

// patchWord is word i of the positions and then the symbols of patches.
func patchWord(patches []rans.Patch, i int) uint16 {
	if i < len(patches) {
		return patches[i].At
	}
	return patches[i-len(patches)].Value
}

// appendPatches appends the words of patches from the first one that is not carried.
func appendPatches(dst []byte, patches []rans.Patch, first int) []byte {
	for i := first; i < 2*len(patches); i++ {
		dst = binary.LittleEndian.AppendUint16(dst, patchWord(patches, i))
	}
	return dst
}

func planeHeader(dst []byte, kind uint8, patches, size int) []byte {
	dst = append(dst, kind, 0)
	dst = binary.LittleEndian.AppendUint16(dst, uint16(patches))
	return binary.LittleEndian.AppendUint32(dst, uint32(size))
}

// commonest is a majority vote (Boyer and Moore): the symbol that more than half of sym are, if there is one.
func commonest(sym []uint16) uint16 {
	v, votes := sym[0], 0
	for _, x := range sym {
		switch {
		case x == v:
			votes++
		case votes == 0:
			v, votes = x, 1
		default:
			votes--
		}
	}
	return v
}

func mapClasses(dst []uint8, sym []uint16, tables []*rans.Encoder, classes []uint8, patches []rans.Patch) []rans.Patch {
	for i := range sym {
		n := len(patches)
		patches = tables[classes[i]].Map(dst[i:i+1], sym[i:i+1], patches)
		if len(patches) > n {
			patches[n].At = uint16(i)
		}
	}
	return patches
}

// encodeDiff appends the differences of raw to base.
func (f *Format) encodeDiff(dst, raw, base []byte, s *Scratch) []byte {
	n, start := len(raw)/f.word, len(dst)-blockHead
	words, from, sym := room(&s.words, n), room(&s.base, n), room(&s.sym, n)
	planes.Load(words, raw, f.word, 0)
	planes.Load(from, base, f.word, 0)
	f.differences(words, from, sym)
	var tables []*rans.Encoder
	if len(f.sym[0].tables) > 0 {
		tables = f.sym[0].encode(7)
	}
	dst = encodeSymbols(dst, sym, 7, tables, f.baseClasses(from, s), false, 0, s)
	acc, held := uint64(0), uint(0)
	put := func(v uint64, k uint) {
		acc |= v << held
		for held += k; held >= 8; held -= 8 {
			dst = append(dst, uint8(acc))
			acc >>= 8
		}
	}
	for i, b := range sym {
		if b < 2 {
			continue
		}
		k := uint(b - 1)
		v := words[i] &^ (1 << k)
		if k > 32 {
			put(v&0xffffffff, 32)
			v, k = v>>32, k-32
		}
		put(v, k)
	}
	if held > 0 {
		dst = append(dst, uint8(acc))
	}
	return pad(dst, start, 4)
}

// differences replaces words by their zig-zagged differences to base and sym by the bit lengths of those.
func (f *Format) differences(words, base []uint64, sym []uint16) {
	width := f.width()
	for i, w := range words {
		d := w - base[i]
		if f.float {
			d = ordered(w, width) - ordered(base[i], width)
		}
		z := zigzag(d, width)
		words[i], sym[i] = z, uint16(bits.Len64(z))
	}
}

// check decodes the blocks of group g that end at these bytes of coded, and compares.
func (e *Encoding) check(g int, raw, base, coded []byte, ends []int, s *Scratch) error {
	var blocks [GroupBlocks][]byte
	from := 0
	for k, end := range ends {
		blocks[k], from = coded[from:end], end
	}
	s.ahead = nil
	out := room(&s.check, len(raw))
	if err := e.decodeBlocks(g*GroupBlocks, out, blocks[:len(ends)], base, s); err != nil {
		return errorf(Internal, "blocks from %d on do not decode after encoding: %s", g*GroupBlocks, err)
	}
	if !bytes.Equal(out, raw) {
		return errorf(Internal, "blocks from %d on decode to other bytes than were encoded", g*GroupBlocks)
	}
	return nil
}
