package core

import (
	"github.com/go-json-experiment/json"

	"bigsmall.dev/bigsmall/codecs"
)

// Breakdown says, as a JSON object, where the bytes of the files go: "parts" has the bytes of sign, exponent, mantissa, values
// (of integers, palettes and differences), tables, stored (blocks as they are, or in zstd), overhead (checksums, lengths), header
// (of the files, with their trailers), parity and original (payloads of the original package); "dtypes" the first three of
// each dtype, with the bytes of its tensors decoded and compressed. With modes, "modes" has about what the files would take in
// each: every tensor is decoded and looked at as a writer would, which takes as long as a compression. Without, the payloads are
// read and nothing is decoded.
func (r *Reader) Breakdown(modes bool, job *Job) ([]byte, error) {
	type ofDType struct {
		Bytes      int64   `json:"n_bytes"`
		Compressed int64   `json:"compressed_bytes"`
		Sign       float64 `json:"sign"`
		Exponent   float64 `json:"exponent"`
		Mantissa   float64 `json:"mantissa"`
	}
	var all codecs.Parts
	original, payloads, parity, size := int64(0), int64(0), int64(0), int64(0)
	dtypes := map[string]*ofDType{}
	estimates := [codecs.EndMode]int64{}
	pool := newPool(job)
	for _, c := range r.files {
		size += c.size
		if c.parity != nil {
			parity += c.parity.sectionLen()
		}
	}
	total := int64(0)
	for _, t := range r.tensors {
		if t.entry.tiedTo == "" {
			total += t.entry.bytes
		}
	}
	pool.total(total)
	for i, t := range r.tensors {
		if t.entry.tiedTo != "" || t.entry.bytes == 0 {
			continue
		}
		name := t.entry.dtype.String()
		of := dtypes[name]
		if of == nil {
			of = &ofDType{}
			dtypes[name] = of
		}
		of.Bytes += t.entry.bytes
		of.Compressed += t.entry.compressed
		payloads += t.entry.compressed
		if t.file.original {
			original += t.entry.compressed
		} else {
			var one codecs.Parts
			if err := r.partsOf(t, &one, pool); err != nil {
				return nil, err
			}
			all.Add(&one)
			of.Sign += one.Sign
			of.Exponent += one.Exponent
			of.Mantissa += one.Mantissa
		}
		if !modes {
			pool.done(t.entry.bytes) // decoding counts by itself
		} else {
			data := make([]byte, t.entry.bytes)
			q, err := r.request(i, data, t.entry.bytes)
			if err != nil {
				return nil, err
			}
			if err := r.decodeAll([]*request{q}, pool); err != nil {
				return nil, err
			}
			for mode := range estimates {
				e, err := codecs.NewEncoding(&codecs.Tensor{DType: t.entry.dtype, Shape: t.entry.shape, Bytes: t.entry.bytes,
					Held: data, Mode: codecs.Mode(mode), Run: pool.run})
				if err != nil {
					return nil, at(err, t.file.name, t.entry.name)
				}
				estimates[mode] += e.EstimatedBytes()
			}
		}
	}
	header := size - payloads - parity
	type parts struct {
		Sign     float64 `json:"sign"`
		Exponent float64 `json:"exponent"`
		Mantissa float64 `json:"mantissa"`
		Values   float64 `json:"values"`
		Tables   float64 `json:"tables"`
		Stored   float64 `json:"stored"`
		Overhead float64 `json:"overhead"`
		Header   int64   `json:"header"`
		Parity   int64   `json:"parity"`
		Original int64   `json:"original"`
	}
	out := struct {
		Parts  parts               `json:"parts"`
		DTypes map[string]*ofDType `json:"dtypes"`
		Modes  map[string]int64    `json:"modes"`
	}{
		Parts:  parts{all.Sign, all.Exponent, all.Mantissa, all.Values, all.Tables, all.Stored, all.Overhead, header, parity, original},
		DTypes: dtypes,
	}
	if modes {
		out.Modes = map[string]int64{}
		for mode, name := range modeNames {
			out.Modes[name] = estimates[mode] + header + parity
		}
	}
	return json.Marshal(out, json.Deterministic(true))
}

// partsOf adds up the parts of a tensor's payload.
func (r *Reader) partsOf(t tensor, sum *codecs.Parts, pool *pool) error {
	head, err := t.file.read(t.entry.offset, t.entry.head)
	if err != nil {
		return at(err, t.file.name, t.entry.name)
	}
	x, err := codecs.ParseHead(head, t.entry.checksum, t.entry.dtype, t.entry.bytes, t.entry.compressed)
	if err != nil {
		return at(err, t.file.name, t.entry.name)
	}
	p := &payload{Payload: x, tensor: t}
	sum.AddHead(x)
	// A few groups at a time; sums of floats are made in one order.
	groups := (p.Blocks() + codecs.GroupBlocks - 1) / codecs.GroupBlocks
	ofGroup := make([]codecs.Parts, groups)
	err = pool.run(groups, func(g int, s *codecs.Scratch) error {
		first := g * codecs.GroupBlocks
		last := min(first+codecs.GroupBlocks, p.Blocks())
		src, err := p.readBlocks(first, last, s)
		if err != nil {
			return at(err, t.file.name, t.entry.name)
		}
		var one codecs.Parts
		for b := first; b < last; b++ {
			_, n := p.BlockSpan(b)
			if err := one.AddBlock(x, b, t.entry.dtype, src[:n:n], s); err != nil {
				return at(err, t.file.name, t.entry.name)
			}
			src = src[n:]
		}
		ofGroup[g] = one
		return nil
	})
	for g := range ofGroup {
		sum.Add(&ofGroup[g])
	}
	return err
}
