package tests

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/core"
)

// bytesRead is what this process has read so far, in bytes.
func bytesRead(t *testing.T) int {
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Skip("no /proc/self/io here")
	}
	n, err := strconv.Atoi(regexp.MustCompile(`rchar: (\d+)`).FindStringSubmatch(string(b))[1])
	require.NoError(t, err)
	return n
}

func compressed(t *testing.T, all []tensor) string {
	t.Helper()
	dir := t.TempDir()
	in := write(t, filepath.Join(dir, "model.safetensors"), safetensors(all, nil))
	out := filepath.Join(dir, "model.bs")
	_, err := core.Compress(in, out, core.Options{}, nil)
	require.NoError(t, err)
	return out
}

// Decoding one tensor reads that tensor's bytes only; a range reads its blocks only.
func TestReadsOnlyWhatItNeeds(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	const n = 1 << 20
	var all []tensor
	for i := range 8 {
		all = append(all, tensor{fmt.Sprint(i), "BF16", []uint64{n}, bf16(r, n, .02)})
	}
	path := compressed(t, all)
	rd, err := core.Open(path, "")
	require.NoError(t, err)
	defer rd.Close()
	x, err := rd.Tensor(5)
	require.NoError(t, err)
	dst := make([]byte, 2*n)
	before := bytesRead(t)
	require.NoError(t, rd.Decode(5, dst, nil))
	read := bytesRead(t) - before
	require.Equal(t, all[5].data, dst)
	require.LessOrEqual(t, read, int(x.Payload)+4096, "of a payload of %d bytes", x.Payload)
	before = bytesRead(t)
	require.NoError(t, rd.DecodeRange(3, 65536*3+5, 10, dst, nil))
	require.Equal(t, all[3].data[2*(65536*3+5):][:20], dst[:20])
	require.Less(t, bytesRead(t)-before, 130_000)
}

func TestRanges(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	all := []tensor{{"bf16", "BF16", []uint64{3, 70_000}, bf16(r, 210_000, .02)}, {"c64", "C64", []uint64{70_000}, f32(r, 140_000, 1)},
		{"f4", "F4", []uint64{4, 50_000}, random(r, 100_000)}, {"i64", "I64", []uint64{9}, random(r, 72)}}
	rd, err := core.Open(compressed(t, all), "")
	require.NoError(t, err)
	defer rd.Close()
	var wg sync.WaitGroup
	for range 8 {
		rng := rand.New(rand.NewPCG(r.Uint64(), 1))
		wg.Go(func() {
			for range 60 {
				i := rng.IntN(rd.Len())
				x, _ := rd.Tensor(i)
				k := 0
				for all[k].name != x.Name {
					k++
				}
				n := uint64(1)
				for _, d := range x.Shape {
					n *= d
				}
				size := uint64(x.Bytes) / n
				first := rng.Uint64N(n + 1)
				count := rng.Uint64N(n - first + 1)
				dst := make([]byte, count*size)
				if !assertNoError(t, rd.DecodeRange(i, first, count, dst, &core.Job{Workers: 1 + rng.IntN(3)})) {
					return
				}
				if string(dst) != string(all[k].data[first*size:(first+count)*size]) {
					t.Errorf("%s: elements %d to %d differ", x.Name, first, first+count)
				}
			}
		})
	}
	wg.Wait()
	require.Equal(t, core.InvalidArgument, core.StatusOf(rd.DecodeRange(0, 1<<40, 1, nil, nil)))
	require.Equal(t, core.DstTooSmall, core.StatusOf(rd.DecodeRange(0, 0, 9, make([]byte, 1), nil)))
	require.Equal(t, core.NotFound, core.StatusOf(rd.Decode(99, nil, nil)))
}

func assertNoError(t *testing.T, err error) bool {
	if err != nil {
		t.Error(err)
	}
	return err == nil
}

func TestManyTensors(t *testing.T) {
	var all []tensor
	for i := range 100_000 {
		all = append(all, tensor{fmt.Sprintf("model.layers.%d.mlp.experts.%d.scale", i/1000, i%1000), "F16", []uint64{1}, []byte{byte(i), byte(i >> 8)}})
	}
	path := compressed(t, all)
	rd, err := core.Open(path, "")
	require.NoError(t, err)
	defer rd.Close()
	require.Equal(t, 100_000, rd.Len())
	i, err := rd.Find("model.layers.77.mlp.experts.123.scale")
	require.NoError(t, err)
	dst := make([]byte, 2)
	require.NoError(t, rd.Decode(i, dst, nil))
	require.Equal(t, []byte{77123 & 255, 77123 >> 8 & 255}, dst)
}

func BenchmarkOpen100000(b *testing.B) {
	var all []tensor
	for i := range 100_000 {
		all = append(all, tensor{fmt.Sprintf("model.layers.%d.mlp.experts.%d.scale", i/1000, i%1000), "F16", []uint64{1}, []byte{1, 2}})
	}
	dir := b.TempDir()
	in, out := filepath.Join(dir, "a.safetensors"), filepath.Join(dir, "a.bs")
	require.NoError(b, os.WriteFile(in, safetensors(all, nil), 0o644))
	_, err := core.Compress(in, out, core.Options{}, nil)
	require.NoError(b, err)
	for b.Loop() {
		rd, err := core.Open(out, "")
		require.NoError(b, err)
		rd.Close()
	}
}

func TestCancel(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	path := compressed(t, []tensor{{"a", "BF16", []uint64{1 << 20}, bf16(r, 1<<20, .02)}})
	rd, err := core.Open(path, "")
	require.NoError(t, err)
	defer rd.Close()
	cancel := int32(1)
	job := &core.Job{Cancel: &cancel}
	require.Equal(t, core.Cancelled, core.StatusOf(rd.Decode(0, make([]byte, 2<<20), job)))
	out := filepath.Join(t.TempDir(), "out.safetensors")
	_, err = core.Decompress(path, out, "", core.Options{}, job)
	require.Equal(t, core.Cancelled, core.StatusOf(err))
	require.NoFileExists(t, out)
	done, total := int64(0), int64(0)
	require.NoError(t, rd.Decode(0, make([]byte, 2<<20), &core.Job{Done: &done, Total: &total}))
	require.Equal(t, []int64{2 << 20, 2 << 20}, []int64{done, total})
}

// Files in memory decode with nothing there but what Locate tells, shards tied to each other too.
func TestMemoryFilesNeedOnlyWhatLocateTells(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	dir := t.TempDir()
	w := bf16(r, 100_000, .02)
	first := []tensor{{"a", "BF16", []uint64{1000, 100}, w}, {"b", "F32", []uint64{3}, random(r, 12)}, {"none", "F32", []uint64{0}, nil}}
	second := []tensor{{"c", "BF16", []uint64{70_000}, bf16(r, 70_000, .02)}, {"tied", "BF16", []uint64{100, 1000}, w}}
	require.NoError(t, os.Mkdir(filepath.Join(dir, "in"), 0o777))
	write(t, filepath.Join(dir, "in", "model-1.safetensors"), safetensors(first, nil))
	write(t, filepath.Join(dir, "in", "model-2.safetensors"), safetensors(second, nil))
	write(t, filepath.Join(dir, "in", "model.safetensors.index.json"), []byte(`{"metadata":{},"weight_map":{"a":"model-1.safetensors",
		"b":"model-1.safetensors","none":"model-1.safetensors","c":"model-2.safetensors","tied":"model-2.safetensors"}}`))
	_, err := core.Compress(filepath.Join(dir, "in"), filepath.Join(dir, "out"), core.Options{}, nil)
	require.NoError(t, err)
	var files []core.MemoryFile
	var whole [][]byte
	for _, name := range []string{"model-1.bs", "model-2.bs"} {
		b, err := os.ReadFile(filepath.Join(dir, "out", name))
		require.NoError(t, err)
		whole = append(whole, b)
		files = append(files, core.MemoryFile{Name: name, Src: bytes.Clone(b)})
	}
	full, err := core.OpenMemory(files, "")
	require.NoError(t, err)
	for i := range full.Len() {
		f, off, n, err := full.Locate(i)
		require.NoError(t, err)
		clear(files[f].Src[off:][:n])
	}
	sparse, err := core.OpenMemory(files, "")
	require.NoError(t, err)
	for i := range sparse.Len() {
		x, err := sparse.Tensor(i)
		require.NoError(t, err)
		dst := make([]byte, x.Bytes)
		f, off, n, err := sparse.Locate(i)
		require.NoError(t, err)
		if n > 0 {
			require.Equal(t, core.Checksum, core.StatusOf(sparse.Decode(i, dst, nil)), x.Name)
		}
		copy(files[f].Src[off:][:n], whole[f][off:])
		require.NoError(t, sparse.Decode(i, dst, nil))
		clear(files[f].Src[off:][:n])
		for _, want := range append(first, second...) {
			if want.name == x.Name {
				require.True(t, bytes.Equal(want.data, dst), x.Name)
			}
		}
	}
	_, err = core.OpenMemory(nil, "")
	require.Equal(t, core.InvalidArgument, core.StatusOf(err))
	lone, err := core.OpenMemory(files[1:], "")
	require.NoError(t, err)
	i, err := lone.Find("tied")
	require.NoError(t, err)
	_, _, _, err = lone.Locate(i)
	require.ErrorContains(t, err, "model-1.bs")
}
