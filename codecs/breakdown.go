package codecs

import (
	"math"

	"bigsmall.dev/bigsmall/codecs/rans"
)

// Parts says where the bytes of payloads go. A symbol that holds bits of several parts counts for each of them by the entropy
// of its table: the exponent first, then the sign given the exponent, then the mantissa given both.
type Parts struct {
	Sign, Exponent, Mantissa float64 // of floats
	Values                   float64 // of integers, palettes and differences
	Tables                   float64 // with the choice between them, and scales
	Stored                   float64 // blocks that are the source's bytes, or one zstd frame of them
	Overhead                 float64 // checksums, lengths, first states, padding
}

// total is their sum.
func (p *Parts) total() float64 {
	return p.Sign + p.Exponent + p.Mantissa + p.Values + p.Tables + p.Stored + p.Overhead
}

// AddHead adds the head of a payload.
func (p *Parts) AddHead(x *Payload) {
	tables := 0
	for _, m := range x.sym {
		tables += len(m.append(nil))
	}
	if x.scales != nil {
		tables += x.scales.stored
	}
	p.Tables += float64(tables)
	p.Overhead += float64(x.headLen) - float64(tables)
}

// AddBlock adds block number of a payload of the dtype, whose bytes src has.
func (p *Parts) AddBlock(x *Payload, number int, d DType, src []byte, s *Scratch) error {
	if err := x.Verify(number, src); err != nil {
		return err
	}
	before := p.total()
	if src[0] != blockCoded {
		p.Stored += float64(len(src) - blockHead)
	} else if x.transform == BaseDiff {
		p.Values += float64(len(src) - blockHead)
	} else {
		b := &s.blocks[0]
		b.first, b.n = uint64(number)*BlockWords, int(min(x.words-uint64(number)*BlockWords, BlockWords))
		if _, err := x.cut(b, src[blockHead:]); err != nil {
			return err
		}
		for i := range x.fields {
			p.addField(x, i, number/GroupBlocks, b, d, s)
		}
	}
	p.Overhead += float64(len(src)) - (p.total() - before)
	return nil
}

// Kinds of bits, in the order in which a symbol's are counted.
const (
	exponentBit = iota
	signBit
	mantissaBit
	otherBit
	bitKinds
)

func (p *Parts) add(kind int, bytes float64) {
	*[bitKinds]*float64{&p.Exponent, &p.Sign, &p.Mantissa, &p.Values}[kind] += bytes
}

// kindOf says what a bit of a transformed word is.
func (f *Format) kindOf(bit uint, d DType) int {
	exp := dtypes[d].exp
	if f.transform == Half {
		exp = 5
	}
	switch top := f.width() - 1; {
	case exp == 0 || f.transform != Plain && f.transform != Half:
		return otherBit
	case bit == top:
		return signBit
	case bit+exp >= top:
		return exponentBit
	}
	return mantissaBit
}

// addField adds the plane and the rest of field i.
func (p *Parts) addField(x *Payload, i, group int, b *block, d DType, s *Scratch) {
	f, plane := x.fields[i], &b.fields[i].sym
	width := f.Bits()
	// Bit k of the run, once it is rotated.
	kind := func(k uint) int {
		if f.Rotate {
			k = (k + width - 1) % width
		}
		return x.kindOf(uint(f.Shift)+k, d)
	}
	for k := range uint(f.Rest) {
		p.add(kind(k), float64(b.n)/8)
	}
	var masks [bitKinds]uint16
	for k := range uint(f.Sym) {
		masks[kind(uint(f.Rest)+k)] |= 1 << k
	}
	bytes := float64(4 * plane.patches)
	if plane.kind == planeRANS {
		bytes += float64(len(plane.data) - rans.StateBytes)
	} else {
		bytes += float64(len(plane.data))
	}
	var shares [bitKinds]float64
	m := x.sym[i]
	switch {
	case plane.kind != planeRANS: // as many bytes for each bit
		for k, mask := range masks {
			for ; mask != 0; mask &= mask - 1 {
				shares[k]++
			}
		}
	case m.classes == nil:
		addShares(&shares, m.tables[m.choice[group]], &masks, 1)
	default:
		var often [MaxTables]int
		for _, c := range x.scaleClasses(b.first, b.n, s) {
			often[c]++
		}
		for t, n := range often[:len(m.tables)] {
			addShares(&shares, m.tables[t], &masks, float64(n))
		}
	}
	sum := 0.0
	for _, share := range shares {
		sum += share
	}
	for k, share := range shares {
		if sum > 0 {
			p.add(k, bytes*share/sum)
		}
	}
}

// addShares adds what each kind of bits, given those before, takes of n symbols of a table.
func addShares(shares *[bitKinds]float64, t *rans.Table, masks *[bitKinds]uint16, n float64) {
	known, before := uint16(0), 0.0
	for k, mask := range masks {
		known |= mask
		often := map[uint16]float64{}
		for i, v := range t.Value {
			often[v&known] += float64(t.Freq[i])
		}
		entropy := 0.0
		for _, f := range t.Value {
			if c := often[f&known]; c > 0 {
				entropy -= c / rans.Slots * math.Log2(c/rans.Slots)
				delete(often, f&known) // once each, in the order of the table: sums of floats are to be the same each time
			}
		}
		shares[k] += n * (entropy - before)
		before = entropy
	}
}

// EstimatedBytes is about how long the payload becomes.
func (e *Encoding) EstimatedBytes() int64 {
	if e.words == 0 || len(e.fields) == 0 && !e.whole && e.transform == Plain {
		return int64(e.headLen) + e.tensor.Bytes + int64(blockHead*e.blocks())
	}
	zstd, coded := e.whole, uint64(0)
	for _, p := range e.plans {
		zstd = zstd || p.zstd
		if p.rans {
			coded++
		}
	}
	if zstd || e.exact == 0 {
		return int64(e.headLen) + int64(e.scaledSample())
	}
	perBlock := blockHead + uint64(len(e.fields))*planeHead + coded*rans.StateBytes/2 // the lanes carry something
	return int64(e.headLen) + int64(e.exact/8/rans.LogOne+uint64(e.blocks())*perBlock)
}

// Add adds other parts.
func (p *Parts) Add(o *Parts) {
	p.Sign += o.Sign
	p.Exponent += o.Exponent
	p.Mantissa += o.Mantissa
	p.Values += o.Values
	p.Tables += o.Tables
	p.Stored += o.Stored
	p.Overhead += o.Overhead
}
