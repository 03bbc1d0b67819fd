package planes

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSplitJoin(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, f := range []Field{
		{0, 8, 8, true}, {0, 9, 7, true}, {0, 9, 1, true}, {0, 10, 6, false}, {16, 8, 8, true},
		{8, 9, 15, true}, {0, 8, 0, false}, {5, 1, 0, false}, {0, 12, 12, true}, {48, 12, 4, true},
	} {
		words := make([]uint64, 100)
		for i := range words {
			words[i] = r.Uint64()
		}
		sym, rest := make([]uint16, 100), make([]uint16, 100)
		f.Split(sym, rest, words)
		got := make([]uint64, 100)
		f.Join(got, sym, rest)
		mask := (uint64(1)<<f.Bits() - 1) << f.Shift
		for i := range words {
			require.Equal(t, words[i]&mask, got[i], "%+v", f)
			require.Less(t, sym[i], uint16(1)<<f.Sym)
		}
	}
	// The sign becomes the lowest bit of rest, the exponent leads.
	sym, rest := make([]uint16, 1), make([]uint16, 1)
	Field{0, 8, 8, true}.Split(sym, rest, []uint64{0xbf81})
	require.Equal(t, []uint16{0x7f, 1<<1 | 1}, []uint16{sym[0], rest[0]})
}

func TestPack(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for bits := uint8(1); bits <= MaxRest; bits++ {
		for n := range 70 {
			values := make([]uint16, n)
			for i := range values {
				values[i] = uint16(r.Uint32()) & (1<<bits - 1)
			}
			packed := Pack(nil, values, bits)
			require.Len(t, packed, PackedLen(n, bits))
			got := make([]uint16, n)
			Unpack(got, packed, bits)
			require.Equal(t, values, got, "%d values of %d bits", n, bits)
		}
	}
}

func TestJoinDirect(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, size := range []int{1, 2} {
		for shift := uint8(0); shift < 4; shift++ {
			width := uint8(8*size) - shift
			for rest := uint8(0); rest < min(width, MaxRest+1); rest++ {
				if width-rest > MaxSym {
					continue
				}
				for _, rotate := range []bool{false, true} {
					if rotate && rest == 0 {
						continue // never chosen: the sign would be part of the symbol
					}
					f := Field{0, width - rest, rest, rotate}
					for n := range 40 {
						name := fmt.Sprintf("%+v, %d words of %d bytes, shift %d", f, n, size, shift)
						words := make([]uint64, n)
						for i := range words {
							words[i] = r.Uint64() & (1<<width - 1)
						}
						sym, low := make([]uint16, n), make([]uint16, n)
						f.Split(sym, low, words)
						want, got := make([]byte, n*size), make([]byte, n*size)
						Store(want, words, size, shift)
						var packed []byte
						if rest > 0 {
							packed = Pack(nil, low, rest)
						}
						f.JoinDirect(got, sym, packed, size, shift)
						require.Equal(t, want, got, name)
					}
				}
			}
		}
	}
}
