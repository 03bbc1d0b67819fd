// Package core compresses neural-network weights without loss: `.safetensors` files, or model directories, become `.bs` files
// about a third smaller, and come back byte for byte.
//
// [Compress] and [Decompress] work on files and directories, [CompressDelta] stores a fine-tune as its difference to a base
// model, [Verify] checks everything and [Repair] mends what is damaged. A [Reader], from [Open] or [OpenMemory], decodes
// single tensors, ranges of them or many at once into memory of the caller's, and is safe for many goroutines; a [Writer], from
// [Create], makes a file of tensors in memory. A [Job] says how many threads a call takes, and can cancel it; nil means all
// defaults. Every error is an [*Error], which names the file, the tensor and the numbers; [StatusOf] tells its kind, and
// errors.Is finds the operating system's error inside it.
//
//	if _, err := core.Compress("model.safetensors", "model.bs", core.Options{}, nil); err != nil {
//		return err
//	}
//
// # Inside
//
// One way through the house. Compressing: a safetensors header is read (safetensors.go), a writer reserves room for ours
// (writer.go), codecs looks at each tensor and chooses a format, its groups of blocks are coded in parallel (pool.go) and
// appended in order, and the file gets its header, trailer and name at the end. Decompressing: the container is checked
// before anything is allocated (container.go), a payload's head is parsed, its blocks are read, verified and decoded in
// parallel straight into the caller's memory (reader.go) or a file (decompress.go).
//
// A GPU gets compressed bytes (device.go): chunks of blocks go through a ring of page-locked buffers, or straight from memory
// that is page-locked already, with a program that says how to decode them (codecs/program.go, codecs/gpu); kernels verify
// the bytes and decode them into place while the next chunk is read. What they do not take, and what they report, the host
// decodes. capi has the driver's functions.
//
//	capi (C functions) -> core (files) -> codecs (tensors) -> codecs/rans, codecs/planes -> codecs/cpu
//	                                   -> codecs/md5 ----------------------------------->
//	                                   -> codecs/reference
//
// Imports go this one way only. Where an algorithm is worth assembly, plain Go states it, is the fallback and does the
// tails; files *_amd64.s hold the same by AVX2 and AVX-512, written by the generators in codecs/_asm, and codecs/cpu says
// which of them run. Other processors run plain Go; theirs would stand beside, in *_arm64.s.
//
// FORMAT.md specifies the container, codecs/SPEC.md the payloads.
//
//	version.go      the version number, the format's draft
//	errors.go       statuses; every error names file, tensor and numbers
//	pool.go         threads, cancelling, progress
//	safetensors.go  the source's header, kept to the byte
//	json.go         JSON that comes from anywhere
//	container.go    the bytes of a .bs file
//	writer.go       writing in one pass; Writer for tensors in memory
//	pipeline.go     many tensors coded at once, written in order
//	digests.go      many tensors digested at once: MD5 is cheap only side by side
//	reader.go       Reader: decoding tensors, ranges, many at once
//	device.go       the same into the memory of a GPU
//	weight.go       tensors that stay compressed there
//	base.go         the base model of a delta
//	compress.go     files and directories in, decompress.go out again
//	shard.go        bigsmall.index.json
//	verify.go       checking everything; the headers as JSON
//	parity.go       repairing what is damaged
//	reference.go    files of the original package (codecs/reference); compat.go writes them, and converts
//	temporary.go    what is being written, and what killed processes left
package core
