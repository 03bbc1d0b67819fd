package rans

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

func TestLog2(t *testing.T) {
	for _, x := range []uint64{1, 2, 3, 5, 7, 100, 4095, 4096, 4097, 1<<20 - 1, 1<<40 + 12345, 1<<63 + 5} {
		require.InDelta(t, math.Log2(float64(x))*LogOne, float64(Log2(x)), 4, "log2(%d)", x)
	}
}

func normal(r *rand.Rand, n, symbols int, sd float64) []uint16 {
	v := make([]uint16, n)
	for i := range v {
		v[i] = uint16(min(max(int(r.NormFloat64()*sd+float64(symbols)/2), 0), symbols-1))
	}
	return v
}

func histogram(v []uint16, size int) []uint64 {
	h := make([]uint64, size)
	for _, x := range v {
		h[x]++
	}
	return h
}

func TestSlotsCoverEveryRankOnce(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, symbols := range []int{2, 3, 5, 30, 63, 64, 65, 200, 256} {
		for range 50 {
			table := randomTable(r, symbols)
			seen := map[[2]int]bool{}
			table.slots(func(_, sym, rank int) {
				require.Less(t, rank, int(table.Freq[sym]))
				seen[[2]int{sym, rank}] = true
			})
			require.Len(t, seen, Slots)
		}
	}
}

// randomTable has the given number of symbols, with frequencies from even to as skewed as they can be.
func randomTable(r *rand.Rand, symbols int) *Table {
	t := &Table{Value: make([]uint16, symbols), Freq: make([]uint16, symbols)}
	w, total := make([]uint64, symbols), uint64(0)
	skew := r.Float64() * 40
	for i := range w {
		t.Value[i] = uint16(i)
		w[i] = uint64(math.Exp(r.Float64()*skew)) + 1
		total += w[i]
	}
	quantise(w, total, t.Freq)
	return t
}

func TestTableRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 300 {
		symbols := 2 + r.IntN(255)
		table := randomTable(r, symbols)
		for i := range table.Value {
			table.Value[i] = uint16(i)
		}
		stored := table.Append(nil)
		require.LessOrEqual(t, len(stored), MaxTableBytes)
		got, rest, err := ParseTable(append(stored, 7, 8), 8)
		require.NoError(t, err)
		require.Equal(t, []byte{7, 8}, rest)
		require.Equal(t, table, got)
		for cut := range stored {
			_, _, err := ParseTable(stored[:cut], 8)
			require.Error(t, err)
		}
	}
}

// The worked example of SPEC.md.
func TestAliasExample(t *testing.T) {
	table := &Table{Value: []uint16{0, 1, 2}, Freq: []uint16{4000, 90, 6}}
	l := table.alias()
	require.Equal(t, []uint8{38, 64, 6, 0}, l.Threshold[:4])
	require.Equal(t, []uint8{1, 1, 0, 0}, l.Alias[:4])
	require.Equal(t, []uint16{26, 0, 32, 96}, l.Offset[:4])
}

func TestRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, symbols := range []int{2, 17, 64, 100, 256} {
		for n := 1; n < 300; n += 1 + n/40 {
			testRoundTrip(t, r, n, symbols)
		}
		testRoundTrip(t, r, 1<<16, symbols)
	}
}

// decode is a Batch of one stream.
func decode(values []uint16, src []byte, d *Decoder) ([Lanes]uint16, error) {
	var b Batch
	if err := b.Add(src, nil, len(values)); err != nil {
		return [Lanes]uint16{}, err
	}
	dst := make([]byte, 2*len(values))
	b.Target(0, dst)
	b.Next(d, len(values))
	for i := range values {
		values[i] = binary.LittleEndian.Uint16(dst[2*i:])
	}
	return b.Close(0)
}

// encode is an Encode of one stream.
func encode(symbols []uint8, e *Encoder, carry [Lanes]uint16) []byte {
	s := Stream{Symbols: symbols, Carry: carry}
	e.Encode(&s)
	return s.Coded
}

func testRoundTrip(t *testing.T, r *rand.Rand, n, symbols int) {
	values := normal(r, n, symbols, float64(symbols)/6)
	table, _ := Build(histogram(values, 256), symbols, 32)
	if table == nil {
		return
	}
	enc, dec := NewEncoder(table, 8), NewDecoder(table, Symbols)
	syms := make([]uint8, n)
	patches := enc.Map(syms, values, nil)
	var carry [Lanes]uint16
	for i := range carry {
		carry[i] = uint16(r.Uint32())
	}
	coded := encode(syms, enc, carry)
	got := make([]uint16, n)
	back, err := decode(got, coded, dec)
	require.NoError(t, err)
	require.Equal(t, carry, back)
	for _, p := range patches {
		got[p.At] = p.Value
	}
	require.Equal(t, values, got)
	// Cut, lengthened or changed streams must be noticed: states and words are all used.
	_, err = decode(got, coded[:len(coded)-2], dec)
	require.Error(t, err)
	_, err = decode(got, append(coded, 0, 0), dec)
	require.Error(t, err)
	testSet(t, r, values, table)
}

// testSet codes values with tables in turn, the given one and others, and decodes them on every tier.
func testSet(t *testing.T, r *rand.Rand, values []uint16, table *Table) {
	n := len(values)
	for _, count := range []int{1, 2, MaxSet} {
		tables, encs := []*Table{table}, []*Encoder{NewEncoder(table, 8)}
		for len(tables) < count {
			other := randomTable(r, 2+r.IntN(MaxSymbols-1))
			for k := range other.Value { // the symbols of one number have values of their own
				other.Value[k] = uint16(3*k + len(tables))
			}
			tables, encs = append(tables, other), append(encs, NewEncoder(other, 12))
		}
		classes, syms, wanted := make([]uint8, n), make([]uint8, n), make([]uint16, n)
		for i := range classes {
			classes[i] = uint8(r.IntN(count))
			own := tables[classes[i]]
			k := r.IntN(len(own.Value))
			syms[i], wanted[i] = uint8(k), own.Value[k]
		}
		var carry [Lanes]uint16
		for i := range carry {
			carry[i] = uint16(r.Uint32())
		}
		coded := EncodeSet(nil, syms, encs, classes, &carry, nil)
		set := NewSet(tables)
		for _, tier := range []string{"generic", "avx2", ""} {
			if cpu.Use(tier) != nil {
				continue
			}
			got := make([]uint16, n)
			back, err := set.Decode(got, coded, classes)
			require.NoError(t, err)
			require.Equal(t, carry, back)
			require.Equal(t, wanted, got)
			_, err = set.Decode(got, slices.Clip(slices.Clone(coded[:len(coded)-2])), classes)
			require.Error(t, err)
			_, err = set.Decode(got, append(slices.Clone(coded), 0, 0), classes)
			require.Error(t, err)
		}
		require.NoError(t, cpu.Use(""))
	}
}

// FuzzSet compares the tiers on streams that need not be any.
func FuzzSet(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 1))
	var tables []*Table
	for range MaxSet {
		tables = append(tables, randomTable(r, 2+r.IntN(MaxSymbols-1)))
	}
	set := NewSet(tables)
	f.Add(bytes.Repeat([]byte{1}, 2000), 300, uint8(3))
	f.Add(make([]byte, 200), 40, uint8(0))
	f.Fuzz(func(t *testing.T, src []byte, n int, step uint8) {
		n = max(0, min(n, 1<<16))
		classes := make([]uint8, n)
		for i := range classes {
			classes[i] = uint8(i) * step % MaxSet
		}
		plain, other := make([]uint16, n), make([]uint16, n)
		require.NoError(t, cpu.Use("generic"))
		carry, err := set.Decode(plain, src, classes)
		for _, tier := range []string{"avx2", ""} {
			if cpu.Use(tier) != nil {
				continue
			}
			again, failed := set.Decode(other, src, classes)
			require.Equal(t, err, failed)
			if err == nil {
				require.Equal(t, carry, again)
				require.Equal(t, plain, other)
			}
		}
		require.NoError(t, cpu.Use(""))
	})
}

func FuzzDecode(f *testing.F) {
	table := randomTable(rand.New(rand.NewPCG(1, 1)), 30)
	dec := NewDecoder(table, Symbols)
	f.Add(make([]byte, 200), 40)
	f.Fuzz(func(_ *testing.T, src []byte, n int) {
		values := make([]uint16, max(0, min(n, 1<<16)))
		_, _ = decode(values, src, dec)
	})
}

func FuzzParseTable(f *testing.F) {
	f.Add((&Table{Value: []uint16{0, 1, 2}, Freq: []uint16{4000, 90, 6}}).Append(nil))
	f.Fuzz(func(t *testing.T, src []byte) {
		table, _, err := ParseTable(src, 12)
		if err == nil {
			NewDecoder(table, Symbols)
			again, _, err := ParseTable(table.Append(nil), 12)
			require.NoError(t, err)
			require.Equal(t, table, again)
		}
	})
}
