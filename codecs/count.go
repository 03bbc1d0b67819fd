package codecs

import (
	"encoding/binary"
	"sync/atomic"

	"bigsmall.dev/bigsmall/codecs/planes"
)

// hist counts the top bits of the upper field and the bytes below it.
type hist struct {
	top [1 << topBits]uint32
	low [maxFields][256]uint32
}

func (h *hist) add(o *hist) {
	for i, c := range o.top {
		h.top[i] += c
	}
	for i := range h.low {
		for v, c := range o.low[i] {
			h.low[i][v] += c
		}
	}
}

// counts is what a tensor's groups hold, counted once for all that is asked later.
type counts struct {
	upper    planes.Field
	lowBytes int
	groups   [][]byte // compact histograms, nil where there are too many to keep
	kept     atomic.Int64
}

// keepCounts bounds them. A group's are a kilobyte or two, at most 30.
const keepCounts = 32 << 20

// count makes the histograms of at most maxSets runs of groups.
func (e *Encoding) count(upper planes.Field, lowBytes int) ([]*hist, error) {
	groups := e.groups()
	per := (groups + maxSets - 1) / maxSets
	sets := make([]*hist, (groups+per-1)/per)
	e.counted = &counts{upper: upper, lowBytes: lowBytes, groups: make([][]byte, groups)}
	err := e.tensor.Run(len(sets), func(k int, s *Scratch) error {
		set := &hist{}
		h := set
		for g := k * per; g < min((k+1)*per, groups); g++ {
			if per > 1 {
				h = &s.encode.counts
				*h = hist{}
			}
			if err := e.countGroup(g, h, s); err != nil {
				return err
			}
			if per > 1 {
				set.add(h)
			}
			if groups > 1 && e.counted.kept.Load() < keepCounts {
				e.counted.groups[g] = h.compact(upper, lowBytes, s)
				e.counted.kept.Add(int64(len(e.counted.groups[g])))
			}
		}
		sets[k] = set
		return nil
	})
	return sets, err
}

// countsOf are the counts of a group.
func (e *Encoding) countsOf(g int, h *hist, s *Scratch) error {
	*h = hist{}
	kept := e.counted.groups[g]
	if kept == nil {
		return e.countGroup(g, h, s)
	}
	h.expand(kept, e.counted.lowBytes)
	return nil
}

// countGroup adds the counts of a group to h.
func (e *Encoding) countGroup(g int, h *hist, s *Scratch) error {
	upper, lowBytes := e.counted.upper, e.counted.lowBytes
	if e.transform == Plain && e.word <= 4 && upper.Sym == topBits {
		raw, _, err := e.tensor.read(int64(g)*GroupBlocks*BlockWords*int64(e.word), int(e.GroupBytes(g)), false, s)
		if err != nil {
			return err
		}
		switch {
		case e.word == 2 && lowBytes == 0:
			h.count16(raw)
			return nil
		case e.word == 4 && lowBytes == 2:
			h.count32(raw, e.shift)
			return nil
		}
	}
	shift, mask := (upper.Shift+upper.Rest)&63, uint64(1)<<upper.Sym-1
	for b := g * GroupBlocks; b < min((g+1)*GroupBlocks, e.blocks()); b++ {
		words, err := e.load(b, s)
		if err != nil {
			return err
		}
		for _, w := range words {
			h.top[w>>shift&mask%(1<<topBits)]++
		}
		for i := range lowBytes {
			for _, w := range words {
				h.low[i][uint8(w>>(8*i))]++
			}
		}
	}
	return nil
}

// count16 counts the top 12 bits of words of 16. More tables would not help: what comes up twice in a row is rare, and
// tables that lie a power of two apart are taken for one another.
func (h *hist) count16(raw []byte) {
	for ; len(raw) >= 16; raw = raw[16:] {
		r := (*[16]byte)(raw)
		h.top[binary.LittleEndian.Uint16(r[0:])>>(16-topBits)]++
		h.top[binary.LittleEndian.Uint16(r[2:])>>(16-topBits)]++
		h.top[binary.LittleEndian.Uint16(r[4:])>>(16-topBits)]++
		h.top[binary.LittleEndian.Uint16(r[6:])>>(16-topBits)]++
		h.top[binary.LittleEndian.Uint16(r[8:])>>(16-topBits)]++
		h.top[binary.LittleEndian.Uint16(r[10:])>>(16-topBits)]++
		h.top[binary.LittleEndian.Uint16(r[12:])>>(16-topBits)]++
		h.top[binary.LittleEndian.Uint16(r[14:])>>(16-topBits)]++
	}
	for ; len(raw) > 0; raw = raw[2:] {
		h.top[binary.LittleEndian.Uint16(raw)>>(16-topBits)]++
	}
}

// count32 counts the top 12 bits of words of 32, and two bytes from bit shift on.
func (h *hist) count32(raw []byte, shift uint8) {
	shift &= 31
	top, low, high := &h.top, &h.low[0], &h.low[1]
	for ; len(raw) >= 8; raw = raw[8:] {
		v, w := binary.LittleEndian.Uint32(raw), binary.LittleEndian.Uint32(raw[4:])
		top[v>>(32-topBits)]++
		top[w>>(32-topBits)]++
		v, w = v>>shift, w>>shift
		low[uint8(v)]++
		high[uint8(v>>8)]++
		low[uint8(w)]++
		high[uint8(w>>8)]++
	}
	if len(raw) > 0 {
		v := binary.LittleEndian.Uint32(raw)
		top[v>>(32-topBits)]++
		low[uint8(v>>shift)]++
		high[uint8(v>>shift>>8)]++
	}
}

// countRows counts the bytes of the differences of words to those a row before.
func (h *hist) countRows(raw []byte, word, row int) {
	first := min(row*word, len(raw)) // these have none before
	for i, b := range raw[:first] {
		h.low[i%word][b]++
	}
	above, raw := raw[:len(raw)-first], raw[first:]
	switch word {
	case 1:
		for i, b := range raw {
			h.low[0][b-above[i]]++
		}
	case 2:
		for ; len(raw) >= 2 && len(above) >= 2; raw, above = raw[2:], above[2:] {
			d := binary.LittleEndian.Uint16(raw) - binary.LittleEndian.Uint16(above)
			h.low[0][uint8(d)]++
			h.low[1][uint8(d>>8)]++
		}
	case 4:
		for ; len(raw) >= 4 && len(above) >= 4; raw, above = raw[4:], above[4:] {
			d := binary.LittleEndian.Uint32(raw) - binary.LittleEndian.Uint32(above)
			h.low[0][uint8(d)]++
			h.low[1][uint8(d>>8)]++
			h.low[2][uint8(d>>16)]++
			h.low[3][uint8(d>>24)]++
		}
	default:
		for ; len(raw) >= 8 && len(above) >= 8; raw, above = raw[8:], above[8:] {
			d := binary.LittleEndian.Uint64(raw) - binary.LittleEndian.Uint64(above)
			for i := range 8 {
				h.low[i][uint8(d>>(8*i))]++
			}
		}
	}
}

// compact lists what is not zero: distance and count of each, and a zero at the end of a histogram.
func (h *hist) compact(upper planes.Field, lowBytes int, s *Scratch) []byte {
	b := s.encode.compact[:0]
	list := func(counts []uint32) {
		last := -1
		for v, c := range counts {
			if c > 0 {
				b = binary.AppendUvarint(b, uint64(v-last))
				b = binary.AppendUvarint(b, uint64(c))
				last = v
			}
		}
		b = append(b, 0)
	}
	list(h.top[:1<<upper.Sym])
	for i := range lowBytes {
		list(h.low[i][:])
	}
	s.encode.compact = b
	return append([]byte(nil), b...)
}

// expand is the inverse of compact, into an empty histogram.
func (h *hist) expand(b []byte, lowBytes int) {
	list := func(counts []uint32) {
		at := -1
		for {
			d, n := binary.Uvarint(b)
			b = b[n:]
			if d == 0 {
				return
			}
			c, n := binary.Uvarint(b)
			b = b[n:]
			at += int(d)
			counts[at] = uint32(c)
		}
	}
	list(h.top[:])
	for i := range lowBytes {
		list(h.low[i][:])
	}
}

// symbolOf turns the top bits of the upper field into the symbols of a field: drop and mask.
func symbolOf(upper, f planes.Field) (drop, mask uint) {
	drop = uint(upper.Sym) - uint(f.Sym)
	if f.Rotate {
		drop--
	}
	return drop, uint(1)<<f.Sym - 1
}

// symbols sums the counts of the top bits to those of the symbols of a field.
func (h *hist) symbols(upper, f planes.Field) []uint64 {
	counts := make([]uint64, 1<<f.Sym)
	drop, mask := symbolOf(upper, f)
	for v, c := range h.top[:1<<upper.Sym] {
		if c > 0 {
			counts[uint(v)>>drop&mask] += uint64(c)
		}
	}
	return counts
}

// fold appends the symbols of a field and their counts; a symbol may come twice.
func (h *hist) fold(values []uint16, weights []uint32, upper, f planes.Field) ([]uint16, []uint32) {
	drop, mask := symbolOf(upper, f)
	for v, c := range h.top[:1<<upper.Sym] {
		if c == 0 {
			continue
		}
		x := uint16(uint(v) >> drop & mask)
		if n := len(values); n > 0 && values[n-1] == x {
			weights[n-1] += c
			continue
		}
		values, weights = append(values, x), append(weights, c)
	}
	return values, weights
}

func sum(sets [][]uint64) []uint64 {
	all := make([]uint64, len(sets[0]))
	for _, s := range sets {
		for i, c := range s {
			all[i] += c
		}
	}
	return all
}
