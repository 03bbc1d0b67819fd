package reference

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"github.com/klauspost/compress/zstd"
)

// Encoded is a blob, and what a header says of it beside its codec.
type Encoded struct {
	Codec string
	Kind  string // special_kind, or ""
	Extra string // the JSON of `extra`, or null
	Blob  []byte
}

// Encode makes a blob that release 1.0.0 decodes, of a dtype by its name in torch, whose elements have itemBytes. It is decoded
// again and compared.
func Encode(raw []byte, dtype string, itemBytes int) (Encoded, error) {
	if int64(len(raw)/itemBytes) > math.MaxUint32 {
		return Encoded{}, fmt.Errorf("%d elements, of which it counts up to %d", len(raw)/itemBytes, uint32(math.MaxUint32))
	}
	best := Encoded{Codec: "zstd", Extra: fmt.Sprintf(`{"level":9,"n_bytes":%d}`, len(raw)), Blob: toZstd(raw)}
	if few := encodeLowcard(raw, itemBytes); few != nil {
		best = Encoded{"special", "lowcard", fmt.Sprintf(`{"item_bytes":%d,"n_unique":%d,"special_kind":"lowcard"}`, itemBytes, few[1]), few}
	} else if codec, encode := family(dtype); encode != nil && len(raw) > 0 {
		blob, err := encode(raw)
		if err != nil {
			return best, err
		}
		if len(blob) < len(best.Blob) {
			best = Encoded{Codec: codec, Extra: "null", Blob: blob}
		}
	}
	if int64(len(best.Blob)) > math.MaxUint32 {
		return best, fmt.Errorf("a payload of %d bytes, of which it counts up to %d", len(best.Blob), uint32(math.MaxUint32))
	}
	back := make([]byte, len(raw))
	b := Blob{Codec: best.Codec, Kind: best.Kind, Elements: int64(len(raw) / itemBytes)}
	if err := Decode(back, b, best.Blob, Serial); err != nil || !bytes.Equal(raw, back) {
		panic(fmt.Sprintf("%s does not decode to what was encoded: %v", best.Codec, err))
	}
	return best, nil
}

func family(dtype string) (codec string, encode func([]byte) ([]byte, error)) {
	switch dtype {
	case "bfloat16":
		return "bf16_se_ac", bf16.encode
	case "float16":
		return "fp16_se_ac", fp16.encode
	case "float32":
		return "fp32_se_ac", encodeF32
	case "float8_e4m3fn", "float8_e5m2":
		return "fp8_cat_ac", encodeF8
	}
	return "", nil
}

// toZstd makes a frame that has its content's size, as python-zstandard wants it, of no bytes too.
func toZstd(raw []byte) []byte {
	if len(raw) == 0 {
		return []byte{0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0}
	}
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithEncoderCRC(false),
		zstd.WithSingleSegment(true))
	if err != nil {
		panic(err) // constant options
	}
	return e.EncodeAll(raw, nil)
}

// encodeLowcard is for at most 16 distinct values, from 256 bytes on; nil for others.
func encodeLowcard(raw []byte, width int) []byte {
	if len(raw) < 256 || width != 1 && width != 2 && width != 4 {
		return nil
	}
	at := func(i int) uint32 {
		switch width {
		case 1:
			return uint32(raw[i])
		case 2:
			return uint32(binary.LittleEndian.Uint16(raw[2*i:]))
		}
		return binary.LittleEndian.Uint32(raw[4*i:])
	}
	n := len(raw) / width
	var values []uint32
	for i := range n {
		v := at(i)
		if k, ok := slices.BinarySearch(values, v); !ok {
			if values = slices.Insert(values, k, v); len(values) > 16 {
				return nil
			}
		}
	}
	index := make([]byte, n)
	for i := range index {
		k, _ := slices.BinarySearch(values, at(i))
		index[i] = byte(k)
	}
	out := []byte{byte(width), byte(len(values))}
	for _, v := range values {
		out = append(out, binary.LittleEndian.AppendUint32(nil, v)[:width]...)
	}
	frame := toZstd(index)
	out = append(binary.LittleEndian.AppendUint32(out, uint32(len(frame))), frame...)
	return binary.LittleEndian.AppendUint32(out, uint32(n))
}

func appendNum(b []byte, v, width int) []byte {
	for k := range width {
		b = append(b, byte(v>>(8*k)))
	}
	return b
}

// appendCategory appends k symbols, their counts and the length and words of a sequence.
func appendCategory(b []byte, symbols []uint16, alphabet, countBytes, symbolBytes int) ([]byte, error) {
	counts := make([]int, alphabet)
	for _, s := range symbols {
		counts[s]++
	}
	distinct := 0
	for _, c := range counts {
		if c > 0 {
			distinct++
		}
	}
	b = appendNum(b, distinct, countBytes)
	for s, c := range counts {
		if c > 0 {
			b = appendNum(b, s, symbolBytes)
		}
	}
	for _, c := range counts {
		if c > 0 {
			b = appendNum(b, c, 4)
		}
	}
	cdf, err := cumulative(counts)
	if err != nil {
		return nil, err
	}
	words := encodeRange(symbols, cdf)
	b = appendNum(b, 4*len(words), 4)
	for _, w := range words {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	return b, nil
}

// encodeRange is the range encoder whose decoder is ranged: a word that a carry may still change waits, with those of all
// ones behind it.
func encodeRange(symbols []uint16, cdf []uint32) (out []uint32) {
	lower, width := uint64(0), ^uint64(0)
	waiting, first := 0, uint32(0)
	release := func(carry bool) {
		rest := ^uint32(0)
		if carry {
			first++
			rest = 0
		}
		out = append(out, first)
		for range waiting - 1 {
			out = append(out, rest)
		}
		waiting = 0
	}
	for _, s := range symbols {
		scale := width >> precision
		width = scale * uint64(cdf[s+1]-cdf[s])
		next := lower + scale*uint64(cdf[s])
		if waiting > 0 && next+width > next {
			release(next < lower)
		}
		lower = next
		if width >= 1<<32 {
			continue
		}
		width <<= 32
		word := uint32(lower >> 32)
		lower <<= 32
		switch {
		case waiting > 0:
			waiting++
		case lower+width > lower:
			out = append(out, word)
		default:
			waiting, first = 1, word
		}
	}
	if width == ^uint64(0) {
		return out
	}
	point := lower + math.MaxUint32
	if waiting > 0 {
		release(point < lower)
	}
	word := uint32(point >> 32)
	out = append(out, word)
	if uint32((lower+width)>>32) == word {
		out = append(out, 0)
	}
	return out
}

func (h half) encode(raw []byte) ([]byte, error) {
	n := len(raw) / 2
	se := make([]uint16, n)
	mantissas := make([][]uint16, 1<<h.exponent)
	for i := range se {
		w := binary.LittleEndian.Uint16(raw[2*i:])
		se[i] = w >> h.mantissa
		e := se[i] & (1<<h.exponent - 1)
		mantissas[e] = append(mantissas[e], w&(1<<h.mantissa-1))
	}
	out, err := appendCategory(appendNum(nil, n, 4), se, 2<<h.exponent, h.nSymbols, h.symbol)
	if err != nil {
		return nil, err
	}
	var list, records []byte
	exponents := 0
	for e, m := range mantissas {
		if len(m) == 0 {
			continue
		}
		exponents++
		list = appendNum(list, e, h.exponents)
		if records, err = appendCategory(appendNum(records, len(m), 4), m, 1<<h.mantissa, h.nMantissas, h.mantissaSymbol); err != nil {
			return nil, err
		}
	}
	section := slices.Concat(appendNum(nil, exponents, 4), list, records)
	return append(appendNum(out, len(section), 4), section...), nil
}

func encodeF32(raw []byte) ([]byte, error) {
	n := len(raw) / 4
	se := make([]uint16, n)
	planes := [3][]byte{make([]byte, n), make([]byte, n), make([]byte, n)}
	for i := range se {
		w := binary.LittleEndian.Uint32(raw[4*i:])
		se[i] = uint16(w >> 23)
		planes[0][i], planes[1][i], planes[2][i] = byte(w), byte(w>>8), byte(w>>16&0x7f)
	}
	out, err := appendCategory(appendNum(nil, n, 4), se, 512, 2, 2)
	if err != nil {
		return nil, err
	}
	for _, p := range planes {
		frame := toZstd(p)
		out = append(appendNum(out, len(frame), 4), frame...)
	}
	return out, nil
}

func encodeF8(raw []byte) ([]byte, error) {
	symbols := make([]uint16, len(raw))
	for i, x := range raw {
		symbols[i] = uint16(x)
	}
	return appendCategory(appendNum(nil, len(raw), 4), symbols, 256, 2, 1)
}
