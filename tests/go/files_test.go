package tests

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/core"
)

// Equal bytes are stored once whatever their dtype, and come back through the blocks of their master.
func TestTiesAcrossWordSizes(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	raw := f32(r, 1<<18, .02)
	for _, order := range [][]string{{"U8", "F32", "I64"}, {"I64", "U8", "F32"}, {"F32", "I64", "U8"}} {
		var all []tensor
		for _, d := range order {
			all = append(all, tensor{d, d, []uint64{uint64(len(raw) * 8 / sourceDTypes[d])}, raw})
		}
		path := compressed(t, all)
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.Less(t, info.Size(), int64(len(raw))+20_000)
		rd, err := core.Open(path, "")
		require.NoError(t, err)
		for i := range rd.Len() {
			got := make([]byte, len(raw))
			require.NoError(t, rd.Decode(i, got, nil))
			require.Equal(t, raw, got)
			x, _ := rd.Tensor(i)
			size := sourceDTypes[x.Name] / 8
			require.NoError(t, rd.DecodeRange(i, 999, 777, got, nil))
			require.Equal(t, raw[999*size:(999+777)*size], got[:777*size])
		}
		rd.Close()
	}
}

// model writes a model directory of two shards with their index, and returns its path.
func model(t *testing.T, dir string, seed uint64) string {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	tied := bf16(r, 300_000, .02)
	write(t, filepath.Join(dir, "model-00001-of-00002.safetensors"), safetensors([]tensor{{"embed", "BF16", []uint64{300, 1000}, tied}, {"a", "BF16", []uint64{5000}, bf16(r, 5000, .1)}}, nil))
	write(t, filepath.Join(dir, "model-00002-of-00002.safetensors"), safetensors([]tensor{{"b", "F32", []uint64{70_000}, f32(r, 70_000, .1)}, {"head", "BF16", []uint64{300, 1000}, tied}}, nil))
	write(t, filepath.Join(dir, "model.safetensors.index.json"), []byte(`{"metadata": {"total_size": 1}, "weight_map":
	{"embed": "model-00001-of-00002.safetensors", "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors", "head": "model-00002-of-00002.safetensors"}}`))
	write(t, filepath.Join(dir, "config.json"), []byte("{}"))
	write(t, filepath.Join(dir, "vae", "diffusion_pytorch_model.safetensors"), safetensors([]tensor{{"a", "F32", []uint64{9000}, f32(r, 9000, .1)}}, nil))
	write(t, filepath.Join(dir, "vae", "diffusion_pytorch_model.fp16.safetensors"), safetensors([]tensor{{"a", "BF16", []uint64{9000}, bf16(r, 9000, .1)}}, nil))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "empty", "folder"), 0o755))
	return dir
}

func sameTree(t *testing.T, a, b string) {
	t.Helper()
	list := func(root string) (out []string) {
		require.NoError(t, filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
			require.NoError(t, err)
			rel, _ := filepath.Rel(root, p)
			out = append(out, rel)
			return nil
		}))
		return out
	}
	require.Equal(t, list(a), list(b))
	for _, f := range list(a) {
		if x, err := os.ReadFile(filepath.Join(a, f)); err == nil {
			y, err := os.ReadFile(filepath.Join(b, f))
			require.NoError(t, err)
			require.Equal(t, x, y, f)
		}
	}
}

func TestDirectory(t *testing.T) {
	dir := t.TempDir()
	src := model(t, filepath.Join(dir, "src"), 1)
	out, back := filepath.Join(dir, "out"), filepath.Join(dir, "back")
	_, err := core.Compress(src, out, core.Options{}, nil)
	require.NoError(t, err)
	_, err = core.Compress(src, out, core.Options{}, nil)
	require.Equal(t, core.IO, core.StatusOf(err), "a directory that is not empty")
	_, err = core.Compress(src, out, core.Options{Force: true}, nil)
	require.NoError(t, err)
	done, total := int64(0), int64(0)
	_, err = core.Decompress(out, back, "", core.Options{}, &core.Job{Done: &done, Total: &total})
	require.NoError(t, err)
	require.Equal(t, total, done)
	sameTree(t, src, back)
	rep, err := core.Verify(out, src, "", nil)
	require.NoError(t, err)
	require.Empty(t, rep.Bad)
	require.Equal(t, 6, rep.Tensors)

	// One shard alone finds what it is tied to in its sibling, or says which one is missing.
	alone, err := core.Open(filepath.Join(out, "model-00002-of-00002.bs"), "")
	require.NoError(t, err)
	defer alone.Close()
	i, err := alone.Find("head")
	require.NoError(t, err)
	require.NoError(t, alone.Decode(i, make([]byte, 600_000), nil))
	first := filepath.Join(out, "model-00001-of-00002.bs")
	require.NoError(t, os.Rename(first, first+".away"))
	lost, err := core.Open(filepath.Join(out, "model-00002-of-00002.bs"), "")
	require.NoError(t, err)
	defer lost.Close()
	err = lost.Decode(i, make([]byte, 600_000), nil)
	require.ErrorContains(t, err, "model-00001-of-00002.bs")
	_, err = core.Decompress(out, filepath.Join(dir, "partial"), "", core.Options{}, nil)
	require.ErrorContains(t, err, "missing")
	require.NoDirExists(t, filepath.Join(dir, "partial"))
	require.NoError(t, os.Rename(first+".away", first))

	// Damage anywhere below the directory is found.
	vae := filepath.Join(out, "vae", "diffusion_pytorch_model.fp16.bs")
	b, err := os.ReadFile(vae)
	require.NoError(t, err)
	b[4096+500] ^= 4
	require.NoError(t, os.WriteFile(vae, b, 0o644))
	rep, err = core.Verify(out, "", "", nil)
	require.NoError(t, err)
	require.Len(t, rep.Bad, 1)

	// A shard of another model is noticed.
	other := filepath.Join(dir, "other")
	_, err = core.Compress(model(t, filepath.Join(dir, "src2"), 2), other, core.Options{}, nil)
	require.NoError(t, err)
	require.NoError(t, os.Rename(filepath.Join(other, "vae", "diffusion_pytorch_model.bs"), filepath.Join(other, "model-00001-of-00002.bs")))
	_, err = core.Open(other, "")
	require.Equal(t, core.Corrupt, core.StatusOf(err))
}

func TestDirectoryOddities(t *testing.T) {
	dir := t.TempDir()
	src := model(t, filepath.Join(dir, "src"), 3)
	shard := filepath.Join(src, "model-00002-of-00002.safetensors")
	b, err := os.ReadFile(shard)
	require.NoError(t, err)
	require.NoError(t, os.Remove(shard))
	_, err = core.Compress(src, filepath.Join(dir, "out"), core.Options{}, nil)
	require.ErrorContains(t, err, "model-00002-of-00002.safetensors")
	require.NoDirExists(t, filepath.Join(dir, "out"))
	write(t, shard, b)
	// What only looks like an index is copied; an index of nothing does no harm.
	write(t, filepath.Join(src, "x.safetensors.index.json"), []byte("\xef\xbb\xbfnot JSON"))
	write(t, filepath.Join(src, "vae", "y.safetensors.index.json"), []byte(`{"weight_map":{}}`))
	_, err = core.Compress(src, filepath.Join(dir, "out"), core.Options{}, nil)
	require.NoError(t, err)
	_, err = core.Decompress(filepath.Join(dir, "out"), filepath.Join(dir, "back"), "", core.Options{}, nil)
	require.NoError(t, err)
	sameTree(t, src, filepath.Join(dir, "back"))
	for _, target := range []string{src, filepath.Join(src, "inside"), dir} {
		_, err = core.Compress(src, target, core.Options{Force: true}, nil)
		require.Equal(t, core.InvalidArgument, core.StatusOf(err), target)
	}
	sameTree(t, src, filepath.Join(dir, "back"))
}

// Nothing that is needed or special is ever replaced.
func TestTargetsThatAreRefused(t *testing.T) {
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(4, 4))
	w := bf16(r, 5000, .1)
	base := write(t, filepath.Join(dir, "base.safetensors"), safetensors([]tensor{{"a", "BF16", []uint64{5000}, w}}, nil))
	tuned := write(t, filepath.Join(dir, "tuned.safetensors"), safetensors([]tensor{{"a", "BF16", []uint64{5000}, bf16(r, 5000, .1)}}, nil))
	require.NoError(t, os.Symlink(base, filepath.Join(dir, "link")))
	before, err := os.ReadFile(base)
	require.NoError(t, err)
	delta := filepath.Join(dir, "delta.bs")
	_, err = core.CompressDelta(tuned, base, delta, core.Options{}, nil)
	require.NoError(t, err)
	for _, target := range []string{base, filepath.Join(dir, "link")} {
		_, err = core.CompressDelta(tuned, base, target, core.Options{}, nil)
		require.Equal(t, core.InvalidArgument, core.StatusOf(err))
		_, err = core.Decompress(delta, target, base, core.Options{}, nil)
		require.Equal(t, core.InvalidArgument, core.StatusOf(err))
		_, err = core.Compress(base, target, core.Options{}, nil)
		require.Equal(t, core.InvalidArgument, core.StatusOf(err))
	}
	after, err := os.ReadFile(base)
	require.NoError(t, err)
	require.Equal(t, before, after)
	_, err = core.CompressDelta(tuned, write(t, filepath.Join(dir, "o.safetensors"), safetensors([]tensor{{"z", "F32", []uint64{1}, make([]byte, 4)}}, nil)), delta, core.Options{}, nil)
	require.Equal(t, core.WrongBase, core.StatusOf(err))

	pipe := filepath.Join(dir, "pipe")
	require.NoError(t, syscall.Mkfifo(pipe, 0o600))
	_, err = core.Compress(base, pipe, core.Options{}, nil)
	require.Equal(t, core.InvalidArgument, core.StatusOf(err))
	_, err = core.Compress(pipe, filepath.Join(dir, "p.bs"), core.Options{}, nil)
	require.Equal(t, core.InvalidArgument, core.StatusOf(err))
	_, err = core.Open(pipe, "")
	require.Equal(t, core.InvalidArgument, core.StatusOf(err))
	info, err := os.Lstat(pipe)
	require.NoError(t, err)
	require.NotZero(t, info.Mode()&os.ModeNamedPipe)
	_, err = core.Compress(base, filepath.Join(dir, "nowhere", "x.bs"), core.Options{}, nil)
	require.Equal(t, core.IO, core.StatusOf(err))
	require.ErrorContains(t, err, filepath.Join(dir, "nowhere"))
	_, err = core.Compress(base, delta, core.Options{NoReplace: true}, nil)
	require.ErrorIs(t, err, os.ErrExist)
}

func TestPermissionsAreKept(t *testing.T) {
	dir := t.TempDir()
	in := write(t, filepath.Join(dir, "in.safetensors"), safetensors(nil, nil))
	for _, mode := range []os.FileMode{0o600, 0o644} {
		require.NoError(t, os.Chmod(in, mode))
		bs, back := filepath.Join(dir, fmt.Sprintf("%o.bs", mode)), filepath.Join(dir, fmt.Sprintf("%o.safetensors", mode))
		_, err := core.Compress(in, bs, core.Options{}, nil)
		require.NoError(t, err)
		_, err = core.Decompress(bs, back, "", core.Options{}, nil)
		require.NoError(t, err)
		for _, f := range []string{bs, back} {
			info, err := os.Stat(f)
			require.NoError(t, err)
			require.Equal(t, mode, info.Mode().Perm())
		}
	}
}

func TestDelta(t *testing.T) {
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(5, 5))
	var before, after []tensor
	for _, d := range []string{"BF16", "F16", "F32", "I64", "F8_E4M3", "F64", "C64", "U8"} {
		size := sourceDTypes[d] / 8
		raw := random(r, 70_000*size)
		if d == "F32" {
			raw = f32(r, 70_000, .1)
		}
		tuned := append([]byte{}, raw...)
		for i := 0; i < len(tuned); i += 11 * size { // some values move a little, some change their sign
			tuned[i] += byte(r.IntN(3))
			if r.IntN(50) == 0 {
				tuned[i+size-1] ^= 0x80
			}
		}
		before = append(before, tensor{d, d, []uint64{70_000}, raw})
		after = append(after, tensor{d, d, []uint64{70_000}, tuned})
	}
	after = append(after, tensor{"new", "BF16", []uint64{5000}, bf16(r, 5000, .1)}, tensor{"same", "F32", []uint64{70_000}, before[2].data})
	before = append(before, tensor{"same", "F32", []uint64{70_000}, before[2].data})
	base := write(t, filepath.Join(dir, "base.safetensors"), safetensors(before, nil))
	tuned := write(t, filepath.Join(dir, "tuned.safetensors"), safetensors(after, nil))
	baseBS, delta, back := filepath.Join(dir, "base.bs"), filepath.Join(dir, "delta.bs"), filepath.Join(dir, "back.safetensors")
	_, err := core.Compress(base, baseBS, core.Options{}, nil)
	require.NoError(t, err)
	var first []byte
	for _, b := range []string{base, baseBS} {
		res, err := core.CompressDelta(tuned, b, delta, core.Options{}, nil)
		require.NoError(t, err)
		require.Less(t, res.OutputBytes, res.SourceBytes/3)
		got, err := os.ReadFile(delta)
		require.NoError(t, err)
		if first == nil {
			first = got
		}
		require.Equal(t, first, got, "a .bs base gives the same delta as its source")
		for _, with := range []string{base, baseBS} {
			_, err = core.Decompress(delta, back, with, core.Options{}, nil)
			require.NoError(t, err)
			x, _ := os.ReadFile(tuned)
			y, _ := os.ReadFile(back)
			require.True(t, string(x) == string(y))
			rep, err := core.Verify(delta, tuned, with, nil)
			require.NoError(t, err)
			require.Empty(t, rep.Bad)
		}
	}
	require.NoError(t, os.Remove(back))
	before[0].data[0] ^= 1
	wrong := write(t, filepath.Join(dir, "wrong.safetensors"), safetensors(before, nil))
	for _, b := range []string{"", wrong} {
		_, err = core.Decompress(delta, back, b, core.Options{}, nil)
		require.Equal(t, core.WrongBase, core.StatusOf(err))
		require.NoFileExists(t, back)
		_, err = core.Verify(delta, "", b, nil)
		require.Equal(t, core.WrongBase, core.StatusOf(err))
		rd, err := core.Open(delta, b)
		require.NoError(t, err)
		i, err := rd.Find("BF16")
		require.NoError(t, err)
		require.Equal(t, core.WrongBase, core.StatusOf(rd.Decode(i, make([]byte, 140_000), nil)))
		rd.Close()
	}
}

func TestSHA256(t *testing.T) {
	dir := t.TempDir()
	in := write(t, filepath.Join(dir, "in.safetensors"), safetensors([]tensor{{"a", "U8", []uint64{3}, []byte{1, 2, 3}}}, nil))
	bs := filepath.Join(dir, "x.bs")
	_, err := core.Compress(in, bs, core.Options{SHA256: true}, nil)
	require.NoError(t, err)
	rep, err := core.Verify(bs, "", "", nil)
	require.NoError(t, err)
	require.Empty(t, rep.Bad)
	b, err := os.ReadFile(bs)
	require.NoError(t, err)
	bad := write(t, filepath.Join(dir, "bad.bs"), forge(t, b, func(s string) string {
		i := strings.Index(s, `"sha256":"`) + 10
		return s[:i] + strings.Repeat("0", 64) + s[i+64:]
	}))
	rep, err = core.Verify(bad, "", "", nil)
	require.NoError(t, err)
	require.Len(t, rep.Bad, 1)
	_, err = core.Decompress(bad, filepath.Join(dir, "back"), "", core.Options{}, nil)
	require.Equal(t, core.Checksum, core.StatusOf(err))
}

// A model without an index is not opened in part: the names of shards tell how many there are.
func TestMissingShardWithoutIndex(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	dir := t.TempDir()
	for _, name := range []string{"model-00001-of-00003", "model-00002-of-00003", "model-00003-of-00003", "part-0-of-2", "part-1-of-2", "other"} {
		write(t, filepath.Join(dir, "in", name+".safetensors"), safetensors([]tensor{{name, "F32", []uint64{100}, f32(r, 100, .1)}}, nil))
	}
	_, err := core.Compress(filepath.Join(dir, "in"), filepath.Join(dir, "out"), core.Options{}, nil)
	require.NoError(t, err)
	all, err := core.Open(filepath.Join(dir, "out"), "")
	require.NoError(t, err)
	require.Equal(t, 6, all.Len())
	all.Close()
	for _, name := range []string{"model-00002-of-00003.bs", "model-00003-of-00003.bs", "model-00001-of-00003.bs", "part-0-of-2.bs", "part-1-of-2.bs"} {
		path := filepath.Join(dir, "out", name)
		b, err := os.ReadFile(path)
		require.NoError(t, err)
		require.NoError(t, os.Remove(path))
		_, err = core.Open(filepath.Join(dir, "out"), "")
		require.ErrorIs(t, err, os.ErrNotExist, name)
		require.ErrorContains(t, err, "is missing", name)
		require.ErrorContains(t, err, filepath.Join(dir, "out"), name)
		_, err = core.OpenMemory([]core.MemoryFile{{Name: "model-00001-of-00003.bs", Src: b}}, "")
		require.ErrorIs(t, err, os.ErrNotExist, name)
		lone, err := openMemory(b)
		require.NoError(t, err)
		lone.Close()
		write(t, path, b)
		lone, err = core.Open(path, "")
		require.NoError(t, err)
		lone.Close()
	}
}

// Where only a variant is in shards, a directory still stands for its plain weights; an index that lists a part of numbered
// shards is refused.
func TestPlainWeightsBesideVariant(t *testing.T) {
	r := rand.New(rand.NewPCG(8, 8))
	dir := t.TempDir()
	in := filepath.Join(dir, "in")
	plain := f32(r, 100, .1)
	write(t, filepath.Join(in, "model.safetensors"), safetensors([]tensor{{"a", "F32", []uint64{100}, plain}}, nil))
	for i, name := range []string{"a", "b"} {
		write(t, filepath.Join(in, fmt.Sprintf("model.fp16-0000%d-of-00002.safetensors", i+1)), safetensors([]tensor{{name, "F16", []uint64{8}, random(r, 16)}}, nil))
	}
	write(t, filepath.Join(in, "model.safetensors.index.fp16.json"), []byte(`{"metadata":{},"weight_map":{"a":"model.fp16-00001-of-00002.safetensors","b":"model.fp16-00002-of-00002.safetensors"}}`))
	_, err := core.Compress(in, filepath.Join(dir, "out"), core.Options{}, nil)
	require.NoError(t, err)
	rd, err := core.Open(filepath.Join(dir, "out"), "")
	require.NoError(t, err)
	defer rd.Close()
	require.Equal(t, 1, rd.Len())
	dst := make([]byte, 400)
	require.NoError(t, rd.Decode(0, dst, nil))
	require.Equal(t, plain, dst)
	_, err = core.Decompress(filepath.Join(dir, "out"), filepath.Join(dir, "back"), "", core.Options{}, nil)
	require.NoError(t, err)
	for _, name := range []string{"model.safetensors", "model.safetensors.index.fp16.json", "model.fp16-00002-of-00002.safetensors"} {
		want, err := os.ReadFile(filepath.Join(in, name))
		require.NoError(t, err)
		got, err := os.ReadFile(filepath.Join(dir, "back", name))
		require.NoError(t, err)
		require.Equal(t, want, got, name)
	}
	require.NoError(t, os.Remove(filepath.Join(dir, "out", "model.bs")))
	variant, err := core.Open(filepath.Join(dir, "out"), "")
	require.NoError(t, err)
	require.Equal(t, 2, variant.Len())
	variant.Close()
	write(t, filepath.Join(dir, "out", core.IndexName), []byte(`{"metadata":{"shards":["model.fp16-00001-of-00002.bs"]},"weight_map":{"a":"model.fp16-00001-of-00002.bs"}}`))
	_, err = core.Open(filepath.Join(dir, "out"), "")
	require.ErrorContains(t, err, "number 2 is missing")
}
