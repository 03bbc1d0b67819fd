package rans

import (
	"unsafe"

	"bigsmall.dev/bigsmall/codecs/planes"
)

// Element is what a symbol and its packed rest become: a little-endian number of Size bytes, 1 or 2. Where Field has a
// rest the field fills the element, so Shift is 0; otherwise the symbol stands Shift bits up.
type Element struct {
	Field planes.Field
	Size  int
	Shift uint8
}

// Symbols are elements that are the symbols themselves.
var Symbols = Element{Size: 2}

// Joins reports whether elements of a field can be made as its symbols are decoded.
func (e Element) Joins() bool {
	f := e.Field
	return f.Bits()+uint(e.Shift) <= uint(8*e.Size) && (f.Rest == 0 || e.Shift == 0 && f.Bits() == uint(8*e.Size))
}

// BatchStreams is how many streams a Batch decodes side by side.
const BatchStreams = 4

// Batch decodes up to four streams of one table side by side, as far as it is told to at a time. It has no meaning
// between a Close of the last stream and the next Add.
type Batch struct {
	// Past says that what is decoded is too much for the caches: it is stored past them, where that can be.
	Past bool
	// Ahead is what is decoded next: it is brought closer meanwhile.
	Ahead []byte

	streams [BatchStreams]stream
	n       int
	args    turns
}

type stream struct {
	lanes
	left int    // symbols to come
	todo int    // of these, in this call
	rest []byte // packed, from the next symbol on; readable up to its capacity
	dst  []byte
}

// turns is the border to the kernels, which know its layout. All pointers are addresses: what they point at stays where
// it is, and the streams keep it alive.
type turns struct {
	table    uintptr
	src      [BatchStreams]uintptr // next word; advanced by the kernel
	rest     [BatchStreams]uintptr
	dst      [BatchStreams]uintptr
	count    uint64
	restStep uint64  // bytes of rest a turn takes
	ahead    uintptr // is prefetched, up to 64 bytes a turn and stream; advanced by the kernel. Nothing has to be there
	state    [BatchStreams]states
}

// states are 32 states as the AVX-512 kernels hold them: low halves, then high halves.
type states [2 * Lanes]uint16

// Reset forgets everything.
func (b *Batch) Reset() { b.n, b.Past, b.Ahead = 0, false, nil }

// Add opens a stream of n symbols: src has its states and words and no more, rest the packed rest of its elements.
// Both may be read, without any effect, up to their capacity.
func (b *Batch) Add(src, rest []byte, n int) error {
	s := &b.streams[b.n]
	if err := s.open(src); err != nil {
		return err
	}
	s.left, s.rest = n, rest
	b.n++
	return nil
}

// Target says where the elements of stream k go from here on.
func (b *Batch) Target(k int, dst []byte) { b.streams[k].dst = dst }

// Next decodes count elements of every stream, or as many as are left of it; count is a multiple of 32. Streams that are
// damaged end in any content; Close tells.
func (b *Batch) Next(d *Decoder, count int) {
	for k := range b.n {
		b.streams[k].todo = min(count, b.streams[k].left)
	}
	if k := d.kernel(); k != nil {
		b.run(k, int(d.element.Field.Rest)*Lanes/8, d.element.Size)
	}
	for k := range b.n {
		for s := &b.streams[k]; s.todo > 0; {
			n := min(s.todo, chunk)
			s.plain(s.dst[:n*d.element.Size], d)
			s.skip(n, d.element)
		}
	}
}

// chunk is how many elements plain code makes before it merges their rest, in the nearest cache.
const chunk = 64 * Lanes

// plain makes elements: first their symbols, then their rest.
func (s *stream) plain(dst []byte, d *Decoder) {
	if d.element.Size == 1 {
		decodeInto(&s.lanes, dst, d.entries(), &d.bytes)
	} else {
		decodeInto(&s.lanes, unsafe.Slice((*[2]uint8)(unsafe.Pointer(unsafe.SliceData(dst))), len(dst)/2), d.entries(), &d.words)
	}
	d.element.Field.Merge(dst, s.rest, d.element.Size, 0)
}

// skip moves past n elements.
func (s *stream) skip(n int, e Element) {
	s.todo -= n
	s.left -= n
	s.dst = s.dst[n*e.Size:]
	if s.left > 0 { // n is a multiple of 32, so the rest goes on at a byte
		s.rest = s.rest[n*int(e.Field.Rest)/8:]
	}
}

// kernel is one tier's code for a table: run[k-1] decodes turns of k streams, and there may be fewer than
// streams.
type kernel struct {
	run      []func(*byte)
	table    unsafe.Pointer
	restRead int           // how much of the rest it reads in a turn
	past     []func(*byte) // run, but past the caches; nil where there is none
}

// wordRead is how much of the words a kernel reads in a turn; it takes no more than that.
const wordRead = 2 * Lanes

// safe is how many turns a kernel may do before it could read what it must not.
func (s *stream) safe(restRead, restStep int) int {
	n := min(s.todo/Lanes, cap(s.words)/wordRead)
	if restStep > 0 {
		if room := cap(s.rest) - restRead; room < 0 {
			n = 0
		} else {
			n = min(n, room/restStep+1)
		}
	}
	return n
}

// run lets a kernel do all turns that are safe. Words past the end of a stream may be taken: then it is damaged, and
// Close says so.
func (b *Batch) run(k *kernel, restStep, size int) {
	a := &b.args
	a.table, a.restStep, a.ahead = uintptr(k.table), uint64(restStep), uintptr(unsafe.Pointer(unsafe.SliceData(b.Ahead)))
	for {
		var active [BatchStreams]*stream
		n, count := 0, 0
		for i := range b.n {
			s := &b.streams[i]
			if c := s.safe(k.restRead, restStep); c > 0 && !s.short && n < len(k.run) {
				if n == 0 || c < count {
					count = c
				}
				active[n] = s
				n++
			}
		}
		if n == 0 {
			return
		}
		a.count = uint64(count)
		aligned := b.Past && k.past != nil
		for i, s := range active[:n] {
			a.src[i] = uintptr(unsafe.Pointer(unsafe.SliceData(s.words)))
			a.rest[i] = uintptr(unsafe.Pointer(unsafe.SliceData(s.rest)))
			a.dst[i] = uintptr(unsafe.Pointer(unsafe.SliceData(s.dst[:count*Lanes*size])))
			aligned = aligned && a.dst[i]%64 == 0
			for j, x := range s.x {
				a.state[i][j], a.state[i][Lanes+j] = uint16(x), uint16(x>>16)
			}
		}
		if aligned {
			k.past[n-1]((*byte)(unsafe.Pointer(a)))
		} else {
			k.run[n-1]((*byte)(unsafe.Pointer(a)))
		}
		for i, s := range active[:n] {
			taken := int(a.src[i] - uintptr(unsafe.Pointer(unsafe.SliceData(s.words))))
			s.short = taken > len(s.words)
			s.words = s.words[min(taken, len(s.words)):]
			for j := range s.x {
				s.x[j] = uint32(a.state[i][j]) | uint32(a.state[i][Lanes+j])<<16
			}
			s.todo -= count * Lanes
			s.left -= count * Lanes
			s.dst = s.dst[count*Lanes*size:]
			if s.left > 0 {
				s.rest = s.rest[count*restStep:]
			}
		}
	}
}

// Close checks that stream k ended as it must, and returns what the encoder gave its lanes to carry.
func (b *Batch) Close(k int) (carry [Lanes]uint16, err error) {
	s := &b.streams[k]
	s.dst, s.rest = nil, nil
	carry, err = s.close()
	s.words = nil
	return carry, err
}
