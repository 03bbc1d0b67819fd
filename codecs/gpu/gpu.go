// Package gpu holds the kernels that decode payloads in the memory of a CUDA device, and the layout of what the host tells
// them.
//
// A *program* says of a payload, or of a run of whole groups of its blocks, how it is decoded: codecs.Program
// makes it from the heads of the payload and of the planes in its blocks, and validates everything in it. Kernels trust the
// program and nothing else. It is little-endian, a multiple of 16 bytes long and says no addresses, only offsets:
//
//	0   u64  words that it covers
//	8   u32  blocks
//	12  u8   fields (1 to 3), u8 bytes of a word (1, 2, 4), u8 shift, u8 1 if words are binary16 to be widened to binary32
//	16  u32  offset in the program of the planes, fields of block 0, fields of block 1, ...
//	20  u32  offset in the program of the blocks
//	24  u32  log2 of the segments of a block; 0 without restart points
//	28  u32  bytes of the program
//	32       three fields, 16 bytes each: u8 shift, u8 sym, u8 rest, u8 rotate, zeros
//	80       zeros to 96; then blocks, planes and tables
//
//	block, 24 bytes: u64 offset from the record's payload address, u64 XXH3-64, u32 length, u32 1 if the device verifies it
//	plane, 32 bytes: u32 offset in the block of the raw symbols or the states, u32 words of the stream,
//	                 u32 offset in the block of the rest, u32 that of the patch numbers listed,
//	                 u32 offset in the program of the table of its group (0 if there is none), u16 patches,
//	                 u16 symbol of a constant plane, u8 kind (0 raw, 1 constant, 2 coded, 3 decoded by the host), zeros
//	table: see rans.Table.AppendBuckets
//
// A *record* tells where a payload is: u64 device addresses of its bytes, of its destination (where word 0 of the program
// goes), of its program, and of its restart points or 0. Bytes at multiples of 8, and 8 more behind the last block may be
// read.
//
// *Restart points* let several warps decode one block: for every block 64 bytes that the lanes carry at its end, then, for
// segment 1 and on, 32 u32 states and u32 words taken so far.
//
// A *unit* is the work of a CTA of Threads threads, one stream (segment of a block) a warp: u32 index of the record, u32
// quad: its warps decode streams 4*quad to 4*quad+3, where stream i is segment i mod segments of block i / segments.
//
// All kernels but Gather take (u64 records, u64 units, u32 first, ...): CTA b serves unit b, or, where units is 0, quad
// first+b of record 0. `status` is the address of a u32, 0xffffffff before; it becomes the least 4*i + warp that is damaged,
// i being b where there are units, else the quad.
//
//	Decode8, Decode16, Decode32(records, units, first, u64 out, status)  words of 1, 2, 4 bytes; out replaces the record's if not 0
//	Restart(records, units, first, status)  fills in restart points; quads are of whole blocks
//	Verify(records, units, first, status)   checks blocks against their XXH3-64; quads are of whole blocks
//	Gather(u64 record, u64 ids, u32 n, u32 rowWords, u64 out, status)  n CTAs: row ids[i] (i64) goes to place i of out;
//	                                        words of 2 or 4 bytes; a row is at most 2 segments long; the status
//	                                        becomes the least i whose row is damaged or does not exist
//
// What bounds them, on an H100. A stream is 2,048 dependent turns of some 160 ns, so one block takes a third of a
// millisecond, and a device is busy only with thousands of streams: 0.77 TB/s of BF16 from 5,120 blocks, 0.93 from segments
// of a fourth of a block. Three things bought most of it: tables expanded to an entry a slot (three reads of shared memory a
// symbol, no comparison), words by a ring in shared memory instead of the first cache, and the rest of the next four turns
// loaded ahead, with 64 registers: at 40 more warps fit, but their spills cost more than they bring. Verifying takes a
// fifth of the time of decoding.
package gpu

import _ "embed"

// PTX is the text of the kernels, for any device from compute capability 7.5 on. Made from kernel.cu by generate.sh.
//
//go:embed kernel.ptx
var PTX string

// Names of the kernels.
const (
	Decode8  = "bs_decode8"
	Decode16 = "bs_decode16"
	Decode32 = "bs_decode32"
	Restart  = "bs_restart"
	Verify   = "bs_verify"
	Gather   = "bs_gather"
)

// Sizes and limits of what the host hands over, in bytes where nothing else is said.
const (
	Threads      = 128 // of a CTA
	Streams      = 4   // of a CTA
	HeadBytes    = 96
	FieldBytes   = 16
	BlockBytes   = 24
	PlaneBytes   = 32
	RecordBytes  = 32
	UnitBytes    = 8
	MaxFields    = 3
	Slack        = 8   // that may be read behind the last block
	ShortBlock   = 240 // blocks up to this long are verified by the host
	Sound        = 0xffffffff
	carryBytes   = 64
	restartBytes = 132
)

// Kinds of planes.
const (
	Raw = iota
	Constant
	Coded
	OfHost
)

// RestartBytes is the room for the restart points of blocks of 1<<segmentsLog segments.
func RestartBytes(blocks int, segmentsLog int) int {
	return blocks * (carryBytes + (1<<segmentsLog-1)*restartBytes)
}
