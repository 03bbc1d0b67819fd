package core

import (
	"encoding/binary"
	"fmt"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/codecs/gpu"
)

// Weight is a tensor that stays compressed in the memory of a device. Restart points in its blocks let many warps decode
// one matrix: a block alone is 2,048 turns of the coder, one after the other.
type Weight struct {
	record   uint64 // the device's address of all of it
	layout   weightLayout
	status   uint64
	elements uint64 // which are words
	size     int    // bytes of one
	kernel   string
}

// segmentsLog is log2 of the segments of a block: 0.75 % of a BF16 matrix goes into restart points. On an H100 a matrix of
// 4096 x 4096 then decodes in 68 us, with four segments in 104 us, and with one in 334 us.
const segmentsLog = 3

// weightLayout is where the parts of a weight lie in its memory; all begin at multiples of 256.
type weightLayout struct {
	program, restarts, payload, end int64
}

func (p *payload) weightLayout() (l weightLayout) {
	align := func(n int64) int64 { return (n + 255) &^ 255 }
	from, _ := p.BlockSpan(0)
	l.program = 256 // the record and the status come first
	l.restarts = align(l.program + int64(p.ProgramBytes(0, p.Blocks())))
	l.payload = align(l.restarts + int64(gpu.RestartBytes(p.Blocks(), segmentsLog)))
	l.end = align(l.payload + p.entry.compressed - from + gpu.Slack)
	return l
}

// putRecord stores the record of a weight in this memory of the device.
func (l *weightLayout) putRecord(record []byte, memory, out uint64) {
	binary.LittleEndian.PutUint64(record, memory+uint64(l.payload))
	binary.LittleEndian.PutUint64(record[8:], out)
	binary.LittleEndian.PutUint64(record[16:], memory+uint64(l.program))
	binary.LittleEndian.PutUint64(record[24:], memory+uint64(l.restarts))
}

// weight opens a tensor that may be kept compressed.
func (r *Reader) weight(i int) (*payload, error) {
	if _, err := r.Tensor(i); err != nil {
		return nil, err
	}
	t := r.tensors[i]
	unfit := func(why string) error {
		return &Error{Status: UnsupportedFeature, File: t.file.name, Tensor: t.entry.name,
			Msg: "cannot stay compressed on a device: " + why + "; keep it decoded"}
	}
	if t.entry.bytes == 0 {
		return nil, unfit("it has no elements")
	}
	if m, err := r.master(t); err == nil && m.file.original {
		return nil, unfit("its codec " + m.entry.codec + " is one for the CPU")
	}
	p, err := r.openPayload(t, newPool(&Job{Workers: 1}))
	switch {
	case err != nil:
		return nil, err
	case p.NeedsBase() || !p.OnDevice():
		return nil, unfit("its codec " + p.entry.codec + " is one for the CPU")
	case storageBits(t.entry.dtype) != 8*p.WordBytes():
		return nil, unfit(fmt.Sprintf("its elements of dtype %s are no words of %d bytes", t.entry.dtype, p.WordBytes()))
	}
	return p, nil
}

// WeightBytes is the device memory that OpenWeight needs for tensor i, or UnsupportedFeature where its form is none that a
// device decodes.
func (r *Reader) WeightBytes(i int) (int64, error) {
	p, err := r.weight(i)
	if err != nil {
		return 0, err
	}
	return p.weightLayout().end, nil
}

// OpenWeight puts tensor i into memory of the device, of room bytes at a multiple of 256, verifies it there and makes its restart
// points. The memory is the caller's and must stay as long as the weight is used; the reader need not. UnsupportedFeature
// means that some block is none that a device decodes.
func (r *Reader) OpenWeight(i int, memory uint64, room int64, dev Device, job *Job) (w *Weight, err error) {
	p, err := r.weight(i)
	if err != nil {
		return nil, err
	}
	fail := func(s Status, format string, args ...any) error {
		return at(failf(s, format, args...), p.file.name, p.entry.name)
	}
	l := p.weightLayout()
	if room < l.end {
		return nil, fail(DstTooSmall, "room for %d bytes of the device, %d are needed", room, l.end)
	}
	if memory == 0 || memory%256 != 0 {
		return nil, fail(InvalidArgument, "device address %#x is no multiple of 256", memory)
	}
	defer func() {
		if e := dev.Sync(); err == nil {
			err = e
		}
		if err != nil {
			w = nil
		}
	}()
	pool := newPool(job)
	pool.total(p.entry.bytes)
	meta, err := dev.HostMemory(int(l.restarts))
	if err != nil {
		return nil, err
	}
	l.putRecord(meta, memory, 0)
	program := p.Program(meta[l.program:], 0, p.Blocks(), 0, segmentsLog)
	hosts, err := p.sendBlocks(memory+uint64(l.payload), program, dev, pool)
	if err != nil {
		return nil, err
	}
	if hosts > 0 {
		return nil, fail(UnsupportedFeature, "cannot stay compressed on a device: %d of its %d blocks are for the CPU; keep it decoded", hosts, p.Blocks())
	}
	w = &Weight{record: memory, layout: l, status: memory + gpu.RecordBytes, elements: uint64(p.entry.bytes) / uint64(p.WordBytes()),
		size: p.WordBytes(), kernel: decodeKernels[p.WordBytes()/2]}
	ctas := (p.Blocks() + gpu.Streams - 1) / gpu.Streams
	steps := []func() error{
		func() error { return dev.Copy(memory, meta) },
		dev.CopiesDone,
		func() error { return dev.Fill(w.status, gpu.Sound, 1) },
		func() error { return dev.Launch(gpu.Verify, ctas, memory, uint64(0), uint32(0), w.status) },
		func() error { return dev.Launch(gpu.Restart, ctas, memory, uint64(0), uint32(0), w.status) },
		func() error { return dev.CopyBack(meta[:4], w.status) },
		dev.Sync,
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, err
		}
	}
	if word := binary.LittleEndian.Uint32(meta); word != gpu.Sound {
		b := int(word) / codecs.GroupBlocks * codecs.GroupBlocks
		if b >= p.Blocks() {
			return nil, fail(Internal, "the device reports damage in block %d of %d", word, p.Blocks())
		}
		q := devicePiece{deviceTensor: &deviceTensor{payload: p}, first: b, last: min(b+codecs.GroupBlocks, p.Blocks())}
		return nil, q.explain(fmt.Errorf("%w in block %d", errDevice, word), codecs.NewScratch())
	}
	pool.done(p.entry.bytes)
	return w, nil
}

// sendBlocks copies all blocks to the device, describes them, and counts those that are for the host.
func (p *payload) sendBlocks(dst uint64, program *codecs.Program, dev Device, pool *pool) (hosts int, err error) {
	base, _ := p.BlockSpan(0)
	var buffers [2][]byte
	var busy [2]Event
	for turn, first := 0, 0; first < p.Blocks(); turn++ {
		slot, last := turn%len(buffers), first
		from, _ := p.BlockSpan(first)
		end := from
		for last < p.Blocks() {
			at, n := p.BlockSpan(last)
			if at+n-from > chunkBytes {
				break
			}
			end = at + n
			last++
		}
		if buffers[slot] == nil {
			if buffers[slot], err = dev.HostMemory(int(min(chunkBytes, p.entry.compressed-base))); err != nil {
				return 0, err
			}
		}
		if e := busy[slot]; e != nil {
			if err := dev.Wait(e); err != nil {
				return 0, err
			}
		}
		buffer := buffers[slot]
		pieces := (last - first + blocksOfPiece - 1) / blocksOfPiece
		unfit := make([]int, pieces)
		err := pool.run(pieces, func(k int, s *codecs.Scratch) error {
			q := devicePiece{deviceTensor: &deviceTensor{payload: p}, first: first + k*blocksOfPiece}
			q.last = min(q.first+blocksOfPiece, last)
			at, _ := p.BlockSpan(q.first)
			z, n := p.BlockSpan(q.last - 1)
			src := buffer[at-from : z+n-from]
			if err := p.readInto(src, at); err != nil {
				return err
			}
			err := q.describe(program, src, s)
			unfit[k] = len(q.hosts)
			return err
		})
		if err != nil {
			return 0, err
		}
		for _, n := range unfit {
			hosts += n
		}
		if err := dev.Copy(dst+uint64(from-base), buffer[:end-from]); err != nil {
			return 0, err
		}
		if err := dev.CopiesDone(); err != nil {
			return 0, err
		}
		if busy[slot], err = dev.Mark(); err != nil {
			return 0, err
		}
		first = last
	}
	return hosts, nil
}

// Elements is the number of elements.
func (w *Weight) Elements() uint64 { return w.elements }

// Launcher starts a kernel, as Device.Launch does.
type Launcher func(kernel string, ctas int, args ...any) error

// Decode begins to decode elements first to first+count-1 to dst. first is a multiple of 65,536, and so is count unless it
// reaches to the end.
func (w *Weight) Decode(first, count, dst uint64, room int64, launch Launcher) error {
	switch {
	case first > w.elements || count > w.elements-first:
		return failf(InvalidArgument, "elements %d to %d of %d", first, first+count, w.elements)
	case first%codecs.BlockWords != 0 || count%codecs.BlockWords != 0 && first+count != w.elements:
		return failf(InvalidArgument, "elements %d to %d: blocks have %d, and parts of one are not decoded", first, first+count, codecs.BlockWords)
	case room < 0 || uint64(room)/uint64(w.size) < count:
		return failf(DstTooSmall, "room for %d bytes, %d are needed", room, count*uint64(w.size))
	case dst%uint64(w.size) != 0:
		return failf(InvalidArgument, "device address %#x is no multiple of %d", dst, w.size)
	case count == 0:
		return nil
	}
	quad := first / codecs.BlockWords * quadsPerBlock
	return launch(w.kernel, int(quads(count)), w.record, uint64(0), uint32(quad), dst-first*uint64(w.size), w.status)
}

const quadsPerBlock = (1 << segmentsLog) / gpu.Streams

// quads is how many CTAs decode so many elements.
func quads(elements uint64) uint64 {
	return (elements + codecs.BlockWords - 1) / codecs.BlockWords * quadsPerBlock
}

// Batch is weights that are decoded together, each to its place, by one launch: many small matrices keep a device busy
// only at the same time.
type Batch struct {
	records, units, status uint64
	ctas                   int
	kernel                 string
}

// BatchBytes is the device memory that OpenBatch needs.
func BatchBytes(weights []*Weight) int64 {
	n := int64(256 + len(weights)*gpu.RecordBytes)
	for _, w := range weights {
		n += int64(quads(w.elements) * gpu.UnitBytes)
	}
	return n
}

// OpenBatch prepares weights to be decoded together, weight k to dst[k], where there is room for it, by memory of the device, of room
// bytes at a multiple of 256. All have elements of the same size, and stay, as the memory does, as long as the batch is used.
func OpenBatch(weights []*Weight, dst []uint64, memory uint64, room int64, dev Device) (*Batch, error) {
	if len(weights) == 0 || len(weights) != len(dst) {
		return nil, failf(InvalidArgument, "%d weights and %d destinations", len(weights), len(dst))
	}
	n := BatchBytes(weights)
	switch {
	case room < n:
		return nil, failf(DstTooSmall, "room for %d bytes of the device, %d are needed", room, n)
	case memory == 0 || memory%256 != 0:
		return nil, failf(InvalidArgument, "device address %#x is no multiple of 256", memory)
	}
	meta, err := dev.HostMemory(int(n))
	if err != nil {
		return nil, err
	}
	b := &Batch{status: memory, records: memory + 256, kernel: weights[0].kernel}
	binary.LittleEndian.PutUint32(meta, gpu.Sound)
	at := 256 + len(weights)*gpu.RecordBytes
	b.units = memory + uint64(at)
	for k, w := range weights {
		if w.size != weights[0].size || dst[k]%uint64(w.size) != 0 {
			return nil, failf(InvalidArgument, "weight %d has elements of %d bytes, the first one of %d, and goes to %#x", k, w.size, weights[0].size, dst[k])
		}
		w.layout.putRecord(meta[256+k*gpu.RecordBytes:], w.record, dst[k])
		for quad := range quads(w.elements) {
			binary.LittleEndian.PutUint32(meta[at:], uint32(k))
			binary.LittleEndian.PutUint32(meta[at+4:], uint32(quad))
			at += gpu.UnitBytes
			b.ctas++
		}
	}
	if err := dev.Copy(memory, meta); err != nil {
		return nil, err
	}
	return b, dev.Sync()
}

// Decode begins to decode all of them.
func (b *Batch) Decode(launch Launcher) error {
	return launch(b.kernel, b.ctas, b.records, b.units, uint32(0), uint64(0), b.status)
}

// Gather begins to decode rows of rowElements elements to dst, one after the other: those whose numbers are n int64 at
// `ids`, in the device's memory. A row that there is not is left out.
func (w *Weight) Gather(ids, n, rowElements, dst uint64, room int64, launch Launcher) error {
	const longest = 2 * codecs.BlockWords >> segmentsLog
	switch {
	case w.size == 1:
		return failf(UnsupportedFeature, "rows of elements of one byte are not gathered")
	case rowElements == 0 || rowElements > longest:
		return failf(UnsupportedFeature, "rows of %d elements, of at most %d", rowElements, longest)
	case n > 1<<31-1:
		return failf(InvalidArgument, "%d rows", n)
	case room < 0 || uint64(room)/uint64(w.size)/rowElements < n:
		return failf(DstTooSmall, "room for %d bytes, not for %d rows of %d elements of %d", room, n, rowElements, w.size)
	case dst%uint64(w.size) != 0 || ids%8 != 0:
		return failf(InvalidArgument, "device addresses %#x and %#x are no multiples of %d and 8", dst, ids, w.size)
	case n == 0:
		return nil
	}
	return launch(gpu.Gather, int(n), w.record, ids, uint32(n), uint32(rowElements), dst, w.status)
}

// Plan is for devices that decode by other programs: the payload of tensor i, head included and verified, and its
// program, whose blocks are where they are in the payload. Where the room is too small nothing is stored; the lengths are given
// either way.
func (r *Reader) Plan(i int, payload, program []byte, job *Job) (payloadLen, programLen int, err error) {
	p, err := r.weight(i)
	if err != nil {
		return 0, 0, err
	}
	payloadLen, programLen = int(p.entry.compressed), p.ProgramBytes(0, p.Blocks())
	if len(payload) == 0 && len(program) == 0 {
		return payloadLen, programLen, nil
	}
	fail := func(s Status, format string, args ...any) error {
		return at(failf(s, format, args...), p.file.name, p.entry.name)
	}
	if len(payload) < payloadLen || len(program) < programLen {
		return payloadLen, programLen, fail(DstTooSmall, "room for %d and %d bytes, %d and %d are needed", len(payload), len(program), payloadLen, programLen)
	}
	from, _ := p.BlockSpan(0)
	if err := p.readInto(payload[:from], 0); err != nil {
		return 0, 0, err
	}
	g := p.Program(program, 0, p.Blocks(), uint64(from), 0)
	pool := newPool(job)
	unfit := make([]int, (p.Blocks()+blocksOfPiece-1)/blocksOfPiece)
	err = pool.run(len(unfit), func(k int, s *codecs.Scratch) error {
		q := devicePiece{deviceTensor: &deviceTensor{payload: p}, first: k * blocksOfPiece}
		q.last = min(q.first+blocksOfPiece, p.Blocks())
		at, _ := p.BlockSpan(q.first)
		end, n := p.BlockSpan(q.last - 1)
		src := payload[at : end+n]
		if err := p.readInto(src, at); err != nil {
			return err
		}
		if err := p.Verify(q.first, src); err != nil {
			return q.explain(err, s)
		}
		err := q.describe(g, src, s)
		unfit[k] = len(q.hosts)
		return err
	})
	for _, n := range unfit {
		if n > 0 && err == nil {
			err = fail(UnsupportedFeature, "some of its %d blocks are for the CPU; decode it there", p.Blocks())
		}
	}
	return payloadLen, programLen, err
}
