// Package reference reads the tensors of files that the original bigsmall package wrote, releases 1.0.0 to 4.0.0, and writes
// those that release 1.0.0 reads. Their codecs are an adaptive-model range coder and its relatives: exact in every bit of a
// binary64 that goes into a table, decoded one symbol after the other. README.md here has the layouts.
package reference

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// Blob is what a header says of a tensor's bytes.
type Blob struct {
	Codec     string // such as bf16_se_ac
	Kind      string // special_kind of the codec "special"
	ItemBytes int    // of that codec
	Elements  int64  // product of the shape
}

// Run calls f for 0 to n-1, perhaps many at once.
type Run func(n int, f func(i int) error) error

// Serial is a Run.
func Serial(n int, f func(i int) error) error {
	for i := range n {
		if err := f(i); err != nil {
			return err
		}
	}
	return nil
}

// XOR is the codec whose result is the difference to a base.
const XOR = "zstd_xor_delta"

type decoder func(dst []byte, b Blob, c *cursor, run Run) error

var decoders = map[string]decoder{
	"bf16_se_ac":            halfDecoder(bf16, rangedAll),
	"bf16_se_rans":          halfDecoder(bf16, oneByOne(stacked)),
	"bf16_se_tans":          halfDecoder(bf16, oneByOne(quantised)),
	"bf16_se_single_kernel": singleKernel,
	"fp16_se_ac":            halfDecoder(fp16, rangedAll),
	"fp32_se_ac":            decodeF32,
	"fp8_cat_ac":            decodeF8,
	"fp4_cat_ac":            decodeF4,
	"zstd":                  decodeZstd,
	XOR:                     decodeZstd,
	"raw":                   decodeRaw,
	"bf16_sparsity_v1":      decodeSparse,
	"fp2_residual_v1":       decodeResidual,
	"bf16_native_f32":       decodeNative,
	"bf16_native_f32_v2":    decodeNativeChosen,
	"special:lowcard":       decodeLowcard,
	"special:wpe_delta":     decodeRows,
}

func (b Blob) key() string {
	if b.Codec == "special" {
		return b.Codec + ":" + b.Kind
	}
	return b.Codec
}

// Known reports whether Decode knows that codec.
func (b Blob) Known() bool { return decoders[b.key()] != nil }

// mostPerByte bounds what a byte of a blob decodes to, so that a small file is not believed to hold a very large tensor: zstd
// comes to 32,768, tensors that the coders are chosen for to some thousands.
const mostPerByte = 1 << 16

// Plausible reports whether a blob of n bytes can hold so many.
func (b Blob) Plausible(n, bytes int64) bool { return bytes <= (n+1)*mostPerByte }

// Decode decodes a blob to exactly len(dst) bytes. Every length in it is checked first.
func Decode(dst []byte, b Blob, blob []byte, run Run) error {
	decode := decoders[b.key()]
	if decode == nil {
		return fmt.Errorf("codec %q is unknown", b.key())
	}
	return decode.whole(dst, b, blob, run)
}

// whole decodes all of a blob; an empty one holds no elements.
func (decode decoder) whole(dst []byte, b Blob, blob []byte, run Run) error {
	if len(dst) == 0 && len(blob) == 0 {
		return nil
	}
	c := &cursor{b: blob}
	if err := decode(dst, b, c, run); err != nil {
		return err
	}
	return c.end()
}

// cursor reads little-endian numbers; the first that is not there makes it fail for good.
type cursor struct {
	b      []byte
	at     int
	failed bool
}

func (c *cursor) take(n int) []byte {
	if n < 0 || n > len(c.b)-c.at || c.failed {
		c.failed = true
		return nil
	}
	c.at += n
	return c.b[c.at-n : c.at : c.at]
}

func (c *cursor) num(width int) int {
	b := c.take(width)
	v := 0
	for i, x := range b {
		v |= int(x) << (8 * i)
	}
	return v
}

// bytes are as many as the u32 before them says.
func (c *cursor) bytes() []byte { return c.take(c.num(4)) }

// nums reads n numbers of width bytes.
func (c *cursor) nums(n, width int) []int {
	b := c.take(n * width)
	if b == nil {
		return nil
	}
	v := make([]int, n)
	for i := range v {
		for k := range width {
			v[i] |= int(b[i*width+k]) << (8 * k)
		}
	}
	return v
}

var errShort = fmt.Errorf("the payload ends too early, or a length in it is wrong")

func (c *cursor) err() error {
	if c.failed {
		return errShort
	}
	return nil
}

func (c *cursor) end() error {
	if c.failed {
		return errShort
	}
	if c.at != len(c.b) {
		return fmt.Errorf("%d bytes follow the payload", len(c.b)-c.at)
	}
	return nil
}

// elements reads the number that codecs begin with, which must be the shape's.
func (c *cursor) elements(b Blob, dst []byte, width int) (int, error) {
	n := c.num(4)
	if err := c.err(); err != nil {
		return 0, err
	}
	if int64(n) != b.Elements || n*width != len(dst) {
		return 0, fmt.Errorf("the payload has %d elements, the shape %d, of %d bytes", n, b.Elements, len(dst))
	}
	return n, nil
}

// ---- zstd ----

var zstds = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderLowmem(true))
	if err != nil {
		panic(err) // constant options
	}
	return d
}}

// unzstd decodes a frame of exactly len(dst) bytes.
func unzstd(dst, frame []byte) error {
	d := zstds.Get().(*zstd.Decoder)
	defer zstds.Put(d)
	out, err := d.DecodeAll(frame, dst[:0:len(dst)])
	if err != nil || len(out) != len(dst) {
		return fmt.Errorf("a zstd frame does not hold %d bytes: %v", len(dst), err)
	}
	return nil
}

func decodeZstd(dst []byte, _ Blob, c *cursor, _ Run) error { return unzstd(dst, c.take(len(c.b))) }

func decodeRaw(dst []byte, _ Blob, c *cursor, _ Run) error {
	if b := c.take(len(dst)); b != nil || len(dst) == 0 {
		copy(dst, b)
		return nil
	}
	return errShort
}

// ---- categories: a static model, and the symbols coded with it ----

// category is an alphabet's counts, and how they become a decoder.
type category struct {
	alphabet int
	symbols  []int
	counts   []int
}

// readCategory reads k symbols of symbolBytes in ascending order, then their counts.
func readCategory(c *cursor, k, symbolBytes, alphabet int) (category, error) {
	g := category{alphabet, c.nums(k, symbolBytes), nil}
	g.counts = c.nums(k, 4)
	if c.failed {
		return g, errShort
	}
	for i, s := range g.symbols {
		if s >= alphabet || i > 0 && s <= g.symbols[i-1] {
			return g, fmt.Errorf("symbols of a model do not ascend below %d", alphabet)
		}
	}
	return g, nil
}

// coding decodes symbols of categories from their bytes.
type coding func(spans []span) error

var symbolPool = sync.Pool{New: func() any { return new([]uint16) }}

// symbols is room for n of them, until done is called: memory that was used before costs no page faults.
func symbols(n int) (room []uint16, done func()) {
	kept := symbolPool.Get().(*[]uint16)
	if cap(*kept) < n {
		*kept = make([]uint16, n)
	}
	return (*kept)[:n], func() { symbolPool.Put(kept) }
}

// ---- 16-bit floats: sign and exponent, then the mantissas of each exponent ----

// half is a float of 16 bits and the widths of the numbers around it.
type half struct {
	exponent, mantissa          uint
	nSymbols, symbol, exponents int
	nMantissas, mantissaSymbol  int
}

var (
	bf16 = half{8, 7, 2, 2, 2, 1, 1}
	fp16 = half{5, 10, 1, 1, 1, 2, 2}
)

func halfDecoder(h half, decode coding) decoder {
	return func(dst []byte, b Blob, c *cursor, run Run) error {
		if _, err := c.elements(b, dst, 2); err != nil {
			return err
		}
		g, err := readCategory(c, c.num(h.nSymbols), h.symbol, 2<<h.exponent)
		if err != nil {
			return err
		}
		code := c.bytes()
		m := &cursor{b: c.bytes()}
		if c.failed {
			return errShort
		}
		var buckets []bucket
		for _, e := range m.nums(m.num(4), h.exponents) {
			buckets = append(buckets, bucket{exponent: e})
		}
		for i := range buckets {
			k := &buckets[i]
			k.size = m.num(4)
			if k.g, err = readCategory(m, m.num(h.nMantissas), h.mantissaSymbol, 1<<h.mantissa); err != nil {
				return err
			}
			k.bytes = m.bytes()
		}
		if err := m.end(); err != nil {
			return err
		}
		return h.join(dst, span{nil, g, code}, buckets, decode)
	}
}

// bucket is the mantissas of one exponent.
type bucket struct {
	exponent, size int
	g              category
	bytes          []byte
}

// join decodes the signs and exponents, and the mantissas of each exponent, all side by side, and puts them together.
func (h half) join(dst []byte, signs span, buckets []bucket, decode coding) error {
	n := len(dst) / 2
	se, done := symbols(n)
	defer done()
	room, done := symbols(n)
	defer done()
	signs.out = se
	spans, at := []span{signs}, 0
	next := make([]int, 1<<h.exponent)
	for i, k := range buckets {
		if k.exponent >= len(next) || i > 0 && k.exponent <= buckets[i-1].exponent || k.size <= 0 || k.size > n-at {
			return fmt.Errorf("%d mantissas of exponent %d, of %d weights", k.size, k.exponent, n)
		}
		spans = append(spans, span{room[at : at+k.size], k.g, k.bytes})
		next[k.exponent] = at
		at += k.size
	}
	if err := decode(spans); err != nil {
		return err
	}
	mask := uint16(1)<<h.exponent - 1
	sizes := make([]int, len(next))
	for _, s := range se {
		sizes[s&mask]++
	}
	for _, k := range buckets {
		if sizes[k.exponent] != k.size {
			return fmt.Errorf("%d mantissas of exponent %d, which occurs %d times", k.size, k.exponent, sizes[k.exponent])
		}
	}
	if at != n { // and so each exponent has its mantissas
		return fmt.Errorf("%d mantissas of %d weights", at, n)
	}
	for i, s := range se {
		e := s & mask
		m := room[next[e]]
		next[e]++
		binary.LittleEndian.PutUint16(dst[2*i:2*i+2], s>>h.exponent<<15|e<<h.mantissa|m)
	}
	return nil
}

// singleKernel is the layout of bf16_se_tans with the streams' numbers before them.
func singleKernel(dst []byte, b Blob, c *cursor, run Run) error {
	if _, err := c.elements(b, dst, 2); err != nil {
		return err
	}
	g, err := readCategory(c, c.num(2), 2, 512)
	if err != nil {
		return err
	}
	state := c.take(4)
	signs := span{nil, g, slices.Concat(state, c.take(2*c.num(4)))}
	var buckets []bucket
	for range c.num(4) {
		k := bucket{exponent: c.num(2)}
		if k.g, err = readCategory(c, c.num(1), 1, 128); err != nil {
			return err
		}
		state := c.take(4)
		k.size = c.num(4)
		k.bytes = slices.Concat(state, c.take(2*c.num(4)))
		if c.failed || k.exponent > 255 || len(buckets) > 255 {
			return errShort
		}
		buckets = append(buckets, k)
	}
	slices.SortFunc(buckets, func(a, b bucket) int { return a.exponent - b.exponent })
	return bf16.join(dst, signs, buckets, oneByOne(quantised))
}

// ---- other floats ----

func decodeF32(dst []byte, b Blob, c *cursor, run Run) error {
	n, err := c.elements(b, dst, 4)
	if err != nil {
		return err
	}
	g, err := readCategory(c, c.num(2), 2, 512)
	if err != nil {
		return err
	}
	code := c.bytes()
	planes := [3][]byte{c.bytes(), c.bytes(), c.bytes()}
	if c.failed {
		return errShort
	}
	se, low := make([]uint16, n), make([]byte, 3*n)
	err = run(4, func(i int) error {
		if i == 3 {
			return ranged(se, g, code)
		}
		return unzstd(low[i*n:(i+1)*n], planes[i])
	})
	if err != nil {
		return err
	}
	for i, s := range se {
		if low[2*n+i] > 0x7f {
			return fmt.Errorf("upper mantissa byte %#x of a float32", low[2*n+i])
		}
		binary.LittleEndian.PutUint32(dst[4*i:], uint32(s)<<23|uint32(low[2*n+i])<<16|uint32(low[n+i])<<8|uint32(low[i]))
	}
	return nil
}

func decodeF8(dst []byte, b Blob, c *cursor, _ Run) error {
	n, err := c.elements(b, dst, 1)
	if err != nil {
		return err
	}
	g, err := readCategory(c, c.num(2), 1, 256)
	if err != nil {
		return err
	}
	symbols := make([]uint16, n)
	if err := ranged(symbols, g, c.bytes()); err != nil {
		return err
	}
	for i, s := range symbols {
		dst[i] = byte(s)
	}
	return nil
}

func decodeF4(dst []byte, _ Blob, c *cursor, _ Run) error {
	n, k, packed := c.num(4), c.num(1), c.num(1)
	want := len(dst)
	if packed != 0 {
		want *= 2
	}
	if c.failed || n != want || packed > 1 {
		return fmt.Errorf("the payload has %d values for %d bytes", n, len(dst))
	}
	g, err := readCategory(c, k, 1, 16)
	if err != nil {
		return err
	}
	symbols := make([]uint16, n)
	if err := ranged(symbols, g, c.bytes()); err != nil {
		return err
	}
	for i := range dst {
		if packed != 0 {
			dst[i] = byte(symbols[2*i] | symbols[2*i+1]<<4)
		} else {
			dst[i] = byte(symbols[i])
		}
	}
	return nil
}

// inner decodes n BF16 words of a blob within another one.
func inner(decode decoder, n int, blob []byte, run Run) ([]uint16, error) {
	raw := make([]byte, 2*n)
	if err := decode.whole(raw, Blob{Elements: int64(n)}, blob, run); err != nil {
		return nil, err
	}
	words := make([]uint16, n)
	for i := range words {
		words[i] = binary.LittleEndian.Uint16(raw[2*i:])
	}
	return words, nil
}

// decodeSparse is small weights and large ones apart.
func decodeSparse(dst []byte, b Blob, c *cursor, run Run) error {
	n, err := c.elements(b, dst, 2)
	if err != nil {
		return err
	}
	c.num(2) // the threshold, which decoding does not need
	var sizes [2]int
	sizes[0], sizes[1] = c.num(4), c.num(4)
	g, err := readCategory(c, c.num(2), 2, 2)
	if err != nil {
		return err
	}
	mask := make([]uint16, n)
	if err := ranged(mask, g, c.bytes()); err != nil {
		return err
	}
	ones := 0
	for _, m := range mask {
		ones += int(m)
	}
	if sizes[0] != n-ones || sizes[1] != ones {
		return fmt.Errorf("%d and %d words, of which the mask has %d and %d", sizes[0], sizes[1], n-ones, ones)
	}
	var words [2][]uint16
	for i := range words {
		blob := c.bytes()
		if c.failed {
			return errShort
		}
		if words[i], err = inner(halfDecoder(bf16, rangedAll), sizes[i], blob, run); err != nil {
			return err
		}
	}
	for i, m := range mask {
		binary.LittleEndian.PutUint16(dst[2*i:], words[m][0])
		words[m] = words[m][1:]
	}
	return nil
}

// decodeNative is float32 whose lower halves are mostly zero.
func decodeNative(dst []byte, b Blob, c *cursor, run Run) error {
	n, err := c.elements(b, dst, 4)
	if err != nil {
		return err
	}
	blob, frame := c.bytes(), c.bytes()
	if c.failed {
		return errShort
	}
	high, err := inner(halfDecoder(bf16, rangedAll), n, blob, run)
	if err != nil {
		return err
	}
	low := make([]byte, 2*n)
	if err := unzstd(low, frame); err != nil {
		return err
	}
	for i, h := range high {
		binary.LittleEndian.PutUint32(dst[4*i:], uint32(h)<<16|uint32(binary.LittleEndian.Uint16(low[2*i:])))
	}
	return nil
}

// decodeNativeChosen is the same, each half by a codec of its own.
func decodeNativeChosen(dst []byte, b Blob, c *cursor, run Run) error {
	n, err := c.elements(b, dst, 4)
	if err != nil {
		return err
	}
	codecs := []decoder{decodeZstd, halfDecoder(bf16, oneByOne(stacked)), halfDecoder(bf16, rangedAll)}
	for _, half := range []int{1, 0} {
		code := c.num(1)
		blob := c.bytes()
		if c.failed || code >= len(codecs) {
			return fmt.Errorf("code %d of a half of the words", code)
		}
		words, err := inner(codecs[code], n, blob, run)
		if err != nil {
			return err
		}
		for i, w := range words {
			binary.LittleEndian.PutUint16(dst[4*i+2*half:], w)
		}
	}
	return nil
}

// ---- any dtype ----

func decodeLowcard(dst []byte, b Blob, c *cursor, _ Run) error {
	width, k := c.num(1), c.num(1)
	if c.failed || width != 1 && width != 2 && width != 4 || k == 0 {
		return fmt.Errorf("%d values of %d bytes", k, width)
	}
	values := c.take(k * width)
	frame := c.bytes()
	n := c.num(4)
	if c.failed || n*width != len(dst) {
		return fmt.Errorf("%d values of %d bytes for %d bytes", n, width, len(dst))
	}
	index := make([]byte, n)
	if err := unzstd(index, frame); err != nil {
		return err
	}
	for i, x := range index {
		if int(x) >= k {
			return fmt.Errorf("value %d of %d", x, k)
		}
		copy(dst[i*width:(i+1)*width], values[int(x)*width:])
	}
	return nil
}

// decodeRows is a matrix in a Blosc2 chunk, perhaps as differences of its rows.
func decodeRows(dst []byte, _ Blob, c *cursor, _ Run) error {
	width, delta, rows, columns := c.num(1), c.num(1), c.num(4), c.num(4)
	chunk := c.bytes()
	if c.failed || width != 1 && width != 2 && width != 4 || delta > 1 {
		return fmt.Errorf("items of %d bytes", width)
	}
	if rows == 0 || columns == 0 || rows > len(dst) || columns > len(dst)/rows || rows*columns*width != len(dst) {
		return fmt.Errorf("%d rows of %d items of %d bytes for %d bytes", rows, columns, width, len(dst))
	}
	if err := unblosc(dst, chunk); err != nil {
		return err
	}
	if delta == 0 {
		return nil
	}
	row := columns * width
	for i := row; i < len(dst); i += width {
		switch width {
		case 1:
			dst[i] += dst[i-row]
		case 2:
			binary.LittleEndian.PutUint16(dst[i:], binary.LittleEndian.Uint16(dst[i:])+binary.LittleEndian.Uint16(dst[i-row:]))
		case 4:
			binary.LittleEndian.PutUint32(dst[i:], binary.LittleEndian.Uint32(dst[i:])+binary.LittleEndian.Uint32(dst[i-row:]))
		}
	}
	return nil
}

// decodeResidual is two bits of each weight, what they miss as a BF16 number, and what the sum of both misses, bit by bit.
func decodeResidual(dst []byte, b Blob, c *cursor, run Run) error {
	n, err := c.elements(b, dst, 2)
	if err != nil {
		return err
	}
	largest := float64(math.Float32frombits(uint32(c.num(2)) << 16))
	index := c.bytes()
	blobs := [2][]byte{c.bytes(), c.bytes()}
	if c.failed || len(index) != (n+3)/4 {
		return errShort
	}
	var words [2][]uint16
	for i, blob := range blobs {
		if words[i], err = inner(halfDecoder(bf16, rangedAll), n, blob, run); err != nil {
			return err
		}
	}
	third := largest / 3
	var levels [4]uint32
	for i, x := range []float64{-largest, -third, third, largest} {
		levels[i] = uint32(toBF16(math.Float32bits(float32(x)))) << 16
	}
	for i, residual := range words[0] {
		level := levels[index[i/4]>>(2*(i%4))&3]
		binary.LittleEndian.PutUint16(dst[2*i:], toBF16(addX86(level, uint32(residual)<<16))^words[1][i])
	}
	return nil
}

// toBF16 rounds to nearest even by the bits alone, also where they are a NaN's.
func toBF16(bits uint32) uint16 { return uint16((bits + 0x7fff + bits>>16&1) >> 16) }

// addX86 adds as SSE does: of NaNs the first one comes out, quieted.
func addX86(a, b uint32) uint32 {
	nan := func(x uint32) bool { return x&0x7fffffff > 0x7f800000 }
	switch {
	case nan(a):
		return a | 0x400000
	case nan(b):
		return b | 0x400000
	}
	s := math.Float32frombits(a) + math.Float32frombits(b)
	if s != s {
		return 0xffc00000
	}
	return math.Float32bits(s)
}
