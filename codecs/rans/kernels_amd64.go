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
		*aliasTable
	}
	wide struct {
		sync.Once
		kernel
		*wideTable
	}
	slots struct {
		sync.Once
		kernel
		*slotTables
	}
}

// kernel is the code for this table on the tier in use, or nil for the plain code.
func (d *Decoder) kernel() *kernel {
	tier, t := cpu.Active(), &d.tiers
	switch {
	case tier >= cpu.AVX512 && len(d.table.Value) <= AliasSymbols:
		t.alias.Do(func() {
			t.alias.aliasTable = new(aliasTable)
			t.alias.fill(d.table, d.element)
			t.alias.kernel = d.element.choose(&aliasKernels, unsafe.Pointer(t.alias.aliasTable))
		})
		return &t.alias.kernel
	case tier >= cpu.AVX512:
		t.wide.Do(func() {
			t.wide.wideTable = new(wideTable)
			t.wide.fill(d.table, d.element)
			t.wide.kernel = d.element.choose(&wideKernels, unsafe.Pointer(t.wide.wideTable))
		})
		return &t.wide.kernel
	case tier >= cpu.AVX2:
		t.slots.Do(func() {
			t.slots.slotTables = new(slotTables)
			run := t.slots.fill(d.table, d.element)
			t.slots.kernel = kernel{run, unsafe.Pointer(t.slots.slotTables), 3*int(d.element.Field.Rest) + 16, nil}
		})
		return &t.slots.kernel
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

// choose is the kernel of a form: those of forms 0 to 2 that store past the caches come after all forms.
func (e Element) choose(all *[8][BatchStreams]func(*byte), table unsafe.Pointer) kernel {
	form := e.form()
	k := kernel{all[form][:], table, restReads[form], nil}
	if e.Size == 2 {
		k.past = all[len(restReads)+form][:]
	}
	return k
}

var aliasKernels = [8][BatchStreams]func(*byte){
	{aliasWords1, aliasWords2, aliasWords3, aliasWords4},
	{aliasWordsNarrow1, aliasWordsNarrow2, aliasWordsNarrow3, aliasWordsNarrow4},
	{aliasWordsWide1, aliasWordsWide2, aliasWordsWide3, aliasWordsWide4},
	{aliasBytes1, aliasBytes2, aliasBytes3, aliasBytes4},
	{aliasBytesNarrow1, aliasBytesNarrow2, aliasBytesNarrow3, aliasBytesNarrow4},
	{aliasWordsPast1, aliasWordsPast2, aliasWordsPast3, aliasWordsPast4},
	{aliasWordsNarrowPast1, aliasWordsNarrowPast2, aliasWordsNarrowPast3, aliasWordsNarrowPast4},
	{aliasWordsWidePast1, aliasWordsWidePast2, aliasWordsWidePast3, aliasWordsWidePast4},
}

var wideKernels = [8][BatchStreams]func(*byte){
	{wideWords1, wideWords2, wideWords3, wideWords4},
	{wideWordsNarrow1, wideWordsNarrow2, wideWordsNarrow3, wideWordsNarrow4},
	{wideWordsWide1, wideWordsWide2, wideWordsWide3, wideWordsWide4},
	{wideBytes1, wideBytes2, wideBytes3, wideBytes4},
	{wideBytesNarrow1, wideBytesNarrow2, wideBytesNarrow3, wideBytesNarrow4},
	{wideWordsPast1, wideWordsPast2, wideWordsPast3, wideWordsPast4},
	{wideWordsNarrowPast1, wideWordsNarrowPast2, wideWordsNarrowPast3, wideWordsNarrowPast4},
	{wideWordsWidePast1, wideWordsWidePast2, wideWordsWidePast3, wideWordsWidePast4},
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

// wideTable is a table of more than 64 symbols as the AVX-512 kernels want it, in bytes; they know its layout.
type wideTable struct {
	alias              [wideBuckets]uint8
	offset, offsetHigh [wideBuckets]uint8 // the four bits above are the threshold
	freq, freqHigh     [wideBuckets]uint8 // of frequency << 4
	value, valueHigh   [wideBuckets]uint8 // of the element of the symbol, its rest zero
	restTable
}

func (w *wideTable) fill(t *Table, e Element) {
	l := t.alias()
	for k := range w.alias {
		// A bucket of 16 slots of its own has its symbol for an alias, with an offset of zero, from slot 0 on.
		threshold := l.Threshold[k] % (Slots / wideBuckets)
		w.alias[k] = l.Alias[k]
		w.offset[k], w.offsetHigh[k] = uint8(l.Offset[k]), uint8(l.Offset[k]>>8)&15|threshold<<4
		if k < len(t.Freq) {
			freq, value := t.Freq[k]<<4, e.base(t.Value[k])
			w.freq[k], w.freqHigh[k], w.value[k], w.valueHigh[k] = uint8(freq), uint8(freq>>8), uint8(value), uint8(value>>8)
		}
	}
	w.restTable.fill(e)
}

// base is the element of a symbol with a rest of zero, or, for a wide rest, that before it is rotated.
func (e Element) base(sym uint16) uint16 {
	if e.form() == 2 {
		return sym << e.Field.Rest
	}
	return sym << e.Field.Up(e.Shift)
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

// slotTables is a table as the AVX2 kernels want it; they know its layout. What takes the bits of the rest is for eight
// elements, which take as many bytes as an element's rest has bits.
type slotTables struct {
	entry            slotTable
	value            [MaxSymbols]uint32 // elements of symbols, their rest zero
	field            [2][16]uint8       // the bytes that make the double word of an element
	shift, keep      [8]uint32          // where its rest begins in it; the bits that it has
	base             [16]uint16         // the element of the lowest value
	byte             [16]uint16         // 255
	up, down, around [2]uint64          // how far a symbol is up; rotation, a shift by 16 being none
}

func (s *slotTables) fill(t *Table, e Element) [](func(*byte)) {
	rest := uint(e.Field.Rest)
	up := uint(e.Shift) + rest
	lowest, highest := t.Value[0], t.Value[0]
	for _, v := range t.Value {
		lowest, highest = min(lowest, v), max(highest, v)
	}
	form, code := 1, itself
	switch {
	case e.Size == 1:
		form = 0
		for k, v := range t.Value {
			code[k] = uint8(v << up)
		}
	case highest-lowest < MaxSymbols:
		for k, v := range t.Value {
			code[k] = uint8(v - lowest)
		}
	default:
		form = 2
		for k, v := range t.Value {
			s.value[k] = uint32(v << up)
		}
	}
	s.entry.fill(t, &code)
	for i := range s.base {
		s.base[i], s.byte[i] = lowest<<up, 255
	}
	s.up[0], s.around[0] = uint64(up), 16
	if rest == 0 {
		return slotKernels[form][0][:]
	}
	if e.Field.Rotate {
		s.down[0], s.around[0] = 1, uint64(8*e.Size-1)
	}
	for i := range uint(8) {
		at := i * rest
		for k := range uint(4) {
			s.field[i/4][4*(i%4)+k] = uint8(at/8 + k) // 3*15/8 + 3 + ... 7*15/8 + 3 = 16 is beyond, and cut
		}
		s.shift[i], s.keep[i] = uint32(at%8), 1<<rest-1
	}
	return slotKernels[form][1][:]
}

var slotKernels = [3][2][2]func(*byte){
	{{slotsBytes1, slotsBytes2}, {slotsBytesRest1, slotsBytesRest2}},
	{{slotsWords1, slotsWords2}, {slotsWordsRest1, slotsWordsRest2}},
	{{slotsWordsAnywhere1, slotsWordsAnywhere2}, {slotsWordsAnywhereRest1, slotsWordsAnywhereRest2}},
}

// setTurns is the border to the kernels of a Set, which know its layout.
type setTurns struct {
	slots, value, classes uintptr
	src, dst              uintptr // src is advanced by the kernel
	count                 uint64
	x                     [Lanes]uint32
}

// kernel decodes as many turns as a kernel may, and says how many values those are.
func (s *Set) kernel(l *lanes, values []uint16, classes []uint8) int {
	run := setTurns512
	switch tier := cpu.Active(); {
	case tier >= cpu.AVX512:
	case tier >= cpu.AVX2:
		run = setTurns256
	default:
		return 0
	}
	done := 0
	a := setTurns{slots: uintptr(unsafe.Pointer(unsafe.SliceData(s.slots))), value: uintptr(unsafe.Pointer(unsafe.SliceData(s.value)))}
	for !l.short {
		a.count = uint64(min((len(values)-done)/Lanes, cap(l.words)/wordRead))
		if a.count == 0 {
			break
		}
		words := uintptr(unsafe.Pointer(unsafe.SliceData(l.words)))
		a.classes, a.dst, a.src, a.x = uintptr(unsafe.Pointer(&classes[done])), uintptr(unsafe.Pointer(&values[done])), words, l.x
		run((*byte)(unsafe.Pointer(&a)))
		taken := int(a.src - words)
		l.short = taken > len(l.words)
		l.words, l.x = l.words[min(taken, len(l.words)):], a.x
		done += int(a.count) * Lanes
	}
	return done
}
