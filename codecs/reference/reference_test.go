package reference

import (
	"crypto/md5"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A tensor of a file of the original package.
type entry struct {
	Name, DType, Codec, MD5 string
	Shape                   []int64
	Offset                  int
	Compressed              int `json:"compressed_bytes"`
	Extra                   struct {
		Kind      string `json:"special_kind"`
		ItemBytes int    `json:"item_bytes"`
		TiedTo    string `json:"tied_to"`
	}
}

var widths = map[string]int64{"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
	"bool": 1, "uint16": 2, "uint32": 4, "uint64": 8, "complex64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1, "float4_e2m1fn_x2": 1, "float8_e8m0fnu": 1,
	"float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1}

func files(t testing.TB) (paths []string) {
	t.Helper()
	for _, pattern := range []string{"*/*.bs", "*/*/*.bs"} {
		found, err := filepath.Glob(filepath.Join("..", "..", "tests", "go", "testdata", "reference", pattern))
		require.NoError(t, err)
		paths = append(paths, found...)
	}
	require.Greater(t, len(paths), 40)
	return paths
}

func parse(t testing.TB, path string) (entries []entry, data []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	n := 10 + int(binary.LittleEndian.Uint32(b[6:]))
	var h struct{ Tensors []entry }
	require.NoError(t, json.Unmarshal(b[10:n], &h))
	return h.Tensors, b[n:]
}

func (e entry) blob() (b Blob, bytes int64) {
	n := int64(1)
	for _, d := range e.Shape {
		n *= d
	}
	return Blob{e.Codec, e.Extra.Kind, e.Extra.ItemBytes, n}, n * widths[e.DType]
}

func TestFixtures(t *testing.T) {
	codecs := map[string]int{}
	for _, path := range files(t) {
		entries, data := parse(t, path)
		for _, e := range entries {
			b, n := e.blob()
			if e.Codec == "tied_ref" {
				continue
			}
			codecs[b.key()]++
			dst := make([]byte, n)
			require.True(t, b.Plausible(int64(e.Compressed), n))
			err := Decode(dst, b, data[e.Offset:][:e.Compressed], Serial)
			require.NoError(t, err, "%s: %s %s", path, e.Name, b.key())
			if e.Codec == XOR {
				continue
			}
			sum := md5.Sum(dst)
			require.Equal(t, e.MD5, hex.EncodeToString(sum[:]), "%s: %s %s", path, e.Name, b.key())
		}
	}
	t.Log(codecs)
}

// What is coded by the range coder alone is encoded to the same bytes again.
func TestEncodesTheSameBytes(t *testing.T) {
	same := 0
	for _, path := range files(t) {
		entries, data := parse(t, path)
		for _, e := range entries {
			codec, encode := family(e.DType)
			if e.Codec != codec || encode == nil || e.Codec == "fp32_se_ac" || e.Compressed == 0 {
				continue
			}
			b, n := e.blob()
			dst := make([]byte, n)
			blob := data[e.Offset:][:e.Compressed]
			require.NoError(t, Decode(dst, b, blob, Serial))
			got, err := encode(dst)
			require.NoError(t, err)
			require.Equal(t, blob, got, "%s: %s", path, e.Name)
			same++
		}
	}
	require.Greater(t, same, 50)
}

func BenchmarkDecodeBF16(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 1))
	raw := make([]byte, 0, 4<<20)
	for range 2 << 20 {
		raw = binary.LittleEndian.AppendUint16(raw, uint16(math.Float32bits(float32(r.NormFloat64()*.02))>>16))
	}
	x, err := Encode(raw, "bfloat16", 2)
	require.NoError(b, err)
	dst := make([]byte, len(raw))
	b.SetBytes(int64(len(raw)))
	for b.Loop() {
		require.NoError(b, Decode(dst, Blob{Codec: x.Codec, Elements: 2 << 20}, x.Blob, Serial))
	}
}

// FuzzBlob decodes anything as anything: an error, or so many bytes.
func FuzzBlob(f *testing.F) {
	var keys []string
	for key := range decoders {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, path := range files(f) {
		entries, data := parse(f, path)
		for _, e := range entries {
			if b, n := e.blob(); e.Codec != "tied_ref" && e.Compressed < 3000 {
				f.Add(data[e.Offset:][:e.Compressed], uint8(slices.Index(keys, b.key())), uint16(b.Elements), uint8(max(1, n/max(1, b.Elements))))
			}
		}
	}
	f.Fuzz(func(_ *testing.T, blob []byte, key uint8, elements uint16, width uint8) {
		codec, kind, _ := strings.Cut(keys[int(key)%len(keys)], ":")
		_ = Decode(make([]byte, int(elements)*int(width%9)), Blob{Codec: codec, Kind: kind, Elements: int64(elements)}, blob, Serial)
	})
}
