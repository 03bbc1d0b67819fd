package tests

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/core"
)

// A subject is a small file of one kind of payload.
type subject struct {
	name    string
	tensors []tensor
	opts    core.Options
	base    []tensor // of a delta
	codec   string   // that its first tensor must have
}

func subjects() []subject {
	r := rand.New(rand.NewPCG(2, 2))
	w := bf16(r, 400, .02)
	plain := func(name, dtype string, data []byte, width int, mode codecs.Mode, codec string) subject {
		return subject{name, []tensor{{"a", dtype, []uint64{uint64(len(data) / width)}, data}}, core.Options{Mode: mode}, nil, codec}
	}
	first, rows := make([]uint16, 128), make([]byte, 0, 64*256)
	for i := range first {
		first[i] = uint16(r.Uint32())
	}
	for i := range 64 * 128 { // noise, but from row to row
		rows = binary.LittleEndian.AppendUint16(rows, first[i%128]+uint16(3*(i/128))+uint16(r.IntN(2)))
	}
	half := make([]byte, 0, 1600)
	for i := range 400 {
		half = binary.LittleEndian.AppendUint32(half, math.Float32bits(float32(i%32)/1024))
	}
	few, spiky, tuned := bytes.Repeat([]byte{1, 2, 3, 2, 1, 1}, 60), bytes.Clone(w), bytes.Clone(w)
	for i := 0; i < 800; i += 40 {
		spiky[i+1] ^= 0x33
		tuned[i] ^= 1
	}
	noise := make([]byte, 300)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	f16 := make([]byte, 0, 800)
	f8 := make([]byte, 600)
	for range 400 {
		f16 = binary.LittleEndian.AppendUint16(f16, uint16(0x2800+r.IntN(0x600)))
	}
	for i := range f8 {
		f8[i] = byte(0x28 + r.IntN(12) + r.IntN(12) + r.IntN(2)<<7)
	}
	return []subject{
		plain("bf16", "BF16", w, 2, codecs.Balanced, codecs.CodecPlanes), plain("bf16 inference", "BF16", w, 2, codecs.Inference, codecs.CodecPlanes),
		plain("bf16 storage", "BF16", bf16(r, 1500, 1), 2, codecs.Storage, codecs.CodecPlanes), plain("bf16 with patches", "BF16", spiky, 2, codecs.Balanced, codecs.CodecPlanes),
		plain("f16", "F16", f16, 2, codecs.Balanced, codecs.CodecPlanes), plain("f32", "F32", f32(r, 300, 1), 4, codecs.Balanced, codecs.CodecPlanes),
		plain("f32 of halves", "F32", half, 4, codecs.Balanced, ""), plain("f8", "F8_E4M3", f8, 1, codecs.Balanced, codecs.CodecPlanes),
		plain("palette", "U8", few, 1, codecs.Balanced, codecs.CodecLowcard), plain("constant", "I64", make([]byte, 240), 8, codecs.Balanced, codecs.CodecLowcard),
		plain("stored", "U8", noise, 1, codecs.Balanced, codecs.CodecStored),
		plain("zstd", "U8", bytes.Repeat([]byte("zstd: quick brown foxes jump over lazy dogs; "), 25), 1, codecs.Balanced, codecs.CodecPlanes),
		{"rows", []tensor{{"a", "I16", []uint64{64, 128}, rows}}, core.Options{}, nil, codecs.CodecRowDelta},
		{"delta", []tensor{{"a", "BF16", []uint64{400}, tuned}}, core.Options{}, []tensor{{"a", "BF16", []uint64{400}, w}}, codecs.CodecDelta},
		{"ties and more", []tensor{{"a", "BF16", []uint64{10, 40}, w}, {"b", "BF16", []uint64{400}, w}, {"c", "F32", []uint64{40}, f32(r, 40, 1)}, {"e", "U8", []uint64{0}, nil}},
			core.Options{SHA256: true}, nil, codecs.CodecPlanes},
	}
}

// Every cut and every single-bit flip of a small file of every codec is noticed, at opening or at decoding, by an error that
// names the tensor where it is one's; nothing wrong is ever given. The padding of a header is all spaces: of each, two bits do.
func TestDamage(t *testing.T) {
	flips, cuts := 0, 0
	for _, s := range subjects() {
		dir := t.TempDir()
		in := write(t, filepath.Join(dir, "in.safetensors"), safetensors(s.tensors, nil))
		out, base := filepath.Join(dir, "out.bs"), ""
		var err error
		if s.base != nil {
			base = write(t, filepath.Join(dir, "base.safetensors"), safetensors(s.base, nil))
			_, err = core.CompressDelta(in, base, out, s.opts, nil)
		} else {
			_, err = core.Compress(in, out, s.opts, nil)
		}
		require.NoError(t, err, s.name)
		bs, err := os.ReadFile(out)
		require.NoError(t, err)
		require.True(t, bytes.Contains(bs, []byte(`"codec":"`+s.codec)), "%s: %s", s.name, bs[:400])
		start, _, ok := headerOf(bs)
		require.True(t, ok)
		// Whole tensors and a part, each of which has to fail or be right.
		read := func(b []byte) (failed bool) {
			r, err := core.OpenMemory([]core.MemoryFile{{Src: b}}, base)
			if err != nil {
				require.NotEqual(t, core.Internal, core.StatusOf(err), "%s: %s", s.name, err)
				return true
			}
			defer r.Close()
			job := &core.Job{Workers: 1}
			for i, x := range s.tensors {
				dst := make([]byte, len(x.data))
				part := make([]byte, min(len(dst), 8))
				width := len(x.data) / max(1, int(product(x.shape)))
				for _, err := range []error{r.Decode(i, dst, job), r.DecodeRange(i, 0, uint64(len(part)/max(1, width)), part, job)} {
					if err == nil {
						continue
					}
					failed = true
					require.Contains(t, []core.Status{core.Corrupt, core.Truncated, core.Checksum}, core.StatusOf(err), "%s: %s", s.name, err)
					require.NotEmpty(t, core.AsError(err).Tensor, "%s: %s", s.name, err)
				}
				if !failed {
					require.True(t, bytes.Equal(x.data, dst), s.name)
					require.True(t, bytes.HasPrefix(x.data, part), s.name)
				}
			}
			return failed
		}
		require.False(t, read(bs), s.name)
		for i := range bs {
			require.True(t, read(bs[:i]), "%s: cut at %d of %d", s.name, i, len(bs))
			cuts++
		}
		text := bytes.LastIndexByte(bs[:start], '}')
		for i := range 8 * len(bs) {
			if i/8 > text && i/8 < start && i%8 > 1 {
				continue
			}
			bs[i/8] ^= 1 << (i % 8)
			require.True(t, read(bs), "%s: bit %d of byte %d", s.name, i%8, i/8)
			bs[i/8] ^= 1 << (i % 8)
			flips++
		}
	}
	fmt.Printf("exhaustive: %d single-bit flips and %d cuts of %d files\n", flips, cuts, len(subjects()))
}

func product(shape []uint64) uint64 {
	n := uint64(1)
	for _, d := range shape {
		n *= d
	}
	return n
}
