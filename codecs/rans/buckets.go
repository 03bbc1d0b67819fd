package rans

import "encoding/binary"

// AppendBuckets appends the table as its alias form, for decoders that expand it themselves: u32 number of buckets, u32 0;
// for each bucket u32 frequency | value << 16 of the symbol of its number (0 without one); then for each bucket u32
// offset | alias << 16 | threshold << 24, as in Layout.
func (t *Table) AppendBuckets(dst []byte) []byte {
	l := t.alias()
	n := 1 << l.Bits
	dst = binary.LittleEndian.AppendUint64(dst, uint64(n))
	for k := range n {
		v := uint32(0)
		if k < len(t.Freq) {
			v = uint32(t.Freq[k]) | uint32(t.Value[k])<<16
		}
		dst = binary.LittleEndian.AppendUint32(dst, v)
	}
	for k := range n {
		dst = binary.LittleEndian.AppendUint32(dst, uint32(l.Offset[k])|uint32(l.Alias[k])<<16|uint32(l.Threshold[k])<<24)
	}
	return dst
}

// BucketBytes is the length of what AppendBuckets appends.
func (t *Table) BucketBytes() int {
	if len(t.Freq) > AliasSymbols {
		return 8 + 8<<wideBucketBits
	}
	return 8 + 8<<bucketBits
}
