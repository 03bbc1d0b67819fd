package tests

import (
	"bytes"
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/core"
)

// fast is a folder of files, in memory where there is such a place: a disk syncs some hundred files a second.
func fast(f *testing.F) string {
	f.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "bigsmall-fuzz-")
	if err != nil {
		return f.TempDir()
	}
	f.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// noFault makes sure that an error is none of the library itself: a panic that was recovered is one.
func noFault(t *testing.T, err error) {
	t.Helper()
	require.NotContains(t, []core.Status{core.Internal, core.Poisoned}, core.StatusOf(err), "%v", err)
}

// zoo is a small file of every kind of payload.
func zoo(f *testing.F) []byte {
	f.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	w := bf16(r, 300, .02)
	source := safetensors([]tensor{
		{"a", "BF16", []uint64{30, 10}, w}, {"b", "BF16", []uint64{300}, w}, {"c", "F32", []uint64{50}, f32(r, 50, 1)},
		{"d", "U8", []uint64{40}, make([]byte, 40)}, {"e", "F16", []uint64{}, []byte{1, 2}}, {"f", "I64", []uint64{0}, nil},
		{"text", "U8", []uint64{400}, bytes.Repeat([]byte("zstd makes little of it "), 17)[:400]},
	}, map[string]string{"format": "pt"})
	in, out := filepath.Join(f.TempDir(), "in.safetensors"), filepath.Join(f.TempDir(), "out.bs")
	require.NoError(f, os.WriteFile(in, source, 0o644))
	_, err := core.Compress(in, out, core.Options{}, nil)
	require.NoError(f, err)
	bs, err := os.ReadFile(out)
	require.NoError(f, err)
	return bs
}

// FuzzFile opens and decodes files whose checksums are put right, so that all behind them is reached. Whatever is believed
// must agree with itself: a part with the whole, what passes as verified with the MD5.
func FuzzFile(f *testing.F) {
	bs := zoo(f)
	f.Add(bs, true)
	f.Add(bs, false)
	f.Add(bs[:4200], false)
	for _, l := range refusals(f) {
		f.Add(l, false)
	}
	f.Fuzz(func(t *testing.T, file []byte, mended bool) {
		if mended {
			file = mend(file)
		}
		r, err := openMemory(file)
		noFault(t, err)
		if err != nil {
			return
		}
		defer r.Close()
		text, err := r.Info()
		noFault(t, err)
		var info struct{ Tensors []struct{ MD5 string } }
		if err == nil {
			require.NoError(t, json.Unmarshal(text, &info))
		}
		job := &core.Job{Workers: 1}
		for i := range r.Len() {
			x, err := r.Tensor(i)
			require.NoError(t, err)
			if x.Bytes > 1<<20 {
				continue
			}
			dst := make([]byte, x.Bytes)
			err = r.DecodeVerified(i, dst, job)
			noFault(t, err)
			if err == nil && info.Tensors != nil {
				sum := md5.Sum(dst)
				require.Equal(t, info.Tensors[i].MD5, hex.EncodeToString(sum[:]))
			}
			if !mended && err == nil {
				whole := make([]byte, x.Bytes)
				require.NoError(t, r.Decode(i, whole, job))
				require.Equal(t, dst, whole)
			}
			elements := uint64(1)
			for _, d := range x.Shape {
				elements *= d
			}
			if err == nil && elements > 2 {
				size := x.Bytes / int64(elements)
				part := make([]byte, size)
				require.NoError(t, r.DecodeRange(i, elements/2, 1, part, job))
				require.Equal(t, dst[int64(elements/2)*size:][:size], part)
			}
		}
	})
}

// refusals are the files of the corpus.
func refusals(f *testing.F) (all [][]byte) {
	f.Helper()
	paths, err := filepath.Glob(filepath.Join(refuse, "*.bs"))
	require.NoError(f, err)
	require.NotEmpty(f, paths)
	for _, p := range paths {
		b, err := os.ReadFile(p)
		require.NoError(f, err)
		all = append(all, b)
	}
	return all
}

// FuzzSource compresses whatever takes itself for a safetensors file: it comes back to the byte, or is refused.
func FuzzSource(f *testing.F) {
	dir := fast(f)
	r := rand.New(rand.NewPCG(4, 4))
	f.Add(safetensors([]tensor{{"a", "BF16", []uint64{3, 2}, bf16(r, 6, 1)}, {"é", "F4", []uint64{2, 2}, []byte{1, 2}}, {"", "I64", []uint64{0, 9}, nil}}, map[string]string{"x": "y"}), false)
	f.Add(safetensors([]tensor{{"w", "BF16", []uint64{600}, bf16(r, 600, 1)}, {"v", "BF16", []uint64{600}, make([]byte, 1200)}}, nil), true)
	f.Add(safetensors(nil, nil), false)
	f.Add([]byte("\x02\x00\x00\x00\x00\x00\x00\x00{}"), false)
	f.Fuzz(func(t *testing.T, source []byte, parity bool) {
		in, bs, back := filepath.Join(dir, "in"), filepath.Join(dir, "x.bs"), filepath.Join(dir, "back")
		require.NoError(t, os.WriteFile(in, source, 0o644))
		opts := core.Options{SHA256: true}
		if parity {
			opts.Parity = 10
		}
		_, err := core.Compress(in, bs, opts, nil)
		noFault(t, err)
		if err != nil {
			return
		}
		rep, err := core.Verify(bs, in, "", nil)
		require.NoError(t, err)
		require.Empty(t, rep.Bad)
		_, err = core.Decompress(bs, back, "", core.Options{}, nil)
		require.NoError(t, err)
		got, err := os.ReadFile(back)
		require.NoError(t, err)
		require.True(t, bytes.Equal(source, got))
	})
}

// FuzzIndex opens a directory whose bigsmall.index.json may say anything.
func FuzzIndex(f *testing.F) {
	dir := fast(f)
	bs := zoo(f)
	require.NoError(f, os.WriteFile(filepath.Join(dir, "m.bs"), bs, 0o644))
	for _, l := range indexLies() {
		if len(l.file) < 10_000 {
			f.Add(l.file)
		}
	}
	f.Add([]byte(`{"metadata":{"shards":["m.bs"],"source_indexes":[]},"weight_map":{"a":"m.bs"}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, core.IndexName), text, 0o644))
		r, err := core.Open(dir, "")
		noFault(t, err)
		if err == nil {
			require.Equal(t, 7, r.Len(), "only the shard that is there can be opened")
			r.Close()
		}
	})
}

// FuzzRepair damages a file with parity: what is repaired is what it was, or nothing is.
func FuzzRepair(f *testing.F) {
	dir := fast(f)
	r := rand.New(rand.NewPCG(9, 9))
	source := safetensors([]tensor{{"a", "BF16", []uint64{60_000}, bf16(r, 60_000, .02)}}, nil)
	require.NoError(f, os.WriteFile(filepath.Join(dir, "in"), source, 0o644))
	path := filepath.Join(dir, "m.bs")
	_, err := core.Compress(filepath.Join(dir, "in"), path, core.Options{Parity: 20}, nil)
	require.NoError(f, err)
	whole, err := os.ReadFile(path)
	require.NoError(f, err)
	f.Add(uint32(5000), []byte{1}, uint32(0))
	f.Add(uint32(len(whole)-100), []byte("\xff\xff\xff\xff\xff\xff"), uint32(0))
	f.Add(uint32(0), make([]byte, 5000), uint32(3000))
	f.Add(uint32(80_000), whole[:20_000], uint32(10))
	f.Fuzz(func(t *testing.T, at uint32, with []byte, cut uint32) {
		b := bytes.Clone(whole)
		copy(b[int(at)%len(b):], with)
		b = b[:len(b)-int(cut)%(len(b)/2)]
		require.NoError(t, os.WriteFile(path, b, 0o644))
		_, err := core.Repair(path, "", nil)
		noFault(t, err)
		got, e := os.ReadFile(path)
		require.NoError(t, e)
		if err != nil {
			require.True(t, bytes.Equal(b, got), "%v", err)
			return
		}
		require.True(t, bytes.Equal(whole, got))
	})
}
