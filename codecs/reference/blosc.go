package reference

import (
	"encoding/binary"
	"fmt"
)

// unblosc decodes one Blosc2 chunk (C-Blosc2's chunk format, version 5) of the kinds that the original package makes: zstd or
// stored, byte shuffle or no filter, or a constant.
func unblosc(dst, chunk []byte) error {
	const head = 32
	bad := func(format string, args ...any) error {
		return fmt.Errorf("Blosc2 chunk: "+format, args...)
	}
	if len(chunk) < head {
		return bad("%d bytes", len(chunk))
	}
	i32 := func(at int) int { return int(int32(binary.LittleEndian.Uint32(chunk[at:]))) }
	flags, width, special := chunk[2], int(chunk[3]), chunk[31]>>4&7
	size, blockSize := i32(4), i32(8)
	if flags&5 != 5 || i32(12) != len(chunk) || size != len(dst) || width == 0 {
		return bad("flags %#x, %d of %d bytes for %d", flags, i32(12), len(chunk), len(dst))
	}
	switch special {
	case 0:
	case 1:
		clear(dst)
		return nil
	case 3:
		if len(chunk) < head+width || size%width != 0 {
			return bad("a value of %d bytes for %d", width, size)
		}
		for i := 0; i < size; i += width {
			copy(dst[i:i+width], chunk[head:])
		}
		return nil
	default:
		return bad("special kind %d", special)
	}
	if flags&2 != 0 { // stored
		if len(chunk)-head != size {
			return bad("%d stored bytes for %d", len(chunk)-head, size)
		}
		copy(dst, chunk[head:])
		return nil
	}
	shuffle := 0
	for i, f := range chunk[16:22] {
		switch {
		case f == 1 && shuffle == 0:
			if shuffle = int(chunk[24+i]); shuffle == 0 {
				shuffle = width
			}
		case f != 0:
			return bad("filter %d", f)
		}
	}
	if flags>>5 != 4 || chunk[31]&1 != 0 || blockSize <= 0 {
		return bad("flags %#x, blocks of %d", flags, blockSize)
	}
	blocks := (size + blockSize - 1) / blockSize
	if blocks > (len(chunk)-head)/4 {
		return bad("%d blocks in %d bytes", blocks, len(chunk))
	}
	room := make([]byte, min(blockSize, size))
	for i := range blocks {
		out := dst[i*blockSize : min((i+1)*blockSize, size)]
		c := &cursor{b: chunk, at: i32(head + 4*i)}
		if c.at < head+4*blocks || c.at > len(chunk) {
			return bad("block %d at %d of %d", i, c.at, len(chunk))
		}
		streams := width
		if flags&0x10 != 0 || len(out) < blockSize {
			streams = 1
		}
		if len(out)%streams != 0 {
			return bad("a block of %d bytes in %d streams", len(out), streams)
		}
		block := room[:len(out)]
		if err := unbloscStreams(block, streams, c); err != nil {
			return bad("block %d: %s", i, err)
		}
		if shuffle <= 1 {
			copy(out, block)
			continue
		}
		n := len(out) / shuffle
		for j := range shuffle {
			for k := range n {
				out[k*shuffle+j] = block[j*n+k]
			}
		}
		copy(out[n*shuffle:], block[n*shuffle:])
	}
	return nil
}

func unbloscStreams(block []byte, streams int, c *cursor) error {
	n := len(block) / streams
	for s := range streams {
		out := block[s*n : (s+1)*n]
		size := int(int32(c.num(4)))
		switch {
		case c.failed:
			return errShort
		case size == 0:
			clear(out)
		case size < 0:
			if token := c.num(1); c.failed || token&1 == 0 || size < -255 {
				return fmt.Errorf("a run of %d", size)
			}
			for i := range out {
				out[i] = byte(-size)
			}
		default:
			data := c.take(size)
			if data == nil {
				return errShort
			}
			if size == n {
				copy(out, data)
			} else if err := unzstd(out, data); err != nil {
				return err
			}
		}
	}
	return nil
}
