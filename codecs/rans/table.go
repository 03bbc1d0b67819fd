package rans

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
)

// Table is a frequency table: the values of an alphabet in ascending order, and how many of the 4096 slots each has.
type Table struct {
	Value []uint16
	Freq  []uint16
}

// Layout says which slot belongs to which symbol: up to 64 symbols by alias buckets, more by cumulative frequencies.
type Layout struct {
	// Symbol k keeps the slots r<<6 | k with r < Threshold[k]; the others of bucket k belong to Alias[k], and their rank
	// within it is Offset[k] + r modulo 2^16.
	Threshold [buckets]uint8
	Alias     [buckets]uint8
	Offset    [buckets]uint16
}

// alias distributes the slots. Bucket k first takes min(f, 64) slots of symbol k. Buckets with room are then filled in
// the order in which they came to have room (at first in ascending order), each by one donor: the lowest symbol that
// still has slots to place. A donor that runs short gives slots of its own bucket, which is then appended to the buckets
// with room. Ranks: the slots of the own bucket first, then aliased slots in bucket order, ascending in each.
func (t *Table) alias() (l Layout) {
	var left [buckets]int // slots of a symbol not placed yet
	room := make([]int, 0, 2*buckets)
	for k := range buckets {
		f := 0
		if k < len(t.Freq) {
			f = int(t.Freq[k])
		}
		own := min(f, perBucket)
		l.Threshold[k], l.Alias[k], left[k] = uint8(own), uint8(k), f-own
		if own < perBucket {
			room = append(room, k)
		}
	}
	donor := 0
	for i := 0; i < len(room); i++ {
		k := room[i]
		for left[donor] == 0 { // the frequencies sum to 4096, so while a bucket has room some symbol has slots left
			donor++
		}
		l.Alias[k] = uint8(donor)
		need := perBucket - int(l.Threshold[k])
		if need <= left[donor] {
			left[donor] -= need
			continue
		}
		l.Threshold[donor] -= uint8(need - left[donor]) // 64 before, and need < 64 + left
		left[donor] = 0
		room = append(room, donor)
	}
	var used [buckets]int
	for k := range buckets {
		used[k] = int(l.Threshold[k])
	}
	for k := range buckets {
		if own := int(l.Threshold[k]); own < perBucket {
			a := l.Alias[k]
			l.Offset[k] = uint16(used[a] - own)
			used[a] += perBucket - own
		}
	}
	return l
}

// slots calls f for every slot with its symbol and its rank among that symbol's slots.
func (t *Table) slots(f func(slot, sym, rank int)) {
	if len(t.Value) > AliasSymbols {
		slot := 0
		for s, n := range t.Freq {
			for rank := range int(n) {
				f(slot, s, rank)
				slot++
			}
		}
		return
	}
	l := t.alias()
	for slot := range Slots {
		k, r := slot%buckets, slot/buckets
		if r < int(l.Threshold[k]) {
			f(slot, k, r)
		} else {
			f(slot, int(l.Alias[k]), int(l.Offset[k]+uint16(r)))
		}
	}
}

// Common is the index of the symbol with the highest frequency, the lowest of several.
func (t *Table) Common() int {
	best := 0
	for i, f := range t.Freq {
		if f > t.Freq[best] {
			best = i
		}
	}
	return best
}

// MaxTableBytes bounds what AppendTable appends: 9 bits of count and layout, at most 31 + 15 bits a symbol.
const MaxTableBytes = 2 + (MaxSymbols*46+7)/8

// Append appends the table in its stored form: u8 symbols - 1, then a string of bits, lowest first, zero-padded to a
// byte: for each symbol the distance of its value from the one before (the first from -1) as an Elias gamma code, four
// bits of b-1 where b is the bit length of its frequency, and the b-1 low bits of the frequency.
func (t *Table) Append(dst []byte) []byte {
	w := bitWriter{dst: append(dst, uint8(len(t.Value)-1))}
	last := -1
	for i, v := range t.Value {
		w.gamma(uint(int(v) - last))
		last = int(v)
		f := uint(t.Freq[i])
		b := uint(bits.Len(f))
		w.put(b-1, 4)
		w.put(f&^(1<<(b-1)), b-1)
	}
	return w.flush()
}

var errTable = errors.New("frequency table ends too early")

// ParseTable reads what Append wrote, for values below 1<<symBits, and returns the rest of src.
func ParseTable(src []byte, symBits uint) (*Table, []byte, error) {
	if len(src) == 0 {
		return nil, nil, errTable
	}
	n := int(src[0]) + 1
	if n < 2 {
		return nil, nil, errors.New("frequency table of one symbol")
	}
	r := bitReader{src: src[1:]}
	t := &Table{Value: make([]uint16, n), Freq: make([]uint16, n)}
	last, sum := -1, 0
	for i := range n {
		gap, ok := r.gamma()
		if !ok {
			return nil, nil, errTable
		}
		last += int(gap)
		if last >= 1<<symBits {
			return nil, nil, fmt.Errorf("symbol %d of a frequency table has value %d, over %d bits", i, last, symBits)
		}
		b, ok1 := r.get(4)
		low, ok2 := r.get(b)
		if !ok1 || !ok2 {
			return nil, nil, errTable
		}
		f := 1<<b | low
		sum += int(f)
		if sum > Slots {
			return nil, nil, fmt.Errorf("frequencies sum to more than %d", Slots)
		}
		t.Value[i], t.Freq[i] = uint16(last), uint16(f)
	}
	if sum != Slots {
		return nil, nil, fmt.Errorf("frequencies sum to %d, not %d", sum, Slots)
	}
	rest, ok := r.finish()
	if !ok {
		return nil, nil, errors.New("padding bits of a frequency table are not zero")
	}
	return t, rest, nil
}

type bitWriter struct {
	dst []byte
	acc uint64
	n   uint
}

func (w *bitWriter) put(v, n uint) {
	w.acc |= uint64(v) << w.n
	for w.n += n; w.n >= 8; w.n -= 8 {
		w.dst = append(w.dst, uint8(w.acc))
		w.acc >>= 8
	}
}

// gamma writes v >= 1: as many zeros as v has bits after its first, a one, those bits.
func (w *bitWriter) gamma(v uint) {
	b := uint(bits.Len(v) - 1)
	w.put(1<<b, b+1)
	w.put(v&^(1<<b), b)
}

func (w *bitWriter) flush() []byte {
	if w.n > 0 {
		w.dst = append(w.dst, uint8(w.acc))
	}
	return w.dst
}

type bitReader struct {
	src []byte
	pos uint
}

func (r *bitReader) get(n uint) (v uint, ok bool) {
	if r.pos+n > uint(len(r.src))*8 {
		return 0, false
	}
	for i := range n {
		v |= uint(r.src[r.pos>>3]>>(r.pos&7)&1) << i
		r.pos++
	}
	return v, true
}

func (r *bitReader) gamma() (uint, bool) {
	for b := range uint(17) {
		one, ok := r.get(1)
		if !ok {
			return 0, false
		}
		if one == 1 {
			low, ok := r.get(b)
			return 1<<b | low, ok
		}
	}
	return 0, false
}

func (r *bitReader) finish() (rest []byte, ok bool) {
	for r.pos&7 != 0 {
		if bit, _ := r.get(1); bit != 0 {
			return nil, false
		}
	}
	return r.src[r.pos>>3:], true
}

// Build makes a table of at most maxSymbols of the values whose counts are given (values are indexes of counts) and
// estimates, in units of 2^-16 bits, what coding all of them with it takes, the table included. Values that do not pay
// for their slots are left out; each of their occurrences is coded as the commonest value and patched at patchBits. The
// table is nil where fewer than two values are worth a slot.
func Build(counts []uint64, maxSymbols int, patchBits uint64) (*Table, uint64) {
	total, n := uint64(0), 0
	for _, c := range counts {
		if c > 0 {
			total += c
			n++
		}
	}
	if n == 0 {
		return nil, 0
	}
	order := make([]uint64, 0, n) // by count, the highest first, then by value; counts are below 1<<47
	for v, c := range counts {
		if c > 0 {
			order = append(order, (1<<47-c)<<16|uint64(v))
		}
	}
	slices.Sort(order)
	kept := make([]uint16, min(n, maxSymbols))
	for i := range kept {
		kept[i] = uint16(order[i])
	}
	// A rare value takes one slot, which costs the others log2(4096/4095) = 1/2839 bit each, about 12 bits of table and
	// 12 bits an occurrence.
	for len(kept) > 0 {
		c := counts[kept[len(kept)-1]]
		if c*Slots >= total || c*(patchBits-10)*2839 > total+12*2839 {
			break
		}
		kept = kept[:len(kept)-1]
	}
	keptCount := uint64(0)
	for _, v := range kept {
		keptCount += counts[v]
	}
	rare := total - keptCount
	if len(kept) < 2 {
		if len(kept) == 1 {
			rare = total - counts[kept[0]]
		}
		return nil, rare * patchBits * LogOne
	}
	common := kept[0]
	slices.Sort(kept)
	t := &Table{Value: kept, Freq: make([]uint16, len(kept))}
	weights := make([]uint64, len(kept))
	for i, v := range kept {
		weights[i] = counts[v]
		if v == common {
			weights[i] += rare
		}
	}
	quantise(weights, total, t.Freq)
	cost := rare * patchBits * LogOne
	for i, w := range weights {
		cost += w * (ScaleBits*LogOne - slotLog(t.Freq[i]))
	}
	return t, cost + uint64(len(kept))*11*LogOne
}

// quantise rounds weights to frequencies of at least 1 that sum to 4096: to the nearest first, then, one at a time, where
// a step costs least or saves most (the lowest symbol of equals).
func quantise(weights []uint64, total uint64, freq []uint16) {
	sum := 0
	for i, w := range weights {
		f := (w*Slots + total/2) / total
		freq[i] = uint16(min(max(f, 1), Slots-uint64(len(weights)-1)))
		sum += int(freq[i])
	}
	var steps [MaxSymbols]uint64 // what a step down loses, or one up gains, plus one
	loss := func(i int) uint64 {
		if freq[i] == 1 {
			return 1 << 63
		}
		return weights[i] * (slotLog(freq[i]) - slotLog(freq[i]-1))
	}
	gain := func(i int) uint64 { return weights[i]*(slotLog(freq[i]+1)-slotLog(freq[i])) + 1 }
	step := steps[:len(weights)]
	if sum > Slots {
		for i := range step {
			step[i] = loss(i)
		}
	}
	for ; sum > Slots; sum-- {
		best, at := uint64(1)<<63, -1
		for i, x := range step {
			if x < best {
				best, at = x, i
			}
		}
		freq[at]--
		step[at] = loss(at)
	}
	if sum < Slots {
		for i := range step {
			step[i] = gain(i)
		}
	}
	for ; sum < Slots; sum++ {
		best, at := uint64(0), 0
		for i, x := range step {
			if x > best {
				best, at = x, i
			}
		}
		freq[at]++
		step[at] = gain(at)
	}
}
