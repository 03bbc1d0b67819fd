package rans

import (
	"encoding/binary"
	"errors"
	"sync"
)

// Decoder is a table ready to decode: its symbols become elements.
type Decoder struct {
	table   *Table
	element Element
	value   [MaxSymbols]uint16
	words   [MaxSymbols][2]uint8 // elements of symbols, their rest zero
	bytes   [MaxSymbols]uint8    // the same of one byte

	expand sync.Once
	slots  *slotTable
	tiers  tierTables
}

// slotTable has one entry a slot: frequency, rank and a code of the symbol in 12, 12 and 8 bits. A frequency is at most
// 4095, since there are two symbols.
type slotTable [Slots]uint32

// fill expands a table; code[k] stands for symbol k.
func (s *slotTable) fill(t *Table, code *[MaxSymbols]uint8) {
	t.runs(func(sym, rank, slot, step, n int) {
		if n == 0 { // a bucket without a symbol of its own
			return
		}
		e := uint32(t.Freq[sym])<<20 | uint32(rank)<<8 | uint32(code[sym])
		for ; n > 0; n-- {
			s[slot%Slots] = e
			slot, e = slot+step, e+1<<8
		}
	})
}

// itself is the code of a table of symbols.
var itself = func() (code [MaxSymbols]uint8) {
	for i := range code {
		code[i] = uint8(i)
	}
	return code
}()

// NewDecoder prepares a table. What the kernels and the plain code look up is made when it is first asked for: a small
// tensor pays for its own tier alone.
func NewDecoder(t *Table, e Element) *Decoder {
	d := &Decoder{table: t, element: e}
	copy(d.value[:], t.Value)
	for k, v := range t.Value {
		w := v << e.Field.Up(e.Shift)
		d.words[k], d.bytes[k] = [2]uint8{uint8(w), uint8(w >> 8)}, uint8(w)
	}
	return d
}

// entries is the table expanded to one entry a slot.
func (d *Decoder) entries() *slotTable {
	d.expand.Do(func() {
		d.slots = new(slotTable)
		d.slots.fill(d.table, &itself)
	})
	return d.slots
}

// ErrStream says that a stream does not end as an encoder ends it: a state is off, or words are missing or left over.
var ErrStream = errors.New("rANS stream does not end in a first state")

// lanes are the states of a stream on its way and the words that it has left.
type lanes struct {
	x     [Lanes]uint32
	words []byte // readable up to its capacity
	short bool   // a word was asked for that was not there: nothing is right any more
}

// open begins a stream of states and words.
func (l *lanes) open(src []byte) error {
	l.short = false
	if len(src) < StateBytes || len(src)%2 != 0 {
		return ErrStream
	}
	for i := range l.x {
		l.x[i] = uint32(binary.LittleEndian.Uint16(src[2*i:])) | uint32(binary.LittleEndian.Uint16(src[2*Lanes+2*i:]))<<16
		if l.x[i] < lower {
			return ErrStream
		}
	}
	l.words = src[StateBytes:]
	return nil
}

// close checks that the stream ends as it must, and returns what the lanes carried.
func (l *lanes) close() (carry [Lanes]uint16, err error) {
	if l.short || len(l.words) > 0 {
		return carry, ErrStream
	}
	for k, v := range l.x {
		if v>>16 != 1 {
			return carry, ErrStream
		}
		carry[k] = uint16(v)
	}
	return carry, nil
}

// decodeInto makes the next len(dst) elements, which begin a turn: element[k] of symbol k.
func decodeInto[T uint8 | [2]uint8](l *lanes, dst []T, t *slotTable, element *[MaxSymbols]T) {
	i, at := 0, 0
	// A turn may take 32 words: while that many are left none needs a check of its own.
	for ; i+Lanes <= len(dst) && at+2*Lanes <= len(l.words); i += Lanes {
		at += 2 * int(turn(&l.x, t, element, (*[2 * Lanes]byte)(l.words[at:]), (*[Lanes]T)(dst[i:])))
	}
	l.words = l.words[at:]
	for ; i < len(dst) && !l.short; i++ {
		dst[i] = element[l.one(i%Lanes, t)]
	}
}

// one decodes one symbol.
func (l *lanes) one(lane int, t *slotTable) uint8 {
	e := t[l.x[lane]%Slots]
	v := l.x[lane]>>ScaleBits*(e>>20) + e>>8%Slots
	if v < lower {
		if len(l.words) < 2 {
			l.short = true
			return 0
		}
		v = v<<16 | uint32(binary.LittleEndian.Uint16(l.words))
		l.words = l.words[2:]
	}
	l.x[lane] = v
	return uint8(e)
}

// Set are tables to choose from, symbol by symbol, ready to decode: at most MaxSet.
type Set struct {
	slots []slotTable
	value [][MaxSymbols]uint32
}

// MaxSet is the most tables of a Set.
const MaxSet = 16

// NewSet prepares tables.
func NewSet(tables []*Table) *Set {
	s := &Set{make([]slotTable, len(tables)), make([][MaxSymbols]uint32, len(tables))}
	for i, t := range tables {
		s.slots[i].fill(t, &itself)
		for k, v := range t.Value {
			s.value[i][k] = uint32(v)
		}
	}
	return s
}

// Decode fills values from the states and words in src, which must be exactly those of len(values) symbols: value i with
// table classes[i]. It returns what the encoder gave its lanes to carry. src may be read, without any effect, up to its
// capacity. Where one table serves all, a Batch is faster.
func (s *Set) Decode(values []uint16, src []byte, classes []uint8) (carry [Lanes]uint16, err error) {
	var l lanes
	if err := l.open(src); err != nil {
		return carry, err
	}
	classes = classes[:len(values)]
	for i := s.kernel(&l, values, classes); i < len(values) && !l.short; i += Lanes {
		n := min(Lanes, len(values)-i)
		l.symbols(values[i:i+n], s, classes[i:i+n])
	}
	return l.close()
}

// symbols decodes at most a turn of symbols, symbol j with table which[j].
func (l *lanes) symbols(values []uint16, s *Set, which []uint8) {
	if len(values) == Lanes && len(l.words) >= 2*Lanes {
		p := turnOf(&l.x, s, (*[Lanes]uint8)(which), (*[2 * Lanes]byte)(l.words), (*[Lanes]uint16)(values))
		l.words = l.words[2*p:]
		return
	}
	for j := range values {
		k := which[j]
		values[j] = uint16(s.value[k][l.one(j, &s.slots[k])])
	}
}

// turnOf is turn with a table for each symbol.
//
//go:noinline
func turnOf(x *[Lanes]uint32, s *Set, which *[Lanes]uint8, win *[2 * Lanes]byte, out *[Lanes]uint16) (p uint) {
	for j := range Lanes {
		k, v := which[j], x[j]
		e := s.slots[k][v%Slots]
		out[j] = uint16(s.value[k][uint8(e)])
		x[j], p = step(v, e, win, p)
	}
	return p
}

// step decodes one lane: the next state, and the position by the borrow of a subtraction. Branches would cost most: a
// fifth of the symbols take a word.
func step(v, e uint32, win *[2 * Lanes]byte, p uint) (uint32, uint) {
	v = v>>ScaleBits*(e>>20) + e>>8%Slots
	w := v<<16 | uint32(binary.LittleEndian.Uint16(win[2*(p%Lanes):]))
	if v >= lower {
		w = v
	}
	return w, p + uint((uint64(v)-lower)>>63)
}

// turn decodes 32 symbols, one a lane, and says how many words it took. A function of its own: in a larger one the
// compiler keeps the position on the stack, and the chain through memory costs half the speed.
//
//go:noinline
func turn[T uint8 | [2]uint8](x *[Lanes]uint32, t *slotTable, element *[MaxSymbols]T, win *[2 * Lanes]byte, out *[Lanes]T) (p uint) {
	for j := 0; j < Lanes; j += 4 {
		y, o := (*[4]uint32)(x[j:]), (*[4]T)(out[j:])
		v := y[0]
		e := t[v%Slots]
		o[0] = element[uint8(e)]
		y[0], p = step(v, e, win, p)
		v = y[1]
		e = t[v%Slots]
		o[1] = element[uint8(e)]
		y[1], p = step(v, e, win, p)
		v = y[2]
		e = t[v%Slots]
		o[2] = element[uint8(e)]
		y[2], p = step(v, e, win, p)
		v = y[3]
		e = t[v%Slots]
		o[3] = element[uint8(e)]
		y[3], p = step(v, e, win, p)
	}
	return p
}
