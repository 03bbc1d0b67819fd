package rans

import "encoding/binary"

// Encoder is a table made ready for encoding.
type Encoder struct {
	index  []uint16 // value -> symbol, or none
	freq   [MaxSymbols]uint32
	start  [MaxSymbols]uint32 // first entry of a symbol in slot
	slot   [Slots]uint16      // start + rank -> slot
	common uint8
	cost   [MaxSymbols]uint32
}

// none marks a value that has no symbol.
const none = 1 << 15

// NewEncoder prepares a table for values below 1<<symBits.
func NewEncoder(t *Table, symBits uint) *Encoder {
	e := &Encoder{index: make([]uint16, 1<<symBits), common: uint8(t.Common())}
	for i := range e.index {
		e.index[i] = none | uint16(e.common)
	}
	start := uint32(0)
	for s, v := range t.Value {
		e.index[v] = uint16(s)
		e.freq[s], e.start[s] = uint32(t.Freq[s]), start
		e.cost[s] = uint32(ScaleBits*LogOne - Log2(uint64(t.Freq[s])))
		start += uint32(t.Freq[s])
	}
	t.slots(func(slot, sym, rank int) { e.slot[e.start[sym]+uint32(rank)] = uint16(slot) })
	return e
}

// Patch is a value that its table does not hold.
type Patch struct {
	At    uint16
	Value uint16
}

// Map turns at most 65536 values into symbols of the table, dst[i] for values[i], and appends the values that have none
// to patches; the commonest symbol stands in for them.
func (e *Encoder) Map(dst []uint8, values []uint16, patches []Patch) []Patch {
	_ = dst[:len(values)]
	for i, v := range values {
		s := e.index[v]
		dst[i] = uint8(s)
		if s >= none {
			patches = append(patches, Patch{uint16(i), v})
		}
	}
	return patches
}

// Cost estimates, in units of 2^-16 bits, what values of these counts take.
func (e *Encoder) Cost(counts []uint64, patchBits uint64) uint64 {
	sum := uint64(0)
	for v, c := range counts {
		if c > 0 {
			s := e.index[v]
			sum += c * uint64(e.cost[uint8(s)])
			if s >= none {
				sum += c * patchBits * LogOne
			}
		}
	}
	return sum
}

// Encode codes the symbols with one table, or, where classes is not nil, symbol i with tables[classes[i]]. It appends the
// states and the words. scratch has room for two bytes a symbol.
func Encode(dst []byte, symbols []uint8, tables []*Encoder, classes []uint8, scratch []byte) []byte {
	var x [Lanes]uint32
	for i := range x {
		x[i] = lower
	}
	q := len(scratch)
	e := tables[0]
	for i := len(symbols) - 1; i >= 0; i-- {
		if classes != nil {
			e = tables[classes[i]]
		}
		s := symbols[i]
		f := e.freq[s]
		v := x[i%Lanes]
		if v>>(32-ScaleBits) >= f { // v >= f<<20 would leave 32 bits
			q -= 2
			binary.LittleEndian.PutUint16(scratch[q:], uint16(v))
			v >>= 16
		}
		d := v / f
		x[i%Lanes] = d<<ScaleBits | uint32(e.slot[(e.start[s]+v-d*f)%Slots])
	}
	for _, v := range x {
		dst = binary.LittleEndian.AppendUint16(dst, uint16(v))
	}
	for _, v := range x {
		dst = binary.LittleEndian.AppendUint16(dst, uint16(v>>16))
	}
	return append(dst, scratch[q:]...)
}
