//go:build !purego

package rans

import (
	"math"
	"sync"
	"unsafe"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

// tierTables are the tables of the tiers that were asked for.
type tierTables struct {
	alias struct {
		sync.Once
		kernel
		aliasTable
	}
}

// kernel is the code for this table on the tier in use, or nil for the plain code.
func (d *Decoder) kernel() *kernel {
	if cpu.Active() >= cpu.AVX512 && len(d.table.Value) <= AliasSymbols {
		a := &d.tiers.alias
		a.Do(func() {
			a.fill(d.table, d.element)
			form := d.element.form()
			a.kernel = kernel{aliasKernels[form], unsafe.Pointer(&a.aliasTable), restReads[form], [BatchStreams]func(*byte){}}
			if d.element.Size == 2 {
				a.kernel.past = aliasPast[form]
			}
		})
		return &a.kernel
	}
	return nil
}

// form says which of the kernels makes an element.
func (e Element) form() int {
	switch {
	case e.Size == 1 && e.Field.Rest > 0:
		return 4
	case e.Size == 1:
		return 3
	case e.Field.Rest > 8:
		return 2
	case e.Field.Rest > 0:
		return 1
	}
	return 0
}

// restReads is how much of the rest the kernels of a form read in a turn.
var restReads = [5]int{0, 32, 64, 0, 32}

var aliasKernels = [5][BatchStreams]func(*byte){
	{aliasWords1, aliasWords2, aliasWords3, aliasWords4},
	{aliasWordsNarrow1, aliasWordsNarrow2, aliasWordsNarrow3, aliasWordsNarrow4},
	{aliasWordsWide1, aliasWordsWide2, aliasWordsWide3, aliasWordsWide4},
	{aliasBytes1, aliasBytes2, aliasBytes3, aliasBytes4},
	{aliasBytesNarrow1, aliasBytesNarrow2, aliasBytesNarrow3, aliasBytesNarrow4},
}

var aliasPast = [3][BatchStreams]func(*byte){
	{aliasWordsPast1, aliasWordsPast2, aliasWordsPast3, aliasWordsPast4},
	{aliasWordsNarrowPast1, aliasWordsNarrowPast2, aliasWordsNarrowPast3, aliasWordsNarrowPast4},
	{aliasWordsWidePast1, aliasWordsWidePast2, aliasWordsWidePast3, aliasWordsWidePast4},
}

// aliasTable is a table as the AVX-512 kernels want it; they know its layout.
type aliasTable struct {
	entry  [buckets]uint16 // low six bits alias[k]; r<<10 | k<<4 >= entry[k] exactly where r >= threshold[k]
	offset [buckets]uint16
	freq   [buckets]uint16 // frequency << 4
	value  [buckets]uint16 // the element of the symbol, its rest zero
	restTable
}

// restTable says how the kernels join the packed rest of a turn.
type restTable struct {
	low, high [2 * Lanes]uint8 // the bytes that make word i, and, for wide fields, those that follow
	shift     [Lanes]uint16    // by how much word i is rotated (or shifted down, where the field is wide)
	turn      [Lanes]uint16    // by how much a finished element is rotated (wide fields only)
	keep      [Lanes]uint16    // the bits of the rest in the rotated word
	keepTop   [Lanes]uint16    // and, in bytes, those of the word shifted down by eight
}

func (a *aliasTable) fill(t *Table, e Element) {
	l := t.alias()
	for k := range a.entry {
		a.offset[k] = l.Offset[k]
		if k < len(t.Freq) {
			a.freq[k] = t.Freq[k] << 4 // at most 4095: there are two symbols
			a.value[k] = e.base(t.Value[k])
		}
		if l.Threshold[k] == perBucket {
			a.entry[k] = math.MaxUint16 // above every slot
			continue
		}
		// The largest number with the alias in its low bits that is not above the first aliased slot.
		first := int(l.Threshold[k])<<10 | k<<4
		entry := first&^63 | int(l.Alias[k])
		if entry > first {
			entry -= 64 // never below zero: where the threshold is 0, the alias is a symbol below k
		}
		a.entry[k] = uint16(entry)
	}
	a.restTable.fill(e)
}

// base is the element of a symbol with a rest of zero, or, for a wide rest, that before it is rotated.
func (e Element) base(sym uint16) uint16 {
	up := uint(e.Shift) + uint(e.Field.Rest)
	if e.Field.Rotate && e.form() != 2 {
		up--
	}
	return sym << up
}

func (r *restTable) fill(e Element) {
	rest, sign := uint(e.Field.Rest), uint16(0)
	if rest == 0 {
		return
	}
	if e.Field.Rotate {
		sign = 1
	}
	mask := uint16(1)<<rest - 1
	for i := range r.shift {
		at := uint(i) * rest
		for k := range 2 {
			r.low[2*i+k], r.high[2*i+k] = uint8(min(at>>3+uint(k), 63)), uint8(min(at>>3+2+uint(k), 63))
		}
		switch e.form() {
		case 2:
			r.shift[i], r.turn[i], r.keep[i] = uint16(at&7), sign, mask
		case 1:
			r.shift[i] = uint16(at&7) + sign
			r.keep[i] = mask>>sign | sign<<15
		default: // the sign of a byte comes down from bit 15
			r.shift[i] = uint16(at&7) + sign
			r.keep[i], r.keepTop[i] = mask>>sign, sign<<7
		}
	}
}
