package tests

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/core"
)

var sourceDTypes = map[string]int{ // bits
	"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
	"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
	"C64": 64, "F64": 64, "I64": 64, "U64": 64,
}

func random(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func TestEveryDType(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	var all []tensor
	for name, bits := range sourceDTypes {
		for _, shape := range [][]uint64{{}, {0}, {8}, {3, 0, 5}, {16, 40}, {2, 1, 3, 1, 2, 1, 4}} {
			n := uint64(bits)
			for _, d := range shape {
				n *= d
			}
			if n%8 != 0 {
				continue
			}
			all = append(all, tensor{fmt.Sprintf("%s %v", name, shape), name, shape, random(r, int(n/8))})
		}
	}
	roundTrip(t, safetensors(all, map[string]string{"format": "pt", "ключ": "値\n\"\\"}))
}

func TestEveryPattern(t *testing.T) {
	all := make([]byte, 0, 1<<17)
	for v := range 1 << 16 {
		all = binary.LittleEndian.AppendUint16(all, uint16(v))
	}
	r := rand.New(rand.NewPCG(2, 2))
	skewed := bf16(r, 1<<17, .02)
	for i := 0; i < len(skewed); i += 2 * 97 { // NaN payloads, infinities, subnormals among weights
		binary.LittleEndian.PutUint16(skewed[i:], uint16(r.Uint32()))
	}
	roundTrip(t, safetensors([]tensor{
		{"bf16", "BF16", []uint64{256, 256}, all}, {"f16", "F16", []uint64{1 << 16}, all},
		{"skewed.bf16", "BF16", []uint64{1 << 17}, skewed}, {"skewed.f16", "F16", []uint64{1 << 9, 1 << 8}, skewed},
		{"as f32", "F32", []uint64{1 << 16}, skewed}, {"noise", "F32", []uint64{100_000}, random(r, 400_000)},
	}, nil))
}

func TestNames(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	var all []tensor
	for _, n := range []string{"", " ", "模型.层.0.权重", "слой", "طبقة", "🙂", "a\tb\n\"c\"\\", "../../etc", "\u0000", "x" + string(make([]rune, 300)), "\u2028"} {
		all = append(all, tensor{n, "BF16", []uint64{3, 5}, bf16(r, 15, 1)})
	}
	roundTrip(t, safetensors(all, nil))
}

func TestUnusualLayouts(t *testing.T) {
	for _, s := range []string{
		`{}`, `{"__metadata__":{}}`, ` {"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}   `,
		`{"b":{"shape":[1],"data_offsets":[2,3],"dtype":"U8"} , "__metadata__":{"z":"1","a":"2"},
		"a":{"data_offsets":[0,2],"dtype":"U8","shape":[2]}}`,
		`{"e":{"dtype":"F32","shape":[0],"data_offsets":[2,2]},"\u0061":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}`,
	} {
		size := map[bool]int{true: 3, false: 2}[len(s) > 100 && s[2] == 'b']
		if s[1] == '}' || s[2] == '_' {
			size = 0
		}
		src := binary.LittleEndian.AppendUint64(nil, uint64(len(s)))
		src = append(append(src, s...), []byte{7, 8, 9}[:size]...)
		roundTrip(t, src)
	}
}

func TestBadSources(t *testing.T) {
	dir := t.TempDir()
	for s, data := range map[string]int{
		`{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}`:                                                     1,
		`{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}`: 2,
		`{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}`: 3,
		`{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}`:                                                     3,
		`{"a":{"dtype":"U8","shape":[18446744073709551615,2],"data_offsets":[0,2]}}`:                                2,
		`{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,0]}}`:                                                     0,
		`{"a":{"DType":"U8","shape":[2],"data_offsets":[0,2]}}`:                                                     2,
		`{"a":{"dtype":"Q3","shape":[2],"data_offsets":[0,2]}}`:                                                     2,
		"{\"\xff\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}":                                        2,
		`{"\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}`:                                                2,
		`{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}x`:                                                    2,
		`[]`: 0, `version https://git-lfs.github.com/spec/v1`: 0,
	} {
		src := binary.LittleEndian.AppendUint64(nil, uint64(len(s)))
		in := write(t, filepath.Join(dir, "bad.safetensors"), append(append(src, s...), make([]byte, data)...))
		_, err := core.Compress(in, filepath.Join(dir, "bad.bs"), core.Options{}, nil)
		require.Error(t, err, s)
		require.Contains(t, []core.Status{core.InvalidArgument, core.UnsupportedFeature}, core.StatusOf(err), "%s: %s", s, err)
		require.NoFileExists(t, filepath.Join(dir, "bad.bs"))
	}
}

// A file exceeds its source by at most 4 KiB + 512 bytes a tensor + 64 bytes a block.
func TestBound(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	var scalars []tensor
	for i := range 10_000 {
		scalars = append(scalars, tensor{fmt.Sprintf("model.layers.%d.self_attn.scale", i), "F32", []uint64{}, f32(r, 1, 1)})
	}
	var noise []tensor
	for i := range 40 {
		noise = append(noise, tensor{fmt.Sprint(i), "U8", []uint64{65537}, random(r, 65537)})
	}
	for _, all := range [][]tensor{scalars, noise, {}, {{"a", "F64", []uint64{1 << 17}, random(r, 1<<20)}}} {
		src := safetensors(all, nil)
		blocks, names := 0, 0
		for _, x := range all {
			blocks += len(x.data)/65536 + 1
			names += len(x.name)
		}
		bs := roundTrip(t, src)
		require.LessOrEqual(t, len(bs), len(src)+4096+512*len(all)+64*blocks)
		require.LessOrEqual(t, uint64(len(bs)), core.Bound(uint64(len(src)), uint64(len(all)), uint64(names)))
	}
}

func TestTied(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	w := bf16(r, 100_000, .02)
	bs := roundTrip(t, safetensors([]tensor{
		{"wte", "BF16", []uint64{100, 1000}, w}, {"other", "BF16", []uint64{5}, bf16(r, 5, 1)},
		{"lm_head", "BF16", []uint64{100, 1000}, w}, {"bits", "I16", []uint64{100_000}, w},
	}, nil))
	require.Less(t, len(bs), len(w)*7/10+8192)
	rd, err := openMemory(bs)
	require.NoError(t, err)
	defer rd.Close()
	for i := range rd.Len() {
		x, _ := rd.Tensor(i)
		if x.Name == "other" {
			continue
		}
		got := make([]byte, len(w))
		require.NoError(t, rd.Decode(i, got, nil))
		require.Equal(t, w, got)
		part := make([]byte, 20)
		require.NoError(t, rd.DecodeRange(i, 70_001, 10, part, nil))
		require.Equal(t, w[140_002:140_022], part)
	}
}

// The bytes of a file depend on its source and the options alone.
func TestDeterministic(t *testing.T) {
	r := rand.New(rand.NewPCG(6, 6))
	var all []tensor
	for i := range 20 {
		n := 1000 << (i % 11)
		all = append(all, tensor{fmt.Sprint("t", i), "BF16", []uint64{uint64(n)}, bf16(r, n, .02)},
			tensor{fmt.Sprint("f", i), "F32", []uint64{uint64(n / 4), 4}, f32(r, n/4*4, .02)})
	}
	dir := t.TempDir()
	source := safetensors(all, nil)
	in := write(t, filepath.Join(dir, "in.safetensors"), source)
	for _, mode := range modes {
		var first []byte
		for _, workers := range []int{1, 2, 7, 64} {
			out := filepath.Join(dir, "out.bs")
			_, err := core.Compress(in, out, core.Options{Mode: mode, SHA256: true}, &core.Job{Workers: workers})
			require.NoError(t, err)
			b, err := os.ReadFile(out)
			require.NoError(t, err)
			if first == nil {
				first = b
			}
			require.True(t, bytes.Equal(first, b))
			rep, err := core.Verify(out, in, "", &core.Job{Workers: workers})
			require.NoError(t, err)
			require.Empty(t, rep.Bad)
			back := filepath.Join(dir, "back.safetensors")
			_, err = core.Decompress(out, back, "", core.Options{}, &core.Job{Workers: workers})
			require.NoError(t, err)
			restored, err := os.ReadFile(back)
			require.NoError(t, err)
			require.True(t, bytes.Equal(source, restored))
		}
	}
}

func TestWriter(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	dir := t.TempDir()
	out := filepath.Join(dir, "w.bs")
	a, b := bf16(r, 3000, .1), f32(r, 10, 1)
	w, err := core.Create(out, []core.Spec{{Name: "a", DType: codecs.BF16, Shape: []uint64{30, 100}}, {Name: "b", DType: codecs.F32, Shape: []uint64{10}},
		{Name: "c", DType: codecs.F4, Shape: []uint64{2, 3}}, {Name: "z", DType: codecs.I64, Shape: []uint64{0}}}, `{"k":"v"}`, core.Options{})
	require.NoError(t, err)
	defer w.Close()
	require.NoError(t, w.Put(1, b, nil))
	require.NoError(t, w.Put(3, nil, nil))
	require.NoError(t, w.Put(2, []byte{1, 2, 3, 4, 5, 6}, nil))
	require.Error(t, w.Put(1, b, nil))
	require.Error(t, w.Put(0, b, nil))
	_, err = w.Finish()
	require.Error(t, err)
	require.NoFileExists(t, out)
	require.NoError(t, w.Put(0, a, nil))
	_, err = w.Finish()
	require.NoError(t, err)
	rd, err := core.Open(out, "")
	require.NoError(t, err)
	defer rd.Close()
	i, err := rd.Find("a")
	require.NoError(t, err)
	got := make([]byte, len(a))
	require.NoError(t, rd.DecodeVerified(i, got, nil))
	require.Equal(t, a, got)
	m, err := rd.Metadata()
	require.NoError(t, err)
	require.JSONEq(t, `{"k":"v"}`, string(m))
	_, err = core.Decompress(out, filepath.Join(dir, "w.safetensors"), "", core.Options{}, nil)
	require.NoError(t, err)
}
