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

// Layout says which slot belongs to which symbol. There are 1<<Bits buckets, a power of two that is no less than the number
// of symbols: 64 or 256; bucket k has the slots r<<Bits | k.
type Layout struct {
	Bits uint
	// Symbol k keeps the slots of bucket k with r < Threshold[k]; the others belong to Alias[k], and their rank within it
	// is Offset[k] + r modulo 2^16.
	Threshold [MaxSymbols]uint8
	Alias     [MaxSymbols]uint8
	Offset    [MaxSymbols]uint16
}

// alias distributes the slots, of which a bucket has m. Bucket k first takes min(f, m) slots of symbol k. Buckets with
// room are then filled in the order in which they came to have room (at first in ascending order), each by one donor:
// the lowest symbol that still has slots to place. A donor that runs short gives slots of its own bucket, which is then
// appended to the buckets with room. Ranks: the slots of the own bucket first, then aliased slots in bucket order,
// ascending in each.
func (t *Table) alias() (l Layout) {
	l.Bits = bucketBits
	if len(t.Freq) > AliasSymbols {
		l.Bits = wideBucketBits
	}
	n, m := 1<<l.Bits, Slots>>l.Bits
	var left, used [MaxSymbols]int // slots of a symbol not placed yet; placed already
	var list [2 * MaxSymbols]uint8
	room := list[:0]
	for k := range n {
		f := 0
		if k < len(t.Freq) {
			f = int(t.Freq[k])
		}
		own := min(f, m)
		l.Threshold[k], l.Alias[k], left[k] = uint8(own), uint8(k), f-own
		if own < m {
			room = append(room, uint8(k))
		}
	}
	donor := 0
	for i := 0; i < len(room); i++ {
		k := room[i]
		for left[donor] == 0 { // the frequencies sum to 4096, so while a bucket has room some symbol has slots left
			donor++
		}
		l.Alias[k] = uint8(donor)
		need := m - int(l.Threshold[k])
		if need <= left[donor] {
			left[donor] -= need
			continue
		}
		l.Threshold[donor] -= uint8(need - left[donor]) // m before, and need < m + left
		left[donor] = 0
		room = append(room, uint8(donor))
	}
	for k := range n {
		used[k] = int(l.Threshold[k])
	}
	for k := range n {
		if own := int(l.Threshold[k]); own < m {
			a := l.Alias[k]
			l.Offset[k] = uint16(used[a] - own)
			used[a] += m - own
		}
	}
	return l
}

// runs calls f for every run of slots with one symbol: slots slot, slot + step and so on, n of them, have the ranks from
// rank on.
func (t *Table) runs(f func(sym, rank, slot, step, n int)) {
	l := t.alias()
	step, m := 1<<l.Bits, Slots>>l.Bits
	for k := range step {
		own := int(l.Threshold[k])
		f(k, 0, k, step, own)
		f(int(l.Alias[k]), int(l.Offset[k]+uint16(own)), own*step+k, step, m-own)
	}
}

// slots calls f for every slot with its symbol and its rank among that symbol's slots.
func (t *Table) slots(f func(slot, sym, rank int)) {
	t.runs(func(sym, rank, slot, step, n int) {
		for i := range n {
			f(slot+i*step, sym, rank+i)
		}
	})
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
