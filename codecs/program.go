package codecs

import (
	"encoding/binary"

	"bigsmall.dev/bigsmall/codecs/gpu"
	"bigsmall.dev/bigsmall/codecs/rans"
)

// OnDevice reports whether a device may decode blocks of this format; Describe says of each block whether it does.
func (f *Format) OnDevice() bool {
	n := len(f.fields)
	if n == 0 || n > gpu.MaxFields || f.word > 4 || n > 1 && (f.word < 4 || f.transform == Half) {
		return false
	}
	return f.scales == nil && (f.transform == Plain || f.transform == Half)
}

// WordBytes is the size of a word of the source.
func (f *Format) WordBytes() int { return f.word }

// Fields is the number of fields of a word.
func (f *Format) Fields() int { return len(f.fields) }

// Program is what the kernels of package gpu are told of blocks of a payload.
type Program struct {
	Bytes []byte

	p                  *Payload
	first, n           int
	segmentsLog        int
	blocksAt, planesAt int
}

// tablesOf calls f for every table that the groups of blocks first to last-1 choose, each once.
func (p *Payload) tablesOf(first, last int, f func(field int, choice uint8)) {
	for i, m := range p.sym {
		var seen [MaxTables]bool
		for g := first / GroupBlocks; g < (last+GroupBlocks-1)/GroupBlocks && len(m.tables) > 0; g++ {
			if c := m.choice[g]; !seen[c] {
				seen[c] = true
				f(i, c)
			}
		}
	}
}

// ProgramBytes is the length of the program for blocks first to last-1 of a format that is OnDevice.
func (p *Payload) ProgramBytes(first, last int) int {
	n := p.planesAt(last-first) + (last-first)*len(p.fields)*gpu.PlaneBytes
	p.tablesOf(first, last, func(i int, c uint8) { n += p.sym[i].tables[c].BucketBytes() })
	return (n + 15) &^ 15
}

func (p *Payload) planesAt(n int) int { return (gpu.HeadBytes + n*gpu.BlockBytes + 15) &^ 15 }

// Program begins the program for blocks first to last-1, which are whole groups, in the first ProgramBytes of dst; Describe
// completes it. The blocks' bytes stand one after the other and begin `offset` bytes behind the payload address of the
// record.
func (p *Payload) Program(dst []byte, first, last int, offset uint64, segmentsLog int) *Program {
	g := &Program{p: p, first: first, n: last - first, segmentsLog: segmentsLog, blocksAt: gpu.HeadBytes}
	g.planesAt = p.planesAt(g.n)
	dst = dst[:p.ProgramBytes(first, last)]
	clear(dst)
	binary.LittleEndian.PutUint64(dst, min(p.words-uint64(first)*BlockWords, uint64(g.n)*BlockWords))
	binary.LittleEndian.PutUint32(dst[8:], uint32(g.n))
	half := uint8(0)
	if p.transform == Half {
		half = 1
	}
	copy(dst[12:], []byte{uint8(len(p.fields)), uint8(p.word), p.shift, half})
	binary.LittleEndian.PutUint32(dst[16:], uint32(g.planesAt))
	binary.LittleEndian.PutUint32(dst[20:], uint32(g.blocksAt))
	binary.LittleEndian.PutUint32(dst[24:], uint32(segmentsLog))
	binary.LittleEndian.PutUint32(dst[28:], uint32(len(dst)))
	for i, x := range p.fields {
		rotate := uint8(0)
		if x.Rotate {
			rotate = 1
		}
		copy(dst[32+gpu.FieldBytes*i:], []byte{x.Shift, x.Sym, x.Rest, rotate})
	}
	at := g.planesAt + g.n*len(p.fields)*gpu.PlaneBytes
	var where [gpu.MaxFields][MaxTables]uint32
	p.tablesOf(first, last, func(i int, c uint8) {
		where[i][c] = uint32(at)
		at = len(p.sym[i].tables[c].AppendBuckets(dst[:at]))
	})
	for k := range g.n {
		_, length := p.BlockSpan(first + k)
		x := dst[g.blocksAt+k*gpu.BlockBytes:]
		binary.LittleEndian.PutUint64(x, offset)
		binary.LittleEndian.PutUint64(x[8:], p.hash[first+k])
		binary.LittleEndian.PutUint32(x[16:], uint32(length))
		if length > gpu.ShortBlock {
			x[20] = 1
		}
		offset += uint64(length)
		for i, m := range p.sym {
			plane := dst[g.planesAt+(k*len(p.fields)+i)*gpu.PlaneBytes:]
			plane[24] = gpu.OfHost
			if len(m.tables) > 0 {
				binary.LittleEndian.PutUint32(plane[16:], where[i][m.choice[(first+k)/GroupBlocks]])
			}
		}
	}
	g.Bytes = dst
	return g
}

// Describe completes the program with the heads of the planes of a block, whose bytes are src, and reports whether
// the device decodes it: if not, the kernels pass it by. A block that is too short for the device to verify is verified here.
// Blocks may be described by several goroutines at once.
func (g *Program) Describe(number int, src []byte) (onDevice bool, err error) {
	p, k := g.p, number-g.first
	if len(src) <= gpu.ShortBlock {
		if err := p.Verify(number, src); err != nil {
			return false, err
		}
	}
	if src[1]|src[2]|src[3] != 0 || src[0] >= endBlock {
		return false, corrupt("kind %d of a block", src[0])
	}
	if src[0] != blockCoded {
		return false, nil
	}
	var b block
	b.n = int(min(p.words-uint64(number)*BlockWords, BlockWords))
	tail, err := p.cut(&b, src[blockHead:len(src):len(src)])
	if err == nil {
		err = zeroPadding(tail, number == p.Blocks()-1)
	}
	if err != nil {
		return false, err
	}
	for i := range p.fields {
		switch kind := b.fields[i].sym.kind; {
		case kind == planeZstd:
			return false, nil
		case kind == planeRANS && i > 0 && g.segmentsLog > 0:
			return false, nil // restart points are those of one stream
		}
	}
	in := func(part []byte) uint32 { return uint32(len(src) - cap(part)) } // all are cut off src
	for i := range p.fields {
		s := &b.fields[i].sym
		x := g.Bytes[g.planesAt+(k*len(p.fields)+i)*gpu.PlaneBytes:][:gpu.PlaneBytes]
		switch s.kind {
		case planeRaw:
			binary.LittleEndian.PutUint32(x, in(s.data))
			x[24] = gpu.Raw
		case planeConstant:
			binary.LittleEndian.PutUint16(x[22:], s.symbol)
			x[24] = gpu.Constant
		case planeRANS:
			binary.LittleEndian.PutUint32(x, in(s.data))
			binary.LittleEndian.PutUint32(x[4:], uint32(len(s.data)-rans.StateBytes)/2)
			x[24] = gpu.Coded
		}
		binary.LittleEndian.PutUint32(x[8:], in(b.fields[i].rest))
		binary.LittleEndian.PutUint32(x[12:], in(s.listed))
		binary.LittleEndian.PutUint16(x[20:], uint16(s.patches))
	}
	return true, nil
}
