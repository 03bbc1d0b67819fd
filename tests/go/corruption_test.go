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
	scaled := make([]byte, 64*128) // of exponents that differ by row and by column
	for i := range scaled {
		scaled[i] = uint8(i/128/8+i%128/16+r.IntN(3))<<2 | uint8(r.IntN(2))<<7 | uint8(r.IntN(4))
	}
	return []subject{
		plain("bf16", "BF16", w, 2, codecs.Balanced, codecs.CodecPlanes), plain("bf16 inference", "BF16", w, 2, codecs.Inference, codecs.CodecPlanes),
		plain("bf16 storage", "BF16", bf16(r, 1500, 1), 2, codecs.Storage, codecs.CodecPlanes), plain("bf16 with patches", "BF16", spiky, 2, codecs.Balanced, codecs.CodecPlanes),
		plain("f16", "F16", f16, 2, codecs.Balanced, codecs.CodecPlanes), plain("f32", "F32", f32(r, 300, 1), 4, codecs.Balanced, codecs.CodecPlanes),
		plain("f32 of halves", "F32", half, 4, codecs.Balanced, ""), plain("f8", "F8_E4M3", f8, 1, codecs.Balanced, codecs.CodecPlanes),
		plain("palette", "U8", few, 1, codecs.Balanced, codecs.CodecLowcard), plain("constant", "I64", make([]byte, 240), 8, codecs.Balanced, codecs.CodecLowcard),
		plain("stored", "U8", noise, 1, codecs.Balanced, codecs.CodecStored),
		plain("zstd", "U8", bytes.Repeat([]byte("zstd: quick brown foxes jump over lazy dogs; "), 25), 1, codecs.Balanced, codecs.CodecPlanes),
		{"scales", []tensor{{"a", "F8_E5M2", []uint64{64, 128}, scaled}}, core.Options{Mode: codecs.Storage}, nil, codecs.CodecPlanes},
		{"rows", []tensor{{"a", "I16", []uint64{64, 128}, rows}}, core.Options{}, nil, codecs.CodecRowDelta},
		{"delta", []tensor{{"a", "BF16", []uint64{400}, tuned}}, core.Options{}, []tensor{{"a", "BF16", []uint64{400}, w}}, codecs.CodecDelta},
		{"ties and more", []tensor{{"a", "BF16", []uint64{10, 40}, w}, {"b", "BF16", []uint64{400}, w}, {"c", "F32", []uint64{40}, f32(r, 40, 1)}, {"e", "U8", []uint64{0}, nil}},
			core.Options{SHA256: true}, nil, codecs.CodecPlanes},
	}
}

// damagedStatuses are what reading a damaged file may give: not Internal, nor a fault of the caller or the system.
var damagedStatuses = []core.Status{core.Corrupt, core.Truncated, core.Checksum, core.UnsupportedVersion, core.UnsupportedCodec, core.UnsupportedFeature}

// readAll opens files and decodes all tensors, whole and in parts at the beginning, the middle and the end. Each must
// fail or be right, whatever became of the others; an error must name a file and, once they are open, one of `payloads`.
func readAll(t *testing.T, what string, files []core.MemoryFile, base string, want []tensor, payloads map[string]string) (failed bool) {
	t.Helper()
	named := func(err error) {
		require.Contains(t, damagedStatuses, core.StatusOf(err), "%s: %s", what, err)
		if len(files) > 1 {
			require.NotEmpty(t, core.AsError(err).File, "%s: %s", what, err)
		}
	}
	r, err := core.OpenMemory(files, base)
	if err != nil {
		named(err)
		return true
	}
	defer r.Close()
	job := &core.Job{Workers: 1}
	require.Equal(t, len(want), r.Len(), what)
	for _, x := range want {
		i, err := r.Find(x.name)
		require.NoError(t, err, what)
		fails := func(err error) bool {
			if err == nil {
				return false
			}
			named(err)
			require.Equal(t, payloads[x.name], core.AsError(err).Tensor, "%s: %s", what, err)
			failed = true
			return true
		}
		dst := make([]byte, len(x.data))
		if !fails(r.Decode(i, dst, job)) {
			require.True(t, bytes.Equal(x.data, dst), "%s: wrong bytes of %s", what, x.name)
		}
		n := int(product(x.shape))
		width, count := len(x.data)/max(1, n), min(n, 3)
		for _, first := range []int{0, n / 2, n - count} {
			k := min(count, n-first)
			part := make([]byte, k*width)
			if !fails(r.DecodeRange(i, uint64(first), uint64(k), part, job)) {
				require.True(t, bytes.Equal(x.data[first*width:][:len(part)], part), "%s: wrong part of %s", what, x.name)
			}
		}
	}
	return failed
}

// everyDamage cuts a file everywhere and flips each of its bits. The padding of a header is all spaces: one bit of each does.
func everyDamage(t *testing.T, bs []byte, damaged func(what string, b []byte)) (flips, cuts int) {
	t.Helper()
	start, _, ok := headerOf(bs)
	require.True(t, ok)
	for i := range bs {
		damaged(fmt.Sprintf("cut at %d of %d", i, len(bs)), bs[:i])
		cuts++
	}
	text := bytes.LastIndexByte(bs[:start], '}')
	for i := range 8 * len(bs) {
		if i/8 > text && i/8 < start && i%8 != i/8%8 {
			continue
		}
		bs[i/8] ^= 1 << (i % 8)
		damaged(fmt.Sprintf("bit %d of byte %d", i%8, i/8), bs)
		bs[i/8] ^= 1 << (i % 8)
		flips++
	}
	return flips, cuts
}

// Every cut and every single-bit flip of a small file of every codec is noticed, at opening or at decoding, by an error that
// names the tensor where it is one's; nothing wrong is ever given.
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
		payloads := map[string]string{}
		for _, x := range s.tensors {
			payloads[x.name] = x.name
		}
		if s.name == "ties and more" { // what is damaged there is the payload of the other
			require.Contains(t, string(bs), `"tied_to":"a"`)
			payloads["b"] = "a"
		}
		require.False(t, readAll(t, s.name, []core.MemoryFile{{Src: bs}}, base, s.tensors, payloads), s.name)
		f, c := everyDamage(t, bs, func(what string, b []byte) {
			what = s.name + ": " + what
			require.True(t, readAll(t, what, []core.MemoryFile{{Src: b}}, base, s.tensors, payloads), what+": not noticed")
		})
		flips, cuts = flips+f, cuts+c
	}
	fmt.Printf("exhaustive: %d single-bit flips and %d cuts of %d files\n", flips, cuts, len(subjects()))
}

// The same of each of two shards, where one has a tensor that is stored in the other: the error names the shard that is damaged.
func TestDamageOfShards(t *testing.T) {
	r := rand.New(rand.NewPCG(8, 8))
	w := bf16(r, 300, .02)
	shards := [][]tensor{
		{{"a", "BF16", []uint64{300}, w}, {"c", "F32", []uint64{40}, f32(r, 40, 1)}},
		{{"b", "BF16", []uint64{10, 30}, w}, {"d", "U8", []uint64{90}, bytes.Repeat([]byte{1, 2, 9}, 30)}},
	}
	dir, want := t.TempDir(), []tensor{}
	for i, tensors := range shards {
		write(t, filepath.Join(dir, "in", fmt.Sprintf("model-0000%d-of-00002.safetensors", i+1)), safetensors(tensors, nil))
		want = append(want, tensors...)
	}
	write(t, filepath.Join(dir, "in", "model.safetensors.index.json"), []byte(`{"metadata":{},"weight_map":{
		"a":"model-00001-of-00002.safetensors","c":"model-00001-of-00002.safetensors",
		"b":"model-00002-of-00002.safetensors","d":"model-00002-of-00002.safetensors"}}`))
	_, err := core.Compress(filepath.Join(dir, "in"), filepath.Join(dir, "out"), core.Options{}, nil)
	require.NoError(t, err)
	files := make([]core.MemoryFile, 2)
	for i := range files {
		files[i].Name = fmt.Sprintf("model-0000%d-of-00002.bs", i+1)
		files[i].Src, err = os.ReadFile(filepath.Join(dir, "out", files[i].Name))
		require.NoError(t, err)
	}
	require.Contains(t, string(files[1].Src), `"tied_to":"a"`)
	payloads := map[string]string{"a": "a", "b": "a", "c": "c", "d": "d"}
	require.False(t, readAll(t, "shards", files, "", want, payloads))
	flips, cuts := 0, 0
	for i := range files {
		f, c := everyDamage(t, bytes.Clone(files[i].Src), func(what string, b []byte) {
			what = files[i].Name + ": " + what
			changed := []core.MemoryFile{files[0], files[1]}
			changed[i].Src = b
			require.True(t, readAll(t, what, changed, "", want, payloads), what+": not noticed")
			r, err := core.OpenMemory(changed, "")
			if err != nil {
				require.Equal(t, files[i].Name, core.AsError(err).File, "%s: %s", what, err)
				return
			}
			defer r.Close()
			for k, x := range want {
				if err := r.Decode(k, make([]byte, len(x.data)), &core.Job{Workers: 1}); err != nil {
					require.Equal(t, files[i].Name, core.AsError(err).File, "%s: %s", what, err)
				}
			}
		})
		flips, cuts = flips+f, cuts+c
	}
	fmt.Printf("exhaustive: %d single-bit flips and %d cuts of %d files\n", flips, cuts, len(files))
}

// Damage of a delta's base is noticed too, or is where the delta has no use for it.
func TestDamageOfBase(t *testing.T) {
	for _, s := range subjects() {
		if s.base == nil {
			continue
		}
		dir := t.TempDir()
		in := write(t, filepath.Join(dir, "in.safetensors"), safetensors(s.tensors, nil))
		plain := safetensors(s.base, nil)
		base, out := write(t, filepath.Join(dir, "base.safetensors"), plain), filepath.Join(dir, "out.bs")
		_, err := core.CompressDelta(in, base, out, s.opts, nil)
		require.NoError(t, err)
		bs, err := os.ReadFile(out)
		require.NoError(t, err)
		allowed := append([]core.Status{core.WrongBase, core.InvalidArgument}, damagedStatuses...)
		noticed := 0
		read := func(what string, b []byte) {
			write(t, base, b)
			r, err := core.OpenMemory([]core.MemoryFile{{Src: bs}}, base)
			dst := make([]byte, len(s.tensors[0].data))
			if err == nil {
				defer r.Close()
				err = r.Decode(0, dst, &core.Job{Workers: 1})
			}
			if err != nil {
				noticed++
				require.Contains(t, allowed, core.StatusOf(err), "%s: %s", what, err)
				require.Contains(t, err.Error(), "base.safetensors", what)
				return
			}
			require.True(t, bytes.Equal(s.tensors[0].data, dst), what+": wrong bytes")
		}
		for i := range plain {
			read(fmt.Sprintf("base cut at %d", i), plain[:i])
		}
		require.Equal(t, len(plain), noticed)
		for i := range 8 * len(plain) {
			plain[i/8] ^= 1 << (i % 8)
			read(fmt.Sprintf("bit %d of byte %d of the base", i%8, i/8), plain)
			plain[i/8] ^= 1 << (i % 8)
		}
		require.Greater(t, noticed, 8*len(s.base[0].data))
	}
}

// A damaged block is an error of whoever needs it; the others are read as if nothing were.
func TestDamageOfBlocks(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 9))
	const blocks, per = 4, codecs.BlockWords
	data := bf16(r, blocks*per-77, .02)
	want := tensor{"a", "BF16", []uint64{uint64(len(data) / 2)}, data}
	for _, mode := range modes {
		dir := t.TempDir()
		in, out := write(t, filepath.Join(dir, "in.safetensors"), safetensors([]tensor{want}, nil)), filepath.Join(dir, "out.bs")
		_, err := core.Compress(in, out, core.Options{Mode: mode}, nil)
		require.NoError(t, err)
		bs, err := os.ReadFile(out)
		require.NoError(t, err)
		whole, err := openMemory(bs)
		require.NoError(t, err)
		_, offset, n, err := whole.Locate(0)
		require.NoError(t, err)
		single, all := 0, 0
		for range 150 {
			at, bit := offset+r.Int64N(n), byte(1)<<r.IntN(8)
			if all < 5 && single > 100 {
				at = offset + r.Int64N(24+12*blocks) // the head's index, which all blocks need
			}
			bs[at] ^= bit
			what := fmt.Sprintf("mode %d, byte %d of the payload", mode, at-offset)
			damaged, err := openMemory(bs)
			require.NoError(t, err, what)
			fails := func(first, end int) bool {
				part := make([]byte, 2*(end-first))
				err := damaged.DecodeRange(0, uint64(first), uint64(end-first), part, &core.Job{Workers: 1})
				if err == nil {
					require.True(t, bytes.Equal(data[2*first:2*end], part), what)
					return false
				}
				require.Contains(t, damagedStatuses, core.StatusOf(err), "%s: %s", what, err)
				require.Equal(t, "a", core.AsError(err).Tensor, what)
				return true
			}
			var bad [blocks]bool
			count := 0
			for b := range blocks {
				bad[b] = fails(b*per+r.IntN(per/2), min((b+1)*per, len(data)/2))
				if bad[b] {
					count++
				}
				if b > 0 {
					require.Equal(t, bad[b-1] || bad[b], fails(b*per-50, b*per+50), what)
				}
			}
			switch count {
			case 1:
				single++
			case blocks:
				all++
			default:
				require.Fail(t, "neither one block nor all", "%s: %v", what, bad)
			}
			damaged.Close()
			bs[at] ^= bit
		}
		require.Positive(t, single)
		require.Positive(t, all)
	}
}

func product(shape []uint64) uint64 {
	n := uint64(1)
	for _, d := range shape {
		n *= d
	}
	return n
}
