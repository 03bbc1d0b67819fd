//go:build !purego

package rans

import (
	"math"
	"math/bits"
	"sync"
	"unsafe"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

// kernels are the tables for the kernels that were asked for.
type kernels struct {
	kernelOnce sync.Once
	narrow     narrowTables
	wide       *wideTables
	windowOnce sync.Once
	window     [symbolWindow]uint8 // symbol of a value, the first one of the table at 0
}

// turns codes what is left of the blocks, whole turns.
func (e *Encoder) turns(blocks []coding) {
	if cpu.Active() < cpu.AVX512 {
		for i := range blocks {
			e.turnsGeneric(&blocks[i])
		}
		return
	}
	narrow := len(e.table.Value) <= AliasSymbols
	e.kernelOnce.Do(func() {
		if narrow {
			e.narrow.fill(e.table)
		} else {
			e.wide = new(wideTables)
			e.wide.fill(e.table)
		}
	})
	var a encodeArgs
	for ; a.begin(blocks); a.end(blocks) {
		if narrow {
			a.tables = unsafe.Pointer(&e.narrow)
			a.runNarrow()
		} else {
			a.tables = unsafe.Pointer(e.wide)
			a.runWide()
		}
	}
}

// encodeArgs is the argument of the kernels.
type encodeArgs struct {
	tables  unsafe.Pointer
	turns   uint64
	symbols [SideBySide]unsafe.Pointer                 // of the last turn; moves down
	out     [SideBySide]unsafe.Pointer                 // where the next word goes; moves up
	state   [SideBySide]struct{ lo, hi [Lanes]uint16 } // lane i at 31-i
	blocks  int
}

// narrowTables are those of at most 64 symbols.
type narrowTables struct {
	freq  [AliasSymbols]uint16 // << 4
	rcpLo [AliasSymbols]uint16 // halves of a float a little below 1/frequency
	rcpHi [AliasSymbols]uint16
	own   [AliasSymbols]uint16 // slots in the own bucket
	alias [AliasSymbols]uint16 // what makes of a rank the place among all aliased slots, ordered by symbol, then rank
	// Aliased slots come in pieces, one a bucket. Where piece t begins is a node of a binary search tree: the root is 1
	// and the children of n are 2*n, for places from there on, and 2*n + 1. At the bottom, leaf[n-64] makes of place<<6
	// the slot.
	tree [AliasSymbols]uint16
	leaf [AliasSymbols]uint16
	root [Lanes]uint16 // tree[1]
}

func (t *narrowTables) fill(table *Table) {
	l := table.alias()
	place := 0 // so many aliased slots have the symbols before
	pieces := 0
	var begin [buckets]uint16
	for i := range begin {
		begin[i] = Slots // no place is that high
	}
	for s, f := range table.Freq {
		// A float of 24 bits that is too low by at most 3.5 units in the last place, as x and the product are rounded
		// down: of a quotient below 1<<20 that is less than one half.
		rcp := math.Float32bits(1/float32(f)) - 1
		t.freq[s], t.rcpLo[s], t.rcpHi[s] = f<<4, uint16(rcp), uint16(rcp>>16)
		t.own[s], t.alias[s] = uint16(l.Threshold[s]), uint16(place)-uint16(l.Threshold[s])
		for k := range buckets {
			if own := int(l.Threshold[k]); own < perBucket && int(l.Alias[k]) == s {
				begin[pieces] = uint16(place)
				t.leaf[buckets-1-pieces] = uint16(k + (own-place)<<bucketBits)
				place += perBucket - own
				pieces++
			}
		}
	}
	for n := 1; n < buckets; n++ {
		level := bits.Len(uint(n)) - 1
		t.tree[n] = begin[buckets-(2*(n-1<<level)+1)<<(bucketBits-1-level)]
	}
	for i := range t.root {
		t.root[i] = t.tree[1]
	}
}

// wideTables are those of more.
type wideTables struct {
	freq  [MaxSymbols]uint16 // << 4
	first [MaxSymbols]uint16 // entry in slot
	slot  [Slots + 1]uint16  // first + rank -> slot; the kernels read a word more
}

func (t *wideTables) fill(table *Table) {
	first := uint16(0)
	for s, f := range table.Freq {
		t.freq[s], t.first[s] = f<<4, first
		first += f
	}
	table.slots(func(slot, sym, rank int) { t.slot[int(t.first[sym])+rank] = uint16(slot) })
}

// begin hands the blocks that have turns left to a kernel, and as many turns as all of them have. It says whether there
// is anything to do.
func (a *encodeArgs) begin(all []coding) bool {
	a.blocks, a.turns = 0, 0
	for i := range all {
		c := &all[i]
		n := uint64(len(c.symbols) / Lanes)
		if n == 0 {
			continue
		}
		if a.blocks == 0 || n < a.turns {
			a.turns = n
		}
		k := a.blocks
		a.blocks++
		a.symbols[k] = unsafe.Pointer(&c.symbols[len(c.symbols)-Lanes])
		a.out[k] = unsafe.Pointer(&c.words[c.at])
		for lane, v := range c.x {
			a.state[k].lo[Lanes-1-lane], a.state[k].hi[Lanes-1-lane] = uint16(v), uint16(v>>16)
		}
	}
	return a.blocks > 0
}

// end takes them back.
func (a *encodeArgs) end(all []coding) {
	k := 0
	for i := range all {
		c := &all[i]
		if len(c.symbols) == 0 {
			continue
		}
		c.symbols = c.symbols[:len(c.symbols)-Lanes*int(a.turns)]
		c.at = int(uintptr(a.out[k]) - uintptr(unsafe.Pointer(unsafe.SliceData(c.words))))
		for lane := range c.x {
			c.x[lane] = uint32(a.state[k].lo[Lanes-1-lane]) | uint32(a.state[k].hi[Lanes-1-lane])<<16
		}
		k++
	}
}

// No table of functions below: what is passed to one of those is allocated.

func (a *encodeArgs) runNarrow() {
	p := (*byte)(unsafe.Pointer(a))
	switch a.blocks {
	case 1:
		encodeNarrow1(p)
	case 2:
		encodeNarrow2(p)
	case 3:
		encodeNarrow3(p)
	case 4:
		encodeNarrow4(p)
	}
}

func (a *encodeArgs) runWide() {
	p := (*byte)(unsafe.Pointer(a))
	switch a.blocks {
	case 1:
		encodeWide1(p)
	case 2:
		encodeWide2(p)
	case 3:
		encodeWide3(p)
	case 4:
		encodeWide4(p)
	}
}
