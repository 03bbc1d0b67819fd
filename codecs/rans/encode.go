package rans

import (
	"encoding/binary"
	"math/bits"
	"sync"
)

// Encoder is a table made ready for encoding.
type Encoder struct {
	index  []uint16           // value -> symbol, or none
	symbol [MaxSymbols]uint32 // frequency << 16 | first entry in slot
	common uint8
	value  uint16 // of common
	cost   [MaxSymbols]uint32
	table  *Table
	once   sync.Once
	slot   *[Slots]uint16 // first entry + rank -> slot; made when plain code needs it
	kernels
}

func (e *Encoder) slots() *[Slots]uint16 {
	e.once.Do(func() {
		slot := new([Slots]uint16)
		e.table.slots(func(at, sym, rank int) { slot[e.symbol[sym]&0xffff+uint32(rank)] = uint16(at) })
		e.slot = slot
	})
	return e.slot
}

// Common is the value that stands in for those without a symbol.
func (e *Encoder) Common() uint16 { return e.value }

// none marks a value that has no symbol.
const none = 1 << 15

// NewEncoder prepares a table for values below 1<<symBits.
func NewEncoder(t *Table, symBits uint) *Encoder {
	common := t.Common()
	e := &Encoder{index: make([]uint16, 1<<symBits), common: uint8(common), value: t.Value[common], table: t}
	for i := range e.index {
		e.index[i] = none | uint16(e.common)
	}
	start := uint32(0)
	for s, v := range t.Value {
		e.index[v] = uint16(s)
		e.symbol[s] = uint32(t.Freq[s])<<16 | start
		e.cost[s] = uint32(ScaleBits*LogOne - slotLog(t.Freq[s]))
		start += uint32(t.Freq[s])
	}
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

// Cost estimates, in units of 2^-16 bits, what these values, each so many times, take.
func (e *Encoder) Cost(values []uint16, counts []uint32, patchBits uint64) uint64 {
	sum := uint64(0)
	for i, v := range values {
		s, c := e.index[v], uint64(counts[i])
		sum += c * uint64(e.cost[uint8(s)])
		if s >= none {
			sum += c * patchBits * LogOne
		}
	}
	return sum
}

// EncodeSet codes symbol i with tables[classes[i]]. Carry rides along in the lanes' first states and comes back from
// Set.Decode: 64 bytes for half a bit a lane. The states and the words are appended to dst; scratch is memory to work in.
func EncodeSet(dst []byte, symbols []uint8, tables []*Encoder, classes []uint8, carry *[Lanes]uint16, scratch []byte) []byte {
	c := start(carry, 2*len(symbols), scratch)
	for i := len(symbols) - 1; i >= 0; i-- {
		c.put(i%Lanes, tables[classes[i]], symbols[i])
	}
	return c.finish(dst)
}

// Stream is a block to be coded with one table: its states and words are appended to Coded. Scratch is memory to work in.
type Stream struct {
	Symbols []uint8
	Carry   [Lanes]uint16
	Coded   []byte
	Scratch []byte
}

// SideBySide is the number of streams from which on Encode is fastest.
const SideBySide = 4

// Encode codes up to SideBySide streams.
func (e *Encoder) Encode(streams ...*Stream) {
	var all [SideBySide]coding
	for i, s := range streams {
		c := &all[i]
		*c = start(&s.Carry, 2*len(s.Symbols), s.Scratch)
		c.symbols = s.Symbols
		for n := len(c.symbols); n%Lanes != 0; n-- { // the turn that is not full comes first: coding goes backwards
			c.put((n-1)%Lanes, e, c.symbols[n-1])
			c.symbols = c.symbols[:n-1]
		}
	}
	e.turns(all[:len(streams)])
	for i, s := range streams {
		s.Coded = all[i].finish(s.Coded)
	}
}

// coding is a block under way.
type coding struct {
	x       [Lanes]uint32
	symbols []uint8 // yet to come
	words   []byte  // in the order in which they left, the reverse of that in which a decoder reads them
	at      int
}

// start needs room for words of so many bytes. A turn stores more than it has, so there is room for one more.
func start(carry *[Lanes]uint16, size int, scratch []byte) (c coding) {
	size += 2 * Lanes
	if cap(scratch) < size {
		scratch = make([]byte, size)
	}
	c.words = scratch[:size]
	for i := range c.x {
		c.x[i] = lower | uint32(carry[i])
	}
	return c
}

func (c *coding) put(lane int, e *Encoder, s uint8) {
	v, t := c.x[lane], e.symbol[s]
	full := overflow(v, t)
	binary.LittleEndian.PutUint16(c.words[c.at:], uint16(v))
	c.at += int(full << 1)
	c.x[lane] = e.next(v>>(full<<4&31), t, e.slots())
}

// finish appends the states and the words in the order of reading.
func (c *coding) finish(dst []byte) []byte {
	for _, v := range c.x {
		dst = binary.LittleEndian.AppendUint16(dst, uint16(v))
	}
	for _, v := range c.x {
		dst = binary.LittleEndian.AppendUint16(dst, uint16(v>>16))
	}
	words := c.words[:c.at]
	const low = 0x00ff_00ff_00ff_00ff
	for ; len(words) >= 8; words = words[:len(words)-8] {
		v := bits.ReverseBytes64(binary.LittleEndian.Uint64(words[len(words)-8:]))
		dst = binary.LittleEndian.AppendUint64(dst, v>>8&low|v&low<<8)
	}
	for ; len(words) > 0; words = words[:len(words)-2] {
		dst = append(dst, words[len(words)-2], words[len(words)-1])
	}
	return dst
}

// turnsGeneric codes what is left of a block, whole turns.
func (e *Encoder) turnsGeneric(c *coding) {
	slots := e.slots()
	for end := len(c.symbols); end > 0; end -= Lanes {
		c.at += int(e.turnBack(&c.x, slots, (*[Lanes]uint8)(c.symbols[end-Lanes:]), (*[2 * Lanes]byte)(c.words[c.at:])))
	}
	c.symbols = nil
}

// overflow is 1 where the state is too large for the symbol: v >= f<<20. Its low word then leaves. Without a branch: a
// fifth of the symbols give a word, at random.
func overflow(v, t uint32) uint32 {
	return uint32((uint64(t>>16) - 1 - uint64(v>>(32-ScaleBits))) >> 63)
}

// next is the state after a symbol.
func (e *Encoder) next(v, t uint32, slot *[Slots]uint16) uint32 {
	f := t >> 16
	d := v / f
	return d<<ScaleBits | uint32(slot[(t+v-d*f)%Slots])
}

// turnBack encodes 32 symbols, one a lane, the last first, and says how many bytes of words it left in out.
//
//go:noinline
func (e *Encoder) turnBack(x *[Lanes]uint32, slot *[Slots]uint16, symbols *[Lanes]uint8, out *[2 * Lanes]byte) (n uint32) {
	for j := Lanes - 1; j >= 0; j-- {
		v, t := x[j], e.symbol[symbols[j]]
		full := overflow(v, t)
		binary.LittleEndian.PutUint16(out[n&(2*Lanes-2):], uint16(v))
		n += full << 1
		x[j] = e.next(v>>(full<<4&31), t, slot)
	}
	return n
}
