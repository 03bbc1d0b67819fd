package rans

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

// What MapWords does is what Map does with the same values.
func TestMapWords(t *testing.T) {
	eachTier(t, func(t *testing.T) {
		r := rand.New(rand.NewPCG(31, 32))
		mapped := 0
		for _, symbols := range []int{2, 3, 63, 64, 65, 255, 256} {
			for _, span := range []int{symbols, 300, 1023, 1024, 1025, 4096} {
				table := randomTable(r, symbols)
				first := r.IntN(4096 - max(span, symbols) + 1)
				at := append(r.Perm(max(span, symbols) - 2)[:symbols-2], -1, max(span, symbols)-2)
				seen := map[int]bool{}
				for _, v := range at {
					seen[first+v+1] = true
				}
				table.Value = table.Value[:0]
				for v := range 4096 {
					if seen[v] {
						table.Value = append(table.Value, uint16(v))
					}
				}
				e := NewEncoder(table, 12)
				for _, size := range []int{1, 2, 4, 8} {
					for _, n := range []int{0, 1, 63, 64, 65, 128, 191, 4096, 4097, 9000} {
						shift, bits := uint8(r.IntN(8*size)), uint8(1+r.IntN(12))
						mask := uint16(1)<<bits - 1
						src, check := fenced(n*size, r.IntN(64))
						values := make([]uint16, n)
						for i := range values {
							w := r.Uint64()
							if r.IntN(4) > 0 { // near the table
								w = uint64(first+r.IntN(span+10)) << shift
							}
							var b [8]byte
							binary.LittleEndian.PutUint64(b[:], w)
							copy(src[i*size:], b[:size])
							clear(b[size:])
							values[i] = uint16(binary.LittleEndian.Uint64(b[:])>>shift) & mask
						}
						want := make([]uint8, n)
						patches := e.Map(want, values, nil)
						got, checkGot := fenced(n, r.IntN(64))
						done, gotPatches := e.MapWords(got, src, size, shift, mask, nil)
						mapped += done
						require.LessOrEqual(t, done, n)
						k := 0
						for k < len(patches) && int(patches[k].At) < done {
							k++
						}
						name := fmt.Sprintf("%d symbols over %d, %d words of %d bytes", symbols, span, n, size)
						require.Equal(t, want[:done], got[:done], name)
						require.Equal(t, append([]Patch(nil), patches[:k]...), gotPatches, name)
						check(t)
						checkGot(t)
					}
				}
			}
		}
		if cpu.Active() >= cpu.AVX512 {
			require.Positive(t, mapped)
		}
	})
}

func BenchmarkMapWords(b *testing.B) {
	const n = 1 << 16
	r := rand.New(rand.NewPCG(33, 34))
	e := NewEncoder(randomTable(r, 64), 12)
	src, dst := make([]byte, 4*n), make([]uint8, n)
	var patches []Patch
	for _, size := range []int{1, 2, 4} {
		b.Run(fmt.Sprintf("symbols/%d/%s/64Ki", 8*size, cpu.Best()), func(b *testing.B) {
			b.SetBytes(int64(n * size))
			for b.Loop() {
				_, patches = e.MapWords(dst, src[:n*size], size, 0, 63, patches[:0])
			}
		})
	}
}
