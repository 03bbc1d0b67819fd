package md5

import (
	"crypto/md5"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

// everyTier runs a test once for each set of kernels this machine and build has.
func everyTier(t *testing.T, f func(t *testing.T)) {
	defer func() { require.NoError(t, cpu.Use("")) }()
	for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
		require.NoError(t, cpu.Use(tier.String()))
		t.Run(tier.String(), f)
	}
}

func random(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// digest writes messages piece by piece, as many of each as pieces says, and compares with crypto/md5.
func digest(t *testing.T, b *Batch, messages [][]byte, least int, piece func(left int) int) {
	t.Helper()
	digests, d := make([]Digest, len(messages)), make([]*Digest, len(messages))
	rest, taken := make([][]byte, len(messages)), make([]int, len(messages))
	for i := range d {
		digests[i] = New()
		d[i] = &digests[i]
	}
	for {
		left := 0
		for i, m := range messages {
			rest[i] = m[taken[i]:][:piece(len(m)-taken[i])]
			left = max(left, (len(m)-taken[i])/BlockSize)
		}
		if left == 0 {
			break
		}
		before := make([]int, len(rest))
		for i := range rest {
			before[i] = len(rest[i])
		}
		b.Write(d, rest, least)
		moved, busy := false, 0
		for i := range rest {
			moved = moved || len(rest[i]) < before[i]
			taken[i] += before[i] - len(rest[i])
			if len(rest[i]) >= BlockSize {
				busy++
			}
		}
		require.Less(t, busy, max(least, 1))
		if !moved {
			least = 1
		}
	}
	for i, m := range messages {
		require.Equal(t, md5.Sum(m), b.Sum(d[i], m[taken[i]:]), "message %d of %d, %d bytes", i, len(messages), len(m))
	}
}

func whole(left int) int { return left }

func TestEveryLength(t *testing.T) {
	everyTier(t, func(t *testing.T) {
		r, b := rand.New(rand.NewPCG(1, 1)), NewBatch()
		for n := range 301 {
			messages := make([][]byte, Lanes)
			for i := range messages {
				messages[i] = random(r, n+i)[i:] // unaligned
			}
			digest(t, b, messages, 1, whole)
		}
	})
}

func TestEveryNumberOfMessages(t *testing.T) {
	everyTier(t, func(t *testing.T) {
		r, b := rand.New(rand.NewPCG(2, 2)), NewBatch()
		for n := range 41 {
			for _, longest := range []int{64, 200, 5000, 100_000} {
				messages := make([][]byte, n)
				for i := range messages {
					messages[i] = random(r, r.IntN(longest+1))
				}
				digest(t, b, messages, 1+r.IntN(Lanes), whole)
				digest(t, b, messages, 1+r.IntN(Lanes), func(left int) int { return r.IntN(left + 1) })
			}
		}
	})
}

// A lane ends where its block does: the bytes around a message are of no account, and stay.
func TestNeighbours(t *testing.T) {
	everyTier(t, func(t *testing.T) {
		r, b := rand.New(rand.NewPCG(3, 3)), NewBatch()
		all := random(r, 64*1024)
		for at := range 130 {
			messages := make([][]byte, 17)
			for i := range messages {
				messages[i] = all[at+3000*i:][:2900-61*i]
			}
			digest(t, b, messages, 1, whole)
		}
	})
}

func TestWriteAllocatesNothing(t *testing.T) {
	everyTier(t, func(t *testing.T) {
		b, m := NewBatch(), make([]byte, 1000)
		digests, d, p := make([]Digest, 20), make([]*Digest, 20), make([][]byte, 20)
		require.Zero(t, testing.AllocsPerRun(10, func() {
			for i := range d {
				digests[i] = New()
				d[i], p[i] = &digests[i], m
			}
			b.Write(d, p, 1)
			for i := range d {
				b.Sum(d[i], p[i])
			}
		}))
	})
}

func BenchmarkSums(b *testing.B) {
	src := random(rand.New(rand.NewPCG(4, 4)), Lanes<<20)
	row := func(name string, f func()) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(src)))
			for b.Loop() {
				f()
			}
		})
	}
	dst := make([]byte, len(src))
	row("memcpy/16x1MiB", func() { copy(dst, src) })
	row("crypto-md5/16x1MiB", func() { md5.Sum(src) })
	defer func() { require.NoError(b, cpu.Use("")) }()
	for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
		require.NoError(b, cpu.Use(tier.String()))
		for _, piece := range []int{32 << 10, 1 << 20} {
			batch, digests, d, p := NewBatch(), make([]Digest, Lanes), make([]*Digest, Lanes), make([][]byte, Lanes)
			row(fmt.Sprintf("md5/16x1MiB/%s/%dKiB", tier, piece>>10), func() {
				for i := range d {
					digests[i] = New()
					d[i] = &digests[i]
				}
				for at := 0; at < 1<<20; at += piece {
					for i := range p {
						p[i] = src[i<<20+at:][:piece]
					}
					batch.Write(d, p, 1)
				}
			})
		}
	}
}
