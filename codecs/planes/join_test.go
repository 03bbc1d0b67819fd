package planes

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

func random(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = uint8(r.Uint32())
	}
	return b
}

func TestJoin32(t *testing.T) {
	defer func() { require.NoError(t, cpu.Use("")) }()
	r := rand.New(rand.NewPCG(7, 8))
	for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
		require.NoError(t, cpu.Use(tier.String()))
		for n := range 200 {
			upper, mid, low := random(r, 2*n+r.IntN(3)), random(r, n), random(r, n+r.IntN(3))
			at, past := r.IntN(65), n%2 == 0
			out := bytes.Repeat([]byte{0xa5}, at+4*n+100)
			Join32(out[at:at+4*n], upper, mid, low, past)
			for i := range n {
				want := uint32(binary.LittleEndian.Uint16(upper[2*i:]))<<16 | uint32(mid[i])<<8 | uint32(low[i])
				require.Equal(t, want, binary.LittleEndian.Uint32(out[at+4*i:]))
			}
			for _, v := range append(bytes.Clone(out[:at]), out[at+4*n:]...) {
				require.EqualValues(t, 0xa5, v)
			}
		}
	}
}

func BenchmarkJoin32(b *testing.B) {
	const n = 1 << 12
	dst, upper, mid, low := make([]byte, 4*n), make([]byte, 2*n), make([]byte, n), make([]byte, n)
	for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
		require.NoError(b, cpu.Use(tier.String()))
		b.Run(tier.String()+"/16KiB", func(b *testing.B) {
			b.SetBytes(4 * n)
			for b.Loop() {
				Join32(dst, upper, mid, low, false)
			}
		})
	}
	require.NoError(b, cpu.Use(""))
}
