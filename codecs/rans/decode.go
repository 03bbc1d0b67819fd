package rans

import (
	"encoding/binary"
	"errors"
)

// Decoder is a table expanded to one entry a slot: frequency - 1, rank and symbol in 12, 12 and 8 bits.
type Decoder struct {
	entry [Slots]uint32
	value [MaxSymbols]uint16
}

// NewDecoder expands a table.
func NewDecoder(t *Table) *Decoder {
	d := &Decoder{}
	copy(d.value[:], t.Value)
	t.slots(func(slot, sym, rank int) {
		d.entry[slot] = uint32(t.Freq[sym]-1)<<20 | uint32(rank)<<8 | uint32(sym)
	})
	return d
}

// ErrStream says that a stream does not end as an encoder ends it: a state is off, or words are missing or left over.
var ErrStream = errors.New("rANS stream does not end in a first state")

// PairOf is where the second string of symbols of a stream goes: value i is decoded with
// Tables[Class[values[i]>>Shift]], values being those of the first.
type PairOf struct {
	Values []uint16
	Tables []*Decoder
	Class  *[256]uint8
	Shift  uint8
}

// Decode fills values from the states and words in src, which must be exactly those of len(values) symbols: with one
// table, or, where classes is not nil, value i with tables[classes[i]]; pair may be nil. It returns what the encoder
// gave its lanes to carry.
func Decode(values []uint16, src []byte, tables []*Decoder, classes []uint8, pair *PairOf) (carry [Lanes]uint16, err error) {
	if len(src) < StateBytes || len(src)%2 != 0 {
		return carry, ErrStream
	}
	var x [Lanes]uint32
	for i := range x {
		x[i] = uint32(binary.LittleEndian.Uint16(src[2*i:])) | uint32(binary.LittleEndian.Uint16(src[2*Lanes+2*i:]))<<16
		if x[i] < lower {
			return carry, ErrStream
		}
	}
	words := src[StateBytes:]
	at, i := 0, 0
	if classes == nil && pair == nil {
		d := tables[0]
		// A turn may take 32 words: while that many are left none needs a check of its own.
		for ; i+Lanes <= len(values) && at+2*Lanes <= len(words); i += Lanes {
			at += 2 * int(turn(&x, d, (*[2 * Lanes]byte)(words[at:]), (*[Lanes]uint16)(values[i:])))
		}
	}
	one := func(lane int, d *Decoder) uint16 {
		e := d.entry[x[lane]%Slots]
		v := x[lane]>>ScaleBits*(e>>20+1) + e>>8%Slots
		if v < lower {
			if at+2 > len(words) {
				at = len(words) + 1 // remembered: nothing is read any more, and the end is wrong
				return 0
			}
			v = v<<16 | uint32(binary.LittleEndian.Uint16(words[at:]))
			at += 2
		}
		x[lane] = v
		return d.value[uint8(e)]
	}
	for ; i < len(values) && at <= len(words); i += Lanes {
		n := min(Lanes, len(values)-i)
		for j := range n {
			d := tables[0]
			if classes != nil {
				d = tables[classes[i+j]]
			}
			values[i+j] = one(j, d)
		}
		if pair != nil {
			for j := range n {
				pair.Values[i+j] = one(j, pair.Tables[pair.Class[uint8(values[i+j]>>pair.Shift)]])
			}
		}
	}
	if at != len(words) {
		return carry, ErrStream
	}
	for k, v := range x {
		if v>>16 != 1 {
			return carry, ErrStream
		}
		carry[k] = uint16(v)
	}
	return carry, nil
}

// step decodes one lane: the next state, and the position by the borrow of a subtraction. Branches would cost most: a
// fifth of the symbols take a word.
func step(v, e uint32, win *[2 * Lanes]byte, p uint) (uint32, uint) {
	v = v>>ScaleBits*(e>>20+1) + e>>8%Slots
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
func turn(x *[Lanes]uint32, d *Decoder, win *[2 * Lanes]byte, out *[Lanes]uint16) (p uint) {
	for j := 0; j < Lanes; j += 4 {
		y, o := (*[4]uint32)(x[j:]), (*[4]uint16)(out[j:])
		v := y[0]
		e := d.entry[v%Slots]
		o[0] = d.value[uint8(e)]
		y[0], p = step(v, e, win, p)
		v = y[1]
		e = d.entry[v%Slots]
		o[1] = d.value[uint8(e)]
		y[1], p = step(v, e, win, p)
		v = y[2]
		e = d.entry[v%Slots]
		o[2] = d.value[uint8(e)]
		y[2], p = step(v, e, win, p)
		v = y[3]
		e = d.entry[v%Slots]
		o[3] = d.value[uint8(e)]
		y[3], p = step(v, e, win, p)
	}
	return p
}
