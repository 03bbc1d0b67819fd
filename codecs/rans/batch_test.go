package rans

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs/cpu"
	"bigsmall.dev/bigsmall/codecs/planes"
)

// eachTier runs a test once for every tier of this machine.
func eachTier(t *testing.T, f func(t *testing.T)) {
	for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
		require.NoError(t, cpu.Use(tier.String()))
		t.Run(tier.String(), f)
	}
	require.NoError(t, cpu.Use(""))
}

var elements = []Element{
	Symbols,
	{planes.Field{Sym: 8}, 1, 0},
	{planes.Field{Sym: 5}, 1, 3},
	{planes.Field{Sym: 6}, 2, 7},
	{planes.Field{Sym: 6, Rest: 2, Rotate: true}, 1, 0},
	{planes.Field{Sym: 5, Rest: 3}, 1, 0},
	{planes.Field{Sym: 4, Rest: 4, Rotate: true}, 1, 0},
	{planes.Field{Sym: 8, Rest: 8, Rotate: true}, 2, 0},
	{planes.Field{Sym: 9, Rest: 7, Rotate: true}, 2, 0},
	{planes.Field{Sym: 9, Rest: 7}, 2, 0},
	{planes.Field{Sym: 12, Rest: 4, Rotate: true}, 2, 0},
	{planes.Field{Sym: 11, Rest: 5}, 2, 0},
	{planes.Field{Sym: 7, Rest: 9, Rotate: true}, 2, 0},
	{planes.Field{Sym: 6, Rest: 10}, 2, 0},
	{planes.Field{Sym: 5, Rest: 11, Rotate: true}, 2, 0},
	{planes.Field{Sym: 4, Rest: 12, Rotate: true}, 2, 0},
	{planes.Field{Sym: 3, Rest: 13}, 2, 0},
	{planes.Field{Sym: 2, Rest: 14, Rotate: true}, 2, 0},
	{planes.Field{Sym: 1, Rest: 15, Rotate: true}, 2, 0},
}

// coded is a stream with its rest and what must come out.
type codedStream struct {
	src, rest, want []byte
	n               int
	carry           [Lanes]uint16
}

// spread is a table of n symbols whose values lie anywhere in what symBits can hold.
func spread(r *rand.Rand, n int, symBits uint8) *Table {
	t := randomTable(r, n)
	for i, v := range r.Perm(1 << symBits)[:n] {
		t.Value[i] = uint16(v)
	}
	return t
}

// draw makes a stream of symbols as likely as the table says, or all of the rarest one.
func draw(r *rand.Rand, t *Table, e Element, n int, rarest bool) codedStream {
	owner := make([]uint8, Slots)
	t.slots(func(slot, sym, _ int) { owner[slot] = uint8(sym) })
	least := 0
	for i, f := range t.Freq {
		if f < t.Freq[least] {
			least = i
		}
	}
	c := codedStream{n: n}
	syms, values, rest := make([]uint8, n), make([]uint16, n), make([]uint16, n)
	for i := range syms {
		if syms[i] = owner[r.IntN(Slots)]; rarest {
			syms[i] = uint8(least)
		}
		values[i] = t.Value[syms[i]]
		rest[i] = uint16(r.Uint32()) & (1<<e.Field.Rest - 1)
	}
	for i := range c.carry {
		c.carry[i] = uint16(r.Uint32())
	}
	c.src = encode(syms, NewEncoder(t, 16), c.carry)
	if e.Field.Rest > 0 {
		c.rest = planes.Pack(nil, rest, e.Field.Rest)
	}
	words := make([]uint64, n)
	f := e.Field
	if f.Rest == 0 {
		f.Sym = 16
	}
	f.Join(words, values, rest)
	c.want = make([]byte, n*e.Size)
	planes.Store(c.want, words, e.Size, e.Shift)
	return c
}

// The element of every tier is that of Field.Join, at every number of streams and at lengths around those of a turn.
func TestBatch(t *testing.T) {
	eachTier(t, func(t *testing.T) {
		r := rand.New(rand.NewPCG(11, 12))
		for _, e := range elements {
			most := 256
			if e.Field.Sym > 0 {
				most = min(most, 1<<e.Field.Sym)
			}
			for _, symbols := range []int{2, 3, 30, 64, 65, 150, 256} {
				if symbols > most {
					continue
				}
				bits := e.Field.Sym
				if bits == 0 {
					bits = 12
				}
				table := spread(r, symbols, bits)
				d := NewDecoder(table, e)
				for streams := 1; streams <= BatchStreams; streams++ {
					for _, n := range []int{1, 31, 32, 33, 64, 95, 96, 1000, 4 * 1000} {
						testBatch(t, r, table, d, streams, n)
					}
				}
				for _, table := range []*Table{steep(r, table), within(r, table, bits, 256), within(r, table, bits, 257)} {
					testBatch(t, r, table, NewDecoder(table, e), 1+r.IntN(BatchStreams), 1000)
				}
			}
		}
	})
}

// steep is the table with one slot for every symbol but one.
func steep(r *rand.Rand, t *Table) *Table {
	s := &Table{Value: t.Value, Freq: make([]uint16, len(t.Freq))}
	for i := range s.Freq {
		s.Freq[i] = 1
	}
	s.Freq[r.IntN(len(s.Freq))] = uint16(Slots - len(s.Freq) + 1)
	return s
}

// within is the table with values from the first to the last of a range of n, or of as many as symBits can hold.
func within(r *rand.Rand, t *Table, symBits uint8, n int) *Table {
	n = min(n, 1<<symBits)
	first := r.IntN(1<<symBits - n + 1)
	values := []uint16{uint16(first), uint16(first + n - 1)}
	for _, v := range r.Perm(n - 2)[:len(t.Value)-2] {
		values = append(values, uint16(first+1+v))
	}
	return &Table{Value: values, Freq: t.Freq}
}

const guard = 0xa5

func testBatch(t *testing.T, r *rand.Rand, table *Table, d *Decoder, streams, n int) {
	e := d.element
	name := fmt.Sprintf("%+v, %d symbols, %d streams of about %d", e, len(table.Value), streams, n)
	var b Batch
	b.Past = r.IntN(2) == 0
	var all []codedStream
	var dst [][]byte
	for k := range streams {
		c := draw(r, table, e, max(1, n-r.IntN(1+n/3)*(k&1)), r.IntN(8) == 0)
		all = append(all, c)
		// Some have memory behind them to read, some end where their bytes end.
		slack := r.IntN(2) * r.IntN(300)
		src := append(make([]byte, 0, len(c.src)+slack), c.src...)
		rest := append(make([]byte, 0, len(c.rest)+slack), c.rest...)
		require.NoError(t, b.Add(src[:len(src):len(src)+slack], rest[:len(rest):len(rest)+slack], c.n), name)
		at := r.IntN(65)
		out := bytes.Repeat([]byte{guard}, 64+at+len(c.want)+200)
		if b.Past { // which takes 64 bytes
			at = -int(uintptr(unsafe.Pointer(unsafe.SliceData(out)))) & 63
		}
		dst = append(dst, out[at:])
		b.Target(k, out[at:at+len(c.want)])
		b.Ahead = src
	}
	step := n
	if r.IntN(2) == 0 {
		step = Lanes * (1 + r.IntN(40))
	}
	for done := 0; done < n; done += (step + Lanes - 1) &^ (Lanes - 1) {
		b.Next(d, (step+Lanes-1)&^(Lanes-1))
	}
	for k, c := range all {
		carry, err := b.Close(k)
		require.NoError(t, err, name)
		require.Equal(t, c.carry, carry, name)
		require.True(t, bytes.Equal(c.want, dst[k][:len(c.want)]), name)
		for _, v := range dst[k][len(c.want):] {
			require.EqualValues(t, guard, v, "%s: written past the end", name)
		}
	}
}

// A damaged stream is noticed by every tier, or decodes to the same elements on all; nothing is written past the end.
func TestBatchDamaged(t *testing.T) {
	r := rand.New(rand.NewPCG(13, 14))
	for range 300 {
		e := elements[r.IntN(len(elements))]
		bits := e.Field.Sym
		if bits == 0 {
			bits = 12
		}
		table := spread(r, 2+r.IntN(min(255, 1<<bits-1)), bits)
		c := draw(r, table, e, 1+r.IntN(3000), r.IntN(4) == 0)
		src := bytes.Clone(c.src)
		switch r.IntN(4) {
		case 0:
			src = src[:max(len(src)-2*(1+r.IntN(40)), StateBytes)]
		case 1:
			src = append(src, make([]byte, 2*(1+r.IntN(40)))...)
		default:
			for range 1 + r.IntN(3) {
				src[r.IntN(len(src))] ^= 1 << r.IntN(8)
			}
		}
		var first []byte
		var firstErr error
		for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
			require.NoError(t, cpu.Use(tier.String()))
			out := bytes.Repeat([]byte{guard}, len(c.want)+300)
			var b Batch
			err := b.Add(src, c.rest, c.n)
			if err == nil {
				b.Target(0, out[:len(c.want)])
				b.Next(NewDecoder(table, e), (c.n+Lanes-1)&^(Lanes-1))
				_, err = b.Close(0)
			}
			for _, v := range out[len(c.want):] {
				require.EqualValues(t, guard, v)
			}
			if tier == cpu.Generic {
				first, firstErr = out, err
			}
			require.Equal(t, firstErr, err, tier)
			if err == nil {
				require.True(t, bytes.Equal(first, out), tier)
			}
		}
		require.NoError(t, cpu.Use(""))
	}
}

func TestJoins(t *testing.T) {
	for _, e := range elements {
		require.True(t, e.Joins(), "%+v", e)
	}
	require.False(t, Element{planes.Field{Sym: 8, Rest: 7, Rotate: true}, 2, 0}.Joins())
	require.False(t, Element{planes.Field{Sym: 8, Rest: 7, Rotate: true}, 2, 1}.Joins())
}

// Bytes are those of the elements.
func BenchmarkDecode(b *testing.B) {
	r := rand.New(rand.NewPCG(7, 8))
	const n = 1 << 16
	for _, c := range []struct {
		dtype   string
		symbols int
		e       Element
	}{
		{"bf16", 30, Element{planes.Field{Sym: 9, Rest: 7, Rotate: true}, 2, 0}},
		{"bf16-inference", 30, Element{planes.Field{Sym: 8, Rest: 8, Rotate: true}, 2, 0}},
		{"bf16-200-symbols", 200, Element{planes.Field{Sym: 10, Rest: 6, Rotate: true}, 2, 0}},
		{"fp16", 50, Element{planes.Field{Sym: 7, Rest: 9, Rotate: true}, 2, 0}},
		{"fp8", 60, Element{planes.Field{Sym: 6, Rest: 2, Rotate: true}, 1, 0}},
		{"fp8-200-symbols", 200, Element{planes.Field{Sym: 8}, 1, 0}},
	} {
		values := normal(r, 1<<20, c.symbols, 3+float64(c.symbols)/20)
		table, _ := Build(histogram(values, 1<<c.e.Field.Sym), c.symbols, 32)
		var all [BatchStreams]codedStream
		for k := range all {
			all[k] = draw(r, table, c.e, n, false)
		}
		dst := make([]byte, BatchStreams*n*c.e.Size)
		for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
			require.NoError(b, cpu.Use(tier.String()))
			for _, streams := range []int{1, BatchStreams} {
				b.Run(fmt.Sprintf("%s/%s/%dx64Ki", c.dtype, tier, streams), func(b *testing.B) {
					b.SetBytes(int64(streams * n * c.e.Size))
					d := NewDecoder(table, c.e)
					var batch Batch
					for b.Loop() {
						batch.Reset()
						for k := range streams {
							_ = batch.Add(all[k].src, all[k].rest, n)
							batch.Target(k, dst[k*n*c.e.Size:])
						}
						batch.Next(d, n)
						for k := range streams {
							if _, err := batch.Close(k); err != nil {
								b.Fatal(err)
							}
						}
					}
				})
			}
		}
	}
	require.NoError(b, cpu.Use(""))
	b.Run("memcpy/512KiB", func(b *testing.B) {
		x, y := make([]byte, 1<<19), make([]byte, 1<<19)
		b.SetBytes(1 << 19)
		for b.Loop() {
			copy(x, y)
		}
	})
}

// What a table costs before the first symbol.
func BenchmarkNewDecoder(b *testing.B) {
	r := rand.New(rand.NewPCG(9, 10))
	for _, symbols := range []int{30, 256} {
		table := randomTable(r, symbols)
		for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
			require.NoError(b, cpu.Use(tier.String()))
			b.Run(fmt.Sprintf("%d/%s", symbols, tier), func(b *testing.B) {
				for b.Loop() {
					if d := NewDecoder(table, Symbols); d.kernel() == nil {
						d.entries()
					}
				}
			})
		}
	}
	require.NoError(b, cpu.Use(""))
}
