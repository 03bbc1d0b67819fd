package tests

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/zeebo/xxh3"

	"bigsmall.dev/bigsmall/core"
)

var update = flag.Bool("update", false, "write testdata/refuse anew")

// A lie is a file that must be refused, at a step: "open", "decode" of its tensors, or "verify", where only an MD5 tells.
// Of a directory the file is its index.
type lie struct {
	name   string
	file   []byte
	step   string
	status core.Status
	says   string
}

// fields of a header that forging needs.
type fields struct {
	Tensors []struct {
		Name       string
		Offset     int
		Compressed int `json:"compressed_bytes"`
		Extra      *struct {
			Head     int
			Checksum string
		}
	}
	Sections []struct {
		Kind           string
		Offset, Length int
		Checksum       string
	}
}

func headerOf(bs []byte) (start int, h fields, ok bool) {
	if len(bs) < 58 || string(bs[:4]) != "BGSM" {
		return 0, h, false
	}
	start = 10 + int(binary.LittleEndian.Uint32(bs[6:]))
	if start > len(bs)-48 {
		return 0, h, false
	}
	return start, h, json.Unmarshal(bs[10:start], &h) == nil
}

// mend puts all checksums of a file right, as a liar would. What contradicts itself too much stays as it is.
func mend(bs []byte) []byte {
	out := bytes.Clone(bs)
	start, h, ok := headerOf(out)
	if !ok {
		return out
	}
	within := func(at, n int) []byte {
		if at < 0 || n < 0 || at > len(out)-start-48 || n > len(out)-start-48-at {
			return nil
		}
		return out[start+at:][:n]
	}
	text := out[10:start]
	replace := func(old string, sum uint64) {
		if fresh := fmt.Sprintf("%016x", sum); len(old) == 16 {
			copy(text, bytes.Replace(text, []byte(`"checksum":"`+old), []byte(`"checksum":"`+fresh), 1))
		}
	}
	for _, t := range h.Tensors {
		payload := within(t.Offset, t.Compressed)
		if t.Extra == nil || payload == nil || t.Extra.Head < 24 || t.Extra.Head > len(payload) {
			continue
		}
		head, rest := payload[:t.Extra.Head], payload[t.Extra.Head:]
		words, index := binary.LittleEndian.Uint64(head[8:]), 24+int(binary.LittleEndian.Uint32(head[20:]))
		for range (words + 65535) / 65536 {
			if index > len(head)-12 {
				break
			}
			n := int(binary.LittleEndian.Uint32(head[index:]))
			if n > len(rest) {
				break
			}
			binary.LittleEndian.PutUint64(head[index+4:], xxh3.Hash(rest[:n]))
			rest, index = rest[n:], index+12
		}
		replace(t.Extra.Checksum, xxh3.Hash(head))
	}
	for _, s := range h.Sections {
		if content := within(s.Offset, s.Length); content != nil && s.Kind == "source_header" {
			replace(s.Checksum, xxh3.Hash(content))
		}
	}
	end := out[len(out)-48:]
	binary.LittleEndian.PutUint64(end[24:], xxh3.Hash(out[:start]))
	binary.LittleEndian.PutUint64(end[40:], xxh3.Hash(end[:40]))
	return out
}

// forge replaces text in a file's header, keeps its length, and mends the file.
func forge(t *testing.T, bs []byte, replace func(string) string) []byte {
	t.Helper()
	h := int(binary.LittleEndian.Uint32(bs[6:]))
	old := strings.TrimRight(string(bs[10:10+h]), " ")
	text := replace(old)
	require.NotEqual(t, old, text, "nothing was replaced")
	require.LessOrEqual(t, len(text), h)
	out := bytes.Clone(bs)
	retext(out, text)
	end := out[len(out)-48:]
	binary.LittleEndian.PutUint64(end[24:], xxh3.Hash(out[:10+h]))
	binary.LittleEndian.PutUint64(end[40:], xxh3.Hash(end[:40]))
	return out
}

// retext puts another text into a header that has room for it.
func retext(bs []byte, text string) {
	room := bs[10 : 10+binary.LittleEndian.Uint32(bs[6:])]
	text = strings.TrimRight(text, " ")
	copy(room, text+strings.Repeat(" ", len(room)-len(text)))
}

// payloadOf is the payload of a tensor, head and blocks, to be changed in place.
func payloadOf(t *testing.T, bs []byte, name string) (head, blocks []byte) {
	t.Helper()
	start, h, ok := headerOf(bs)
	require.True(t, ok)
	for _, x := range h.Tensors {
		if x.Name == name {
			p := bs[start+x.Offset:][:x.Compressed]
			return p[:x.Extra.Head], p[x.Extra.Head:]
		}
	}
	require.Fail(t, "no tensor "+name)
	return nil, nil
}

func swap(from, to string) func(string) string {
	return func(s string) string { return strings.Replace(s, from, to, 1) }
}

func headerLies(t *testing.T) (all []lie) {
	r := rand.New(rand.NewPCG(1, 1))
	w := bf16(r, 400, .02)
	path := compressed(t, []tensor{{"a", "BF16", []uint64{40, 10}, w}, {"b", "BF16", []uint64{40, 10}, w}, {"c", "U8", []uint64{3}, []byte{1, 2, 3}}})
	bs, err := os.ReadFile(path)
	require.NoError(t, err)
	c := `"name":"c","shape":[3]`
	for name, c := range map[string]struct {
		replace func(string) string
		status  core.Status
		says    string
	}{
		"draft":              {swap(`"draft":3`, `"draft":2`), core.UnsupportedVersion, "draft 2"},
		"no-draft":           {swap(`"draft":3`, `"drift":3`), core.UnsupportedVersion, "draft"},
		"requires":           {swap(`"requires":[]`, `"requires":["warp"]`), core.UnsupportedFeature, `"warp"`},
		"section":            {swap(`"sections":[`, `"sections":[{"kind":"x","offset":0,"length":0,"checksum":"","optional":false},`), core.Corrupt, "section"},
		"codec":              {swap(`"codec":"bs_planes"`, `"codec":"qz_planes"`), core.UnsupportedCodec, "qz_planes"},
		"dtype":              {swap(`"dtype":"uint8"`, `"dtype":"uint9"`), core.UnsupportedFeature, "uint9"},
		"shape":              {swap(c, `"name":"c","shape":[4]`), core.Corrupt, "agree"},
		"shape-overflow":     {swap(c, `"name":"c","shape":[4294967296,4294967296,4]`), core.Corrupt, "too large"},
		"shape-64-bits":      {swap(c, `"name":"c","shape":[18446744073709551615,2]`), core.Corrupt, "too large"},
		"shape-65-bits":      {swap(c, `"name":"c","shape":[18446744073709551616]`), core.Corrupt, "JSON"},
		"shape-huge":         {swap(c, `"name":"c","shape":[4611686018427387904]`), core.Corrupt, "too large"},
		"shape-1-tb":         {swap(c, `"name":"c","shape":[1099511627776]`), core.Corrupt, "head of"},
		"shape-times-zero":   {swap(c, `"name":"c","shape":[4294967296,4294967296,0]`), core.Corrupt, ""},
		"dimensions":         {swap(c, `"name":"c","shape":[3`+strings.Repeat(",1", 64)+`]`), core.Corrupt, "65 dimensions"},
		"negative":           {swap(c, `"name":"c","shape":[-3]`), core.Corrupt, "JSON"},
		"fraction":           {swap(c, `"name":"c","shape":[3.0]`), core.Corrupt, "JSON"},
		"exponent":           {swap(c, `"name":"c","shape":[3e0]`), core.Corrupt, "JSON"},
		"shape-of-text":      {swap(c, `"name":"c","shape":["3"]`), core.Corrupt, "JSON"},
		"duplicate-key":      {swap(`"mode"`, `"mode":"x","mode"`), core.Corrupt, "duplicate"},
		"duplicate-deep":     {swap(`"name":"c"`, `"name":"c","name":"d"`), core.Corrupt, "duplicate"},
		"duplicate-escaped":  {swap(`"mode"`, `"m\u006fde":"x","mode"`), core.Corrupt, "duplicate"},
		"key-in-other-case":  {swap(`"tensors":`, `"Tensors":`), core.Corrupt, "tensor_count"},
		"same-name":          {swap(`"name":"c"`, `"name":"a"`), core.Corrupt, "twice"},
		"lone-surrogate":     {swap(`"name":"c"`, `"name":"\ud800"`), core.Corrupt, "JSON"},
		"bad-utf-8":          {swap(`"name":"c"`, "\"name\":\"\xff\""), core.Corrupt, "JSON"},
		"another-name":       {swap(`"name":"c"`, `"name":"d"`), core.Corrupt, "agree"},
		"count":              {swap(`"tensor_count":3`, `"tensor_count":2`), core.Corrupt, "tensor_count"},
		"count-giant":        {swap(`"tensor_count":3`, `"tensor_count":18446744073709551615`), core.Corrupt, "tensor_count"},
		"tie-to-itself":      {swap(`"tied_to":"a"`, `"tied_to":"b"`), core.Corrupt, "tied"},
		"tie-to-nothing":     {swap(`"tied_to":"a"`, `"tied_to":"z"`), core.Corrupt, "not in the file"},
		"tie-to-another":     {swap(`"tied_to":"a"`, `"tied_to":"c"`), core.Corrupt, "another tensor"},
		"tie-up":             {swap(`"tied_to":"a"`, `"tied_to":"a","shard":"../x.bs"`), core.Corrupt, "plain file name"},
		"tie-absolute":       {swap(`"tied_to":"a"`, `"tied_to":"a","shard":"/etc/passwd"`), core.Corrupt, "plain file name"},
		"tie-dots":           {swap(`"tied_to":"a"`, `"tied_to":"a","shard":".."`), core.Corrupt, "plain file name"},
		"tie-nul":            {swap(`"tied_to":"a"`, `"tied_to":"a","shard":"x\u0000.bs"`), core.Corrupt, "plain file name"},
		"tie-with-bytes":     {swap(`"codec":"tied_ref","special":"tied","compressed_bytes":0`, `"codec":"tied_ref","special":"tied","compressed_bytes":64`), core.Corrupt, "tied"},
		"md5":                {swap(`"md5":"`, `"md5":"x`), core.Corrupt, "MD5"},
		"offset":             {swap(`"offset":0`, `"offset":64`), core.Corrupt, "offset 64"},
		"offset-negative":    {swap(`"offset":0`, `"offset":-64`), core.Corrupt, "JSON"},
		"offset-giant":       {swap(`"offset":0`, `"offset":18446744073709551552`), core.Corrupt, "offset"},
		"payload-giant":      {swap(`"compressed_bytes":64,`, `"compressed_bytes":9223372036854775744,`), core.Corrupt, "payload"},
		"payload-ragged":     {swap(`"compressed_bytes":64,`, `"compressed_bytes":63,`), core.Corrupt, "payload"},
		"payload-of-another": {swap(`"compressed_bytes":64,`, `"compressed_bytes":0,`), core.Corrupt, ""},
		"not-an-object":      {func(string) string { return "[]" }, core.Corrupt, "JSON"},
		"empty-text":         {func(string) string { return "" }, core.Corrupt, "JSON"},
		"text-behind":        {func(s string) string { return s + "{}" }, core.Corrupt, "JSON"},
		"deep":               {func(string) string { return strings.Repeat("[", 3000) }, core.Corrupt, "JSON"},
		"deep-objects":       {func(string) string { return strings.Repeat(`{"a":`, 700) }, core.Corrupt, "JSON"},
		"no-source-header":   {swap(`"kind":"source_header"`, `"kind":"other_header_"`), core.UnsupportedFeature, "other_header_"},
		"optional-only":      {swap(`"kind":"source_header",`, `"kind":"other_header_",`), core.UnsupportedFeature, "other_header_"},
		"two-optionals":      {swap(`"kind":"source_header","`, `"optional":true,"kind":"y","`), core.Corrupt, "JSON"},
		"section-outside":    {swap(`"length":`, `"length":64000`), core.Corrupt, "section"},
		"parity-of-nothing": {func(s string) string {
			return swap(`"optional":false`, `"optional":true`)(swap(`"kind":"source_header"`, `"kind":"parity"`)(s))
		}, core.Corrupt, "parity"},
		"parity-not-optional": {swap(`"kind":"source_header"`, `"kind":"parity"`), core.UnsupportedFeature, "parity"},
		"head-giant":          {swap(`"head":`, `"head":9999`), core.Corrupt, "head"},
		"head-none":           {swap(`"extra":{"head":`, `"extra":{"h":`), core.Corrupt, "head"},
		"checksum-of-text":    {swap(`"checksum":"`, `"checksum":"z`), core.Corrupt, "checksum"},
		"delta-without-base":  {swap(`"codec":"bs_planes"`, `"codec":"bs_delta"`), core.Corrupt, "base_md5"},
		"sha256":              {swap(`]}`, `],"sha256":"00"}`), core.Corrupt, "SHA-256"},
		"metadata-of-number":  {swap(`"safetensors_metadata":null`, `"safetensors_metadata":{"a":1}`), core.Corrupt, "JSON"},
	} {
		all = append(all, lie{name + ".bs", forge(t, bs, c.replace), "open", c.status, c.says})
	}
	raw := func(name string, status core.Status, says string, change func(b []byte) []byte) {
		all = append(all, lie{name + ".bs", change(bytes.Clone(bs)), "open", status, says})
	}
	length := func(n uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint32(b[6:], n); return b }
	}
	sealed := func(change func(b []byte)) func([]byte) []byte {
		return func(b []byte) []byte {
			change(b[len(b)-48:])
			binary.LittleEndian.PutUint64(b[len(b)-8:], xxh3.Hash(b[len(b)-48:len(b)-8]))
			return b
		}
	}
	raw("header-beyond-the-file", core.Truncated, "", length(50_000_000))
	raw("header-too-long", core.Corrupt, "100000001", length(100_000_001))
	raw("header-4-gb", core.Corrupt, "4294967295", length(math.MaxUint32))
	raw("header-short", core.Corrupt, "", length(100))
	raw("version", core.UnsupportedVersion, "version 7", func(b []byte) []byte { b[4] = 7; return b })
	raw("trailer-header-length", core.Corrupt, "trailer", sealed(func(e []byte) { e[8] ^= 64 }))
	raw("trailer-data-length", core.Corrupt, "trailer", sealed(func(e []byte) { e[16] ^= 64 }))
	raw("trailer-giant", core.Corrupt, "trailer", sealed(func(e []byte) { e[23] = 0xff }))
	raw("trailer-parity", core.UnsupportedFeature, "newer", sealed(func(e []byte) { e[32] = 1 }))
	raw("trailer-of-another", core.Checksum, "header", sealed(func(e []byte) { e[24]++ }))
	raw("trailer-damaged", core.Truncated, "trailer", func(b []byte) []byte { b[len(b)-3]++; return b })
	raw("cut-after-header", core.Truncated, "", func(b []byte) []byte { return b[:4096] })
	raw("cut-in-preamble", core.Truncated, "", func(b []byte) []byte { return b[:9] })
	raw("empty", core.Corrupt, "", func([]byte) []byte { return nil })
	raw("magic-only", core.Truncated, "", func(b []byte) []byte { return b[:4] })
	raw("safetensors", core.Corrupt, "not a .bs file", func([]byte) []byte { return safetensors([]tensor{{"a", "U8", []uint64{1}, []byte{1}}}, nil) })
	all = append(all,
		lie{"md5-of-others.bs", forge(t, bs, func(s string) string {
			at := strings.LastIndex(s, `"md5":"`) + 7
			return s[:at] + strings.Repeat("0", 32) + s[at+32:]
		}), "verify", core.Checksum, "MD5"},
		lie{"sha256-of-others.bs", forge(t, bs, func(s string) string {
			return strings.TrimSuffix(s, "}") + `,"sha256":"` + strings.Repeat("0", 64) + `"}`
		}), "verify", core.Checksum, "SHA-256"},
	)
	return append(all, sectionLies(t, bs)...)
}

// sectionLies have sections that tell of other files, or unpack to more than they should.
func sectionLies(t *testing.T, bs []byte) (all []lie) {
	start, h, ok := headerOf(bs)
	require.True(t, ok)
	section := func(name, says string, frame []byte, size uint32) {
		content := binary.LittleEndian.AppendUint32(nil, uint32(len(frame)))
		content = append(binary.LittleEndian.AppendUint32(content, size), frame...)
		content = append(content, make([]byte, -len(content)&63)...)
		s := h.Sections[0]
		out := append(bytes.Clone(bs[:start+s.Offset]), content...)
		out = append(out, bs[len(bs)-48:]...)
		retext(out, strings.Replace(string(out[10:start]), fmt.Sprintf(`"length":%d,"checksum":"%s"`, s.Length, s.Checksum),
			fmt.Sprintf(`"length":%d,"checksum":"%016x"`, len(content), xxh3.Hash(content)), 1))
		binary.LittleEndian.PutUint64(out[len(out)-32:], uint64(s.Offset+len(content)))
		all = append(all, lie{"section-" + name + ".bs", mend(out), "open", core.Corrupt, says})
	}
	e, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	defer e.Close()
	source := safetensors([]tensor{{"z", "U8", []uint64{1}, []byte{1}}}, nil)
	source = source[:len(source)-1]
	bomb := e.EncodeAll(make([]byte, 8<<20), nil)
	section("of-another", "tensors", e.EncodeAll(source, nil), uint32(len(source)))
	section("bomb", "", bomb, 64)
	section("bomb-that-says-so", "", bomb, 8<<20)
	section("giant", "", e.EncodeAll(source, nil), math.MaxUint32)
	section("too-little", "", e.EncodeAll(source, nil), uint32(len(source)+1))
	section("no-frame", "", []byte("this is no zstd frame at all"), 10)
	section("two-frames", "", slices.Concat(e.EncodeAll(source[:8], nil), e.EncodeAll(source[8:], nil)), uint32(len(source)+1))
	section("wrong-length", "", e.EncodeAll(append([]byte{0xff}, source[1:]...), nil), uint32(len(source)))
	return all
}

// payloadLies contradict themselves behind checksums that are right.
func payloadLies(t *testing.T) (all []lie) {
	r := rand.New(rand.NewPCG(2, 2))
	path := compressed(t, []tensor{{"a", "BF16", []uint64{500}, bf16(r, 500, .02)}})
	bs, err := os.ReadFile(path)
	require.NoError(t, err)
	head, block := payloadOf(t, bs, "a")
	require.Equal(t, byte(1), block[0], "coded")
	words := int(binary.LittleEndian.Uint32(block[8:]))
	index := 24 + int(binary.LittleEndian.Uint32(head[20:]))
	add := func(name, says string, change func(head, block []byte)) {
		b := bytes.Clone(bs)
		change(payloadOf(t, b, "a"))
		status := core.Corrupt
		if strings.Contains(says, "unknown") {
			status = core.UnsupportedFeature
		}
		all = append(all, lie{"payload-" + name + ".bs", mend(b), "decode", status, says})
	}
	set16 := binary.LittleEndian.PutUint16
	set32, set64 := binary.LittleEndian.PutUint32, binary.LittleEndian.PutUint64
	add("transform", "unknown", func(h, _ []byte) { h[0] = 9 })
	add("transform-row", "", func(h, _ []byte) { h[0] = 3 })
	add("transform-palette", "", func(h, _ []byte) { h[0] = 2 })
	add("transform-base", "", func(h, _ []byte) { h[0] = 4 })
	add("shift", "", func(h, _ []byte) { h[1] = 17 })
	add("word", "", func(h, _ []byte) { h[2] = 4 })
	add("no-word", "", func(h, _ []byte) { h[2] = 0 })
	add("fields", "", func(h, _ []byte) { h[3] = 9 })
	add("no-fields", "", func(h, _ []byte) { h[3] = 0 })
	add("block-size", "unknown", func(h, _ []byte) { h[4] = 15 })
	add("palette", "", func(h, _ []byte) { h[5] = 3 })
	add("reserved", "", func(h, _ []byte) { h[7] = 1 })
	add("words", "", func(h, _ []byte) { set64(h[8:], 1499) })
	add("words-giant", "", func(h, _ []byte) { set64(h[8:], math.MaxUint64) })
	add("row", "", func(h, _ []byte) { set32(h[16:], 7) })
	add("body-giant", "", func(h, _ []byte) { set32(h[20:], math.MaxUint32-3) })
	add("body-short", "", func(h, _ []byte) { set32(h[20:], 8) })
	add("field-outside", "", func(h, _ []byte) { h[24] = 200 })
	add("field-wide", "", func(h, _ []byte) { h[25] = 13 })
	add("field-gap", "", func(h, _ []byte) { h[26]-- })
	add("rotate", "", func(h, _ []byte) { h[27] = 2 })
	add("tables", "", func(h, _ []byte) { h[28] = 17 })
	add("no-tables", "", func(h, _ []byte) { h[28] = 0 })
	add("descriptor-reserved", "", func(h, _ []byte) { h[29] = 5 })
	add("scales", "", func(h, _ []byte) { h[6] = 1 })
	add("scales-of-rows", "", func(h, _ []byte) { h[6] = 1; set32(h[16:], 1) })
	add("scales-giant-row", "", func(h, _ []byte) { h[6] = 1; set32(h[16:], math.MaxUint32) })
	add("scales-unknown", "", func(h, _ []byte) { h[6] = 2 })
	add("table-of-256", "", func(h, _ []byte) { h[32] = 255 })
	add("table-of-one", "", func(h, _ []byte) { h[32] = 0 })
	add("table-sum", "", func(h, _ []byte) { h[36] ^= 0x18 })
	add("table-of-zeros", "", func(h, _ []byte) { clear(h[33:index]) })
	add("table-of-ones", "", func(h, _ []byte) { copy(h[33:index], bytes.Repeat([]byte{0xff}, index-33)) })
	add("index-long", "", func(h, _ []byte) { set32(h[index:], math.MaxUint32) })
	add("index-short", "", func(h, _ []byte) { set32(h[index:], 64) })
	add("index-zero", "", func(h, _ []byte) { set32(h[index:], 0) })
	add("block-kind", "", func(_, b []byte) { b[0] = 3 })
	add("block-reserved", "", func(_, b []byte) { b[2] = 1 })
	add("block-stored", "", func(_, b []byte) { b[0] = 0 })
	add("block-zstd", "", func(_, b []byte) { b[0] = 2 })
	add("plane-kind", "", func(_, b []byte) { b[4] = 7 })
	add("plane-raw", "", func(_, b []byte) { b[4] = 0 })
	add("plane-constant", "", func(_, b []byte) { b[4] = 1 })
	add("patches-too-many", "", func(_, b []byte) { set16(b[6:], math.MaxUint16) })
	add("stream-giant", "", func(_, b []byte) { set32(b[8:], math.MaxUint32) })
	add("stream-empty", "", func(_, b []byte) { set32(b[8:], 0) })
	add("stream-short", "", func(_, b []byte) { set32(b[8:], uint32(words-2)) })
	add("state-too-small", "", func(_, b []byte) { set16(b[12+64:], 0) })
	add("state-other", "", func(_, b []byte) { b[12] ^= 1 })
	add("words-other", "", func(_, b []byte) { b[12+128+2*(words/2)] ^= 4 })
	return slices.Concat(all, patchLies(t), bombs(t))
}

// patchLies are of a constant plane with patches.
func patchLies(t *testing.T) (all []lie) {
	data := make([]byte, 60_000)
	const n = 24
	for i := range n {
		data[2000*i+7] = byte(10 * (i + 1))
	}
	bs, err := os.ReadFile(compressed(t, []tensor{{"a", "U8", []uint64{uint64(len(data))}, data}}))
	require.NoError(t, err)
	_, block := payloadOf(t, bs, "a")
	require.Equal(t, []byte{1, 0, 0, 0, 1, 0, n, 0}, block[:8], "a constant plane with patches")
	const at = 12
	for name, change := range map[string]func(b []byte){
		"descend":    func(b []byte) { copy(b[at:], []byte{b[at+2], b[at+3], b[at], b[at+1]}) },
		"twice":      func(b []byte) { copy(b[at+2:], b[at:at+2]) },
		"outside":    func(b []byte) { binary.LittleEndian.PutUint16(b[at+2*(n-1):], 60_000) },
		"symbol":     func(b []byte) { binary.LittleEndian.PutUint16(b[at+2*n:], 256) },
		"more":       func(b []byte) { b[6]++ },
		"fewer":      func(b []byte) { b[6]-- },
		"of-symbols": func(b []byte) { binary.LittleEndian.PutUint32(b[8:], 256) },
		"of-all":     func(b []byte) { binary.LittleEndian.PutUint16(b[6:], 60_000) },
	} {
		b := bytes.Clone(bs)
		_, block := payloadOf(t, b, "a")
		change(block)
		all = append(all, lie{"patch-" + name + ".bs", mend(b), "decode", core.Corrupt, ""})
	}
	return all
}

// bombs are zstd frames that hold more than a block.
func bombs(t *testing.T) (all []lie) {
	text := bytes.Repeat([]byte("zstd makes little of this sentence, "), 600)
	for i := range text {
		text[i] += byte(i / 5000)
	}
	path := compressed(t, []tensor{{"a", "U8", []uint64{uint64(len(text))}, text}})
	bs, err := os.ReadFile(path)
	require.NoError(t, err)
	start, h, ok := headerOf(bs)
	require.True(t, ok)
	head, block := payloadOf(t, bs, "a")
	require.Equal(t, byte(2), block[0], "zstd")
	index := 24 + int(binary.LittleEndian.Uint32(head[20:]))
	add := func(name string, frame []byte) {
		fresh := binary.LittleEndian.AppendUint32([]byte{2, 0, 0, 0}, uint32(len(frame)))
		fresh = append(fresh, frame...)
		fresh = append(fresh, make([]byte, -(len(head)+len(fresh))&63)...)
		head := bytes.Clone(head)
		binary.LittleEndian.PutUint32(head[index:], uint32(len(fresh)))
		old := h.Tensors[0].Compressed
		grown := len(head) + len(fresh) - old
		out := slices.Concat(bs[:start], head, fresh, bs[start+old:])
		text := string(out[10:start])
		text = strings.Replace(text, fmt.Sprintf(`"compressed_bytes":%d`, old), fmt.Sprintf(`"compressed_bytes":%d`, old+grown), 1)
		text = strings.Replace(text, fmt.Sprintf(`"kind":"source_header","offset":%d`, old), fmt.Sprintf(`"kind":"source_header","offset":%d`, old+grown), 1)
		retext(out, text)
		binary.LittleEndian.PutUint64(out[len(out)-32:], uint64(len(out)-48-start))
		all = append(all, lie{"zstd-" + name + ".bs", mend(out), "decode", core.Corrupt, ""})
	}
	e, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	defer e.Close()
	sized := e.EncodeAll(text, nil)
	add("bomb", e.EncodeAll(make([]byte, 64<<20), nil))
	add("one-byte-less", e.EncodeAll(text[1:], nil))
	add("two-frames", slices.Concat(e.EncodeAll(text[:50], nil), e.EncodeAll(text[50:], nil), []byte{1}))
	add("cut", sized[:len(sized)-3])
	add("no-frame", bytes.Repeat([]byte{7}, 60))
	add("skippable", append([]byte{0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4}, sized[:20]...))
	return all
}

// indexLies are directories: a good shard and an index that lies.
func indexLies() []lie {
	index := func(shards, weights, sources string) []byte {
		return []byte(fmt.Sprintf(`{"metadata":{"shards":[%s],"source_indexes":[%s]},"weight_map":{%s}}`, shards, sources, weights))
	}
	source := func(name string) string {
		text, _ := json.Marshal(`{"weight_map":{"a":"m.safetensors"}}`)
		return fmt.Sprintf(`{"name":%q,"text":%s}`, name, text)
	}
	good := source("model.safetensors.index.json")
	return []lie{
		{"index-up", index(`"../m.bs"`, `"a":"../m.bs"`, good), "open", core.Corrupt, "plain file name"},
		{"index-absolute", index(`"/m.bs"`, `"a":"/m.bs"`, good), "open", core.Corrupt, "plain file name"},
		{"index-dots", index(`".."`, `"a":".."`, good), "open", core.Corrupt, "plain file name"},
		{"index-missing", index(`"n.bs"`, `"a":"n.bs"`, good), "open", core.IO, "n.bs"},
		{"index-another-tensor", index(`"m.bs"`, `"z":"m.bs"`, good), "open", core.Corrupt, `"z"`},
		{"index-no-json", []byte(`{"metadata":`), "open", core.Corrupt, "index"},
		{"index-duplicate", []byte(`{"weight_map":{},"weight_map":{}}`), "open", core.Corrupt, "index"},
		{"index-deep", []byte(strings.Repeat("[", 100_000)), "open", core.Corrupt, "index"},
		{"index-itself", index(`"bigsmall.index.json"`, `"a":"bigsmall.index.json"`, good), "open", core.Corrupt, "not a .bs file"},
		{"index-source-up", index(`"m.bs"`, `"a":"m.bs"`, source("../model.safetensors.index.json")), "open", core.Corrupt, "plain file name"},
		{"index-source-absolute", index(`"m.bs"`, `"a":"m.bs"`, source("/tmp/model.safetensors.index.json")), "open", core.Corrupt, "plain file name"},
		{"index-source-other", index(`"m.bs"`, `"a":"m.bs"`, source("config.json")), "open", core.Corrupt, "plain file name"},
	}
}

const refuse = "testdata/refuse"

func writeLies(t *testing.T) {
	t.Helper()
	require.NoError(t, os.RemoveAll(refuse))
	var lines []string
	for _, l := range slices.Concat(headerLies(t), payloadLies(t), indexLies()) {
		path := filepath.Join(refuse, l.name)
		if strings.HasPrefix(l.name, "index-") {
			path = filepath.Join(path, core.IndexName)
		}
		write(t, path, l.file)
		lines = append(lines, strings.Join([]string{l.name, l.step, l.status.String(), l.says}, "\t"))
	}
	slices.Sort(lines)
	write(t, filepath.Join(refuse, "expected.tsv"), []byte("file\tstep\tstatus\tsays\n"+strings.Join(lines, "\n")+"\n"))
}

// expected are the files of the corpus; the shard of the directories is put beside their indexes.
func expected(t *testing.T) (all []lie) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(refuse, "expected.tsv"))
	require.NoError(t, err)
	for _, line := range strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")[1:] {
		f := strings.Split(line, "\t")
		require.Len(t, f, 4)
		l := lie{name: f[0], step: f[1], says: f[3]}
		for s := range core.Status(100) {
			if s.String() == f[2] {
				l.status = s
			}
		}
		require.NotZero(t, l.status, line)
		all = append(all, l)
	}
	return all
}

// refusal does what an unsuspecting user would with a file of the corpus, and tells at which step it was refused.
func refusal(path, scratch string) (step string, err error) {
	r, err := core.Open(path, "")
	if err != nil {
		return "open", err
	}
	defer r.Close()
	job := &core.Job{Workers: 1}
	for i := range r.Len() {
		x, err := r.Tensor(i)
		if err != nil {
			return "decode", err
		}
		if x.Bytes > 1<<20 {
			return "decode", fmt.Errorf("%d bytes for a tensor of a small file", x.Bytes)
		}
		if err := r.Decode(i, make([]byte, x.Bytes), job); err != nil {
			return "decode", err
		}
	}
	rep, err := core.Verify(path, "", "", job)
	if err == nil && len(rep.Bad) > 0 {
		err = &core.Error{Status: core.Checksum, File: rep.Bad[0].File, Msg: rep.Bad[0].Problem}
	}
	if err != nil {
		return "verify", err
	}
	_, err = core.Decompress(path, scratch, "", core.Options{}, job)
	return "restore", err
}

// Every file of the corpus is refused, at the step and for the reason that stand beside it, and nothing is written.
func TestRefuse(t *testing.T) {
	if *update {
		writeLies(t)
	}
	shard, err := os.ReadFile(compressed(t, []tensor{{"a", "U8", []uint64{3}, []byte{1, 2, 3}}}))
	require.NoError(t, err)
	seen := map[string]bool{"expected.tsv": true}
	for _, l := range expected(t) {
		seen[l.name] = true
		path, out := filepath.Join(refuse, l.name), filepath.Join(t.TempDir(), "out")
		if strings.HasPrefix(l.name, "index-") {
			dir := t.TempDir()
			index, err := os.ReadFile(filepath.Join(path, core.IndexName))
			require.NoError(t, err)
			write(t, filepath.Join(dir, core.IndexName), index)
			write(t, filepath.Join(dir, "m.bs"), shard)
			path = dir
		}
		step, err := refusal(path, out)
		if !assert.Error(t, err, l.name) {
			continue
		}
		assert.Equal(t, l.step, step, "%s: %s", l.name, err)
		assert.Equal(t, l.status, core.StatusOf(err), "%s: %s", l.name, err)
		assert.Contains(t, err.Error(), l.says, l.name)
		left, err := os.ReadDir(filepath.Dir(out))
		require.NoError(t, err)
		require.Empty(t, left, l.name)
		if _, err := core.Decompress(path, out, "", core.Options{}, nil); l.step != "restore" {
			require.Error(t, err, l.name)
			require.NoFileExists(t, out)
		}
	}
	entries, err := os.ReadDir(refuse)
	require.NoError(t, err)
	for _, e := range entries {
		require.True(t, seen[e.Name()], "%s is not in expected.tsv", e.Name())
	}
}
