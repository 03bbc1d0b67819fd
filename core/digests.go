package core

import (
	"context"
	"slices"
	"sync"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/codecs/md5"
)

// message is a tensor whose MD5 is wanted: its bytes are made piece by piece, and digested in order.
type message interface {
	// size is how many bytes it has and how many a piece has, a multiple of md5.BlockSize.
	size() (all, piece int64)
	// make fills dst with the bytes from off on. Pieces are made in any order and many at once.
	make(dst []byte, off int64, s *codecs.Scratch) error
	// digest sees the pieces in order, one at a time.
	digest(b []byte)
	// end has the MD5, or what went wrong with a piece. What it returns ends everything.
	end(sum [16]byte, err error) error
}

// digestAll digests many messages over the pool. Many are under way at once, because their MD5 is cheap only side by side;
// one alone has its pieces made by all threads, ahead of the one that digests them.
//
// Each worker digests where enough messages have a piece for it, else makes the next piece while there is room, else
// digests what there is. Long messages come first, so that they end with the others.
func digestAll(messages []message, p *pool) error {
	d := &digests{pool: p, messages: messages, failed: len(messages)}
	d.changed.L = &d.mu
	d.order = make([]int, len(messages))
	sizes := make([]int64, len(messages))
	for i, m := range messages {
		d.order[i] = i
		sizes[i], _ = m.size()
	}
	slices.SortStableFunc(d.order, func(a, b int) int { return int(max(min(sizes[b]-sizes[a], 1), -1)) })
	if err := p.run(p.width(), d.work); err != nil {
		return err
	}
	return d.err
}

// What is under way at once: so many bytes of pieces, and so many messages.
const (
	threadRoom = 4 << 20
	leastRoom  = 16 << 20
	mostFlows  = 8 * md5.Lanes
)

func (d *digests) room() int64 { return max(leastRoom, threadRoom*int64(d.pool.width())) }

type digests struct {
	pool     *pool
	messages []message
	order    []int // of messages, longest first

	mu      sync.Mutex
	changed sync.Cond
	waiting int
	next    int     // of order, to begin
	making  []*flow // those with pieces still to make,
	turn    int     // of which this is next
	ready   []*flow // those with a piece to digest
	live    int     // begun and not ended
	used    int64   // bytes of pieces in flight
	slots   []*slot // free
	flows   []*flow
	stopped bool
	failed  int
	err     error
}

// flow is a message under way.
type flow struct {
	index       int
	m           message
	size, piece int64
	made        int64   // pieces up to here are made or being made
	digested    int64   // up to here
	inMaking    int     // pieces being made
	queue       []*slot // pieces in order
	busy        bool    // someone digests it
	listed      bool    // it stands in ready
	err         error
	digest      md5.Digest
}

// slot is a piece.
type slot struct {
	buf  []byte
	left []byte // not digested yet
	full bool
	seen bool // by message.digest
}

// fail ends everything. Of several errors that of the first message is kept.
func (d *digests) fail(index int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopped = true
	if index < d.failed && err != nil {
		d.failed, d.err = index, err
	}
	d.changed.Broadcast()
}

func (d *digests) work(_ int, s *codecs.Scratch) error {
	through := false
	defer func() {
		if !through { // a panic: the others must not wait for what was in hand
			d.fail(0, nil)
		}
	}()
	h := &hand{batch: md5.NewBatch()}
	d.mu.Lock()
	for !d.stopped {
		d.begin()
		switch want := min(md5.Lanes, d.live); {
		case d.pool.cancelled():
			d.stopped, d.failed, d.err = true, -1, context.Canceled
		case d.live == 0:
			d.stopped = true
		case len(d.ready) >= md5.Lanes:
			d.digest(h, md5.Lanes/2)
		case len(d.ready) >= want:
			d.digest(h, 1)
		case d.make(s):
		case len(d.ready) > 0:
			d.digest(h, 1)
		default:
			d.waiting++
			d.changed.Wait()
			d.waiting--
		}
	}
	d.changed.Broadcast()
	d.mu.Unlock()
	through = true
	return nil
}

// begin takes up more messages. Like all that follows it is called, and returns, with mu held.
func (d *digests) begin() {
	most := min(mostFlows, md5.Lanes*d.pool.width())
	for d.next < len(d.order) && len(d.making)+len(d.ready) < most {
		f := &flow{}
		if n := len(d.flows); n > 0 {
			f, d.flows = d.flows[n-1], d.flows[:n-1]
		}
		i := d.order[d.next]
		d.next++
		d.live++
		*f = flow{index: i, m: d.messages[i], queue: f.queue, digest: md5.New()}
		if f.size, f.piece = f.m.size(); f.size > 0 {
			d.making = append(d.making, f)
		}
		d.offer(f)
	}
}

// offer lists a flow that can be digested, or ended.
func (d *digests) offer(f *flow) {
	can := f.size == 0 || len(f.queue) > 0 && f.queue[0].full
	if f.err != nil {
		can = f.inMaking == 0
	}
	if can && !f.busy && !f.listed {
		f.listed = true
		d.ready = append(d.ready, f)
	}
	if d.waiting > 0 {
		d.changed.Broadcast()
	}
}

// make makes a piece of the message whose turn it is, and reports whether there was one, and room for it.
func (d *digests) make(s *codecs.Scratch) bool {
	if len(d.making) == 0 {
		return false
	}
	d.turn %= len(d.making)
	f := d.making[d.turn]
	n, off := min(f.piece, f.size-f.made), f.made
	if d.used > 0 && d.used+n > d.room() {
		return false
	}
	d.used += n
	f.inMaking++
	if f.made += n; f.made == f.size {
		d.made(f)
	} else {
		d.turn++
	}
	piece := &slot{}
	if k := len(d.slots); k > 0 {
		piece, d.slots = d.slots[k-1], d.slots[:k-1]
	}
	f.queue = append(f.queue, piece)
	d.mu.Unlock()
	piece.buf = slices.Grow(piece.buf[:0], int(n))[:n]
	piece.left = piece.buf
	err := f.m.make(piece.buf, off, s)
	d.mu.Lock()
	piece.full = true
	f.inMaking--
	if err != nil && f.err == nil {
		f.err = err
		d.made(f)
	}
	d.offer(f)
	return true
}

// made takes a flow off those with pieces to make.
func (d *digests) made(f *flow) {
	if i := slices.Index(d.making, f); i >= 0 {
		last := len(d.making) - 1
		d.making[i] = d.making[last]
		d.making = d.making[:last]
	}
}

// hand is what a worker has in hand while it digests.
type hand struct {
	batch  *md5.Batch
	flows  [2 * md5.Lanes]*flow
	pieces [2 * md5.Lanes]*slot // nil of a flow to end
	errs   [2 * md5.Lanes]error
	state  [2 * md5.Lanes]*md5.Digest
	left   [2 * md5.Lanes][]byte
}

// digest digests a piece each of the messages that have one, as long as at least least of them have something left.
func (d *digests) digest(h *hand, least int) {
	n, taken := 0, 0
	for _, f := range d.ready {
		if n == len(h.flows) {
			break
		}
		taken++
		f.listed = false
		if f.err != nil && f.inMaking > 0 {
			continue // it comes again
		}
		f.busy = true
		h.flows[n], h.errs[n], h.pieces[n] = f, f.err, nil
		if f.err == nil && f.size > 0 {
			h.pieces[n] = f.queue[0]
		}
		n++
	}
	d.ready = slices.Delete(d.ready, 0, taken)
	d.mu.Unlock()

	for i, f := range h.flows[:n] {
		h.state[i], h.left[i] = &f.digest, nil
		if piece := h.pieces[i]; piece != nil {
			if h.left[i] = piece.left; !piece.seen {
				piece.seen = true
				f.m.digest(piece.buf)
			}
		}
	}
	h.batch.Write(h.state[:n], h.left[:n], least)
	for i, f := range h.flows[:n] {
		if h.pieces[i] != nil && len(h.left[i]) < md5.BlockSize {
			f.digested += int64(len(h.pieces[i].buf))
		}
		if h.errs[i] == nil && f.digested < f.size {
			continue
		}
		var sum [16]byte
		if h.errs[i] == nil {
			sum = h.batch.Sum(&f.digest, h.left[i])
		}
		f.digested = f.size
		if err := f.m.end(sum, h.errs[i]); err != nil {
			d.fail(f.index, err)
		}
	}

	d.mu.Lock()
	for i, f := range h.flows[:n] {
		f.busy = false
		switch piece := h.pieces[i]; {
		case h.errs[i] != nil:
			for _, q := range f.queue {
				d.free(q)
			}
			f.queue = f.queue[:0]
		case piece != nil && len(h.left[i]) < md5.BlockSize:
			f.queue = slices.Delete(f.queue, 0, 1)
			d.free(piece)
		case piece != nil:
			piece.left = h.left[i]
		}
		h.flows[i] = nil
		if f.digested == f.size {
			f.m = nil
			d.flows = append(d.flows, f)
			d.live--
		} else {
			d.offer(f)
		}
	}
	if d.waiting > 0 {
		d.changed.Broadcast()
	}
}

func (d *digests) free(piece *slot) {
	d.used -= int64(len(piece.buf))
	piece.full, piece.seen, piece.left = false, false, nil
	d.slots = append(d.slots, piece)
}
