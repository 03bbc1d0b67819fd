package codecs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs/cpu"
)

// serial is a Run on one goroutine.
func serial(n int, f func(int, *Scratch) error) error {
	s := NewScratch()
	for i := range n {
		if err := f(i, s); err != nil {
			return err
		}
	}
	return nil
}

// threads is a Run on eight goroutines, in reverse order.
func threads(n int, f func(int, *Scratch) error) error {
	var wg sync.WaitGroup
	errs := make([]error, n)
	next := make(chan int)
	for range 8 {
		wg.Go(func() {
			s := NewScratch()
			for i := range next {
				errs[i] = f(i, s)
			}
		})
	}
	for i := n - 1; i >= 0; i-- {
		next <- i
	}
	close(next)
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// encodeAll is the whole payload of a tensor.
func encodeAll(e *Encoding) ([]byte, uint64, error) {
	var body []byte
	groups := make([]Index, e.Groups())
	s := NewScratch()
	var err error
	for g := range groups {
		var group []byte
		if group, groups[g], err = e.AppendGroup(nil, g, s); err != nil {
			return nil, 0, err
		}
		if g == len(groups)-1 {
			group = e.Seal(group, groups[g], int64(e.HeadLen()+len(body)))
		}
		body = append(body, group...)
	}
	head, sum := e.Head(groups)
	return append(head, body...), sum, nil
}

// decodeAll reads a payload as a stranger would.
func decodeAll(payload []byte, sum uint64, d DType, rawLen int64, base []byte) ([]byte, error) {
	if len(payload) < HeadFixed {
		return nil, corrupt("short")
	}
	n := HeadLen(payload)
	if n < 0 || n > int64(len(payload)) {
		return nil, corrupt("head of %d bytes", n)
	}
	p, err := ParseHead(payload[:n], sum, d, rawLen, int64(len(payload)))
	if err != nil {
		return nil, err
	}
	out := make([]byte, rawLen)
	s := NewScratch()
	for i, run := 0, 1; i < p.Blocks(); i, run = i+run, run%GroupBlocks+1 {
		run = min(run, GroupBlocks-i%GroupBlocks, p.Blocks()-i)
		off, _ := p.BlockSpan(i)
		end, length := p.BlockSpan(i + run - 1)
		lo := int64(i) * p.BlockBytes()
		hi := min(lo+int64(run)*p.BlockBytes(), rawLen)
		var b []byte
		if base != nil {
			b = base[lo:hi]
		}
		if err := p.DecodeBlocks(i, out[lo:hi], payload[off:end+length], b, s); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func tensorOf(d DType, raw []byte, mode Mode, shape ...uint64) *Tensor {
	return &Tensor{DType: d, Shape: shape, Bytes: int64(len(raw)), Src: bytes.NewReader(raw), Mode: mode, Run: serial}
}

// roundTrip encodes, decodes and compares. Tensors without elements have no payload: core leaves them out.
func roundTrip(t *testing.T, tensor *Tensor, raw, base []byte) (size int, codec string) {
	t.Helper()
	choose := NewEncoding
	if base != nil {
		tensor.Base = bytes.NewReader(base)
		choose = NewDelta
	}
	e, err := choose(tensor)
	require.NoError(t, err)
	payload, sum, err := encodeAll(e)
	require.NoError(t, err)
	defer func() { require.NoError(t, cpu.Use("")) }()
	for tier := cpu.Generic; tier < cpu.Best(); tier++ {
		require.NoError(t, cpu.Use(tier.String()))
		got, err := decodeAll(payload, sum, tensor.DType, int64(len(raw)), base)
		require.NoError(t, err)
		require.True(t, bytes.Equal(raw, got), "%s", tier)
	}
	require.NoError(t, cpu.Use(""))
	got, err := decodeAll(payload, sum, tensor.DType, int64(len(raw)), base)
	require.NoError(t, err)
	require.True(t, bytes.Equal(raw, got))
	parallel := *tensor
	parallel.Run = threads
	again, err := choose(&parallel)
	require.NoError(t, err)
	other, sum2, err := encodeAll(again)
	require.NoError(t, err)
	require.Equal(t, sum, sum2)
	require.True(t, bytes.Equal(payload, other), "bytes depend on the number of threads")
	id, _ := e.Codec()
	require.LessOrEqual(t, len(payload), len(raw)+24+64*max(1, e.blocks())+Align+8)
	return len(payload), id
}

// weights are normal numbers as floats of the dtype, little-endian.
func weights(r *rand.Rand, d DType, n int, sd float64) []byte {
	out := make([]byte, 0, 8*n)
	for range n {
		x := r.NormFloat64() * sd
		switch d {
		case F64:
			out = binary.LittleEndian.AppendUint64(out, math.Float64bits(x))
		case F32, C64:
			out = binary.LittleEndian.AppendUint32(out, math.Float32bits(float32(x)))
		case BF16:
			out = binary.LittleEndian.AppendUint16(out, uint16(math.Float32bits(float32(x))>>16))
		case F16:
			h, _ := toHalf(math.Float32bits(float32(x)) &^ 0x1fff)
			out = binary.LittleEndian.AppendUint16(out, h)
		default:
			v := uint64(int64(x / sd * 30))
			out = append(out, binary.LittleEndian.AppendUint64(nil, v)[:dtypes[d].word]...)
		}
	}
	return out
}

func TestRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for d := Bool; d < endDType; d++ {
		for _, mode := range []Mode{Balanced, Inference, Storage} {
			for _, n := range []int{1, 2, 31, 33, 1000, 4096, BlockWords, 5*BlockWords + 77} {
				if n > 4096 && mode != Balanced && testing.Short() {
					continue
				}
				t.Run(fmt.Sprintf("%s/%d/%d", d, mode, n), func(t *testing.T) {
					raw := weights(r, d, n, .02)
					roundTrip(t, tensorOf(d, raw, mode, uint64(n)), raw, nil)
				})
			}
		}
	}
}

// Values that no table holds are patched into words of every form; some are in the lanes, some in the list.
func TestPatches(t *testing.T) {
	r := rand.New(rand.NewPCG(15, 16))
	const n = 2*BlockWords + 99
	for _, d := range []DType{BF16, F16, F32, F8E4M3, F8E5M2} {
		for _, rare := range []int{40, 3000, 30_000} {
			word := dtypes[d].word
			raw := weights(r, d, n, .02)
			for i := range n {
				if r.IntN(rare) == 0 {
					for k := range word {
						raw[i*word+k] = uint8(r.Uint32())
					}
				}
			}
			for _, mode := range []Mode{Balanced, Inference} {
				roundTrip(t, tensorOf(d, raw, mode, n), raw, nil)
			}
		}
	}
	for _, zeros := range []uint32{0x1fff, 0x7fff} { // binary16 in binary32, all of its bits or only some in use
		half := make([]byte, 0, 4*n)
		for range n {
			h, _ := toHalf(math.Float32bits(float32(r.NormFloat64()*.01)) &^ zeros)
			if r.IntN(3000) == 0 {
				h = uint16(r.Uint32()) &^ uint16(zeros>>13)
			}
			half = binary.LittleEndian.AppendUint32(half, fromHalf(h))
		}
		size, _ := roundTrip(t, tensorOf(F32, half, Balanced, n), half, nil)
		require.Less(t, size, n*2)
	}
}

// Files do not depend on the CPU: every tier writes the same bytes, whatever the block's length.
func TestTiersWriteTheSame(t *testing.T) {
	r := rand.New(rand.NewPCG(11, 12))
	for _, d := range []DType{BF16, F16, F32, F64, F8E4M3, F8E5M2, U8, I32, I64} {
		for _, n := range []int{1, 33, 700, 5000, BlockWords - 1, BlockWords + 40, 4*BlockWords + 1, 6*BlockWords + 6021} {
			raw := weights(r, d, n, .02)
			for i := range raw { // rare values, and parts that differ
				if r.IntN(500) == 0 {
					raw[i] = byte(r.Uint32())
				} else if i > len(raw)/2 && d == BF16 && i%2 == 1 {
					raw[i]++
				}
			}
			var base []byte
			if d == BF16 && n > 100 {
				base = bytes.Clone(raw)
				for i := 0; i < len(base); i += 20 {
					base[i] ^= 1
				}
			}
			for _, mode := range []Mode{Balanced, Inference, Storage} {
				var want []byte
				for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
					require.NoError(t, cpu.Use(tier.String()))
					tensor, choose := tensorOf(d, raw, mode, uint64(n)), NewEncoding
					if base != nil && mode == Storage {
						tensor.Base, choose = bytes.NewReader(base), NewDelta
					}
					e, err := choose(tensor)
					require.NoError(t, err)
					got, _, err := encodeAll(e)
					require.NoError(t, err)
					if want == nil {
						want = got
					}
					require.True(t, bytes.Equal(want, got), "%s, mode %d, %d words: %s", d, mode, n, tier)
				}
				require.NoError(t, cpu.Use(""))
			}
		}
	}
}

// What is counted once and kept is what counting again finds.
func TestCountsAreKept(t *testing.T) {
	r := rand.New(rand.NewPCG(13, 14))
	for _, d := range []DType{BF16, F16, F32, F64, U16, I32} {
		raw := weights(r, d, 9*BlockWords+123, .02)
		e := &Encoding{tensor: tensorOf(d, raw, Balanced, 9*BlockWords+123)}
		e.word, e.words = dtypes[d].word, uint64(len(raw)/dtypes[d].word)
		upper, lowBytes := e.layout(dtypes[d].exp)
		sets, err := e.count(upper, lowBytes)
		require.NoError(t, err)
		s, total := NewScratch(), &hist{}
		for g := range e.groups() {
			again, kept, truth := &hist{}, &hist{}, &hist{}
			require.NoError(t, e.countGroup(g, again, s))
			for b := g * GroupBlocks; b < min((g+1)*GroupBlocks, e.blocks()); b++ {
				words, err := e.load(b, s)
				require.NoError(t, err)
				for _, w := range words {
					truth.top[w>>(upper.Shift+upper.Rest)&(1<<upper.Sym-1)]++
					for i := range lowBytes {
						truth.low[i][uint8(w>>(8*i))]++
					}
				}
			}
			require.Equal(t, truth, again)
			require.NotNil(t, e.counted.groups[g])
			require.NoError(t, e.countsOf(g, kept, s))
			require.Equal(t, again, kept)
			total.add(again)
			e.counted.groups[g] = nil // as where there are too many
			require.NoError(t, e.countsOf(g, kept, s))
			require.Equal(t, again, kept)
		}
		for _, h := range sets {
			for i, c := range h.top {
				total.top[i] -= c
			}
			for i := range h.low {
				for v, c := range h.low[i] {
					total.low[i][v] -= c
				}
			}
		}
		require.Equal(t, &hist{}, total)
	}
}

func TestCodecsAreChosen(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	const n = 100_000
	gauss := weights(r, BF16, n, .02)
	size, codec := roundTrip(t, tensorOf(BF16, gauss, Balanced, n), gauss, nil)
	require.Equal(t, CodecPlanes, codec)
	require.Less(t, size, 2*n*67/100)

	noise := make([]byte, 2*n)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	_, codec = roundTrip(t, tensorOf(BF16, noise, Balanced, n), noise, nil)
	require.Equal(t, CodecStored, codec)

	few := make([]byte, 0, 4*n)
	for range n {
		few = binary.LittleEndian.AppendUint32(few, []uint32{0, 0x3f800000, 0xdeadbeef}[r.IntN(3)])
	}
	size, codec = roundTrip(t, tensorOf(F32, few, Balanced, n), few, nil)
	require.Equal(t, CodecLowcard, codec)
	require.Less(t, size, n*21/100)

	zero := make([]byte, 8*n)
	size, codec = roundTrip(t, tensorOf(F64, zero, Balanced, n), zero, nil)
	require.Equal(t, CodecLowcard, codec)
	require.Less(t, size, 256)

	rows := make([]byte, 0, 4*n)
	for i := range n {
		x := math.Sin(float64(i/500)/70+float64(i%500)) + r.NormFloat64()*1e-6
		rows = binary.LittleEndian.AppendUint32(rows, math.Float32bits(float32(x)))
	}
	_, codec = roundTrip(t, tensorOf(F32, rows, Balanced, n/500, 500), rows, nil)
	require.Equal(t, CodecRowDelta, codec)

	half := make([]byte, 0, 4*n)
	for _, w := range []uint32{0, 1 << 31, 0x7f800000, 0xff802000, 0x33800000, 0xb8000000} {
		half = binary.LittleEndian.AppendUint32(half, w)
	}
	for range n {
		h, _ := toHalf(math.Float32bits(float32(r.NormFloat64()*.01)) &^ 0x1fffff)
		half = binary.LittleEndian.AppendUint32(half, fromHalf(h))
	}
	size, _ = roundTrip(t, tensorOf(F32, half, Balanced, n+6), half, nil)
	require.Less(t, size, n*2)

	ids := make([]byte, 0, 8*n)
	for i := range n {
		ids = binary.LittleEndian.AppendUint64(ids, uint64(i))
	}
	size, _ = roundTrip(t, tensorOf(I64, ids, Balanced, n), ids, nil)
	require.Less(t, size, n/10)

	tuned := bytes.Clone(gauss)
	for i := range n {
		if r.IntN(10) == 0 {
			tuned[2*i] ^= 1
		}
	}
	size, codec = roundTrip(t, tensorOf(BF16, tuned, Balanced, n), tuned, gauss)
	require.Equal(t, CodecDelta, codec)
	require.Less(t, size, n/8)
}

func TestHalfIsExact(t *testing.T) {
	for h := range 1 << 16 {
		got, ok := toHalf(fromHalf(uint16(h)))
		require.True(t, ok)
		require.Equal(t, uint16(h), got)
	}
	for _, w := range []uint32{1, 0x3f800001, 0x7f800001, 0x477fffff, 0x33000000, 0x47800000, 0x38800001} {
		_, ok := toHalf(w)
		require.False(t, ok, "%08x", w)
	}
}

func TestOrderedAscends(t *testing.T) {
	for w := range uint64(1 << 16) {
		require.Equal(t, w, unordered(ordered(w, 16), 16))
	}
	require.Less(t, ordered(0xbf80, 16), ordered(0x8000, 16))
	require.Less(t, ordered(0x0000, 16), ordered(0x3f80, 16))
	for _, width := range []uint{8, 16, 32, 64} {
		for _, d := range []uint64{0, 1, 2, ^uint64(0), 1 << (width - 1)} {
			require.Equal(t, d&(^uint64(0)>>(64-width)), unzigzag(zigzag(d, width), width))
		}
	}
}

// Every single-bit flip and every cut of a payload is an error or gives the same bytes.
func TestDamageIsNoticed(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	raw := weights(r, BF16, 700, .02)
	e, err := NewEncoding(tensorOf(BF16, raw, Storage, 700))
	require.NoError(t, err)
	payload, sum, err := encodeAll(e)
	require.NoError(t, err)
	for i := range 8 * len(payload) {
		bad := bytes.Clone(payload)
		bad[i/8] ^= 1 << (i % 8)
		_, err := decodeAll(bad, sum, BF16, int64(len(raw)), nil)
		require.Error(t, err, "bit %d", i)
	}
	for i := range payload {
		_, err := decodeAll(payload[:i], sum, BF16, int64(len(raw)), nil)
		require.Error(t, err)
	}
}

// Names are operation/dtype/mode/tier/size; memcpy has caches that hold all of it, as they have.
func BenchmarkTensor(b *testing.B) {
	defer func() { require.NoError(b, cpu.Use("")) }()
	r := rand.New(rand.NewPCG(9, 9))
	const n = 1 << 20
	modes := map[Mode]string{Inference: "inference", Balanced: "balanced", Storage: "storage"}
	for _, d := range []DType{BF16, F16, F32, F8E4M3} {
		raw := weights(r, d, n, .02)
		for _, mode := range []Mode{Inference, Balanced, Storage} {
			e, err := NewEncoding(tensorOf(d, raw, mode, n))
			require.NoError(b, err)
			payload, sum, err := encodeAll(e)
			require.NoError(b, err)
			p, err := ParseHead(payload[:e.HeadLen()], sum, d, int64(len(raw)), int64(len(payload)))
			require.NoError(b, err)
			for tier := cpu.Generic; tier <= cpu.Best(); tier++ {
				require.NoError(b, cpu.Use(tier.String()))
				name := fmt.Sprintf("%s/%s/%s/%dMiB", d, modes[mode], tier, len(raw)>>20)
				b.Run("decode/"+name, func(b *testing.B) {
					dst, s := make([]byte, len(raw)), NewScratch()
					b.SetBytes(int64(len(raw)))
					b.ReportMetric(float64(len(payload))/float64(len(raw))*100, "%")
					for b.Loop() {
						for i := 0; i < p.Blocks(); i += GroupBlocks {
							off, _ := p.BlockSpan(i)
							end, length := p.BlockSpan(i + GroupBlocks - 1)
							lo := int64(i) * p.BlockBytes()
							if err := p.DecodeBlocks(i, dst[lo:lo+GroupBlocks*p.BlockBytes()], payload[off:end+length], nil, s); err != nil {
								b.Fatal(err)
							}
						}
					}
				})
				b.Run("encode/"+name, func(b *testing.B) {
					b.SetBytes(int64(len(raw)))
					for b.Loop() {
						e, err := NewEncoding(tensorOf(d, raw, mode, n))
						if err != nil {
							b.Fatal(err)
						}
						if _, _, err := encodeAll(e); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
	b.Run("memcpy/2MiB", func(b *testing.B) {
		src, dst := make([]byte, 2<<20), make([]byte, 2<<20)
		b.SetBytes(2 << 20)
		for b.Loop() {
			copy(dst, src)
		}
	})
}

// Floats whose single bytes repeat, though whole words do not, are cut into bytes for zstd.
func TestRepeatedBytesOfFloats(t *testing.T) {
	r := rand.New(rand.NewPCG(31, 32))
	for _, d := range []DType{BF16, F16, F32} {
		word := dtypes[d].word
		raw := weights(r, d, 90_000, .02)
		for i := range raw {
			if i%word < word-1 { // all but the upper byte has a period
				raw[i] = raw[i%(700*word)]
			}
		}
		size, codec := roundTrip(t, tensorOf(d, raw, Balanced, 90_000), raw, nil)
		require.Equal(t, CodecPlanes, codec)
		require.Less(t, size, 90_000*75/100, d.String())
		fast, _ := roundTrip(t, tensorOf(d, raw, Inference, 90_000), raw, nil)
		require.Greater(t, fast, size)
	}
}
