package codecs

import (
	"io"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"

	"bigsmall.dev/bigsmall/codecs/planes"
	"bigsmall.dev/bigsmall/codecs/rans"
)

// Mode says how much work goes into size. The numbers are those of bs_mode in bigsmall.h.
type Mode uint8

const (
	Balanced Mode = iota
	Inference
	Storage
	EndMode
)

// Codec ids, as they stand in the header of a file. Frozen from 1.0 on.
const (
	CodecStored   = "bs_stored"
	CodecPlanes   = "bs_planes"
	CodecLowcard  = "bs_lowcard"
	CodecRowDelta = "bs_rowdelta"
	CodecDelta    = "bs_delta"
)

// Known reports whether the id is one that ParseHead reads.
func Known(id string) bool {
	return id == CodecStored || id == CodecPlanes || id == CodecLowcard || id == CodecRowDelta || id == CodecDelta
}

// Run calls f for 0 to n-1, possibly from many goroutines at once, each with a Scratch of its own, and returns the error
// of the lowest index that failed.
type Run func(n int, f func(i int, s *Scratch) error) error

// Tensor is what an encoder has to know: the dtype, the shape (for rows) and where the bytes are. ReadAt must be safe for
// concurrent use. Base, where not nil, is a tensor of the same dtype and shape to code the difference to.
type Tensor struct {
	DType DType
	Shape []uint64
	Bytes int64
	Src   io.ReaderAt
	Held  []byte // all bytes, where they are in memory; Src is not asked then
	Base  io.ReaderAt
	Mode  Mode
	Run   Run
}

// Encoding is a tensor's chosen format, ready to encode its groups of blocks.
type Encoding struct {
	Format
	plans   []plan
	whole   bool // try zstd on whole blocks
	level   zstd.EncoderLevel
	tensor  *Tensor
	headLen int
	counted *counts
	bits    uint64 // estimated size, in units of 2^-16 bits
	exact   uint64 // the same by the counts of all words, as far as the coder does it
	sampled uint64 // bytes of the sample blocks, coded
}

// Codec is the id of the encoding and the word the header has for its special kind, or "".
func (e *Encoding) Codec() (id, special string) {
	switch {
	case e.transform == Palette:
		return CodecLowcard, "lowcard"
	case e.transform == RowDelta:
		return CodecRowDelta, "wpe_delta"
	case e.transform == BaseDiff:
		return CodecDelta, "delta"
	case len(e.fields) == 0 && !e.whole:
		return CodecStored, ""
	}
	return CodecPlanes, ""
}

// Groups is the number of groups of blocks, each encoded by one call of AppendGroup.
func (e *Encoding) Groups() int { return e.groups() }

// GroupBytes is the number of source bytes of group g.
func (e *Encoding) GroupBytes(g int) int64 {
	per := int64(GroupBlocks * BlockWords * e.word)
	return min(per, e.tensor.Bytes-int64(g)*per)
}

// HeadLen is the length of the head, known before any block is encoded.
func (e *Encoding) HeadLen() int { return e.headLen }

// MaxHead bounds the head of a tensor of so many bytes: tables have to pay for themselves, and number 16 a set; scales are
// one byte for 16 words at most.
func MaxHead(bytes int64) int64 {
	return 1024 + min(bytes, 2*maxFields*(MaxTables*rans.MaxTableBytes+classCount/2)) + bytes/wordsOfScale + bytes/4096
}

// MinHead is the least head of a tensor of the dtype and so many bytes: its index of blocks.
func MinHead(d DType, bytes int64) int64 {
	per := int64(BlockWords * dtypes[d].word)
	return fixedHead + indexEntry*((bytes-1)/per+1)
}

// Index collects what the groups of a payload report.
type Index struct{ items []indexItem }

// AppendGroup appends the coded blocks of group g.
func (e *Encoding) AppendGroup(dst []byte, g int, s *Scratch) ([]byte, Index, error) {
	var index Index
	dst = slices.Grow(dst, int(e.GroupBytes(g))+GroupBlocks*(blockHead+Align))
	if err := e.choose(g, s); err != nil {
		return nil, index, err
	}
	raw, base, err := e.tensor.read(int64(g)*GroupBlocks*BlockWords*int64(e.word), int(e.GroupBytes(g)), e.transform == BaseDiff, s)
	if err != nil {
		return nil, index, err
	}
	start := len(dst)
	var ends [GroupBlocks]int
	dst = e.encodeGroup(dst, &ends, g*GroupBlocks, raw, base, e.plans, e.whole, e.level, s)
	blocks := ends[:min(GroupBlocks, e.blocks()-g*GroupBlocks)]
	for k := range blocks {
		blocks[k] -= start
	}
	if err := e.check(g, raw, base, dst[start:], blocks, s); err != nil {
		return nil, index, err
	}
	index.items = make([]indexItem, len(blocks))
	from := 0
	for k, to := range blocks {
		block := dst[start+from : start+to]
		index.items[k] = indexItem{uint32(len(block)), xxh3.Hash(block)}
		from = to
	}
	return dst, index, nil
}

// Seal pads the last group of a payload, which begins at byte at of it: the padding of a payload belongs to its last
// block, so that a checksum covers it.
func (e *Encoding) Seal(group []byte, index Index, at int64) []byte {
	last := &index.items[len(index.items)-1]
	start := len(group) - int(last.length)
	for (at+int64(len(group)))%Align != 0 {
		group = append(group, 0)
	}
	*last = indexItem{uint32(len(group) - start), xxh3.Hash(group[start:])}
	return group
}

// Head is the head of the payload, once every group is encoded.
func (e *Encoding) Head(groups []Index) (head []byte, checksum uint64) {
	var items []indexItem
	for _, g := range groups {
		items = append(items, g.items...)
	}
	head = e.appendHead(nil, items)
	if len(head) != e.headLen {
		panic("codecs: length of a head changed")
	}
	return head, xxh3.Hash(head)
}

// read reads n bytes of the tensor, and of its base.
func (t *Tensor) read(at int64, n int, withBase bool, s *Scratch) (raw, base []byte, err error) {
	if t.Held != nil {
		raw = t.Held[at : at+int64(n)]
	} else {
		raw = room(&s.encode.raw, n)
		err = readFull(t.Src, raw, at)
	}
	if err == nil && withBase {
		base = room(&s.encode.base, n)
		err = readFull(t.Base, base, at)
	}
	return raw, base, err
}

func readFull(r io.ReaderAt, b []byte, at int64) error {
	n, err := r.ReadAt(b, at)
	if n == len(b) {
		return nil
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func (t *Tensor) readBlock(b, word int, withBase bool, s *Scratch) (raw, base []byte, err error) {
	per := int64(BlockWords * word)
	return t.read(int64(b)*per, int(min(per, t.Bytes-int64(b)*per)), withBase, s)
}

// choose picks, for every field, the table that suits a group best.
func (e *Encoding) choose(g int, s *Scratch) error {
	for i, x := range e.fields {
		m, best := e.sym[i], ^uint64(0)
		if len(m.tables) < 2 || m.classes != nil {
			continue
		}
		h := &s.encode.counts
		if err := e.countsOf(g, h, s); err != nil {
			return err
		}
		values, weights := s.encode.values[:0], s.encode.weights[:0]
		if i == 0 {
			values, weights = h.fold(values, weights, e.counted.upper, x)
		} else {
			for v, c := range h.low[x.Shift/8] {
				if c > 0 {
					values, weights = append(values, uint16(v)), append(weights, c)
				}
			}
		}
		s.encode.values, s.encode.weights = values, weights
		for k, enc := range m.encode(uint(x.Sym)) {
			if c := enc.Cost(values, weights, patchBits); c < best {
				best = c
				m.choice[g] = uint8(k)
			}
		}
	}
	return nil
}

// trialLevel is how zstd is tried on samples; where it wins there, its best level does the work.
const trialLevel = zstd.SpeedDefault

const patchBits = 32 + 2 // position, literal, and the stand-in

// NewEncoding looks at the tensor and chooses how to code it.
func NewEncoding(t *Tensor) (*Encoding, error) {
	info := dtypes[t.DType]
	if t.Bytes%int64(info.word) != 0 {
		return nil, errorf(Invalid, "%d bytes of %s", t.Bytes, t.DType)
	}
	e := &Encoding{tensor: t, level: zstd.SpeedBestCompression}
	if t.Mode == Inference {
		e.level = trialLevel
	}
	e.word, e.float, e.words = info.word, info.sign, uint64(t.Bytes)/uint64(info.word)
	if e.words > 0 {
		if err := e.analyse(info); err != nil {
			return nil, err
		}
	}
	return e, e.finish()
}

// finish falls back to storing where nothing is gained, and measures the head.
func (e *Encoding) finish() error {
	stored := (8*uint64(e.tensor.Bytes) + 32*8*uint64(e.blocks())) * rans.LogOne
	if e.blocks() == 1 && e.transform != BaseDiff { // the sample was all of it
		stored = 8 * (uint64(e.tensor.Bytes) + blockHead + fixedHead) * rans.LogOne
		e.bits = 8 * (e.sampled + uint64(len(e.appendHead(nil, nil)))) * rans.LogOne
	}
	if e.transform != BaseDiff && e.bits+e.bits/1024 >= stored {
		e.Format = Format{word: e.word, words: e.words, float: e.float}
		e.plans, e.whole, e.bits = nil, false, stored
	}
	choices := false
	for _, m := range e.sym {
		choices = choices || m.classes == nil && len(m.tables) > 1
	}
	if !choices {
		e.counted = nil
	}
	e.headLen = len(e.appendHead(nil, make([]indexItem, e.blocks())))
	return nil
}

// narrow is what a first look at all words finds.
type narrow struct {
	or       uint64   // of all words
	half     bool     // every word is an exact binary16
	distinct []uint64 // ascending; more than maxPalette means too many
}

func (a *narrow) look(words []uint64) {
	for _, w := range words {
		a.or |= w
	}
	if a.half {
		for _, w := range words {
			if _, ok := toHalf(uint32(w)); !ok {
				a.half = false
				break
			}
		}
	}
	if len(a.distinct) <= maxPalette {
		last, any := uint64(0), false
		for _, w := range words {
			if any && w == last {
				continue
			}
			last, any = w, true
			if at, found := slices.BinarySearch(a.distinct, w); !found {
				if a.distinct = slices.Insert(a.distinct, at, w); len(a.distinct) > maxPalette {
					break
				}
			}
		}
	}
}

func (a *narrow) hopeless(floats bool) bool {
	return !a.half && len(a.distinct) > maxPalette && (!floats || a.or&1 == 1)
}

// load reads and transforms block b.
func (e *Encoding) load(b int, s *Scratch) ([]uint64, error) {
	raw, _, err := e.tensor.readBlock(b, e.word, false, s)
	if err != nil {
		return nil, err
	}
	words := room(&s.words, len(raw)/e.word)
	planes.Load(words, raw, e.word, 0)
	e.apply(words)
	return words, nil
}

func (e *Encoding) scanNarrow(exp uint) (narrow, error) {
	start := func() narrow { return narrow{half: exp == 8 && e.word == 4} }
	all, mu, done := start(), sync.Mutex{}, atomic.Bool{}
	err := e.tensor.Run(e.blocks(), func(b int, s *Scratch) error {
		if done.Load() {
			return nil
		}
		raw, _, err := e.tensor.readBlock(b, e.word, false, s)
		if err != nil {
			return err
		}
		one := start()
		const step = 1 << 11 // most tensors show within a few words that nothing is to be had
		for n := len(raw) / e.word; n > 0 && !one.hopeless(exp > 0); n = len(raw) / e.word {
			words := room(&s.words, min(n, step))
			planes.Load(words, raw, e.word, 0)
			one.look(words)
			raw = raw[len(words)*e.word:]
		}
		mu.Lock()
		defer mu.Unlock()
		all.or |= one.or
		all.half = all.half && one.half
		for _, w := range one.distinct {
			if at, found := slices.BinarySearch(all.distinct, w); !found && len(all.distinct) <= maxPalette {
				all.distinct = slices.Insert(all.distinct, at, w)
			}
		}
		if all.hopeless(exp > 0) {
			done.Store(true)
		}
		return nil
	})
	return all, err
}

// analyse chooses transform, fields and tables.
func (e *Encoding) analyse(info dtypeInfo) error {
	found, err := e.scanNarrow(info.exp)
	if err != nil {
		return err
	}
	exp := info.exp
	switch {
	case found.hopeless(exp > 0):
	case len(found.distinct) <= maxPalette:
		e.transform, e.palette, exp = Palette, found.distinct, 0
	case exp > 0:
		if found.half {
			e.transform, exp = Half, 5
			h := uint64(0)
			if h, err = e.halfBits(); err != nil {
				return err
			}
			found.or = h
		}
		for mantissa := e.width() - 1 - exp; uint(e.shift) < mantissa && found.or>>e.shift&1 == 0; {
			e.shift++
		}
	}
	if err := e.analyseFields(exp); err != nil {
		return err
	}
	if e.transform != Plain || e.shift != 0 {
		return nil
	}
	if exp > 0 && e.word > 1 && e.tensor.Mode != Inference {
		if err := e.tryBytes(); err != nil {
			return err
		}
	}
	return e.tryRows()
}

// tryBytes looks whether the bytes of floats, each for itself, repeat for zstd: in most tensors the lowest ones are noise.
func (e *Encoding) tryBytes() error {
	repeats := false
	err := e.tensor.Run(1, func(_ int, s *Scratch) error {
		raw, _, err := e.tensor.readBlock(e.sampleBlocks()[0], e.word, false, s)
		if err != nil {
			return err
		}
		s.bytes = (planes.Cut{Size: e.word, Bits: 8}).Append(s.bytes[:0], raw, 8)
		s.stream = zstdEncode(s.stream[:0], s.bytes, trialLevel)
		repeats = len(s.stream)*10 < len(s.bytes)*9
		return nil
	})
	if err != nil || !repeats {
		return err
	}
	c := &Encoding{tensor: e.tensor, level: e.level}
	c.Format = Format{word: e.word, words: e.words, float: e.float}
	if err := c.analyseFields(0); err != nil {
		return err
	}
	if c.size() < e.size() {
		*e = *c
	}
	return nil
}

// halfBits is the union of all words as binary16.
func (e *Encoding) halfBits() (or uint64, err error) {
	var mu sync.Mutex
	err = e.tensor.Run(e.blocks(), func(b int, s *Scratch) error {
		words, err := e.load(b, s)
		if err != nil {
			return err
		}
		one := uint64(0)
		for _, w := range words {
			one |= w
		}
		mu.Lock()
		defer mu.Unlock()
		or |= one
		return nil
	})
	return or, err
}

const (
	topBits = 12 // of a field, counted at once
	maxSets = 64 // histograms kept to find tables that differ within a tensor
)

// layout cuts a word into an upper run of bits and whole bytes below it.
func (e *Encoding) layout(exp uint) (upper planes.Field, lowBytes int) {
	w := e.width()
	if exp == 0 {
		return planes.Field{Shift: uint8(w - 8), Sym: 8}, int(w/8) - 1
	}
	if w >= 24 {
		lowBytes = int(w-16) / 8
	}
	m := w - 8*uint(lowBytes)
	s := min(m, topBits)
	return planes.Field{Shift: uint8(8 * lowBytes), Sym: uint8(s), Rest: uint8(m - s)}, lowBytes
}

// analyseFields chooses the fields and tables for the transform that is set.
func (e *Encoding) analyseFields(exp uint) error {
	upper, lowBytes := e.layout(exp)
	sets, err := e.count(upper, lowBytes)
	if err != nil {
		return err
	}
	field := upper
	topSets := func(f planes.Field) [][]uint64 {
		out := make([][]uint64, len(sets))
		for i, h := range sets {
			out[i] = h.symbols(upper, f)
		}
		return out
	}
	alphabet := rans.MaxSymbols
	if exp > 0 {
		all := sets[0]
		if len(sets) > 1 {
			all = &hist{}
			for _, h := range sets {
				all.add(h)
			}
		}
		field, alphabet = e.chooseField(exp, upper, all)
	}
	e.fields, e.sym, e.plans, e.bits = nil, nil, nil, 0
	e.addField(field, topSets(field), alphabet)
	for i := lowBytes - 1; i >= 0; i-- {
		low := make([][]uint64, len(sets))
		for k, h := range sets {
			low[k] = make([]uint64, 256)
			for v, c := range h.low[i] {
				low[k][v] = uint64(c)
			}
		}
		e.addField(planes.Field{Shift: uint8(8 * i), Sym: 8}, low, rans.MaxSymbols)
	}
	e.exact = e.bits
	if err := e.sample(); err != nil || e.tensor.Mode != Storage || exp == 0 {
		return err
	}
	return e.tryScales(exp, upper, sets, topSets(field), alphabet)
}

// scaledSample estimates all blocks by those of the sample.
func (e *Encoding) scaledSample() uint64 {
	words := uint64(0)
	for _, b := range e.sampleBlocks() {
		words += min(BlockWords, e.words-uint64(b)*BlockWords)
	}
	return e.sampled * e.words / words
}

// size estimates the payload from the sample blocks.
func (e *Encoding) size() uint64 {
	return e.scaledSample() + uint64(len(e.appendHead(nil, nil)))
}

// chooseField finds how many mantissa bits, and whether the sign, belong into the symbol, and how many symbols it takes.
func (e *Encoding) chooseField(exp uint, upper planes.Field, all *hist) (best planes.Field, alphabet int) {
	m := upper.Bits()
	values, weights := all.fold(nil, nil, upper, planes.Field{Sym: upper.Sym})
	var room [1 << topBits]uint64
	bestCost := [2]uint64{^uint64(0), ^uint64(0)}
	var bestField [2]planes.Field
	for j := uint(0); j <= 4; j++ {
		for _, signed := range []uint{0, 1} {
			s := exp + j + signed
			if exp+j+1 > uint(upper.Sym) || m-s > planes.MaxRest {
				continue
			}
			if e.tensor.Mode == Inference && (j > 0 || signed > 0) {
				continue
			}
			f := planes.Field{Shift: upper.Shift, Sym: uint8(s), Rest: uint8(m - s), Rotate: signed == 0}
			counts, present := room[:1<<s], 0
			clear(counts)
			drop, mask := symbolOf(upper, f)
			for i, v := range values {
				x := uint(v) >> drop & mask
				if counts[x] == 0 {
					present++
				}
				counts[x] += uint64(weights[i])
			}
			cost := uint64(0)
			for k, limit := range []int{rans.AliasSymbols, rans.MaxSymbols} {
				if k == 0 || present > rans.AliasSymbols { // else it is the same table
					_, cost = rans.Build(counts, limit, patchBits)
					cost += e.words * uint64(m-s) * rans.LogOne
				}
				if cost < bestCost[k] {
					bestCost[k], bestField[k] = cost, f
				}
			}
		}
	}
	// More than 64 symbols decode at two thirds of the speed and encode at half of it: worth it from 0.05 percent on.
	if e.tensor.Mode != Inference && bestCost[1]+uint64(e.tensor.Bytes)*8*rans.LogOne/2000 < bestCost[0] {
		return bestField[1], rans.MaxSymbols
	}
	return bestField[0], rans.AliasSymbols
}

// addField adds a field with the tables that its histograms deserve.
func (e *Encoding) addField(f planes.Field, sets [][]uint64, alphabet int) {
	tables, _, cost := cluster(sets, alphabet)
	p := plan{rans: len(tables) > 0}
	rawBits := e.words * 8 * rans.LogOne
	if f.Sym <= 8 && cost+uint64(e.blocks())*rans.StateBytes*8*rans.LogOne >= rawBits*995/1000 && e.constantCost(sets) > rawBits {
		tables, cost, p.rans = nil, e.words*8*rans.LogOne, false
	}
	e.fields = append(e.fields, f)
	e.sym = append(e.sym, &tableSet{tables: tables, choice: make([]uint8, e.groups())})
	e.plans = append(e.plans, p)
	e.bits += cost + e.words*uint64(f.Rest)*rans.LogOne
}

// constantCost is what a plane takes as one symbol and patches.
func (e *Encoding) constantCost(sets [][]uint64) uint64 {
	all := sum(sets)
	return (e.words - slices.Max(all)) * 32 * rans.LogOne
}

// cluster merges histograms until no merge saves bits and at most MaxTables are left. It builds their tables, says which
// of them each set got (0 for a set without a table) and what coding everything takes.
func cluster(sets [][]uint64, alphabet int) (tables []*rans.Table, of []uint8, cost uint64) {
	type node struct {
		counts []uint64 // from first to last
		cost   uint64
		sets   []int
	}
	// Most values never come up: what lies outside of those that do is left out of all sums.
	first, last := len(sets[0]), 0
	for _, s := range sets {
		lo := 0
		for lo < first && s[lo] == 0 {
			lo++
		}
		hi := len(s)
		for hi > last && s[hi-1] == 0 {
			hi--
		}
		first, last = min(first, lo), max(last, hi)
	}
	first = min(first, last)
	var nodes []*node
	for i, s := range sets {
		if c, any := entropy(s[first:last]); any {
			nodes = append(nodes, &node{s[first:last], c, []int{i}})
		}
	}
	type merge struct {
		to   *node
		gain int64
	}
	seen := map[[2]*node]merge{}
	sums := make([]uint64, last-first)
	look := func(a, b *node) merge {
		m, ok := seen[[2]*node{a, b}]
		if !ok {
			for i, c := range a.counts {
				sums[i] = c + b.counts[i]
			}
			c, _ := entropy(sums)
			m = merge{&node{nil, c, nil}, int64(a.cost+b.cost) - int64(c)}
			seen[[2]*node{a, b}] = m
		}
		return m
	}
	for len(nodes) > 1 {
		at, with, best := 0, 0, merge{}
		for i := range nodes {
			for j := i + 1; j < len(nodes); j++ {
				// With many histograms only neighbours are candidates: what lies together is alike.
				if len(nodes) > 24 && j > i+1 {
					break
				}
				if m := look(nodes[i], nodes[j]); best.to == nil || m.gain > best.gain {
					at, with, best = i, j, m
				}
			}
		}
		if best.gain < 0 && len(nodes) <= MaxTables {
			break
		}
		to, a, b := best.to, nodes[at], nodes[with]
		to.counts, to.sets = sum([][]uint64{a.counts, b.counts}), slices.Concat(a.sets, b.sets)
		nodes[at] = to
		nodes = slices.Delete(nodes, with, with+1)
	}
	counts := make([]uint64, len(sets[0]))
	of = make([]uint8, len(sets))
	for _, n := range nodes {
		copy(counts[first:], n.counts)
		t, c := rans.Build(counts, alphabet, patchBits)
		cost += c
		if t != nil {
			for _, i := range n.sets {
				of[i] = uint8(len(tables))
			}
			tables = append(tables, t)
		}
	}
	return tables, of, cost
}

// entropy is what symbols of these counts take with a table of their own, in units of 2^-16 bits, the table included.
func entropy(counts []uint64) (cost uint64, any bool) {
	total, logs := uint64(0), uint64(0)
	for _, c := range counts {
		if c > 0 {
			total += c
			logs += c * rans.Log2(c)
			cost += 11 * rans.LogOne
		}
	}
	return cost + total*rans.Log2(total) - logs, total > 0
}

// addCounts adds what one goroutine counted.
func addCounts(mu *sync.Mutex, all []uint64, counts []uint32) {
	mu.Lock()
	defer mu.Unlock()
	for i, c := range counts {
		all[i] += uint64(c)
	}
}

// sampleBlocks are the blocks on which alternatives are tried: up to four, evenly spread.
func (e *Encoding) sampleBlocks() []int {
	n := e.blocks()
	k := min(max(n/16, 1), 4)
	out := make([]int, k)
	for i := range out {
		out[i] = i * n / k
	}
	return out
}

// sample encodes a few blocks to see where zstd beats the coder, and how large they become. Scales are tried where it does
// not, and it is not asked again.
func (e *Encoding) sample() error {
	e.sampled = 0
	blocks := e.sampleBlocks()
	var mu sync.Mutex
	sizes := make([][2]int, len(e.fields)) // without zstd, with it
	wholeSize, planeSize := 0, 0
	words := 0
	err := e.tensor.Run(len(blocks), func(k int, s *Scratch) error {
		b := blocks[k]
		if err := e.choose(b/GroupBlocks, s); err != nil {
			return err
		}
		raw, _, err := e.tensor.readBlock(b, e.word, false, s)
		if err != nil {
			return err
		}
		var end [GroupBlocks]int
		s.encode.trial = e.encodeGroup(s.encode.trial[:0], &end, b, raw, nil, e.plans, false, trialLevel, s)
		without, n := end[0], len(raw)/e.word
		var one [maxFields][2]int
		gain := 0
		for i, f := range e.fields {
			if f.Sym > 8 || f.Rest > 0 || e.scales != nil {
				continue
			}
			l := &s.encode.one[0]
			l.source, l.block = source{n: n, bits: uint(f.Sym)}, s.encode.trial[:0]
			if e.sideBySide() {
				l.raw, l.cut = raw, f.SymCut(e.word, e.shift)
			} else {
				words := room(&s.words, n)
				planes.Load(words, raw, e.word, 0)
				e.apply(words)
				l.sym = room(&s.sym, n)
				f.Split(l.sym, nil, words)
			}
			one[i] = l.trial(e.coders(i, b/GroupBlocks, e.plans), s)
			s.encode.trial, l.block = l.block, nil
			gain += one[i][0] - one[i][1]
		}
		// Most weights are noise to zstd: in a large tensor the beginning of the block says so.
		whole := blockHead + len(raw)
		promising := e.scales == nil
		if promising && e.blocks() >= 16 {
			part := raw[:min(len(raw), 1<<15)]
			s.stream = zstdEncode(s.stream[:0], part, trialLevel)
			promising = len(s.stream)*len(raw) < (without-gain)*len(part)*11/10
		}
		if promising {
			s.stream = zstdEncode(s.stream[:0], raw, trialLevel)
			whole = blockHead + 4 + len(s.stream)
		}
		mu.Lock()
		defer mu.Unlock()
		for i := range sizes {
			sizes[i][0] += one[i][0]
			sizes[i][1] += one[i][1]
		}
		wholeSize += whole
		planeSize += without - gain
		e.sampled += uint64(min(without-gain, whole))
		words += n
		return nil
	})
	if err != nil {
		return err
	}
	if e.scales == nil {
		for i := range e.plans {
			e.plans[i].zstd = sizes[i][1]*100 < sizes[i][0]*99
		}
	}
	// Decoding zstd is several times slower than the coder, so it must earn its place.
	e.whole = wholeSize*100 < planeSize*98
	if scaled := e.sampled * 8 * rans.LogOne / 1024 * (e.words * 1024 / uint64(words)); e.whole || scaled < e.bits {
		e.bits = scaled
	}
	return nil
}

// RowsPossible reports whether a tensor of that shape is tried as differences of rows.
func RowsPossible(shape []uint64, bytes int64) bool {
	return len(shape) == 2 && shape[0] >= 16 && shape[1] >= 4 && bytes >= 1<<14
}

// tryRows looks whether the rows of a matrix resemble the row above, as those of position embeddings do.
func (e *Encoding) tryRows() error {
	shape := e.tensor.Shape
	if !RowsPossible(shape, e.tensor.Bytes) {
		return nil
	}
	row := e.words / shape[0]
	if row >= BlockWords/4 {
		return nil
	}
	c := &Encoding{tensor: e.tensor, level: e.level}
	c.Format = Format{transform: RowDelta, param: uint32(row), word: e.word, words: e.words, float: e.float}
	// A first look at one block: what do the bytes of the differences take, one by one?
	bits := uint64(0)
	err := c.tensor.Run(1, func(_ int, s *Scratch) error {
		raw, _, err := c.tensor.readBlock(e.sampleBlocks()[0], c.word, false, s)
		if err != nil {
			return err
		}
		h := &s.encode.counts
		h.low = [maxFields][256]uint32{}
		h.countRows(raw, c.word, int(row))
		var counts [256]uint64
		for i := range c.word {
			for v, c := range h.low[i] {
				counts[v] = uint64(c)
			}
			x, _ := entropy(counts[:])
			bits += min(x, uint64(len(raw)/c.word)*8*rans.LogOne)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if bits/8/rans.LogOne*uint64(len(e.sampleBlocks())) >= e.sampled {
		return nil
	}
	if err := c.analyseFields(0); err != nil {
		return err
	}
	if c.size() < e.size() {
		*e = *c
	}
	return nil
}

// NewDelta chooses between coding the difference to t.Base and coding the tensor by itself.
func NewDelta(t *Tensor) (*Encoding, error) {
	alone, err := NewEncoding(t)
	if err != nil || alone.words == 0 {
		return alone, err
	}
	e := &Encoding{tensor: t, level: alone.level}
	e.Format = Format{transform: BaseDiff, word: alone.word, words: alone.words, float: alone.float}
	const lengths = 65
	all := make([]uint64, classCount*lengths)
	var mu sync.Mutex
	err = t.Run(e.groups(), func(g int, s *Scratch) error {
		counts := make([]uint32, len(all))
		shift := e.baseShift()
		for b := g * GroupBlocks; b < min((g+1)*GroupBlocks, e.blocks()); b++ {
			raw, base, err := t.readBlock(b, e.word, true, s)
			if err != nil {
				return err
			}
			n := len(raw) / e.word
			words, from, sym := room(&s.words, n), room(&s.base, n), room(&s.sym, n)
			planes.Load(words, raw, e.word, 0)
			planes.Load(from, base, e.word, 0)
			e.differences(words, from, sym)
			for i, v := range sym {
				counts[int(uint8(from[i]>>shift))*lengths+int(v)]++
			}
		}
		addCounts(&mu, all, counts)
		return nil
	})
	if err != nil {
		return nil, err
	}
	sets := make([][]uint64, classCount)
	for i := range sets {
		sets[i] = all[i*lengths : (i+1)*lengths]
		for n, c := range sets[i] {
			e.bits += c * uint64(max(n-1, 0)) * rans.LogOne
		}
	}
	tables, of, cost := cluster(sets, rans.AliasSymbols)
	e.bits += cost + (classCount*4+uint64(e.blocks())*rans.StateBytes*8)*rans.LogOne
	e.sym = []*tableSet{{tables: tables, classes: (*[classCount]uint8)(of)}}
	if e.bits >= alone.bits {
		return alone, nil
	}
	return e, e.finish()
}
