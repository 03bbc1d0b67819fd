// Package tests exercises the library from outside, through core and the files it writes.
package tests

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
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

// tensor is one to be written to a safetensors file, in this order.
type tensor struct {
	name  string
	dtype string
	shape []uint64
	data  []byte
}

// safetensors is the file that holds them.
func safetensors(tensors []tensor, metadata map[string]string) []byte {
	var h bytes.Buffer
	h.WriteString("{")
	if metadata != nil {
		m, _ := json.Marshal(metadata)
		fmt.Fprintf(&h, `"__metadata__":%s`, m)
	}
	at := 0
	var data []byte
	for _, t := range tensors {
		if h.Len() > 1 {
			h.WriteString(",")
		}
		name, _ := json.Marshal(t.name)
		shape, _ := json.Marshal(t.shape)
		if len(t.shape) == 0 {
			shape = []byte("[]")
		}
		fmt.Fprintf(&h, `%s:{"dtype":%q,"shape":%s,"data_offsets":[%d,%d]}`, name, t.dtype, shape, at, at+len(t.data))
		at += len(t.data)
		data = append(data, t.data...)
	}
	h.WriteString("}")
	for h.Len()%8 != 0 {
		h.WriteString(" ")
	}
	out := binary.LittleEndian.AppendUint64(nil, uint64(h.Len()))
	return append(append(out, h.Bytes()...), data...)
}

func write(t *testing.T, path string, b []byte) string {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, b, 0o644))
	return path
}

// bf16 is n normal weights.
func bf16(r *rand.Rand, n int, sd float64) []byte {
	b := make([]byte, 0, 2*n)
	for range n {
		b = binary.LittleEndian.AppendUint16(b, uint16(math.Float32bits(float32(r.NormFloat64()*sd))>>16))
	}
	return b
}

func f32(r *rand.Rand, n int, sd float64) []byte {
	b := make([]byte, 0, 4*n)
	for range n {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(r.NormFloat64()*sd)))
	}
	return b
}

var modes = []codecs.Mode{codecs.Balanced, codecs.Inference, codecs.Storage}

// roundTrip compresses, verifies and restores a file in every mode, and gives back the balanced `.bs`.
func roundTrip(t *testing.T, src []byte) []byte {
	t.Helper()
	dir := t.TempDir()
	in := write(t, filepath.Join(dir, "in.safetensors"), src)
	var out []byte
	for _, mode := range modes {
		bs := filepath.Join(dir, "x.bs")
		res, err := core.Compress(in, bs, core.Options{Mode: mode}, nil)
		require.NoError(t, err)
		b, err := os.ReadFile(bs)
		require.NoError(t, err)
		require.Equal(t, int64(len(b)), res.OutputBytes)
		require.Equal(t, int64(len(src)), res.SourceBytes)
		if mode == codecs.Balanced {
			out = b
		}
		rep, err := core.Verify(bs, in, "", nil)
		require.NoError(t, err)
		require.Empty(t, rep.Bad)
		back := filepath.Join(dir, "back.safetensors")
		_, err = core.Decompress(bs, back, "", core.Options{}, nil)
		require.NoError(t, err)
		got, err := os.ReadFile(back)
		require.NoError(t, err)
		require.True(t, bytes.Equal(src, got), "the restored file differs")
	}
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	require.NoError(t, err)
	require.Empty(t, left, "temporary files are left")
	return out
}

// openMemory opens a lone file.
func openMemory(b []byte) (*core.Reader, error) {
	return core.OpenMemory([]core.MemoryFile{{Src: b}}, "")
}
