package planes

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

// cuts are parts of fields as they come up, and beyond, for words of all sizes.
func cuts() (all []Cut) {
	for _, size := range []int{1, 2, 4, 8} {
		top := uint8(8*size - 1)
		for bits := uint8(1); bits <= min(MaxRest, top); bits++ {
			for _, shift := range []uint8{0, 3, top / 2, top + 1 - bits} {
				if shift+bits <= top+1 {
					all = append(all, Cut{Size: size, Shift: shift, Bits: bits})
					all = append(all, Cut{Size: size, Shift: shift, Bits: bits, Top: top, Rotate: true})
				}
				if shift+bits < top {
					all = append(all, Cut{Size: size, Shift: shift, Bits: bits, Top: shift + bits, Rotate: true})
				}
			}
		}
	}
	return all
}

// A field cut straight out of words is what Split takes out of them.
func TestCutIsSplit(t *testing.T) {
	r := rand.New(rand.NewPCG(21, 22))
	for _, size := range []int{1, 2, 4, 8} {
		for shift := uint8(0); shift < 4; shift++ {
			width := uint8(8*size) - shift
			for rest := uint8(0); rest <= MaxRest; rest++ {
				for sym := uint8(1); sym <= MaxSym && sym+rest <= min(width, MaxBits); sym++ {
					f := Field{Shift: width - sym - rest, Sym: sym, Rest: rest, Rotate: rest > 0 && r.IntN(2) > 0}
					src, words := make([]byte, 50*size), make([]uint64, 50)
					for i := range src {
						src[i] = byte(r.Uint32())
					}
					Load(words, src, size, shift)
					wantSym, wantRest, got := make([]uint16, 50), make([]uint16, 50), make([]uint16, 50)
					f.Split(wantSym, wantRest, words)
					f.SymCut(size, shift).Values(got, src)
					require.Equal(t, wantSym, got, "%+v, %d bytes, shift %d", f, size, shift)
					if rest > 0 {
						f.RestCut(size, shift).Values(got, src)
						require.Equal(t, wantRest, got, "%+v, %d bytes, shift %d", f, size, shift)
					}
				}
			}
		}
	}
}

// Every kernel packs what the plain code does, at every length and alignment, and writes nowhere else.
func TestCutAppend(t *testing.T) {
	const guard = 0xa5
	for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
		t.Run(tier.String(), func(t *testing.T) {
			require.NoError(t, cpu.Use(tier.String()))
			defer func() { require.NoError(t, cpu.Use("")) }()
			r := rand.New(rand.NewPCG(23, 24))
			memory, out := make([]byte, 8*600+64), make([]byte, 2*600+256)
			for _, c := range cuts() {
				lengths := []int{0, 1, 31, 32, 33, 63, 64, 65, 95, 97, 128, 161, 255, 256, 289, 512, 545}
				for n := range lengths {
					n = lengths[n]
					at, to := r.IntN(64), r.IntN(64)
					src := memory[at : at+n*c.Size]
					for i := range memory {
						memory[i] = byte(r.Uint32())
					}
					values := make([]uint16, n)
					for i := range values {
						values[i] = c.At(src, i)
					}
					name := fmt.Sprintf("%+v, %d words at %d", c, n, at)
					got := make([]uint16, n)
					c.Values(got, src)
					require.Equal(t, values, got, name)
					for _, width := range []uint8{c.Bits, max(c.Bits, 8)} {
						want := Pack([]byte("head"), values, width)
						for i := range out {
							out[i] = guard
						}
						copy(out[to:], "head")
						limit := to + len(want) + 64 // what a kernel may use beyond
						packed := c.Append(out[to:to+4:limit], src, width)
						require.True(t, bytes.Equal(want, packed), name)
						require.Equal(t, bytes.Repeat([]byte{guard}, to), out[:to], name)
						require.Equal(t, bytes.Repeat([]byte{guard}, len(out)-limit), out[limit:], name)
						// Without room it finds its own, and what was there stays.
						tight := append(make([]byte, 0, 4), "head"...)
						require.True(t, bytes.Equal(want, c.Append(tight, src, width)), name)
					}
				}
			}
		})
	}
}

func TestDiffering(t *testing.T) {
	r := rand.New(rand.NewPCG(25, 26))
	for _, c := range cuts() {
		for _, n := range []int{0, 1, 2, 3, 50, 101} {
			src := make([]byte, n*c.Size)
			for i := range src {
				src[i] = byte(r.Uint32() & r.Uint32() & r.Uint32())
			}
			want := 0
			for i := range n / 2 {
				if c.At(src, i) != c.At(src, n/2+i) {
					want++
				}
			}
			require.Equal(t, want, c.Differing(src, n), "%+v, %d words", c, n)
			if want > 3 {
				require.GreaterOrEqual(t, c.Differing(src, want-2), want-2)
			}
		}
	}
}

func BenchmarkSplit(b *testing.B) {
	const n = 1 << 16
	for _, d := range []struct {
		name string
		cut  Cut
	}{
		{"bf16", Field{0, 9, 7, true}.RestCut(2, 0)},
		{"fp16", Field{0, 7, 9, true}.RestCut(2, 0)},
		{"fp32", Field{16, 9, 7, true}.RestCut(4, 0)},
		{"fp8", Field{0, 6, 2, true}.RestCut(1, 0)},
	} {
		src, dst := make([]byte, n*d.cut.Size), make([]byte, 0, 4*n)
		for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
			b.Run(fmt.Sprintf("pack/%s/%s/64Ki", d.name, tier), func(b *testing.B) {
				require.NoError(b, cpu.Use(tier.String()))
				defer func() { require.NoError(b, cpu.Use("")) }()
				b.SetBytes(int64(len(src)))
				for b.Loop() {
					dst = d.cut.Append(dst[:0], src, d.cut.Bits)
				}
			})
		}
	}
	src, dst := make([]byte, 64<<20), make([]byte, 64<<20)
	b.Run("pack/memcpy/64Mi", func(b *testing.B) {
		b.SetBytes(int64(len(src)))
		for b.Loop() {
			copy(dst, src)
		}
	})
}
