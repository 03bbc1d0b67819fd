package core

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/codecs/gpu"
)

// Device is a device that decodes by the kernels of package gpu: its memory, a stream of the caller's for kernels, and one of its
// own for copies to it. It is used by one goroutine; addresses are the device's own. What its functions begin goes on while
// the host goes on.
type Device interface {
	// HostMemory gives page-locked memory, DeviceMemory memory of the device, at multiples of 256. Both live until Close.
	HostMemory(n int) ([]byte, error)
	DeviceMemory(n int) (uint64, error)
	// PageLocked reports whether b, which is not empty, is memory that copies may read in place.
	PageLocked(b []byte) bool
	// Copy copies from page-locked memory, in the stream of copies.
	Copy(dst uint64, src []byte) error
	// CopyBack copies to page-locked memory, in the stream of kernels.
	CopyBack(dst []byte, src uint64) error
	// Fill stores a value n times, in the stream of kernels.
	Fill(dst uint64, value uint32, n int) error
	// CopiesDone lets the stream of kernels wait for all copies begun so far.
	CopiesDone() error
	// Mark is the point in the stream of kernels where all begun so far has ended; Wait waits for it, once.
	Mark() (Event, error)
	Wait(Event) error
	// Launch starts a kernel of package gpu with so many CTAs. Arguments are uint64 or uint32.
	Launch(kernel string, ctas int, args ...any) error
	// Sync waits for both streams.
	Sync() error
}

// Event is a point in a stream.
type Event any

// DeviceItem is one request of DecodeDevice: tensor Index goes to the device's address Dst, where there is room for Cap bytes.
type DeviceItem struct {
	Index int
	Dst   uint64
	Cap   int64
}

const (
	chunkBytes    = 31 << 20 // of a chunk: a copy that takes long beside a launch, and many pieces; four fit 128 MiB
	chunkSlots    = 4        // one is filled, one copied, one decoded, and one evens that out
	blocksOfPiece = 4 * codecs.GroupBlocks
	statusWords   = 4 // of a chunk: one for the checksums and one for each size of words
)

// deviceTensor is a tensor on its way to the device.
type deviceTensor struct {
	*payload
	dst uint64
}

// devicePiece is a run of whole groups of blocks that has a program of its own.
type devicePiece struct {
	*deviceTensor
	first, last int
	from        int64  // where its bytes begin in the payload
	bytes       int    // how many
	source      []byte // the same where they are read in place, in page-locked memory
	at          int    // where they go in a chunk
	programAt   int    // and its program
	hosts       []int  // blocks that the device left to the host
}

func (d *devicePiece) quads() int { return (d.last - d.first + gpu.Streams - 1) / gpu.Streams }

// room is what the piece takes of a chunk, beside its bytes.
func (d *devicePiece) room() int {
	return d.ProgramBytes(d.first, d.last) + gpu.RecordBytes + d.quads()*gpu.UnitBytes + codecs.Align
}

// deviceChunk is what is copied and decoded at a time: bytes of pieces, then records, units and programs.
type deviceChunk struct {
	pieces    []*devicePiece
	inPlace   bool // its pieces are read in place
	records   int  // where they begin, and with them what is always copied
	units     int
	bytes     int
	perWord   [3]int // units of words of 1, 2 and 4 bytes, in this order
	nextBytes int
	nextRoom  int
}

// DecodeDevice decodes many tensors into the memory of a device: their compressed bytes are copied, checked and decoded
// there, the bytes of one chunk while the next is read. What the device does not take is decoded by the host and copied. When it
// returns without an error everything is in place; after an error the destinations are undefined. Either way the device
// is done.
func (r *Reader) DecodeDevice(items []DeviceItem, dev Device, job *Job) (err error) {
	p := newPool(job)
	defer func() {
		if e := dev.Sync(); err == nil {
			err = e
		}
	}()
	tensors, total, err := r.deviceTensors(items, p)
	if err != nil {
		return err
	}
	p.total(total)
	run := &deviceRun{dev: dev, pool: p}
	for _, t := range tensors {
		run.plan(t)
	}
	run.close()
	if err := run.begin(); err != nil {
		return err
	}
	for i := range run.chunks {
		if err := run.chunk(i); err != nil {
			return err
		}
	}
	if err := run.byHost(); err != nil {
		return err
	}
	return run.check()
}

// deviceTensors opens what is asked for.
func (r *Reader) deviceTensors(items []DeviceItem, p *pool) (tensors []*deviceTensor, total int64, err error) {
	tensors = make([]*deviceTensor, len(items))
	for k, it := range items {
		q, err := r.request(it.Index, nil, it.Cap)
		if err != nil {
			return nil, 0, err
		}
		total += q.hi
		tensors[k] = &deviceTensor{dst: it.Dst}
	}
	err = p.run(len(items), func(k int, _ *codecs.Scratch) error {
		t := r.tensors[items[k].Index]
		if t.entry.bytes == 0 {
			return nil
		}
		m, err := r.master(t)
		if err != nil {
			return err
		}
		if m.file.original {
			return at(failf(NoDevice, "files of the original package are decoded by the CPU; decode on the CPU and copy"), t.file.name, t.entry.name)
		}
		if tensors[k].payload, err = r.openPayload(t, p); err != nil {
			return err
		}
		if word := uint64(tensors[k].WordBytes()); items[k].Dst%word != 0 {
			return at(failf(InvalidArgument, "device address %#x is no multiple of %d", items[k].Dst, word), t.file.name, t.entry.name)
		}
		return nil
	})
	tensors = slices.DeleteFunc(tensors, func(t *deviceTensor) bool { return t.payload == nil })
	return tensors, total, err
}

// deviceRun is one DecodeDevice.
type deviceRun struct {
	dev    Device
	pool   *pool
	chunks []*deviceChunk
	hosts  []*devicePiece // of blocks for the host

	slots  int // that are in use
	host   [chunkSlots][]byte
	device [chunkSlots]uint64
	busy   [chunkSlots]Event
	status uint64
}

// plan cuts a tensor into pieces and puts them into chunks.
func (d *deviceRun) plan(t *deviceTensor) {
	var m memory
	for first := 0; first < t.Blocks(); first += blocksOfPiece {
		q := &devicePiece{deviceTensor: t, first: first, last: min(first+blocksOfPiece, t.Blocks())}
		q.from, _ = t.BlockSpan(q.first)
		end, n := t.BlockSpan(q.last - 1)
		q.bytes = int(end + n - q.from)
		if t.NeedsBase() || !t.OnDevice() {
			d.hosts = append(d.hosts, q)
			continue
		}
		if first == 0 {
			var ok bool
			if m, ok = t.file.src.(memory); ok {
				all := m[t.entry.offset : t.entry.offset+t.entry.compressed]
				if !d.dev.PageLocked(all) {
					m = nil
				}
			}
		}
		if m != nil {
			q.source = m[t.entry.offset+q.from:][:q.bytes]
		}
		d.add(q)
	}
}

// add puts a piece into the last chunk, or into a new one.
func (d *deviceRun) add(q *devicePiece) {
	var c *deviceChunk
	if n := len(d.chunks); n > 0 {
		c = d.chunks[n-1]
	}
	inPlace := q.source != nil
	if c == nil || c.inPlace != inPlace || c.nextBytes+q.bytes+c.nextRoom+q.room() > chunkBytes && len(c.pieces) > 0 {
		c = &deviceChunk{inPlace: inPlace}
		d.chunks = append(d.chunks, c)
	} else if last := c.pieces[len(c.pieces)-1]; last.deviceTensor != q.deviceTensor {
		// Pieces of a tensor follow each other as they do in the file, so that one copy takes them all.
		c.nextBytes = (c.nextBytes + gpu.Slack + codecs.Align - 1) &^ (codecs.Align - 1)
	}
	q.at = c.nextBytes
	c.nextBytes += q.bytes
	c.nextRoom += q.room()
	c.pieces = append(c.pieces, q)
}

// close lays out the chunks.
func (d *deviceRun) close() {
	align := func(n int) int { return (n + codecs.Align - 1) &^ (codecs.Align - 1) }
	for _, c := range d.chunks {
		c.records = align(c.nextBytes + gpu.Slack)
		c.units = c.records + align(len(c.pieces)*gpu.RecordBytes)
		at := c.units
		for _, q := range c.pieces {
			c.perWord[wordClass(q)] += q.quads()
			at += q.quads() * gpu.UnitBytes
		}
		at = align(at)
		for _, q := range c.pieces {
			q.programAt = at
			at += q.ProgramBytes(q.first, q.last)
		}
		c.bytes = at
	}
}

// wordClass numbers the sizes of words: 1, 2, 4 bytes.
func wordClass(q *devicePiece) int { return q.WordBytes() / 2 }

var decodeKernels = [3]string{gpu.Decode8, gpu.Decode16, gpu.Decode32}

// begin takes the memory that the chunks go through.
func (d *deviceRun) begin() (err error) {
	host, device := 0, 0
	for _, c := range d.chunks {
		device = max(device, c.bytes)
		if c.inPlace {
			host = max(host, c.bytes-c.records)
		} else {
			host = max(host, c.bytes)
		}
		for _, q := range c.pieces {
			host = max(host, int(q.BlockBytes())) // should it turn out to be one for the host
		}
	}
	if len(d.hosts) > 0 {
		host = max(host, chunkBytes) // the largest piece is smaller
	}
	d.slots = min(chunkSlots, len(d.chunks)+len(d.hosts))
	for i := range d.slots {
		if d.host[i], err = d.dev.HostMemory(host); err != nil {
			return err
		}
		if i < len(d.chunks) {
			if d.device[i], err = d.dev.DeviceMemory(device); err != nil {
				return err
			}
		}
	}
	if n := statusWords * len(d.chunks); n > 0 {
		if d.status, err = d.dev.DeviceMemory(4 * n); err == nil {
			err = d.dev.Fill(d.status, gpu.Sound, n)
		}
	}
	return err
}

// wait waits until the device is done with a slot.
func (d *deviceRun) wait(slot int) error {
	e := d.busy[slot]
	d.busy[slot] = nil
	if e == nil {
		return nil
	}
	var err error
	d.pool.idle(func() { err = d.dev.Wait(e) })
	return err
}

// chunk reads chunk i, and lets the device copy, check and decode it.
func (d *deviceRun) chunk(i int) error {
	c, slot := d.chunks[i], i%d.slots
	if err := d.wait(slot); err != nil {
		return err
	}
	device, status := d.device[slot], d.status+uint64(4*statusWords*i)
	// What is copied from here: all of the chunk, or what follows the bytes.
	host, base := d.host[slot], 0
	if c.inPlace {
		base = c.records
	}
	var unitAt [3]int
	for k := 1; k < len(unitAt); k++ {
		unitAt[k] = unitAt[k-1] + c.perWord[k-1]
	}
	for k, q := range c.pieces {
		record := host[c.records-base+k*gpu.RecordBytes:]
		binary.LittleEndian.PutUint64(record, device+uint64(q.at))
		binary.LittleEndian.PutUint64(record[8:], q.dst+uint64(int64(q.first)*q.BlockBytes()))
		binary.LittleEndian.PutUint64(record[16:], device+uint64(q.programAt))
		binary.LittleEndian.PutUint64(record[24:], 0)
		class := wordClass(q)
		for quad := range q.quads() {
			unit := host[c.units-base+unitAt[class]*gpu.UnitBytes:]
			binary.LittleEndian.PutUint32(unit, uint32(k))
			binary.LittleEndian.PutUint32(unit[4:], uint32(quad))
			unitAt[class]++
		}
	}
	err := d.pool.run(len(c.pieces), func(k int, s *codecs.Scratch) error {
		q := c.pieces[k]
		src := q.source
		if src == nil {
			src = host[q.at:][:q.bytes]
			if err := q.readInto(src, q.from); err != nil {
				return err
			}
		}
		return q.describe(q.Program(host[q.programAt-base:], q.first, q.last, 0, 0), src, s)
	})
	if err != nil {
		return err
	}
	if err := d.send(c, host, base, device); err != nil {
		return err
	}
	if err := d.launch(c, device, status); err != nil {
		return err
	}
	for _, q := range c.pieces {
		if len(q.hosts) > 0 {
			d.hosts = append(d.hosts, q)
		}
		d.pool.done(q.decodedBytes() - q.hostBytes())
	}
	d.busy[slot], err = d.dev.Mark()
	return err
}

// send copies a chunk.
func (d *deviceRun) send(c *deviceChunk, host []byte, base int, device uint64) error {
	for k := 0; c.inPlace && k < len(c.pieces); { // runs of pieces of one tensor
		first, n := c.pieces[k], 0
		for ; k < len(c.pieces) && c.pieces[k].deviceTensor == first.deviceTensor; k++ {
			n += c.pieces[k].bytes
		}
		m := first.file.src.(memory)
		if err := d.dev.Copy(device+uint64(first.at), m[first.entry.offset+first.from:][:n]); err != nil {
			return err
		}
	}
	if err := d.dev.Copy(device+uint64(base), host[:c.bytes-base]); err != nil {
		return err
	}
	return d.dev.CopiesDone()
}

// launch starts the kernels for a chunk.
func (d *deviceRun) launch(c *deviceChunk, device, status uint64) error {
	records, units := device+uint64(c.records), device+uint64(c.units)
	all := c.perWord[0] + c.perWord[1] + c.perWord[2]
	if err := d.dev.Launch(gpu.Verify, all, records, units, uint32(0), status); err != nil {
		return err
	}
	for class, n := range c.perWord {
		status += 4
		if n == 0 {
			continue
		}
		if err := d.dev.Launch(decodeKernels[class], n, records, units, uint32(0), uint64(0), status); err != nil {
			return err
		}
		units += uint64(n * gpu.UnitBytes)
	}
	return nil
}

// readInto reads bytes of the payload.
func (p *payload) readInto(dst []byte, from int64) error {
	n, err := p.file.src.ReadAt(dst, p.entry.offset+from)
	if n == len(dst) {
		return nil
	}
	return at(shortRead(err), p.file.name, p.entry.name)
}

// describe completes the program of a piece whose bytes are src. What does not look right is decoded by the host, which
// knows best how to say what is wrong.
func (q *devicePiece) describe(g *codecs.Program, src []byte, s *codecs.Scratch) error {
	for b := q.first; b < q.last; b++ {
		_, n := q.BlockSpan(b)
		ok, err := g.Describe(b, src[:n:n])
		if err != nil {
			return q.explain(err, s)
		}
		if !ok {
			q.hosts = append(q.hosts, b)
		}
		src = src[n:]
	}
	return nil
}

// explain decodes a piece for the error that comes of it. Where none comes the device's own is a fault.
func (q *devicePiece) explain(err error, s *codecs.Scratch) error {
	dst := make([]byte, q.decodedBytes())
	lo := int64(q.first) * q.BlockBytes()
	if e := q.decode(q.first, q.last, lo, lo+int64(len(dst)), dst, s); e != nil {
		return e
	}
	return at(failf(Internal, "%s, while the same bytes decode well on the CPU: the device or the way to it is at fault", err),
		q.file.name, q.entry.name)
}

func (q *devicePiece) decodedBytes() int64 { return q.spanBytes(q.first, q.last) }

func (q *devicePiece) spanBytes(first, last int) int64 {
	return min(int64(last)*q.BlockBytes(), q.entry.bytes) - int64(first)*q.BlockBytes()
}

func (q *devicePiece) hostBytes() (n int64) {
	for _, b := range q.hosts {
		n += q.spanBytes(b, b+1)
	}
	return n
}

// hostRun is blocks that the host decodes, and where in a buffer.
type hostRun struct {
	*devicePiece
	first, last, at int
}

// byHost decodes what is left to the host, and copies it to its place.
func (d *deviceRun) byHost() error {
	var runs []hostRun
	used, turn := 0, 0
	flush := func() error {
		slot := turn % d.slots
		turn++
		if err := d.wait(slot); err != nil {
			return err
		}
		host := d.host[slot]
		err := d.pool.run(len(runs), func(k int, s *codecs.Scratch) error {
			q := runs[k]
			n := q.spanBytes(q.first, q.last)
			lo := int64(q.first) * q.BlockBytes()
			err := q.decode(q.first, q.last, lo, lo+n, host[q.at:][:n], s)
			d.pool.done(n)
			return err
		})
		for _, q := range runs {
			if err == nil {
				err = d.dev.Copy(q.dst+uint64(int64(q.first)*q.BlockBytes()), host[q.at:][:q.spanBytes(q.first, q.last)])
			}
		}
		if err == nil {
			err = d.dev.CopiesDone()
		}
		if err == nil {
			d.busy[slot], err = d.dev.Mark()
		}
		runs, used = runs[:0], 0
		return err
	}
	add := func(q *devicePiece, first, last int) error {
		n := int(q.spanBytes(first, last))
		if used+n > len(d.host[0]) {
			if err := flush(); err != nil {
				return err
			}
		}
		runs = append(runs, hostRun{q, first, last, used})
		used += (n + codecs.Align - 1) &^ (codecs.Align - 1)
		return nil
	}
	for _, q := range d.hosts {
		if q.hosts == nil { // all of it
			if err := add(q, q.first, q.last); err != nil {
				return err
			}
		}
		for _, b := range q.hosts {
			if err := add(q, b, b+1); err != nil {
				return err
			}
		}
	}
	if len(runs) > 0 {
		return flush()
	}
	return nil
}

var errDevice = errors.New("the device found damage")

// check looks at what the kernels reported.
func (d *deviceRun) check() error {
	n := statusWords * len(d.chunks)
	if n == 0 {
		return nil
	}
	words, err := d.dev.HostMemory(4 * n)
	if err == nil {
		err = d.dev.CopyBack(words, d.status)
	}
	if err == nil {
		err = d.dev.Sync()
	}
	if err != nil {
		return err
	}
	for i, c := range d.chunks {
		unitsOf := [statusWords]int{0, 0, c.perWord[0], c.perWord[0] + c.perWord[1]} // before those of the kernel
		for k := range statusWords {
			word := binary.LittleEndian.Uint32(words[4*(statusWords*i+k):])
			if word == gpu.Sound {
				continue
			}
			q := c.pieceOf(unitsOf[k] + int(word)/gpu.Streams)
			if q == nil {
				return failf(Internal, "the device reports damage in stream %d of a launch that has fewer", word)
			}
			if k == 0 {
				return q.explain(fmt.Errorf("%w: a checksum differs", errDevice), codecs.NewScratch())
			}
			return q.explain(fmt.Errorf("%w in stream %d", errDevice, word), codecs.NewScratch())
		}
	}
	return nil
}

// pieceOf is the piece that a unit of a chunk belongs to.
func (c *deviceChunk) pieceOf(unit int) *devicePiece {
	for class := range c.perWord {
		for _, q := range c.pieces {
			if wordClass(q) == class {
				if unit < q.quads() {
					return q
				}
				unit -= q.quads()
			}
		}
	}
	return nil
}
