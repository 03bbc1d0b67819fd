package rans

import "encoding/binary"

// Encoder is a table made ready for encoding.
type Encoder struct {
	index  []uint16           // value -> symbol, or none
	symbol [MaxSymbols]uint32 // frequency << 16 | first entry in slot
	slot   [Slots]uint16      // first entry + rank -> slot
	common uint8
	value  uint16 // of common
	cost   [MaxSymbols]uint32
}

// Common is the value that stands in for those without a symbol.
func (e *Encoder) Common() uint16 { return e.value }

// none marks a value that has no symbol.
const none = 1 << 15

// NewEncoder prepares a table for values below 1<<symBits.
func NewEncoder(t *Table, symBits uint) *Encoder {
	e := &Encoder{index: make([]uint16, 1<<symBits), common: uint8(t.Common()), value: t.Value[t.Common()]}
	for i := range e.index {
		e.index[i] = none | uint16(e.common)
	}
	start := uint32(0)
	for s, v := range t.Value {
		e.index[v] = uint16(s)
		e.symbol[s] = uint32(t.Freq[s])<<16 | start
		e.cost[s] = uint32(ScaleBits*LogOne - Log2(uint64(t.Freq[s])))
		start += uint32(t.Freq[s])
	}
	t.slots(func(slot, sym, rank int) { e.slot[e.symbol[sym]&0xffff+uint32(rank)] = uint16(slot) })
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

// Pair is a second string of symbols in the lanes of a first: after the 32 symbols of a turn come those 32 of the pair,
// symbol i coded with Tables[Classes[i]].
type Pair struct {
	Symbols []uint8
	Tables  []*Encoder
	Classes []uint8
}

// Encode codes the symbols with one table, or, where classes is not nil, symbol i with tables[classes[i]]; pair may be
// nil. Carry rides along in the lanes' first states and comes back from Decode: 64 bytes for half a bit a lane. The
// states and the words are appended to dst; scratch is memory to work in.
func Encode(dst []byte, symbols []uint8, tables []*Encoder, classes []uint8, pair *Pair, carry *[Lanes]uint16, scratch []byte) []byte {
	var x [Lanes]uint32
	for i := range x {
		x[i] = lower | uint32(carry[i])
	}
	n := len(symbols)
	q := 2*n + 2*Lanes // room below for the words of a turn
	if pair != nil {
		q += 2 * n
	}
	if cap(scratch) < q {
		scratch = make([]byte, q)
	}
	scratch = scratch[:q]
	put := func(i int, e *Encoder, s uint8) {
		v, t := x[i%Lanes], e.symbol[s]
		full := overflow(v, t)
		binary.LittleEndian.PutUint16(scratch[q-2:], uint16(v))
		q -= int(full << 1)
		x[i%Lanes] = e.next(v>>(full<<4&31), t)
	}
	for end := n; end > 0; {
		start := (end - 1) &^ (Lanes - 1)
		if pair == nil && classes == nil && end-start == Lanes {
			q -= int(tables[0].turnBack(&x, (*[Lanes]uint8)(symbols[start:]), (*[2 * Lanes]byte)(scratch[q-2*Lanes:])))
			end = start
			continue
		}
		if pair != nil {
			for i := end - 1; i >= start; i-- {
				put(i, pair.Tables[pair.Classes[i]], pair.Symbols[i])
			}
		}
		for i := end - 1; i >= start; i-- {
			e := tables[0]
			if classes != nil {
				e = tables[classes[i]]
			}
			put(i, e, symbols[i])
		}
		end = start
	}
	for _, v := range x {
		dst = binary.LittleEndian.AppendUint16(dst, uint16(v))
	}
	for _, v := range x {
		dst = binary.LittleEndian.AppendUint16(dst, uint16(v>>16))
	}
	return append(dst, scratch[q:]...)
}

// overflow is 1 where the state is too large for the symbol: v >= f<<20. Its low word then leaves. Without a branch: a
// fifth of the symbols give a word, at random.
func overflow(v, t uint32) uint32 {
	return uint32((uint64(t>>16) - 1 - uint64(v>>(32-ScaleBits))) >> 63)
}

// next is the state after a symbol.
func (e *Encoder) next(v, t uint32) uint32 {
	f := t >> 16
	d := v / f
	return d<<ScaleBits | uint32(e.slot[(t+v-d*f)%Slots])
}

// turnBack encodes 32 symbols, one a lane, the last first, and says how many bytes of words it left at the end of out.
//
//go:noinline
func (e *Encoder) turnBack(x *[Lanes]uint32, symbols *[Lanes]uint8, out *[2 * Lanes]byte) uint32 {
	n := uint32(2*Lanes - 2)
	for j := Lanes - 1; j >= 0; j-- {
		v, t := x[j], e.symbol[symbols[j]]
		full := overflow(v, t)
		binary.LittleEndian.PutUint16(out[n&(2*Lanes-2):], uint16(v))
		n -= full << 1
		x[j] = e.next(v>>(full<<4&31), t)
	}
	return 2*Lanes - 2 - n
}
