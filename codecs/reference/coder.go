package reference

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// finder looks a symbol up by a number below 2^24.
type finder struct {
	cdf  []uint32
	near [1 << nearBits]uint16 // the symbol of the first number of each cell
}

const nearBits = 12

func newFinder(cdf []uint32) *finder {
	f := &finder{cdf: cdf}
	s := 0
	for i := range f.near {
		for cdf[s+1] <= uint32(i)<<(precision-nearBits) {
			s++
		}
		f.near[i] = uint16(s)
	}
	return f
}

func (f *finder) find(q uint32) int {
	s := int(f.near[q>>(precision-nearBits)])
	for f.cdf[s+1] <= q {
		s++
	}
	return s
}

// model is the category's, as the range coder and the stack coder use it.
func (g category) model() (*finder, error) {
	counts := make([]int, g.alphabet)
	for i, s := range g.symbols {
		counts[s] = g.counts[i]
	}
	cdf, err := cumulative(counts)
	if err != nil {
		return nil, err
	}
	return newFinder(cdf), nil
}

// words are those of a stream; those behind its end are 0.
type words []byte

func (w *words) next() (x uint64) {
	if len(*w) >= 4 {
		x = uint64(binary.LittleEndian.Uint32(*w))
		*w = (*w)[4:]
	}
	return x
}

func wholeWords(b []byte, size int) error {
	if b == nil || len(b)%size != 0 {
		return fmt.Errorf("%d bytes are no whole number of code words", len(b))
	}
	return nil
}

// A stream is a range decoder at work: that of the crate constriction, of 32-bit words and 64-bit state, whose encoder
// resolves carries. Only the distance of its point from the lower end of its range matters.
type stream struct {
	distance, width uint64
	words           words
	model           *finder
	out             []uint16
}

func newStream(out []uint16, g category, bytes []byte) (*stream, error) {
	if err := wholeWords(bytes, 4); err != nil {
		return nil, err
	}
	m, err := g.model()
	if err != nil {
		return nil, err
	}
	s := &stream{width: ^uint64(0), words: bytes, model: m, out: out}
	s.distance = s.words.next() << 32
	s.distance |= s.words.next()
	return s, nil
}

var errSymbol = fmt.Errorf("code words give a symbol that is none of their model")

// ranged decodes one stream.
func ranged(out []uint16, g category, bytes []byte) error {
	return rangedAll([]span{{out, g, bytes}})
}

// A span is symbols to decode, and from what.
type span struct {
	out   []uint16
	g     category
	bytes []byte
}

// lanes is how many streams are decoded side by side: a symbol of one waits for a division, a table and a product, of
// which a processor does several at once.
const lanes = 4

// rangedAll decodes many streams, the longest first; where one ends the next begins.
func rangedAll(spans []span) error {
	spans = slices.DeleteFunc(spans, func(s span) bool { return len(s.out) == 0 })
	slices.SortStableFunc(spans, func(a, b span) int { return len(b.out) - len(a.out) })
	var side []*stream
	for len(spans) > 0 || len(side) > 0 {
		for len(side) < lanes && len(spans) > 0 {
			s, err := newStream(spans[0].out, spans[0].g, spans[0].bytes)
			if err != nil {
				return err
			}
			side, spans = append(side, s), spans[1:]
		}
		n := len(side[0].out)
		for _, s := range side {
			n = min(n, len(s.out))
		}
		if err := step(side, n); err != nil {
			return err
		}
		side = slices.DeleteFunc(side, func(s *stream) bool { return len(s.out) == 0 })
	}
	return nil
}

// step decodes n symbols of each.
func step(side []*stream, n int) error {
	if len(side) == 1 {
		return side[0].step(n)
	}
	for i := range n {
		for _, s := range side {
			scale := s.width >> precision
			q := s.distance / scale
			if q >= total {
				return errSymbol
			}
			symbol := int(s.model.near[q>>(precision-nearBits)&(1<<nearBits-1)])
			cdf := s.model.cdf
			low, high := uint64(cdf[symbol]), uint64(cdf[symbol+1])
			for high <= q {
				symbol++
				low, high = high, uint64(cdf[symbol+1])
			}
			distance, width := s.distance-scale*low, scale*(high-low)
			if width < 1<<32 {
				width <<= 32
				distance = distance<<32 | s.words.next()
			}
			s.distance, s.width = distance, width
			s.out[i] = uint16(symbol)
		}
	}
	for _, s := range side {
		s.out = s.out[n:]
	}
	return nil
}

// step is the same of one, whose state then stays in registers.
func (s *stream) step(n int) error {
	distance, width, words := s.distance, s.width, s.words
	cdf, near := s.model.cdf, &s.model.near
	for i := range s.out[:n] {
		scale := width >> precision
		q := distance / scale
		if q >= total {
			return errSymbol
		}
		symbol := int(near[q>>(precision-nearBits)&(1<<nearBits-1)])
		low, high := uint64(cdf[symbol]), uint64(cdf[symbol+1])
		for high <= q {
			symbol++
			low, high = high, uint64(cdf[symbol+1])
		}
		distance -= scale * low
		if width = scale * (high - low); width < 1<<32 {
			width <<= 32
			distance = distance<<32 | words.next()
		}
		s.out[i] = uint16(symbol)
	}
	s.distance, s.width, s.words, s.out = distance, width, words, s.out[n:]
	return nil
}

// oneByOne makes a coding of many of one of one.
func oneByOne(decode func(out []uint16, g category, bytes []byte) error) coding {
	return func(spans []span) error {
		for _, s := range spans {
			if err := decode(s.out, s.g, s.bytes); err != nil {
				return err
			}
		}
		return nil
	}
}

// stacked is the ANS decoder of the same crate: the words come from the end.
func stacked(out []uint16, g category, bytes []byte) error {
	if err := wholeWords(bytes, 4); err != nil {
		return err
	}
	if len(out) == 0 {
		return nil
	}
	m, err := g.model()
	if err != nil {
		return err
	}
	pop := func() (x uint64) {
		x = uint64(binary.LittleEndian.Uint32(bytes[len(bytes)-4:]))
		bytes = bytes[:len(bytes)-4]
		return x
	}
	state := uint64(0)
	if len(bytes) > 0 {
		state = pop()
	}
	for state < 1<<32 && len(bytes) > 0 {
		state = state<<32 | pop()
	}
	for i := range out {
		q := uint32(state) & (total - 1)
		s := m.find(q)
		state = (state>>precision)*uint64(m.cdf[s+1]-m.cdf[s]) + uint64(q-m.cdf[s])
		if state < 1<<32 && len(bytes) > 0 {
			state = state<<32 | pop()
		}
		out[i] = uint16(s)
	}
	return nil
}

// quantised is a decoder of rANS whose table holds frequencies: a power of two in all, 16-bit words, 32-bit state.
func quantised(out []uint16, g category, bytes []byte) error {
	if len(bytes) < 4 {
		return errShort
	}
	if err := wholeWords(bytes, 2); err != nil {
		return err
	}
	if len(out) == 0 {
		return nil
	}
	bits, all := 0, 0
	for i, f := range g.counts {
		if f <= 0 || f > 4096 {
			return fmt.Errorf("frequency %d of symbol %d", f, g.symbols[i])
		}
		all += f
	}
	switch all {
	case 4096:
		bits = 12
	case 1024:
		bits = 10
	default:
		return fmt.Errorf("frequencies of %d in all", all)
	}
	type entry struct{ symbol, frequency, start uint16 }
	table := make([]entry, 0, all)
	start := 0
	for i, f := range g.counts {
		for range f {
			table = append(table, entry{uint16(g.symbols[i]), uint16(f), uint16(start)})
		}
		start += f
	}
	state := binary.LittleEndian.Uint32(bytes)
	bytes = bytes[4:]
	for i := range out {
		slot := state & uint32(all-1)
		e := table[slot]
		state = uint32(e.frequency)*(state>>bits) + slot - uint32(e.start)
		for state < 1<<16 && len(bytes) > 0 {
			state = state<<16 | uint32(binary.LittleEndian.Uint16(bytes))
			bytes = bytes[2:]
		}
		out[i] = e.symbol
	}
	return nil
}
