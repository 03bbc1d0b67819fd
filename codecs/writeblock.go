package codecs

import (
	"encoding/binary"
	"math/bits"
	"slices"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"

	"bigsmall.dev/bigsmall/codecs/planes"
	"bigsmall.dev/bigsmall/codecs/rans"
)

// zstdPool lends encoders of one level. The best level keeps tens of MiB in each, so there are few, and who finds none
// waits: nothing is locked while one is held.
type zstdPool struct {
	idle chan *zstd.Encoder
}

var zstdPools = map[zstd.EncoderLevel]*zstdPool{
	zstd.SpeedDefault: newZstdPool(zstd.SpeedDefault, 16), zstd.SpeedBestCompression: newZstdPool(zstd.SpeedBestCompression, 4),
}

func newZstdPool(level zstd.EncoderLevel, n int) *zstdPool {
	p := &zstdPool{make(chan *zstd.Encoder, n)}
	for range n { // what they need they allocate at first use
		e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(level), zstd.WithEncoderCRC(false),
			zstd.WithWindowSize(BlockWords*8), zstd.WithLowerEncoderMem(true))
		if err != nil {
			panic(err) // constant options
		}
		p.idle <- e
	}
	return p
}

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

// encodeBlock appends the block of the words in raw, group g of the payload. It keeps the smallest of the ways that the
// format and the plans allow.
func (f *Format) encodeBlock(dst []byte, group int, raw, base []byte, plans []plan, whole bool, level zstd.EncoderLevel, s *Scratch) []byte {
	start, n := len(dst), len(raw)/f.word
	if f.transform == BaseDiff {
		dst = f.encodeDiff(append(dst, blockCoded, 0, 0, 0), raw, base, s)
	} else if f.join() == joinSymbols && f.word == 2 {
		dst = append(dst, blockCoded, 0, 0, 0)
		sym := room(&s.sym, n)
		s.packed = f.fields[0].SplitDirect(sym, s.packed[:0], raw, f.shift)
		dst = encodeSymbols(dst, sym, uint(f.fields[0].Sym), f.coders(0, group, plans), nil, plans[0].zstd, level, s)
		dst = pad(append(dst, s.packed...), start, 4)
	} else if len(f.fields) > 0 {
		dst = append(dst, blockCoded, 0, 0, 0)
		words := room(&s.words, n)
		planes.Load(words, raw, f.word, 0)
		f.apply(words)
		sym, mant, rest := room(&s.sym, n), room(&s.mant, n), room(&s.rest, n)
		for i, x := range f.fields {
			x.Split(sym, mant, rest, words)
			if x.Mant > 0 {
				dst = f.encodePair(dst, i, sym, mant, f.coders(i, group, plans), level, s)
			} else {
				dst = encodeSymbols(dst, sym, uint(x.Sym), f.coders(i, group, plans), nil, plans[i].zstd, level, s)
			}
			if x.Rest > 0 {
				dst = pad(planes.Pack(dst, rest, x.Rest), start, 4)
			}
		}
	}
	size := len(dst) - start
	if stored := blockHead + len(raw); size == 0 || size > stored {
		size = stored
		dst = append(dst[:start], blockStored, 0, 0, 0)
		dst = append(dst, raw...)
	}
	if whole {
		s.stream = zstdEncode(s.stream[:0], raw, level)
		if blockHead+4+len(s.stream) < size {
			dst = append(dst[:start], blockZstd, 0, 0, 0)
			dst = binary.LittleEndian.AppendUint32(dst, uint32(len(s.stream)))
			dst = append(dst, s.stream...)
		}
	}
	return pad(dst, start, 8)
}

// coders are the tables for field i in a group, or nil where the coder is not worth trying.
func (f *Format) coders(i, group int, plans []plan) []*rans.Encoder {
	m := f.sym[i]
	if !plans[i].rans || len(m.tables) == 0 {
		return nil
	}
	return m.encode(uint(f.fields[i].Sym))[m.choice[group]:]
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

// encodeSymbols appends one plane in its smallest form.
func encodeSymbols(dst []byte, sym []uint16, symBits uint, tables []*rans.Encoder, classes []uint8, tryZstd bool,
	level zstd.EncoderLevel, s *Scratch) []byte {
	n, start := len(sym), len(dst)
	header := func(kind uint8, patches, size int) { dst = planeHeader(dst, kind, patches, size) }
	common, others := sym[0], n
	if tables == nil || nearlyConstant(sym) {
		common = commonest(sym)
		others = 0
		for _, v := range sym {
			if v != common {
				others++
			}
		}
	}
	best, kind := 4*others, uint8(planeConstant)
	if symBits <= 8 && n < best {
		best, kind = n, planeRaw
	}
	if best <= rans.StateBytes {
		tables, tryZstd = nil, false
	}
	s.patches = s.patches[:0]
	if tables != nil {
		idx := room(&s.bytes, n)
		if classes == nil {
			s.patches = tables[0].Map(idx, sym, s.patches)
		} else {
			s.patches = mapClasses(idx, sym, tables, classes, s.patches)
		}
		if 4*len(s.patches) < best {
			carry := carried(s.patches)
			s.coded = rans.Encode(s.coded[:0], idx, tables, classes, nil, &carry, s.words16())
			if size := len(s.coded) + max(4*len(s.patches)-2*rans.Lanes, 0); size < best {
				best, kind = size, planeRANS
			}
		}
	}
	if tryZstd && symBits <= 8 {
		raw := room(&s.bytes, n)
		for i, v := range sym {
			raw[i] = uint8(v)
		}
		s.stream = zstdEncode(s.stream[:0], raw, level)
		if len(s.stream) < best {
			kind = planeZstd
		}
	}
	switch kind {
	case planeRaw:
		header(planeRaw, 0, 0)
		for _, v := range sym {
			dst = append(dst, uint8(v))
		}
	case planeZstd:
		header(planeZstd, 0, len(s.stream))
		dst = append(dst, s.stream...)
	case planeConstant:
		s.patches = s.patches[:0]
		for i, v := range sym {
			if v != common {
				s.patches = append(s.patches, rans.Patch{At: uint16(i), Value: v})
			}
		}
		header(planeConstant, len(s.patches), int(common))
	case planeRANS:
		header(planeRANS, len(s.patches), (len(s.coded)-rans.StateBytes)/2)
		dst = append(dst, s.coded...)
	}
	dst = pad(dst, start, 4)
	switch kind {
	case planeConstant:
		dst = appendPatches(dst, s.patches, 0)
	case planeRANS:
		dst = appendPatches(dst, s.patches, rans.Lanes)
	}
	return pad(dst, start, 4)
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

// encodePair appends the symbol plane and the mantissa plane of a field, in one stream where the symbols are coded.
func (f *Format) encodePair(dst []byte, i int, sym, mant []uint16, tables []*rans.Encoder, level zstd.EncoderLevel, s *Scratch) []byte {
	x, m, n, start := f.fields[i], f.mant[i], len(sym), len(dst)
	// Alone: the mantissas as they are. It bounds what the pair may take, and serves where symbols are constant.
	dst = encodeSymbols(dst, sym, uint(x.Sym), tables, nil, false, level, s)
	dst = encodeSymbols(dst, mant, uint(x.Mant), nil, nil, false, level, s)
	if tables == nil || dst[start] != planeRANS {
		return dst
	}
	first, classes, shift := make([]uint8, n), room(&s.classes, n), classShift(x.Sym)
	patches := tables[0].Map(first, sym, nil)
	for k, v := range sym {
		classes[k] = m.classes[v>>shift]
	}
	for _, p := range patches { // a decoder sees the stand-in when it looks up the class
		classes[p.At] = m.classes[tables[0].Common()>>shift]
	}
	second, mants := make([]uint8, n), m.encode(uint(x.Mant))
	also := mapClasses(second, mant, mants, classes, nil)
	carry := carried(patches)
	coded := rans.Encode(nil, first, tables, nil, &rans.Pair{Symbols: second, Tables: mants, Classes: classes}, &carry, nil)
	if len(coded)+4*len(also)+2*planeHead+4 >= len(dst)-start || len(patches)+len(also) > n/4 {
		return dst
	}
	dst = planeHeader(dst[:start], planePaired, len(patches), (len(coded)-rans.StateBytes)/2)
	dst = pad(append(dst, coded...), start, 4)
	dst = pad(appendPatches(dst, patches, rans.Lanes), start, 4)
	dst = planeHeader(dst, planePaired, len(also), 0)
	return appendPatches(dst, also, 0)
}

func planeHeader(dst []byte, kind uint8, patches, size int) []byte {
	dst = append(dst, kind, 0)
	dst = binary.LittleEndian.AppendUint16(dst, uint16(patches))
	return binary.LittleEndian.AppendUint32(dst, uint32(size))
}

// nearlyConstant looks at 32 symbols: the count that decides costs a tenth of the encoder's time.
func nearlyConstant(sym []uint16) bool {
	step := max(len(sym)/32, 1)
	first, same := sym[len(sym)/2], 0
	for i := 0; i < len(sym); i += step {
		if sym[i] == first {
			same++
		}
	}
	return same*step*2 > len(sym) || len(sym) < 4096
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

// appendBlock encodes block i, decodes it again and compares.
func (e *Encoding) appendBlock(dst []byte, i int, raw, base []byte, s *Scratch) ([]byte, indexItem, error) {
	start := len(dst)
	dst = e.encodeBlock(dst, i/GroupBlocks, raw, base, e.plans, e.whole, e.level, s)
	block := dst[start:]
	s.check = slices.Grow(s.check[:0], len(raw))[:len(raw)]
	if err := e.decodeBlocks(i, s.check, [][]byte{block}, base, s); err != nil {
		return nil, indexItem{}, errorf(Internal, "block does not decode after encoding: %s", err)
	}
	if string(s.check) != string(raw) {
		return nil, indexItem{}, errorf(Internal, "block decodes to other bytes than were encoded")
	}
	return dst, indexItem{uint32(len(block)), xxh3.Hash(block)}, nil
}
