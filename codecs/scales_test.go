package codecs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

// scaled are floats whose scale differs by row and by column, and in signed columns their sign does too.
func scaled(r *rand.Rand, d DType, rows, cols int, signed bool) []byte {
	row, col, bias := make([]float64, rows), make([]float64, cols), make([]float64, cols)
	for i := range row {
		row[i] = math.Exp(r.NormFloat64())
	}
	for i := range col {
		col[i] = math.Exp(r.NormFloat64())
		if signed {
			bias[i] = 2 * r.NormFloat64()
		}
	}
	out := make([]byte, 0, rows*cols*dtypes[d].word)
	for i := range row {
		for k := range col {
			x := math.Float32bits(float32((r.NormFloat64() + bias[k]) * row[i] * col[k] * .02))
			switch d {
			case F32:
				out = binary.LittleEndian.AppendUint32(out, x)
			case BF16:
				out = binary.LittleEndian.AppendUint16(out, uint16(x>>16))
			case F16:
				h, _ := toHalf(x &^ 0x1fff)
				out = binary.LittleEndian.AppendUint16(out, h)
			default: // the upper bits of a binary16: those of F8_E5M2
				h, _ := toHalf(x &^ 0x1fff)
				out = append(out, uint8(h>>8))
			}
		}
	}
	return out
}

func TestScales(t *testing.T) {
	r := rand.New(rand.NewPCG(21, 22))
	for _, d := range []DType{BF16, F16, F32, F8E5M2} {
		for _, shape := range [][]uint64{{90, 100}, {700, 300}, {40, 2001}, {24, 16, 5, 7}, {3, 70_000}, {5000, 8}} {
			for _, signed := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%d/%t", d, shape, signed), func(t *testing.T) {
					rows, cols := int(shape[0]), 1
					for _, n := range shape[1:] {
						cols *= int(n)
					}
					raw := scaled(r, d, rows, cols, signed)
					size, _ := roundTrip(t, tensorOf(d, raw, Storage, shape...), raw, nil)
					without, _ := roundTrip(t, tensorOf(d, raw, Balanced, shape...), raw, nil)
					require.LessOrEqual(t, size, without)
					e, err := NewEncoding(tensorOf(d, raw, Storage, shape...))
					require.NoError(t, err)
					if rows >= 24 && rows <= 700 && cols >= 100 {
						require.NotNil(t, e.scales)
						require.Less(t, size, without)
					}
				})
			}
		}
	}
}

// Binary16 numbers in binary32, and numbers with zero low bits.
func TestScalesOfNarrowNumbers(t *testing.T) {
	r := rand.New(rand.NewPCG(23, 24))
	for _, d := range []DType{BF16, F16} {
		narrow := scaled(r, d, 200, 400, true)
		raw := make([]byte, 0, 2*len(narrow))
		for i := 0; i < len(narrow); i += 2 {
			w := binary.LittleEndian.Uint16(narrow[i:])
			x := uint32(w) << 16
			if d == F16 {
				x = fromHalf(w)
			}
			raw = binary.LittleEndian.AppendUint32(raw, x)
		}
		e, err := NewEncoding(tensorOf(F32, raw, Storage, 200, 400))
		require.NoError(t, err)
		require.NotNil(t, e.scales)
		roundTrip(t, tensorOf(F32, raw, Storage, 200, 400), raw, nil)
	}
}

// Nothing is gained where rows and columns are alike, and nothing is tried without two dimensions.
func TestScalesThatDoNotPay(t *testing.T) {
	r := rand.New(rand.NewPCG(25, 26))
	raw := weights(r, BF16, 300*400, .02)
	for _, tensor := range []*Tensor{
		tensorOf(BF16, raw, Storage, 300, 400), tensorOf(BF16, raw, Storage, 120_000),
		tensorOf(BF16, scaled(r, BF16, 300, 400, true), Storage, 120_000),
		tensorOf(BF16, scaled(r, BF16, 300, 400, true), Balanced, 300, 400),
	} {
		e, err := NewEncoding(tensor)
		require.NoError(t, err)
		require.Nil(t, e.scales)
	}
}

// What a head says of scales is checked, and bounded by what it holds.
func TestScalesAreChecked(t *testing.T) {
	const cols, words = 40, 90 * 40
	x := &scales{row: bytes.Repeat([]byte{1, 2, 3}, 30), col: make([]uint8, cols)}
	good := x.append(nil)
	got, rest, err := parseScales(append(bytes.Clone(good), 9), words, cols)
	require.NoError(t, err)
	require.Equal(t, []byte{9}, rest)
	require.Equal(t, x.row, got.row)
	require.Equal(t, x.col, got.col)
	_, _, err = parseScales(good, words-cols+1, cols) // a last row of one word
	require.NoError(t, err)
	for name, c := range map[string]struct {
		src   []byte
		words uint64
		cols  uint32
	}{
		"nothing":         {nil, words, cols},
		"cut":             {good[:len(good)-1], words, cols},
		"fewer rows":      {good, words - cols, cols},
		"more rows":       {good, words + 1, cols},
		"wide":            {good, 1, 200},
		"narrow":          {append([]byte{182, 0, 0, 0}, make([]byte, 182)...), 180 * 2, 2},
		"little for many": {[]byte{1, 0, 0, 0, 5}, 1 << 40, 1 << 20},
		"no frame":        {[]byte{10, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, words, cols},
		"a large frame":   {append([]byte{0, 0, 16, 0}, make([]byte, 1<<20)...), 1 << 26, 32},
	} {
		_, _, err := parseScales(c.src, c.words, c.cols)
		require.Error(t, err, name)
	}
}
