package rans

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

// encodeTruth is the coder symbol by symbol.
func encodeTruth(symbols []uint8, e *Encoder, carry *[Lanes]uint16) []byte {
	c := start(carry, 2*len(symbols), nil)
	for i := len(symbols) - 1; i >= 0; i-- {
		c.put(i%Lanes, e, symbols[i])
	}
	return c.finish(nil)
}

// extremes are tables at the edges of what a table can be, and random ones.
func extremes(r *rand.Rand) map[string]*Table {
	tables := map[string]*Table{}
	for _, n := range []int{2, 3, 31, 63, 64, 65, 128, 129, 255, 256} {
		one := &Table{}
		for v := range n {
			one.Value, one.Freq = append(one.Value, uint16(v)), append(one.Freq, 1)
		}
		for at, name := range map[int]string{0: "first", n / 2: "middle", n - 1: "last"} {
			t := &Table{one.Value, append([]uint16(nil), one.Freq...)}
			t.Freq[at] = uint16(Slots - n + 1)
			tables[fmt.Sprintf("%d, all in the %s", n, name)] = t
		}
		for i := range 6 {
			tables[fmt.Sprintf("%d, random %d", n, i)] = randomTable(r, n)
		}
		even := &Table{one.Value, make([]uint16, n)}
		for i := range even.Freq {
			even.Freq[i] = uint16(Slots/n + boolInt(i < Slots%n))
		}
		tables[fmt.Sprintf("%d, even", n)] = even
	}
	return tables
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// drawn are symbols as often as the table thinks, or, for one in eight, any symbols: states then are extreme too.
func drawn(r *rand.Rand, t *Table, n int) []uint8 {
	var slot []uint8
	for s, f := range t.Freq {
		slot = append(slot, bytes.Repeat([]byte{uint8(s)}, int(f))...)
	}
	out := make([]uint8, n)
	anything := r.IntN(8) == 0
	for i := range out {
		if out[i] = slot[r.IntN(Slots)]; anything {
			out[i] = uint8(r.IntN(len(t.Freq)))
		}
	}
	return out
}

// fenced is n bytes at an offset from an aligned address, with guards around.
func fenced(n, offset int) (inner []byte, check func(t *testing.T)) {
	all := bytes.Repeat([]byte{guard}, n+192)
	inner = all[64+offset : 64+offset+n : 64+offset+n]
	return inner, func(t *testing.T) {
		t.Helper()
		for i, b := range all {
			if (i < 64+offset || i >= 64+offset+n) && b != guard {
				t.Fatalf("byte %d outside of %d at %d is written", i-64-offset, n, offset)
			}
		}
	}
}

func TestEncodeIsTheTruth(t *testing.T) {
	eachTier(t, func(t *testing.T) {
		r := rand.New(rand.NewPCG(11, 12))
		lengths := []int{1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 161, 1000, 4096, 4129}
		for name, table := range extremes(r) {
			e := NewEncoder(table, 8)
			for i, n := range lengths {
				m := lengths[(i+r.IntN(len(lengths)))%len(lengths)]
				var all [SideBySide]Stream
				var streams []*Stream
				var want [][]byte
				var checks []func(*testing.T)
				for k, n := range []int{n, m, n, m}[:1+r.IntN(SideBySide)] {
					var carry [Lanes]uint16
					for i := range carry {
						carry[i] = uint16(r.Uint32())
					}
					symbols, check1 := fenced(n, r.IntN(64))
					copy(symbols, drawn(r, table, n))
					scratch, check2 := fenced(2*n+2*Lanes, r.IntN(64))
					coded, check3 := fenced(2*n+StateBytes, r.IntN(64))
					all[k] = Stream{symbols, carry, coded[:0], scratch}
					streams = append(streams, &all[k])
					checks = append(checks, check1, check2, check3)
					want = append(want, encodeTruth(symbols, e, &carry))
				}
				e.Encode(streams...)
				for k, s := range streams {
					require.True(t, bytes.Equal(want[k], s.Coded), "%s: %d symbols, stream %d of %d", name, len(s.Symbols), k, len(streams))
				}
				for _, check := range checks {
					check(t)
				}
			}
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	r := rand.New(rand.NewPCG(7, 8))
	const n = 1 << 16
	for _, symbols := range []int{30, 64, 256} {
		values := normal(r, n, symbols, float64(symbols)/10)
		table, _ := Build(histogram(values, 256), symbols, 32)
		e := NewEncoder(table, 8)
		var all [SideBySide]Stream
		for i := range all {
			s := &all[i]
			s.Symbols, s.Scratch, s.Coded = make([]uint8, n), make([]byte, 2*n+2*Lanes), make([]byte, 0, 3*n)
			e.Map(s.Symbols, values, nil)
		}
		for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
			for streams := 1; streams <= SideBySide; streams++ {
				b.Run(fmt.Sprintf("%d-symbols/%s/%dx64Ki", symbols, tier, streams), func(b *testing.B) {
					require.NoError(b, cpu.Use(tier.String()))
					defer func() { require.NoError(b, cpu.Use("")) }()
					b.SetBytes(int64(2 * n * streams)) // as of BF16
					for b.Loop() {
						var which []*Stream
						for i := range streams {
							all[i].Coded = all[i].Coded[:0]
							which = append(which, &all[i])
						}
						e.Encode(which...)
					}
				})
			}
		}
	}
	b.Run("memcpy/64Mi", func(b *testing.B) {
		src, dst := make([]byte, 64<<20), make([]byte, 64<<20)
		b.SetBytes(64 << 20)
		for b.Loop() {
			copy(dst, src)
		}
	})
}
