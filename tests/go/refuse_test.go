package tests

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/zeebo/xxh3"

	"bigsmall.dev/bigsmall/core"
)

// forge replaces text in a file's header and mends length, padding and checksums, as a liar would.
func forge(t *testing.T, bs []byte, replace func(string) string) []byte {
	t.Helper()
	h := int(binary.LittleEndian.Uint32(bs[6:]))
	old := strings.TrimRight(string(bs[10:10+h]), " ")
	text := replace(old)
	require.NotEqual(t, old, text, "nothing was replaced")
	require.LessOrEqual(t, len(text), h)
	out := bytes.Clone(bs)
	copy(out[10:], text+strings.Repeat(" ", h-len(text)))
	end := out[len(out)-48:]
	binary.LittleEndian.PutUint64(end[24:], xxh3.Hash(out[:10+h]))
	binary.LittleEndian.PutUint64(end[40:], xxh3.Hash(end[:40]))
	return out
}

// A file that lies is refused with the right status before anything is decoded.
func TestRefuse(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	w := bf16(r, 4000, .02)
	path := compressed(t, []tensor{{"a", "BF16", []uint64{40, 100}, w}, {"b", "BF16", []uint64{40, 100}, w}, {"c", "U8", []uint64{3}, []byte{1, 2, 3}}})
	bs, err := os.ReadFile(path)
	require.NoError(t, err)
	swap := func(from, to string) func(string) string {
		return func(s string) string { return strings.Replace(s, from, to, 1) }
	}
	for name, c := range map[string]struct {
		replace func(string) string
		status  core.Status
		says    string
	}{
		"draft":              {swap(`"draft":2`, `"draft":1`), core.UnsupportedVersion, "draft 1"},
		"no draft":           {swap(`"draft":2`, `"drift":2`), core.UnsupportedVersion, "draft"},
		"requires":           {swap(`"requires":[]`, `"requires":["warp"]`), core.UnsupportedFeature, `"warp"`},
		"section":            {swap(`"sections":[`, `"sections":[{"kind":"x","offset":0,"length":0,"checksum":"","optional":false},`), core.Corrupt, "section"},
		"codec":              {swap(`"codec":"bs_planes"`, `"codec":"qz_planes"`), core.UnsupportedCodec, "qz_planes"},
		"dtype":              {swap(`"dtype":"uint8"`, `"dtype":"uint9"`), core.UnsupportedFeature, "uint9"},
		"shape":              {swap(`"shape":[3]`, `"shape":[4]`), core.Corrupt, "agree"},
		"shape overflow":     {swap(`"shape":[3]`, `"shape":[4294967296,4294967296,4]`), core.Corrupt, "too large"},
		"dimensions":         {swap(`"shape":[3]`, `"shape":[3`+strings.Repeat(",1", 64)+`]`), core.Corrupt, "65 dimensions"},
		"negative":           {swap(`"shape":[3]`, `"shape":[-3]`), core.Corrupt, "JSON"},
		"duplicate key":      {swap(`"mode"`, `"mode":"x","mode"`), core.Corrupt, "duplicate"},
		"key in other case":  {swap(`"tensors":`, `"Tensors":`), core.Corrupt, "tensor_count"},
		"same name":          {swap(`"name":"c"`, `"name":"a"`), core.Corrupt, "twice"},
		"lone surrogate":     {swap(`"name":"c"`, `"name":"\ud800"`), core.Corrupt, "JSON"},
		"bad UTF-8":          {swap(`"name":"c"`, "\"name\":\"\xff\""), core.Corrupt, "JSON"},
		"count":              {swap(`"tensor_count":3`, `"tensor_count":2`), core.Corrupt, "tensor_count"},
		"tie to itself":      {swap(`"tied_to":"a"`, `"tied_to":"b"`), core.Corrupt, "tied"},
		"tie to nothing":     {swap(`"tied_to":"a"`, `"tied_to":"z"`), core.Corrupt, "not in the file"},
		"tie to another":     {swap(`"tied_to":"a"`, `"tied_to":"c"`), core.Corrupt, "another tensor"},
		"tie outside":        {swap(`"tied_to":"a"`, `"tied_to":"a","shard":"../x.bs"`), core.Corrupt, "plain file name"},
		"md5":                {swap(`"md5":"`, `"md5":"x`), core.Corrupt, "MD5"},
		"offset":             {swap(`"offset":0`, `"offset":64`), core.Corrupt, "offset 64"},
		"not an object":      {func(string) string { return "[]" }, core.Corrupt, "JSON"},
		"deep":               {func(string) string { return strings.Repeat("[", 3000) }, core.Corrupt, "JSON"},
		"no source header":   {swap(`"kind":"source_header"`, `"kind":"other_header_"`), core.UnsupportedFeature, "other_header_"},
		"optional unknown":   {swap(`"kind":"source_header","`, `"optional":true,"kind":"y","`), core.Corrupt, "JSON"},
		"huge head":          {swap(`"head":`, `"head":9999`), core.Corrupt, "head"},
		"delta without base": {swap(`"codec":"bs_planes"`, `"codec":"bs_delta"`), core.Corrupt, "base_md5"},
	} {
		_, err := openMemory(forge(t, bs, c.replace))
		require.Error(t, err, name)
		require.Equal(t, c.status, core.StatusOf(err), "%s: %s", name, err)
		require.Contains(t, err.Error(), c.says, name)
	}
}

// A small file must not make a reader allocate a lot.
func TestRefusesCheaply(t *testing.T) {
	bs, err := os.ReadFile(compressed(t, []tensor{{"a", "U8", []uint64{70_000}, make([]byte, 70_000)}}))
	require.NoError(t, err)
	grown := func(header string) []byte { // the header replaced by a longer one
		out := append(bytes.Clone(bs[:6]), 0, 0, 0, 0)
		out = append(out, header...)
		for len(out)%64 != 0 {
			out = append(out, ' ')
		}
		binary.LittleEndian.PutUint32(out[6:], uint32(len(out)-10))
		end := append([]byte("BGSMEND\n"), make([]byte, 32)...)
		binary.LittleEndian.PutUint64(end[8:], uint64(len(out)))
		binary.LittleEndian.PutUint64(end[24:], xxh3.Hash(out))
		return append(append(out, end...), binary.LittleEndian.AppendUint64(nil, xxh3.Hash(end))...)
	}
	for name, b := range map[string][]byte{
		"empty entries": grown(`{"writer":"x","draft":2,"tensors":[` + strings.Repeat("{},", 1<<20) + `{}]}`),
		"long shape":    grown(`{"writer":"x","draft":2,"tensors":[{"name":"a","md5":"` + strings.Repeat("0", 90) + `","shape":[` + strings.Repeat("0,", 1<<20) + `0]}]}`),
		"sections":      grown(`{"writer":"x","draft":2,"sections":[` + strings.Repeat("{},", 1<<20) + `{}]}`),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := openMemory(b)
		runtime.ReadMemStats(&after)
		require.Equal(t, core.Corrupt, core.StatusOf(err), name)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(16<<20+6*len(b)), name)
	}
	_, err = openMemory(append(bytes.Clone(bs[:4096]), make([]byte, 20)...))
	require.Equal(t, core.Truncated, core.StatusOf(err))
	_, err = openMemory(grown(`{"tensors":[]}`)[:100])
	require.Error(t, err)
}

// Every cut and every single-bit flip of a small file is noticed, at opening or at decoding, and never gives wrong bytes.
func TestDamage(t *testing.T) {
	r := rand.New(rand.NewPCG(2, 2))
	all := []tensor{{"a", "BF16", []uint64{10, 40}, bf16(r, 400, .02)}, {"b", "F32", []uint64{40}, f32(r, 40, 1)}, {"c", "I64", []uint64{30}, make([]byte, 240)}}
	bs, err := os.ReadFile(compressed(t, all))
	require.NoError(t, err)
	read := func(b []byte) error {
		rd, err := openMemory(b)
		if err != nil {
			return err
		}
		defer rd.Close()
		for i := range rd.Len() {
			x, _ := rd.Tensor(i)
			dst := make([]byte, x.Bytes)
			if err := rd.Decode(i, dst, &core.Job{Workers: 1}); err != nil {
				return err
			}
		}
		return nil
	}
	require.NoError(t, read(bs))
	for i := range bs {
		err := read(bs[:i])
		require.Error(t, err, "cut at %d of %d", i, len(bs))
		require.Contains(t, []core.Status{core.Truncated, core.Corrupt}, core.StatusOf(err))
	}
	header := bytes.LastIndexByte(bs[:4096], '}')
	for i := range 8 * len(bs) {
		if i/8 > header && i/8 < 4090 && i%8 > 1 { // the header's padding: two bits of each byte will do
			continue
		}
		bad := bytes.Clone(bs)
		bad[i/8] ^= 1 << (i % 8)
		require.Error(t, read(bad), "bit %d of byte %d", i%8, i/8)
	}
}

func TestVerifyReports(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	path := compressed(t, []tensor{{"a", "BF16", []uint64{4000}, bf16(r, 4000, .02)}, {"b", "BF16", []uint64{4000}, bf16(r, 4000, .02)}})
	bs, err := os.ReadFile(path)
	require.NoError(t, err)
	at := 4096 + 3000
	bs[at] ^= 1
	bad := write(t, filepath.Join(t.TempDir(), "bad.bs"), bs)
	rep, err := core.Verify(bad, "", "", nil)
	require.NoError(t, err)
	require.Equal(t, 2, rep.Tensors)
	require.Len(t, rep.Bad, 1)
	require.Equal(t, "a", rep.Bad[0].Tensor)
	require.Contains(t, rep.Bad[0].Problem, "checksum")
	_, err = core.Decompress(bad, bad+".safetensors", "", core.Options{}, nil)
	require.Equal(t, core.Checksum, core.StatusOf(err))
	require.Contains(t, err.Error(), `"a"`)
	require.Contains(t, err.Error(), "bad.bs")
	require.NoFileExists(t, bad+".safetensors")
	rep, err = core.Verify(path, write(t, filepath.Join(t.TempDir(), "s.safetensors"), safetensors([]tensor{{"a", "BF16", []uint64{4000}, bf16(r, 4000, .02)}}, nil)), "", nil)
	require.NoError(t, err)
	require.Len(t, rep.Bad, 2) // "a", which differs, and "b", which the source has not
	rep, err = core.Verify(write(t, filepath.Join(t.TempDir(), "cut.bs"), bs[:5000]), "", "", nil)
	require.NoError(t, err)
	require.Len(t, rep.Bad, 1)
	_, err = core.Verify(write(t, filepath.Join(t.TempDir(), "no.bs"), []byte("something else entirely")), "", "", nil)
	require.Error(t, err)
}
