package codecs

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/zeebo/xxh3"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

// seeds are tensors of the kinds that codecs tell apart.
func seeds() map[DType][][]byte {
	r := rand.New(rand.NewPCG(7, 8))
	spiky := weights(r, BF16, 900, .02)
	for i := 0; i < len(spiky); i += 37 {
		spiky[i] ^= 0x55
	}
	return map[DType][][]byte{
		BF16: {weights(r, BF16, 700, .02), spiky}, F16: {weights(r, F16, 300, 1)}, F32: {weights(r, F32, 300, 1), make([]byte, 400)},
		F64: {weights(r, F64, 50, 1)}, F8E4M3: {weights(r, F8E4M3, 500, 1)}, C64: {weights(r, C64, 60, 1)},
		U8: {[]byte("aaaabbbbcccc"), bytes.Repeat([]byte("zstd likes this. "), 40)}, I64: {bytes.Repeat([]byte{1, 0, 0, 0, 0, 0, 0, 0}, 30)},
	}
}

// onEveryTier runs f with each set of kernels that this machine has and returns what it gave; all must give the same.
func onEveryTier[T any](t *testing.T, f func() (T, error)) (first T, err error) {
	t.Helper()
	defer func() { require.NoError(t, cpu.Use("")) }()
	for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
		require.NoError(t, cpu.Use(tier.String()))
		got, e := f()
		if tier == cpu.Generic {
			first, err = got, e
			continue
		}
		require.Equal(t, err == nil, e == nil, "plain Go: %v, %s: %v", err, tier, e)
		if err == nil {
			require.Equal(t, first, got, "%s", tier)
			continue
		}
		var a, b *Error
		require.Equal(t, errors.As(err, &a), errors.As(e, &b))
		if a != nil {
			require.Equal(t, a.Kind, b.Kind, "plain Go: %v, %s: %v", err, tier, e)
		}
	}
	return first, err
}

// FuzzPayload decodes payloads whose checksums are right, so that everything behind them is reached, with all kernels.
func FuzzPayload(f *testing.F) {
	for d, raws := range seeds() {
		for _, raw := range raws {
			for _, mode := range []Mode{Balanced, Inference, Storage} {
				e, err := NewEncoding(tensorOf(d, raw, mode, uint64(len(raw)/(max(d.Bits(), 8)/8))))
				require.NoError(f, err)
				payload, _, err := encodeAll(e)
				require.NoError(f, err)
				f.Add(payload, uint8(d), uint16(len(raw)))
			}
			delta := tensorOf(d, raw, Balanced, uint64(len(raw)/(max(d.Bits(), 8)/8)))
			base := bytes.Clone(raw)
			base[0] ^= 1
			delta.Base = bytes.NewReader(base)
			e, err := NewDelta(delta)
			require.NoError(f, err)
			payload, _, err := encodeAll(e)
			require.NoError(f, err)
			f.Add(payload, uint8(d), uint16(len(raw)))
		}
	}
	for _, d := range []DType{BF16, F32, F8E5M2} {
		raw := scaled(rand.New(rand.NewPCG(9, 10)), d, 96, 96, true)
		e, err := NewEncoding(tensorOf(d, raw, Storage, 96, 96))
		require.NoError(f, err)
		require.NotNil(f, e.scales)
		payload, _, err := encodeAll(e)
		require.NoError(f, err)
		f.Add(payload, uint8(d), uint16(len(raw)))
	}
	f.Fuzz(func(t *testing.T, payload []byte, d uint8, rawLen uint16) {
		if !DType(d).Valid() || len(payload) < HeadFixed {
			return
		}
		n := HeadLen(payload)
		if n < 0 || n > int64(len(payload)) {
			return
		}
		head := bytes.Clone(payload[:n])
		p, err := ParseHead(head, xxh3.Hash(head), DType(d), int64(rawLen), int64(len(payload)))
		if err != nil {
			return
		}
		base := make([]byte, p.BlockBytes())
		for i := range base {
			base[i] = byte(i * 7)
		}
		for i := range p.Blocks() {
			off, length := p.BlockSpan(i)
			lo := int64(i) * p.BlockBytes()
			size := min(p.BlockBytes(), int64(rawLen)-lo)
			src := payload[off : off+length]
			p.hash[i] = xxh3.Hash(src)
			_, _ = onEveryTier(t, func() ([]byte, error) {
				dst := make([]byte, size)
				err := p.DecodeBlocks(i, dst, src, base[:size], NewScratch())
				return dst, err
			})
		}
	})
}

// FuzzEncode compresses any bytes as any dtype: all kernels write the same, and it decodes to what it was.
func FuzzEncode(f *testing.F) {
	for d, raws := range seeds() {
		for i, raw := range raws {
			f.Add(raw, uint8(d), uint8(i), uint8(10))
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte, d, mode, columns uint8) {
		dt := DType(d)
		if !dt.Valid() || len(raw) > 1<<18 {
			return
		}
		size := max(dt.Bits()/8, 1)
		raw = raw[:len(raw)/size*size]
		if len(raw) == 0 {
			return
		}
		shape := []uint64{uint64(len(raw) / size)}
		if c := uint64(columns); c > 1 && shape[0]%c == 0 {
			shape = []uint64{shape[0] / c, c}
		}
		sum := uint64(0)
		payload, err := onEveryTier(t, func() ([]byte, error) {
			e, err := NewEncoding(tensorOf(dt, raw, Mode(mode)%EndMode, shape...))
			if err != nil {
				return nil, err
			}
			var payload []byte
			payload, sum, err = encodeAll(e)
			return payload, err
		})
		require.NoError(t, err)
		got, err := decodeAll(payload, sum, dt, int64(len(raw)), nil)
		require.NoError(t, err)
		require.True(t, bytes.Equal(raw, got))
	})
}

// FuzzDelta codes the difference of any bytes to any others: it gives them back, and with another base something else or an
// error, but no fault.
func FuzzDelta(f *testing.F) {
	for d, raws := range seeds() {
		for _, raw := range raws {
			base := bytes.Clone(raw)
			for i := 3; i < len(base); i += 11 {
				base[i]++
			}
			f.Add(raw, base, uint8(d))
		}
	}
	f.Fuzz(func(t *testing.T, raw, base []byte, d uint8) {
		dt := DType(d)
		if !dt.Valid() || dt.Bits() < 8 {
			return
		}
		size := dt.Bits() / 8
		n := min(len(raw), len(base), 1<<18) / size * size
		if n == 0 {
			return
		}
		raw, base = raw[:n], base[:n]
		sum := uint64(0)
		payload, err := onEveryTier(t, func() ([]byte, error) {
			tensor := tensorOf(dt, raw, Balanced, uint64(n/size))
			tensor.Base = bytes.NewReader(base)
			e, err := NewDelta(tensor)
			if err != nil {
				return nil, err
			}
			var payload []byte
			payload, sum, err = encodeAll(e)
			return payload, err
		})
		require.NoError(t, err)
		got, err := decodeAll(payload, sum, dt, int64(n), base)
		require.NoError(t, err)
		require.True(t, bytes.Equal(raw, got))
		other := bytes.Clone(base)
		for i := range other {
			other[i] ^= byte(i)
		}
		_, _ = onEveryTier(t, func() ([]byte, error) { return decodeAll(payload, sum, dt, int64(n), other) })
	})
}
