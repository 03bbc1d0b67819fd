package core

import (
	"context"
	"encoding/hex"
	"slices"
	"sync"

	"github.com/zeebo/xxh3"

	"bigsmall.dev/bigsmall/codecs"
)

// pipeline codes items and writes their payloads in the order of the items. Groups of blocks of many items are coded at
// once; whoever finishes the group that is next in the file writes it and what waits behind it, while the others go on.
type pipeline struct {
	w     *writer
	pool  *pool
	items []*item
	most  int // groups in memory

	mu      sync.Mutex
	changed sync.Cond
	next    int  // item to begin
	first   int  // item whose payload is written; those before it are in the file
	writing bool // someone writes
	used    int  // buffers of groups
	idle    [][]byte
	holding int64    // bytes of sources in memory
	held    [][]byte // buffers for more
	stopped bool
	failed  int
	err     error
}

// encodeAll makes the payloads of items and appends them to the file.
func (w *writer) encodeAll(items []*item, p *pool) error {
	l := &pipeline{w: w, pool: p, items: items, most: 2*p.width() + 2, failed: len(items)}
	l.changed.L = &l.mu
	if err := p.run(p.width(), l.work); err != nil {
		return err
	}
	return l.err
}

// work codes items until there are none left.
func (l *pipeline) work(int, *codecs.Scratch) error {
	i, through := 0, false
	defer func() {
		if !through { // a panic: the others must not wait for what was in hand
			l.fail(i, nil)
		}
	}()
	for {
		l.mu.Lock()
		i = l.next
		l.next++
		through = l.stopped || i >= len(l.items)
		l.mu.Unlock()
		if through {
			return nil
		}
		err := l.encode(i)
		if err == nil && l.pool.cancelled() {
			err = context.Canceled
		}
		if err != nil {
			l.fail(i, err)
		}
	}
}

// fail ends everything. Of several errors that of the first item is kept.
func (l *pipeline) fail(i int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopped = true
	if i < l.failed && err != nil {
		l.failed, l.err = i, at(err, "", l.items[i].spec.Name)
	}
	l.changed.Broadcast()
}

// encode makes the payload of item i.
func (l *pipeline) encode(i int) error {
	it := l.items[i]
	n := it.spec.End - it.spec.Begin
	if n == 0 || it.entry.Codec == codecTied {
		l.pool.done(n)
		l.mu.Lock()
		defer l.mu.Unlock()
		it.coded = true
		l.drain()
		return nil
	}
	held, err := l.hold(it)
	if err != nil {
		return err
	}
	defer l.release(it, held)
	// What is coded must be what was digested. Times do not tell: a mapping changes a file without them.
	if held != nil && it.data == nil && xxh3.Hash(held) != it.hash {
		return wasChanged("")
	}
	t := &codecs.Tensor{DType: it.spec.DType, Shape: it.entry.Shape, Bytes: n, Src: it.src, Held: held, Mode: l.w.opts.Mode, Run: l.pool.run}
	choose := codecs.NewEncoding
	if it.base != nil {
		t.Base = it.base
		choose = codecs.NewDelta
	}
	e, err := choose(t)
	if err != nil {
		return err
	}
	groups, lens := make([]codecs.Index, e.Groups()), make([]int, e.Groups())
	l.mu.Lock()
	it.groups, it.at = make([][]byte, len(groups)), int64(e.HeadLen())
	l.mu.Unlock()
	err = l.pool.run(len(groups), func(g int, s *codecs.Scratch) error {
		buf, ok := l.lend(i, g)
		if !ok {
			return nil
		}
		buf, index, err := e.AppendGroup(buf[:0], g, s)
		if err != nil {
			return err
		}
		groups[g], lens[g] = index, len(buf)
		l.pool.done(e.GroupBytes(g))
		l.mu.Lock()
		defer l.mu.Unlock()
		it.groups[g] = buf
		l.drain()
		return nil
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil || l.stopped {
		return err
	}
	if held == nil {
		l.mu.Unlock()
		same, err := it.unchanged(l.pool)
		l.mu.Lock()
		if err == nil && !same {
			err = wasChanged("")
		}
		if err != nil || l.stopped {
			return err
		}
	}
	last, size := len(groups)-1, int64(e.HeadLen())
	for _, n := range lens[:last] {
		size += int64(n)
	}
	it.groups[last] = e.Seal(it.groups[last], groups[last], size) // not in the file before coded is set
	size += int64(len(it.groups[last]))
	head, sum := e.Head(groups)
	it.head = head
	id, special := e.Codec()
	it.entry.Codec, it.entry.Compressed = id, uint64(size)
	it.entry.Extra = &headerExtra{Head: uint64(len(head)), Checksum: hash(sum)}
	if special != "" {
		it.entry.Special = &special
	}
	if id == codecs.CodecDelta {
		it.entry.Extra.BaseMD5 = hex.EncodeToString(it.base.md5[:])
	}
	it.coded = true
	l.drain()
	return nil
}

// unchanged reads an item that is not held once more.
func (it *item) unchanged(p *pool) (bool, error) {
	h := hashers.Get().(*xxh3.Hasher)
	defer hashers.Put(h)
	h.Reset()
	err := p.copy(h, it.src, it.spec.End-it.spec.Begin)
	return h.Sum64() == it.hash, err
}

// mostHeld is how much of the sources is held in memory at once.
const mostHeld = 96 << 20

// hold reads the item's bytes, where there is room for them: an encoder looks at them twice, and reading them from the page
// cache takes as long as counting them. It returns nil where there is none.
func (l *pipeline) hold(it *item) ([]byte, error) {
	if it.data != nil {
		return it.data, nil
	}
	n := it.spec.End - it.spec.Begin
	l.mu.Lock()
	if l.holding+n > mostHeld {
		l.mu.Unlock()
		return nil, nil
	}
	l.holding += n
	var buf []byte
	if k := len(l.held); k > 0 {
		buf, l.held = l.held[k-1], l.held[:k-1]
	}
	l.mu.Unlock()
	buf = slices.Grow(buf[:0], int(n))[:n]
	const piece = 1 << 20
	return buf, l.pool.run(int((n+piece-1)/piece), func(i int, _ *codecs.Scratch) error {
		at := int64(i) * piece
		return readAll(it.src, buf[at:min(at+piece, n)], at)
	})
}

// release gives back what hold gave.
func (l *pipeline) release(it *item, held []byte) {
	if held == nil || it.data != nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.holding -= int64(len(held))
	l.held = append(l.held, held)
}

// lend gives a buffer for group g of item i, once there is one: half of them are for the item that is written, and its
// next group always gets one, so that nothing waits for ever. It gives none where the work has ended.
func (l *pipeline) lend(i, g int) (buf []byte, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.stopped {
		most := l.most / 2
		if i == l.first {
			most = l.most
		}
		if l.used < most || i == l.first && g == l.items[i].written {
			if n := len(l.idle); n > 0 {
				buf, l.idle = l.idle[n-1], l.idle[:n-1]
			}
			l.used++
			return buf, true
		}
		l.pool.wait(&l.changed)
	}
	return nil, false
}

// drain writes what is next in the file, as far as it is there, unless someone is at it. It is called with mu held and
// lets go of it while it writes.
func (l *pipeline) drain() {
	if l.writing {
		return
	}
	l.writing = true
	defer func() { l.writing = false }()
	for !l.stopped && l.first < len(l.items) {
		it := l.items[l.first]
		var b []byte
		at := int64(0)
		switch {
		case it.coded && it.head != nil: // before the groups where those are still here: the file grows from front to back
			b, it.head = it.head, nil
		case it.written < len(it.groups) && it.groups[it.written] != nil && (it.coded || it.written < len(it.groups)-1):
			b, at = it.groups[it.written], it.at
		case it.coded && it.written == len(it.groups):
			l.w.add(it)
			l.first++
			l.changed.Broadcast()
			continue
		default:
			return
		}
		l.mu.Unlock()
		err := l.w.writePayload(at, b)
		l.mu.Lock()
		if err != nil {
			l.stopped = true
			if l.first < l.failed {
				l.failed, l.err = l.first, err
			}
			l.changed.Broadcast()
			return
		}
		if at > 0 {
			it.groups[it.written] = nil
			it.written++
			it.at += int64(len(b))
			l.idle = append(l.idle, b)
			l.used--
			l.changed.Broadcast()
		}
	}
}
