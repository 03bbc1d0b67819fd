package tests

import (
	"bytes"
	"crypto/md5"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/core"
)

// raws are the tensors of a safetensors file.
func raws(t *testing.T, path string) map[string][]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	n := 8 + int(binary.LittleEndian.Uint64(b))
	var h map[string]json.RawMessage
	require.NoError(t, json.Unmarshal(b[8:n], &h))
	delete(h, "__metadata__")
	out := map[string][]byte{}
	for name, text := range h {
		var x struct {
			Offsets [2]int `json:"data_offsets"`
		}
		require.NoError(t, json.Unmarshal(text, &x))
		out[name] = b[n+x.Offsets[0] : n+x.Offsets[1]]
	}
	return out
}

// originals are files that releases 1.0.0 (v1) and 4.0.0 (v4) of the original package wrote.
const originals = "testdata/reference"

// md5s are those that a file's header has of its tensors.
func md5s(t *testing.T, path string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	var h struct{ Tensors []struct{ Name, MD5 string } }
	require.NoError(t, json.Unmarshal(b[10:10+binary.LittleEndian.Uint32(b[6:])], &h))
	out := map[string]string{}
	for _, x := range h.Tensors {
		out[x.Name] = x.MD5
	}
	return out
}

func sum(b []byte) string {
	s := md5.Sum(b)
	return hex.EncodeToString(s[:])
}

// sums are the MD5s of a safetensors file's tensors.
func sums(t *testing.T, path string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for name, data := range raws(t, path) {
		out[name] = sum(data)
	}
	return out
}

func TestReadsTheOriginalsFiles(t *testing.T) {
	paths, err := filepath.Glob(filepath.Join(originals, "*", "*.bs"))
	require.NoError(t, err)
	for _, path := range paths {
		base := ""
		if strings.HasSuffix(path, "delta_ft.bs") {
			base = filepath.Join(filepath.Dir(path), "delta_base.safetensors")
			_, err := core.Decompress(path, filepath.Join(t.TempDir(), "x"), "", core.Options{}, nil)
			require.Equal(t, core.WrongBase, core.StatusOf(err))
		}
		want := md5s(t, path)
		r, err := core.Open(path, base)
		require.NoError(t, err, path)
		require.Equal(t, len(want), r.Len())
		var items []core.Item
		for i := range r.Len() {
			x, err := r.Tensor(i)
			require.NoError(t, err)
			items = append(items, core.Item{Index: i, Dst: make([]byte, x.Bytes)})
		}
		require.NoError(t, r.DecodeMany(items, nil), path)
		for _, it := range items {
			x, _ := r.Tensor(it.Index)
			require.Equal(t, want[x.Name], sum(it.Dst), "%s: %s", path, x.Name)
			if n := x.Bytes; n > 8 {
				elements := uint64(1)
				for _, d := range x.Shape {
					elements *= d
				}
				width := n / int64(elements)
				part := make([]byte, width)
				require.NoError(t, r.DecodeRange(it.Index, elements/2, 1, part, nil))
				require.Equal(t, it.Dst[int64(elements/2)*width:][:width], part)
			}
		}
		r.Close()
		out := filepath.Join(t.TempDir(), "out.safetensors")
		_, err = core.Decompress(path, out, base, core.Options{}, nil)
		require.NoError(t, err, path)
		require.Equal(t, want, sums(t, out), path)
		rep, err := core.Verify(path, "", base, nil)
		require.NoError(t, err)
		require.Empty(t, rep.Bad)
	}
	require.NotEmpty(t, paths)
}

// Shards, and tensors that are in none because another one is the same.
func TestReadsTheOriginalsDirectories(t *testing.T) {
	dirs, err := filepath.Glob(filepath.Join(originals, "*", "sharded_repo"))
	require.NoError(t, err)
	require.NotEmpty(t, dirs)
	for _, dir := range dirs {
		want := map[string]string{}
		ours, err := filepath.Glob(filepath.Join(dir, "*.bs"))
		require.NoError(t, err)
		for _, path := range ours {
			for name, sum := range md5s(t, path) {
				want[name] = sum
			}
		}
		if strings.Contains(dir, "v4") {
			want["lm_head.weight"] = want["model.embed_tokens.weight"]
		}
		check := func(r *core.Reader) {
			t.Helper()
			require.Equal(t, len(want), r.Len())
			for name, md5 := range want {
				i, err := r.Find(name)
				require.NoError(t, err)
				x, err := r.Tensor(i)
				require.NoError(t, err)
				dst := make([]byte, x.Bytes)
				require.NoError(t, r.Decode(i, dst, nil))
				require.Equal(t, md5, sum(dst), name)
			}
			_, err := r.Info()
			require.NoError(t, err)
		}
		r, err := core.Open(dir, "")
		require.NoError(t, err)
		check(r)
		r.Close()
		var files []core.MemoryFile
		for _, path := range append(ours, filepath.Join(dir, core.IndexName)) {
			b, err := os.ReadFile(path)
			require.NoError(t, err)
			files = append(files, core.MemoryFile{Name: filepath.Base(path), Src: b})
		}
		r, err = core.OpenMemory(files, "")
		require.NoError(t, err)
		check(r)
		rep, err := core.Verify(dir, "", "", nil)
		require.NoError(t, err)
		require.Empty(t, rep.Bad)
		out := filepath.Join(t.TempDir(), "out")
		_, err = core.Decompress(dir, out, "", core.Options{}, nil)
		require.NoError(t, err)
		got := map[string]string{}
		shards, err := filepath.Glob(filepath.Join(out, "*.safetensors"))
		require.NoError(t, err)
		for _, s := range shards {
			for name, sum := range sums(t, s) {
				got[name] = sum
			}
		}
		require.Equal(t, want, got)
		text, err := os.ReadFile(filepath.Join(out, "model.safetensors.index.json"))
		require.NoError(t, err)
		var index struct {
			Map map[string]string `json:"weight_map"`
		}
		require.NoError(t, json.Unmarshal(text, &index))
		require.Equal(t, len(want), len(index.Map))
		for name, shard := range index.Map {
			require.Contains(t, raws(t, filepath.Join(out, shard)), name)
		}
	}
}

// Every cut is refused, and what is changed is an error or, of the padding of a range coder's last word, without effect.
func TestDamageOfTheOriginalsFiles(t *testing.T) {
	paths, err := filepath.Glob(filepath.Join(originals, "*", "*.bs"))
	require.NoError(t, err)
	require.NotEmpty(t, paths)
	r := rand.New(rand.NewPCG(4, 4))
	for _, path := range paths {
		bs, err := os.ReadFile(path)
		require.NoError(t, err)
		if len(bs) > 60_000 {
			continue
		}
		base := ""
		if strings.HasSuffix(path, "delta_ft.bs") {
			base = filepath.Join(filepath.Dir(path), "delta_base.safetensors")
		}
		want := md5s(t, path)
		read := func(b []byte) (failed bool) {
			rd, err := core.OpenMemory([]core.MemoryFile{{Src: b}}, base)
			if err != nil {
				require.NotEqual(t, core.Internal, core.StatusOf(err), "%s: %s", path, err)
				return true
			}
			defer rd.Close()
			for i := range rd.Len() {
				x, _ := rd.Tensor(i)
				if x.Bytes > 1<<24 {
					return true
				}
				dst := make([]byte, x.Bytes)
				if err := rd.Decode(i, dst, &core.Job{Workers: 1}); err != nil {
					require.Contains(t, []core.Status{core.Corrupt, core.Truncated, core.Checksum, core.WrongBase}, core.StatusOf(err), "%s: %s", path, err)
					failed = true
				} else {
					require.Equal(t, want[x.Name], sum(dst), "%s: %s", path, x.Name)
				}
			}
			return failed
		}
		require.False(t, read(bs), path)
		step := 1
		if len(bs) > 20_000 {
			step = len(bs) / 500
		}
		for n := 0; n < len(bs); n += step {
			_, err := openMemory(bs[:n])
			require.Error(t, err, "%s: cut at %d", path, n)
		}
		require.True(t, read(bs[:len(bs)-1]), "%s: cut by one", path)
		header := 10 + int(binary.LittleEndian.Uint32(bs[6:]))
		for range 25 {
			at := header + r.IntN(len(bs)-header)
			bit := byte(1) << r.IntN(8)
			bs[at] ^= bit
			read(bs)
			bs[at] ^= bit
		}
	}
}

// What is written for release 1.0 has its layout, and is read here like its own files.
func TestWritesForTheOriginal(t *testing.T) {
	r := rand.New(rand.NewPCG(6, 6))
	w := bf16(r, 30_000, .02)
	all := []tensor{{"é b", "BF16", []uint64{300, 100}, w}, {"a", "BF16", []uint64{30_000}, w}, {"c", "F32", []uint64{5000}, f32(r, 5000, 1)}, {"s", "F32", []uint64{}, []byte{1, 2, 3, 4}},
		{"n", "F16", []uint64{0, 3}, nil}, {"i", "I64", []uint64{40}, make([]byte, 320)}, {"few", "U8", []uint64{900}, bytes.Repeat([]byte{7, 8, 8}, 300)}, {"f8", "F8_E5M2", []uint64{60_000}, f8s(r, 60_000)}}
	dir := t.TempDir()
	in := write(t, filepath.Join(dir, "m.safetensors"), safetensors(all, map[string]string{"k": "v"}))
	out, back := filepath.Join(dir, "m.bs"), filepath.Join(dir, "back.safetensors")
	_, err := core.Compress(in, out, core.Options{Compat: true}, nil)
	require.NoError(t, err)
	bs, err := os.ReadFile(out)
	require.NoError(t, err)
	for _, codec := range []string{"bf16_se_ac", "fp32_se_ac", "fp8_cat_ac", "zstd", "special", "tied_ref"} {
		require.Contains(t, string(bs[:4000]), `"codec":"`+codec+`"`)
	}
	rep, err := core.Verify(out, in, "", nil)
	require.NoError(t, err)
	require.Len(t, rep.Bad, 1, "only the source's own header is not kept")
	_, err = core.Decompress(out, back, "", core.Options{}, nil)
	require.NoError(t, err)
	require.Equal(t, raws(t, in), raws(t, back))
	_, err = core.Compress(write(t, filepath.Join(dir, "f64.safetensors"), safetensors([]tensor{{"d", "F64", []uint64{1}, make([]byte, 8)}}, nil)), out, core.Options{Compat: true}, nil)
	require.Equal(t, core.UnsupportedFeature, core.StatusOf(err))
	require.ErrorContains(t, err, `"d"`)
	require.ErrorContains(t, err, "float64")
	requireBytes(t, bs, out, "what was there")

	// Both ways.
	ours, again := filepath.Join(dir, "ours.bs"), filepath.Join(dir, "again.bs")
	_, err = core.Convert(out, ours, "", core.Options{Mode: codecs.Storage, Parity: 5}, nil)
	require.NoError(t, err)
	rep, err = core.Verify(ours, in, "", nil)
	require.NoError(t, err)
	require.Len(t, rep.Bad, 1)
	_, err = core.Convert(ours, again, "", core.Options{Compat: true}, nil)
	require.NoError(t, err)
	requireBytes(t, bs, again, "converted back")
}

// A tie may lead to a name that is much longer than its own.
func TestWritesLongNamesForTheOriginal(t *testing.T) {
	w := bf16(rand.New(rand.NewPCG(7, 7)), 600, 1)
	all := []tensor{{strings.Repeat("a", 5000), "BF16", []uint64{600}, w}}
	for i := range 20 {
		all = append(all, tensor{fmt.Sprintf("b%d", i), "BF16", []uint64{600}, w})
	}
	dir := t.TempDir()
	in, out := write(t, filepath.Join(dir, "m.safetensors"), safetensors(all, nil)), filepath.Join(dir, "m.bs")
	_, err := core.Compress(in, out, core.Options{Compat: true}, nil)
	require.NoError(t, err)
	rep, err := core.Verify(out, "", "", nil)
	require.NoError(t, err)
	require.Empty(t, rep.Bad)
}

func f8s(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(0x28 + r.IntN(12) + r.IntN(12) + r.IntN(2)<<7)
	}
	return b
}

func TestConvertsTheOriginalsFiles(t *testing.T) {
	for _, version := range []string{"v1", "v4"} {
		fixtures := filepath.Join(originals, version)
		for _, name := range []string{"mixed", "tied", "fp16", "bf16_fp2", "lowcard"} {
			if _, err := os.Stat(filepath.Join(fixtures, name+".bs")); err != nil {
				continue
			}
			out, back := filepath.Join(t.TempDir(), "x.bs"), filepath.Join(t.TempDir(), "x.safetensors")
			_, err := core.Convert(filepath.Join(fixtures, name+".bs"), out, "", core.Options{}, nil)
			require.NoError(t, err)
			_, err = core.Decompress(out, back, "", core.Options{}, nil)
			require.NoError(t, err)
			require.Equal(t, md5s(t, filepath.Join(fixtures, name+".bs")), sums(t, back), name)
		}
		base, out := filepath.Join(fixtures, "delta_base.safetensors"), filepath.Join(t.TempDir(), "x.bs")
		_, err := core.Convert(filepath.Join(fixtures, "delta_ft.bs"), out, "", core.Options{}, nil)
		require.Equal(t, core.WrongBase, core.StatusOf(err))
		_, err = core.Convert(filepath.Join(fixtures, "delta_ft.bs"), out, base, core.Options{}, nil)
		require.NoError(t, err)
		back := filepath.Join(t.TempDir(), "back.safetensors")
		_, err = core.Decompress(out, back, base, core.Options{}, nil)
		require.NoError(t, err)
		require.Equal(t, md5s(t, filepath.Join(fixtures, "delta_ft.bs")), sums(t, back))
		dir := filepath.Join(t.TempDir(), "dir")
		_, err = core.Convert(filepath.Join(fixtures, "sharded_repo"), dir, "", core.Options{}, nil)
		require.NoError(t, err)
		rep, err := core.Verify(dir, "", "", nil)
		require.NoError(t, err)
		require.Empty(t, rep.Bad)
		r, err := core.Open(dir, "")
		require.NoError(t, err)
		r.Close()
		require.NoFileExists(t, filepath.Join(dir, "bigsmall.index.bin"))
	}
}
