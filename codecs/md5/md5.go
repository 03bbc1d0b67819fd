// Package md5 digests many messages side by side: one alone has to wait for itself, step by step. What is left of it
// here is the order of the lanes; single messages, tails and machines without a kernel go to crypto/md5.
package md5

import (
	"crypto/md5"
	"encoding"
	"encoding/binary"
	"hash"
)

const (
	// BlockSize is that of MD5.
	BlockSize = md5.BlockSize
	// Lanes is how many messages a kernel digests at once.
	Lanes = 16
)

// Digest is a message on its way: the state after all blocks so far.
type Digest struct {
	state [4]uint32
	n     uint64 // bytes so far, a multiple of BlockSize
}

// New is the digest of nothing yet.
func New() Digest { return Digest{state: [4]uint32{0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476}} }

// Batch is what digesting takes beside the digests. One goroutine may use it at a time.
type Batch struct {
	args  args
	owner [Lanes]int // which of the messages has the lane
	plain hash.Hash
	saved []byte // state of plain, as crypto/md5 marshals it
	sum   [md5.Size]byte
}

// args is all that a kernel sees. Every lane has blocks blocks to read.
type args struct {
	state  [4][Lanes]uint32
	_      [BlockSize / 4][Lanes]uint32 // room for a block of every lane, where registers are too few for it
	src    [Lanes]*byte
	blocks uint64
}

// What crypto/md5 marshals: a magic of four bytes, the state in big-endian, the bytes of a block not yet full, their
// number and that of all bytes.
const (
	savedState = 4
	savedCount = savedState + md5.Size + BlockSize
	savedLen   = savedCount + 8
)

// NewBatch makes a Batch.
func NewBatch() *Batch {
	b := &Batch{plain: md5.New()}
	b.saved = b.marshal()
	if len(b.saved) != savedLen {
		panic("md5: crypto/md5 saves its state in another form")
	}
	return b
}

func (b *Batch) marshal() []byte {
	s, err := b.plain.(encoding.BinaryAppender).AppendBinary(b.saved[:0])
	if err != nil {
		panic(err) // it has none to give
	}
	return s
}

// Write digests the whole blocks of p[i] into d[i] and takes them from p[i]. Where fewer than least messages are left, it
// leaves them as they are, for another time with more beside them.
func (b *Batch) Write(d []*Digest, p [][]byte, least int) {
	next, active := 0, 0
	for i := range b.owner {
		b.owner[i] = -1
	}
	kernel := kernels()
	least = max(least, 1)
	for {
		blocks := uint64(1) << 62
		for lane, i := range b.owner {
			if i < 0 {
				for next < len(p) && len(p[next]) < BlockSize {
					next++
				}
				if next == len(p) {
					continue
				}
				i = next
				b.owner[lane] = i
				next++
				active++
				for k, v := range d[i].state {
					b.args.state[k][lane] = v
				}
			}
			b.args.src[lane] = &p[i][0]
			blocks = min(blocks, uint64(len(p[i])/BlockSize))
		}
		if kernel == nil || active < max(least, fewest) {
			break
		}
		b.args.blocks = blocks
		any := 0
		for b.owner[any] < 0 {
			any++
		}
		for lane, i := range b.owner {
			if i < 0 { // nobody looks at what comes of it
				b.args.src[lane] = b.args.src[any]
			}
		}
		kernel(&b.args)
		for lane, i := range b.owner {
			if i < 0 {
				continue
			}
			d[i].n += blocks * BlockSize
			if p[i] = p[i][blocks*BlockSize:]; len(p[i]) < BlockSize {
				b.leave(lane, d[i])
				active--
			}
		}
	}
	for lane, i := range b.owner {
		if i >= 0 {
			b.leave(lane, d[i])
		}
	}
	clear(b.args.src[:])
	if active >= least {
		for i := range p {
			b.alone(d[i], &p[i])
		}
	}
}

// leave takes the state of a lane to its message.
func (b *Batch) leave(lane int, d *Digest) {
	for k := range d.state {
		d.state[k] = b.args.state[k][lane]
	}
	b.owner[lane] = -1
}

// alone is Write for one message.
func (b *Batch) alone(d *Digest, p *[]byte) {
	whole := len(*p) &^ (BlockSize - 1)
	if whole == 0 {
		return
	}
	b.resume(d)
	b.plain.Write((*p)[:whole])
	*p = (*p)[whole:]
	b.saved = b.marshal()
	for k := range d.state {
		d.state[k] = binary.BigEndian.Uint32(b.saved[savedState+4*k:])
	}
	d.n += uint64(whole)
}

// resume sets plain to the state of d.
func (b *Batch) resume(d *Digest) {
	for k, v := range d.state {
		binary.BigEndian.PutUint32(b.saved[savedState+4*k:], v)
	}
	binary.BigEndian.PutUint64(b.saved[savedCount:], d.n)
	if err := b.plain.(encoding.BinaryUnmarshaler).UnmarshalBinary(b.saved); err != nil {
		panic(err) // NewBatch made sure of the form
	}
}

// Sum is the MD5 of all that was written to d and of tail, with which the message ends.
func (b *Batch) Sum(d *Digest, tail []byte) [md5.Size]byte {
	b.resume(d)
	b.plain.Write(tail)
	b.plain.Sum(b.sum[:0])
	return b.sum
}
