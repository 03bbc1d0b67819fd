// Package rans is the entropy coder: 32-lane interleaved rANS with 12-bit frequencies, 32-bit states and 16-bit words.
//
// A block of n symbols becomes 32 states and one stream of words. Symbol i belongs to lane i mod 32. A state x lives in
// [2^16, 2^32); its low 12 bits are a slot. The slot names a symbol, its frequency f and the slot's rank among the
// symbol's slots, and the next state is f*(x>>12) + rank; a state that fell below 2^16 takes in the next word. Encoding
// is the same run backwards, so a decoder reads the words in the order in which it needs them.
//
// Which slot belongs to which symbol is what a Layout decides, by the alias method: its tables, of 64 or 256 buckets, fit
// into vector registers. They expand to a 4096-entry table, which is what the plain code here decodes with.
//
// Sources: J. Duda, Asymmetric numeral systems (arXiv 1311.2540); F. Giesen, Interleaved entropy coders (arXiv
// 1402.3392) and his alias rANS; M. D. Vose, A linear algorithm for generating random numbers with a given distribution
// (1991).
package rans

const (
	// Lanes is the number of interleaved states of a block.
	Lanes = 32
	// ScaleBits is log2 of the sum of all frequencies of a table.
	ScaleBits = 12
	// Slots is that sum.
	Slots = 1 << ScaleBits
	// MaxSymbols is the largest alphabet of a table.
	MaxSymbols = 256
	// AliasSymbols is the largest alphabet whose slots are laid out in 64 buckets; others have 256.
	AliasSymbols = 64
	// StateBytes is what the states of a block take: 32 low halves, then 32 high halves.
	StateBytes = 4 * Lanes

	lower      = 1 << 16 // states are at least this
	bucketBits = 6
	buckets    = 1 << bucketBits
	perBucket  = Slots / buckets

	wideBucketBits = 8
	wideBuckets    = 1 << wideBucketBits
)
