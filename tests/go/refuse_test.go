package tests

import (
	"bytes"
	"encoding/binary"
	"fmt"
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

// swollen are files of a few MB that a reader could take for much more.
func swollen(t *testing.T) map[string][]byte {
	t.Helper()
	grown := func(header string) []byte {
		out := append([]byte("BGSM\x01\x00"), 0, 0, 0, 0)
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
	var metadata strings.Builder
	for i := range 400_000 {
		fmt.Fprintf(&metadata, `"%x":"",`, i)
	}
	return map[string][]byte{
		"empty entries": grown(`{"writer":"x","draft":3,"tensors":[` + strings.Repeat("{},", 1<<20) + `{}]}`),
		"long shape":    grown(`{"writer":"x","draft":3,"tensors":[{"name":"a","md5":"` + strings.Repeat("0", 90) + `","shape":[` + strings.Repeat("0,", 1<<20) + `0]}]}`),
		"sections":      grown(`{"writer":"x","draft":3,"sections":[` + strings.Repeat("{},", 1<<20) + `{}]}`),
		"requires":      grown(`{"writer":"x","draft":3,"requires":[` + strings.Repeat(`"",`, 1<<20) + `""]}`),
		"metadata":      grown(`{"writer":"x","draft":3,"safetensors_metadata":{` + metadata.String() + `"a":""}}`),
		"unknown keys":  grown(`{"writer":"x","draft":3,"more":[` + strings.Repeat(`[],`, 1<<20) + `[]]}`),
		"deep":          grown(strings.Repeat("[", 4<<20)),
	}
}

// A small file must not make a reader allocate a lot.
func TestRefusesCheaply(t *testing.T) {
	for name, b := range swollen(t) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := openMemory(b)
		runtime.ReadMemStats(&after)
		require.Error(t, err, name)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(16<<20+6*len(b)), name)
	}
	bs, err := os.ReadFile(compressed(t, []tensor{{"a", "U8", []uint64{70_000}, make([]byte, 70_000)}}))
	require.NoError(t, err)
	_, err = openMemory(append(bytes.Clone(bs[:4096]), make([]byte, 20)...))
	require.Equal(t, core.Truncated, core.StatusOf(err))
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
