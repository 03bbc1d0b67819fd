package core

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/klauspost/reedsolomon"
	"github.com/zeebo/xxh3"

	"bigsmall.dev/bigsmall/codecs"
)

// Parity is a section at the end of a file by which what was damaged before it, and in it, can be computed again. The
// protected bytes are cut into pieces, the pieces stand in columns, one behind the other, and every row of pieces gets
// further ones by a Reed-Solomon code: as many of a row may be lost as it got. FORMAT.md has the layout.

const (
	// MaxParity is the most percent of parity: one byte for each.
	MaxParity = 100

	sectionParity = "parity"
	parityMagic   = "BGSMPAR\n"
	parityHeadLen = 64
	parityPiece   = 4096 // bytes; what a disk or a page loses at once
	parityColumns = 200  // more would find no room for 2 % in a code of 256
	parityRows    = 8    // rows that are worked on at once: 6.5 MB
	mostParityRow = 256  // pieces of a row, of both kinds: elements of GF(2^8)
)

// parityShape says where everything is.
type parityShape struct {
	size      int64 // of the file
	protected int64 // bytes before the section
	data      int   // columns of protected pieces,
	parity    int   // of computed ones
}

// newParityShape gives the shape of so many percent: as few rows as there can be, and then as few columns.
func newParityShape(protected int64, percent int) parityShape {
	g := parityShape{protected: protected}
	most := int64(min(parityColumns, mostParityRow*100/(100+percent)))
	rows := (g.pieces() + most - 1) / most
	g.data = int((g.pieces() + rows - 1) / rows)
	g.parity = (g.data*percent + 99) / 100
	g.size = g.whole()
	return g
}

func (g parityShape) pieces() int64  { return (g.protected + parityPiece - 1) / parityPiece }
func (g parityShape) rows() int64    { return (g.pieces() + int64(g.data) - 1) / int64(g.data) }
func (g parityShape) entries() int64 { return g.pieces() + int64(g.parity)*g.rows() }
func (g parityShape) tableLen() int64 {
	return roundUp(4*g.entries(), codecs.Align)
}
func (g parityShape) firstParity() int64 { return g.protected + parityHeadLen + g.tableLen() }
func (g parityShape) lastTable() int64 {
	return g.firstParity() + int64(g.parity)*g.rows()*parityPiece
}
func (g parityShape) sectionLen() int64 {
	return g.lastTable() + g.tableLen() + parityHeadLen - g.protected
}

// whole is the size of the file.
func (g parityShape) whole() int64 { return g.protected + g.sectionLen() + trailerLen }

// place is where row r of column c is in the file, and its number in the table; the column that is not full has rows that
// are nowhere and count as zeros.
func (g parityShape) place(c int, r int64) (offset, entry int64, there bool) {
	if c < g.data {
		i := int64(c)*g.rows() + r
		return i * parityPiece, i, i < g.pieces()
	}
	i := int64(c-g.data)*g.rows() + r
	return g.firstParity() + i*parityPiece, g.pieces() + i, true
}

func (g parityShape) head() []byte {
	b := append(make([]byte, 0, parityHeadLen), parityMagic...)
	b = binary.LittleEndian.AppendUint64(b, uint64(g.size))
	b = binary.LittleEndian.AppendUint64(b, uint64(g.protected))
	b = binary.LittleEndian.AppendUint32(b, parityPiece)
	b = binary.LittleEndian.AppendUint16(b, uint16(g.data))
	b = binary.LittleEndian.AppendUint16(b, uint16(g.parity))
	b = append(b, make([]byte, 24)...)
	return binary.LittleEndian.AppendUint64(b, xxh3.Hash(b))
}

func parseParityHead(b []byte) (g parityShape, ok bool) {
	if len(b) != parityHeadLen || string(b[:8]) != parityMagic || xxh3.Hash(b[:56]) != binary.LittleEndian.Uint64(b[56:]) {
		return g, false
	}
	size, protected := binary.LittleEndian.Uint64(b[8:]), binary.LittleEndian.Uint64(b[16:])
	g = parityShape{int64(size), int64(protected), int(binary.LittleEndian.Uint16(b[28:])), int(binary.LittleEndian.Uint16(b[30:]))}
	if size > 1<<60 || protected > size || protected == 0 || protected%codecs.Align != 0 || g.data == 0 || g.parity == 0 ||
		g.parity > g.data || g.data+g.parity > mostParityRow || int64(g.data) > g.pieces() {
		return g, false
	}
	// Also that the other fields are what they are in every head.
	return g, g.size == g.whole() && bytes.Equal(g.head(), b)
}

// parityFile is a file and the code that protects it.
type parityFile struct {
	parityShape
	code reedsolomon.Encoder
	src  io.ReaderAt
	rows sync.Pool // *[][]byte
}

func newParityFile(g parityShape, src io.ReaderAt) (*parityFile, error) {
	// One goroutine: this package's pool is who starts them. No cache: it grows by 40 KB for every pattern of damage.
	code, err := reedsolomon.New(g.data, g.parity, reedsolomon.WithCauchyMatrix(), reedsolomon.WithMaxGoroutines(1), reedsolomon.WithInversionCache(false))
	if err != nil {
		return nil, failf(Internal, "no code of %d and %d: %s", g.data, g.parity, err)
	}
	f := &parityFile{parityShape: g, code: code, src: src}
	f.rows.New = func() any {
		columns := make([][]byte, g.data+g.parity)
		room := make([]byte, len(columns)*parityRows*parityPiece)
		for c := range columns {
			columns[c], room = room[:parityRows*parityPiece:parityRows*parityPiece], room[parityRows*parityPiece:]
		}
		return &columns
	}
	return f, nil
}

// each calls f for runs of rows from first on, with room for all columns of them.
func (f *parityFile) each(p *pool, do func(first int64, n int, columns [][]byte) error) error {
	rows := f.parityShape.rows()
	return p.run(int((rows+parityRows-1)/parityRows), func(i int, _ *codecs.Scratch) error {
		room := f.rows.Get().(*[][]byte)
		defer f.rows.Put(room)
		first := int64(i) * parityRows
		n := int(min(parityRows, rows-first))
		columns := make([][]byte, len(*room))
		for c, b := range *room {
			columns[c] = b[:n*parityPiece]
		}
		return do(first, n, columns)
	})
}

// read reads n rows of columns c0 to c1-1. What is behind the end of the file, or of the protected bytes, counts as zeros.
func (f *parityFile) read(first int64, columns [][]byte, c0, c1 int) error {
	for c := c0; c < c1; c++ {
		at, _, there := f.place(c, first)
		b := columns[c]
		n := 0
		if there {
			if c < f.data {
				b = b[:min(int64(len(b)), f.protected-at)]
			}
			var err error
			if n, err = f.src.ReadAt(b, at); err != nil && err != io.EOF {
				return err
			}
		}
		clear(columns[c][n:])
	}
	return nil
}

// pieceHash is an entry of the table.
func pieceHash(b []byte) uint32 { return uint32(xxh3.Hash(b)) }

// hashRows fills in the table's entries of n rows.
func (f *parityFile) hashRows(table []byte, first int64, n int, columns [][]byte) {
	for c := range columns {
		for r := range n {
			if _, entry, there := f.place(c, first+int64(r)); there {
				binary.LittleEndian.PutUint32(table[4*entry:], pieceHash(columns[c][r*parityPiece:][:parityPiece]))
			}
		}
	}
}

// writeParity writes the section behind the protected bytes and returns its checksum.
func writeParity(f *os.File, g parityShape, p *pool) (uint64, error) {
	pf, err := newParityFile(g, f)
	if err != nil {
		return 0, err
	}
	table := make([]byte, g.tableLen())
	err = pf.each(p, func(first int64, n int, columns [][]byte) error {
		if err := pf.read(first, columns, 0, g.data); err != nil {
			return err
		}
		if err := pf.code.Encode(columns); err != nil {
			return failf(Internal, "parity: %s", err)
		}
		pf.hashRows(table, first, n, columns)
		return pf.writeColumns(f, first, columns, g.data)
	})
	if err != nil {
		return 0, err
	}
	return g.finish(f, table, p)
}

// writeColumns writes rows of columns c0 on.
func (f *parityFile) writeColumns(dst io.WriterAt, first int64, columns [][]byte, c0 int) error {
	for c := c0; c < len(columns); c++ {
		at, _, there := f.place(c, first)
		if !there {
			continue
		}
		b := columns[c]
		if c < f.data {
			b = b[:min(int64(len(b)), f.protected-at)]
		}
		if _, err := dst.WriteAt(b, at); err != nil {
			return err
		}
	}
	return nil
}

// finish writes heads and tables, and returns the checksum of the section.
func (g parityShape) finish(f *os.File, table []byte, p *pool) (uint64, error) {
	head := g.head()
	for at, b := range map[int64][]byte{g.protected: head, g.protected + parityHeadLen: table, g.lastTable(): table, g.lastTable() + g.tableLen(): head} {
		if _, err := f.WriteAt(b, at); err != nil {
			return 0, err
		}
	}
	return g.checksum(f, p)
}

// checksum is that of the section, which the trailer has.
func (g parityShape) checksum(src io.ReaderAt, p *pool) (uint64, error) {
	h := xxh3.New()
	err := p.copy(h, io.NewSectionReader(src, g.protected, g.sectionLen()), g.sectionLen())
	return h.Sum64(), err
}

// checkParity compares the section, where the file has one, with the trailer's checksum of it.
func (c *container) checkParity(p *pool) error {
	if c.parity == nil {
		return nil
	}
	sum, err := c.parity.checksum(c.src, p)
	if err == nil && sum != c.parityHash {
		err = failf(Checksum, "checksum of the parity is %016x, not %016x: the tensors are not affected; repair it", sum, c.parityHash)
	}
	return at(err, c.name, "")
}

// Repaired is what Repair did.
type Repaired struct {
	Files    int   // looked at
	Repaired int   // of them, written anew
	Pieces   int64 // of 4096 bytes that were damaged
}

// Repair makes a damaged file whole by its parity. It is written anew beside its target, dst or, where that is "", path
// itself, and takes its name once every checksum in it is right. A file that is whole stays as it is. A directory is
// repaired in place, file by file.
func Repair(path, dst string, job *Job) (Repaired, error) {
	p := newPool(job)
	info, err := os.Stat(path)
	if err != nil {
		return Repaired{}, inFile(err, path)
	}
	if !info.IsDir() {
		p.total(info.Size())
		return repairFile(path, dst, p)
	}
	if dst != "" {
		return Repaired{}, failf(InvalidArgument, "%s is a directory, which is repaired in place: give no target", path)
	}
	t, err := readTree(path)
	if err != nil {
		return Repaired{}, inFile(err, path)
	}
	all := Repaired{}
	var failed error
	files, total := slices.DeleteFunc(t.files, func(f string) bool { return !strings.HasSuffix(f, ourExt) }), int64(0)
	for _, f := range files {
		if info, err := os.Stat(filepath.Join(path, f)); err == nil {
			total += info.Size()
		}
	}
	p.total(total)
	for _, f := range files {
		one, err := repairFile(filepath.Join(path, f), "", p)
		all.Files++
		all.Repaired += one.Repaired
		all.Pieces += one.Pieces
		if StatusOf(err) == Cancelled {
			return all, err
		}
		if err != nil && failed == nil { // the others can be repaired all the same
			failed = err
		}
	}
	if all.Files == 0 {
		return all, &Error{Status: IO, File: path, Msg: "holds no .bs file", Err: os.ErrNotExist}
	}
	return all, failed
}

func repairFile(path, dst string, p *pool) (Repaired, error) {
	none := Repaired{Files: 1}
	f, info, err := openRegular(path)
	if err != nil {
		return none, err
	}
	defer f.Close()
	g, found, err := findParity(f, info.Size(), p)
	if err != nil {
		return none, inFile(err, path)
	}
	if !found {
		return none, wholeWithoutParity(path, p)
	}
	pf, err := newParityFile(g, f)
	if err != nil {
		return none, inFile(err, path)
	}
	d, err := pf.examine(info.Size(), p)
	if err != nil {
		return none, inFile(err, path)
	}
	if d.whole {
		if dst != "" {
			return none, failf(InvalidArgument, "%s is whole: %s was not written", path, dst)
		}
		return none, nil
	}
	target := dst
	if target == "" {
		target = path
	}
	tmp, err := newTemporary(target, info.Mode(), false)
	if err != nil {
		return none, inFile(err, target)
	}
	if err := pf.restore(tmp.File, d, p); err != nil {
		tmp.abandon()
		return none, inFile(err, path)
	}
	f.Close() // Windows replaces no file that is open
	if err := tmp.publish(); err != nil {
		return none, inFile(err, target)
	}
	return Repaired{1, 1, d.pieces}, nil
}

// wholeWithoutParity is nil for a file that needs no parity.
func wholeWithoutParity(path string, p *pool) error {
	const hint = "it holds no parity to repair it by: fetch it again, or compress its source again"
	c, err := openWhole(path, p)
	if err == nil && c.original {
		var rep Report
		if rep, err = verifyFile(path, "", "", false, p); err == nil && len(rep.Bad) > 0 {
			err = &Error{Status: Checksum, File: path, Tensor: rep.Bad[0].Tensor, Msg: rep.Bad[0].Problem}
		}
	}
	if err == nil && c.parity != nil {
		return &Error{Status: Corrupt, File: path, Msg: "the heads of its parity are damaged, the rest is whole: compress its source again for another"}
	}
	if err == nil {
		return nil
	}
	if x, damage := damaged(err); damage {
		return &Error{Status: StatusOf(err), File: path, Tensor: x.Tensor, Msg: x.Problem + "; " + hint}
	}
	return err
}

// openWhole opens a file and checks all of it but the MD5s, which would need the base of a delta.
func openWhole(path string, p *pool) (*container, error) {
	f, info, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c, err := openContainer(path, f, info.Size())
	if err != nil {
		return nil, err
	}
	return c, c.checkPayloads(p)
}

// checkPayloads verifies the checksums of all heads and blocks.
func (c *container) checkPayloads(p *pool) error {
	return p.run(len(c.entries), func(i int, s *codecs.Scratch) error {
		e := &c.entries[i]
		if e.tiedTo != "" || e.bytes == 0 || c.original {
			return nil
		}
		bad, err := c.badBlocks(e, s)
		if err == nil && len(bad) > 0 {
			err = failf(Checksum, "checksums of %s differ", blockNumbers(bad))
		}
		return at(err, c.name, e.name)
	})
}

// badBlocks are the blocks of a payload whose checksums differ, or that cannot be read.
func (c *container) badBlocks(e *entry, s *codecs.Scratch) (bad []int, err error) {
	head, err := c.read(e.offset, e.head)
	if err != nil {
		return nil, err
	}
	q, err := codecs.ParseHead(head, e.checksum, e.dtype, e.bytes, e.compressed)
	if err != nil {
		return nil, err
	}
	p := &payload{Payload: q, tensor: tensor{c, e}}
	for b := range q.Blocks() {
		src, err := p.readBlocks(b, b+1, s)
		if err != nil || q.Verify(b, src) != nil {
			bad = append(bad, b)
		}
	}
	return bad, nil
}

// blockNumbers names blocks in a message: "blocks 1, 4-7".
func blockNumbers(blocks []int) string {
	var runs []string
	for i := 0; i < len(blocks); {
		k := i + 1
		for k < len(blocks) && blocks[k] == blocks[k-1]+1 {
			k++
		}
		if k == i+1 {
			runs = append(runs, fmt.Sprint(blocks[i]))
		} else {
			runs = append(runs, fmt.Sprintf("%d-%d", blocks[i], blocks[k-1]))
		}
		i = k
		if len(runs) == 20 && i < len(blocks) {
			runs = append(runs, fmt.Sprintf("... %d", blocks[len(blocks)-1]))
			break
		}
	}
	if len(blocks) == 1 {
		return "block " + runs[0]
	}
	return "blocks " + strings.Join(runs, ", ")
}

// findParity looks for one of the section's two heads: where the last one is in a file of the right length, else
// everywhere.
func findParity(f io.ReaderAt, size int64, p *pool) (g parityShape, found bool, err error) {
	fits := func(b []byte, at int64) bool {
		var ok bool
		g, ok = parseParityHead(b)
		// So much of a file may be lost that half is left; and of what is left a table takes little.
		return ok && (at == g.protected || at == g.size-trailerLen-parityHeadLen) && g.size/2 <= size
	}
	if at := size - trailerLen - parityHeadLen; at > 0 {
		b := make([]byte, parityHeadLen)
		if _, err := f.ReadAt(b, at); err != nil {
			return g, false, err
		}
		if fits(b, at) {
			return g, true, nil
		}
	}
	w := &headSearch{fits: fits}
	err = p.copy(w, f, size)
	if w.found {
		return g, true, nil
	}
	return g, false, err
}

// headSearch is written a file, in pieces of a multiple of 64 but for the last one.
type headSearch struct {
	at    int64
	fits  func(b []byte, at int64) bool
	found bool
}

// Write ends with io.EOF where it found one.
func (w *headSearch) Write(b []byte) (int, error) {
	for i := 0; i+parityHeadLen <= len(b); i += codecs.Align {
		if string(b[i:i+8]) == parityMagic && w.fits(b[i:i+parityHeadLen], w.at+int64(i)) {
			w.found = true
			return i, io.EOF
		}
	}
	w.at += int64(len(b))
	return len(b), nil
}

// damage is what examine found.
type damage struct {
	bad    []bool // by entry of the table
	pieces int64
	whole  bool
}

// examine compares all pieces with both tables: a piece that either knows is right. It fails where a row has lost more
// pieces than it can.
func (f *parityFile) examine(size int64, p *pool) (*damage, error) {
	g := f.parityShape
	tables := [2][]byte{make([]byte, g.tableLen()), make([]byte, g.tableLen())}
	heads := [2][]byte{make([]byte, parityHeadLen), make([]byte, parityHeadLen)}
	for b, at := range map[*[]byte]int64{&tables[0]: g.protected + parityHeadLen, &tables[1]: g.lastTable(), &heads[0]: g.protected, &heads[1]: g.lastTable() + g.tableLen()} {
		if _, err := f.src.ReadAt(*b, at); err != nil && err != io.EOF {
			return nil, err
		}
	}
	d := &damage{bad: make([]bool, g.entries())}
	var pieces, lost, looked atomic.Int64
	lost.Store(-1)
	err := f.each(p, func(first int64, n int, columns [][]byte) error {
		if err := f.read(first, columns, 0, len(columns)); err != nil {
			return err
		}
		for r := range n {
			bad := 0
			for c := range columns {
				_, entry, there := f.place(c, first+int64(r))
				if !there {
					continue
				}
				sum := pieceHash(columns[c][r*parityPiece:][:parityPiece])
				if sum != binary.LittleEndian.Uint32(tables[0][4*entry:]) && sum != binary.LittleEndian.Uint32(tables[1][4*entry:]) {
					d.bad[entry] = true
					bad++
				}
			}
			pieces.Add(int64(bad))
			if bad > g.parity {
				lost.Store(first + int64(r))
			}
		}
		part := int64(n) * int64(len(columns)) * parityPiece // more than there is where columns are not full
		p.done(max(0, min(part, size-(looked.Add(part)-part))))
		return nil
	})
	if err != nil {
		return nil, err
	}
	d.pieces = pieces.Load()
	if row := lost.Load(); row >= 0 {
		bad := 0
		for c := range g.data + g.parity {
			if _, entry, there := g.place(c, row); there && d.bad[entry] {
				bad++
			}
		}
		return nil, failf(Corrupt, "%d pieces of %d bytes are damaged, in one row %d of %d, of which %d can be computed: that is beyond repair; fetch the file again",
			d.pieces, parityPiece, bad, g.data+g.parity, g.parity)
	}
	d.whole = d.pieces == 0 && size == g.size && bytes.Equal(tables[0], tables[1]) && bytes.Equal(heads[0], heads[1])
	if d.whole {
		sum, err := g.checksum(f.src, p)
		if err != nil {
			return nil, err
		}
		want, err := g.trailer(f.src, sum)
		if err != nil {
			return nil, err
		}
		have := make([]byte, trailerLen)
		if _, err := f.src.ReadAt(have, g.size-trailerLen); err != nil && err != io.EOF {
			return nil, err
		}
		d.whole = bytes.Equal(want, have)
	}
	return d, nil
}

// trailer is the one that a file with these protected bytes has.
func (g parityShape) trailer(src io.ReaderAt, sum uint64) ([]byte, error) {
	var pre [preamble]byte
	if err := readAll(src, pre[:], 0); err != nil {
		return nil, err
	}
	n := preamble + int64(binary.LittleEndian.Uint32(pre[6:]))
	if n > min(g.protected, preamble+maxHeader) {
		return nil, failf(Corrupt, "header of %d bytes, of which %d are protected", n, g.protected)
	}
	text := make([]byte, n)
	if err := readAll(src, text, 0); err != nil {
		return nil, err
	}
	return trailer{uint64(n), uint64(g.size - n - trailerLen), xxh3.Hash(text), sum}.append(nil), nil
}

// restore writes the whole file to dst and checks every checksum in it.
func (f *parityFile) restore(dst *os.File, d *damage, p *pool) error {
	g := f.parityShape
	table := make([]byte, g.tableLen())
	err := f.each(p, func(first int64, n int, columns [][]byte) error {
		if err := f.read(first, columns, 0, len(columns)); err != nil {
			return err
		}
		for r := 0; r < n; {
			lost := f.lost(d, first+int64(r))
			k := r + 1
			for k < n && slices.Equal(f.lost(d, first+int64(k)), lost) { // solved together
				k++
			}
			if len(lost) > 0 {
				rows := make([][]byte, len(columns))
				for c := range columns {
					rows[c] = columns[c][r*parityPiece : k*parityPiece]
				}
				for _, c := range lost {
					rows[c] = rows[c][:0]
				}
				if err := f.code.Reconstruct(rows); err != nil {
					return failf(Internal, "parity: %s", err)
				}
			}
			r = k
		}
		f.hashRows(table, first, n, columns)
		return f.writeColumns(dst, first, columns, 0)
	})
	if err != nil {
		return err
	}
	sum, err := g.finish(dst, table, p)
	if err != nil {
		return err
	}
	end, err := g.trailer(dst, sum)
	if err != nil {
		return err
	}
	if _, err := dst.WriteAt(end, g.size-trailerLen); err != nil {
		return err
	}
	c, err := openContainer("", dst, g.size)
	if err == nil {
		err = c.checkPayloads(p)
	}
	if err != nil {
		return at(failf(Corrupt, "what the parity gives is no whole file, so nothing was changed: %s", asError(err).Msg), "", asError(err).Tensor)
	}
	return nil
}

// lost are the columns whose pieces of a row are damaged.
func (f *parityFile) lost(d *damage, row int64) (columns []int) {
	for c := range f.data + f.parity {
		if _, entry, there := f.place(c, row); there && d.bad[entry] {
			columns = append(columns, c)
		}
	}
	return columns
}
