package codecs

import (
	"encoding/binary"
	"slices"
	"sync"
	"sync/atomic"

	"bigsmall.dev/bigsmall/codecs/planes"
	"bigsmall.dev/bigsmall/codecs/rans"
)

// scales choose the tables of a tensor whose scale differs by row and by column: the class of a word is the sum, modulo
// 256, of a number of its row and one of its column. What the numbers mean is the encoder's matter.
type scales struct {
	row, col []uint8
	coded    []byte // an encoder's: what append appends
	stored   int    // a reader's: bytes that they take in the head
}

const (
	mostScale    = 16 // bounds how far scales may be compressed, so that a short head cannot ask for much memory
	wordsOfScale = 16 // a number has at least so many words
)

// append appends the numbers of the rows and then of the columns, as they are or as one zstd frame, behind its length.
func (x *scales) append(dst []byte) []byte {
	if x.coded == nil {
		x.encode()
	}
	return append(binary.LittleEndian.AppendUint32(dst, uint32(len(x.coded))), x.coded...)
}

func (x *scales) encode() {
	all := slices.Concat(x.row, x.col)
	if len(all) <= mostZstd {
		if frame := zstdEncode(nil, all, numbersLevel); len(frame) < len(all) && len(all) <= mostScale*len(frame) {
			all = frame
		}
	}
	x.coded = all
}

// parseScales reads what append wrote, of so many words in rows of cols words, and returns the rest of src.
func parseScales(src []byte, words uint64, cols uint32) (*scales, []byte, error) {
	rows := (words + uint64(cols) - 1) / uint64(cols)
	n := rows + uint64(cols)
	if len(src) < 4 || uint64(binary.LittleEndian.Uint32(src)) > uint64(len(src)-4) {
		return nil, nil, corrupt("scales of %d rows and %d columns end too early", rows, cols)
	}
	data := src[4 : 4+binary.LittleEndian.Uint32(src)]
	src, stored := src[4+len(data):], 4+len(data)
	if n > words/wordsOfScale || n > mostScale*uint64(len(data)) || uint64(len(data)) > n {
		return nil, nil, corrupt("scales of %d rows and %d columns in %d bytes", rows, cols, len(data))
	}
	if uint64(len(data)) < n {
		if n > mostZstd {
			return nil, nil, corrupt("scales of %d rows and %d columns in a frame", rows, cols)
		}
		all := make([]byte, n)
		if err := NewScratch().zstdDecode(all, data); err != nil {
			return nil, nil, err
		}
		data = all
	}
	return &scales{row: data[:rows], col: data[rows:], stored: stored}, src, nil
}

// classes are the tables of n words from word first on.
func (f *Format) scaleClasses(first uint64, n int, s *Scratch) []uint8 {
	out, table := room(&s.classes, n), f.sym[0].classes
	row, col := int(first/uint64(f.param)), int(first%uint64(f.param))
	for done := 0; done < n; {
		cols := f.scales.col[col:]
		cols = cols[:min(len(cols), n-done)]
		r := f.scales.row[row]
		dst := out[done:][:len(cols)]
		for i, c := range cols {
			dst[i] = table[r+c]
		}
		done += len(cols)
		row, col = row+1, 0
	}
	return out
}

// What an encoder makes of scales. A class is the sum of a level of the row and one of the column, and, in its upper bits,
// how often numbers of the column are negative.
const (
	leastScaled  = 1 << 13 // words; the numbers and tables of fewer do not pay
	mostColumns  = 1 << 20
	scaleLog     = 4   // fraction bits of a logarithm
	outlying     = 256 // one number in so many may be larger than all that count as what they are
	scaleOctaves = 16  // and what is further below those counts as this far
	levelsOfSign = 16  // levels of a row or column beside a sign
	levelsAlone  = 128 // and without one
	signShift    = 5   // of the sign's class, which is above any sum of levels
)

// A scaling is one way to make classes.
type scaling struct {
	step   int64 // of a level, in 1/256 octave
	signed bool
}

// rowLengths are the lengths of the rows that a tensor of two or more dimensions may be cut into.
func (e *Encoding) rowLengths() (lengths []uint64) {
	shape, total := e.tensor.Shape, uint64(1)
	for _, d := range shape {
		total *= d
	}
	if total != e.words || total < leastScaled {
		return nil
	}
	cols := uint64(1)
	for k := len(shape) - 1; k > 0; k-- {
		cols *= shape[k]
		rows := total / cols
		if rows >= 4 && cols >= 4 && cols <= mostColumns && rows+cols <= total/wordsOfScale && !slices.Contains(lengths, cols) {
			lengths = append(lengths, cols)
		}
	}
	return lengths
}

// scaleSums are what the rows and columns of a tensor hold.
type scaleSums struct {
	row, col, negative []uint64 // sums of logarithms; of each column, how many numbers are negative
	total              uint64
}

// sumScales sums the logarithms of the numbers, none of them less than least or more than most.
func (e *Encoding) sumScales(exp uint, cols, least, most uint64) (*scaleSums, error) {
	rows := (e.words + cols - 1) / cols
	x := &scaleSums{row: make([]uint64, rows), col: make([]uint64, cols), negative: make([]uint64, cols)}
	sign := e.width() - 1
	var mu sync.Mutex
	err := e.tensor.Run(e.groups(), func(g int, s *Scratch) error {
		col, negative, total := room(&s.encode.sums[0], int(cols)), room(&s.encode.sums[1], int(cols)), uint64(0)
		clear(col)
		clear(negative)
		for b := g * GroupBlocks; b < min((g+1)*GroupBlocks, e.blocks()); b++ {
			words, err := e.load(b, s)
			if err != nil {
				return err
			}
			at := uint64(b) * BlockWords
			row, c := at/cols, at%cols
			for len(words) > 0 {
				n := min(cols-c, uint64(len(words)))
				sum := uint64(0)
				col, negative := col[c:c+n], negative[c:c+n]
				for i, w := range words[:n] {
					l := min(max(logOf(w, sign, exp), least), most)
					sum += l
					col[i] += l
					negative[i] += w >> (sign & 63)
				}
				atomic.AddUint64(&x.row[row], sum)
				total += sum
				words, row, c = words[n:], row+1, 0
			}
		}
		mu.Lock()
		defer mu.Unlock()
		x.total += total
		for i := range col {
			x.col[i] += col[i]
			x.negative[i] += negative[i]
		}
		return nil
	})
	return x, err
}

// logOf is the logarithm to the base of two of a float without its sign, in 1<<scaleLog to the octave, from any zero on: its
// bits, near enough.
func logOf(word uint64, sign, exp uint) uint64 {
	m := word & (1<<(sign&63) - 1)
	mantissa := sign - exp
	if mantissa < scaleLog {
		return m << ((scaleLog - mantissa) & 63)
	}
	return m >> ((mantissa - scaleLog) & 63)
}

// scalings are the ways worth trying: classes by sign only where signs differ more by column than chance makes them, in
// coarser levels where many rows or columns are outside of the finer ones.
func (x *scaleSums) scalings(words uint64) []scaling {
	all := []scaling{{64, false}}
	rows, chance := uint64(len(x.row)), uint64(0)
	for _, n := range x.negative {
		d := max(2*n, rows) - min(2*n, rows)
		chance += d * d * 16 / rows // 16 on average
	}
	if chance < 20*uint64(len(x.col)) {
		return all
	}
	fine := scaling{64, true}
	outside := 0
	level := x.leveller(words, fine)
	look := func(l int64) {
		if l < 0 || l >= levelsOfSign {
			outside++
		}
	}
	for i := range x.row {
		look(level(x.ofRow(words, i)))
	}
	for i := range x.col {
		look(level(x.ofColumn(words, i)))
	}
	if outside*64 > len(x.row)+len(x.col) {
		return append(all, scaling{128, true})
	}
	return append(all, fine)
}

// leveller turns a sum of n logarithms into a level, which may be out of range.
func (x *scaleSums) leveller(words uint64, by scaling) func(sum, n uint64) int64 {
	mean := func(sum, n uint64) int64 { return int64(sum * (256 >> scaleLog) / n) }
	zero := mean(x.total, words) - by.levels()/2*by.step - by.step/2
	return func(sum, n uint64) int64 {
		d := mean(sum, n) - zero
		if d < 0 {
			return -1
		}
		return d / by.step
	}
}

func (x *scaleSums) ofRow(words uint64, i int) (sum, n uint64) {
	cols := uint64(len(x.col))
	return x.row[i], min(cols, words-uint64(i)*cols)
}

func (x *scaleSums) ofColumn(words uint64, i int) (sum, n uint64) {
	cols := uint64(len(x.col))
	if n = words / cols; uint64(i) < words%cols {
		n++
	}
	return x.col[i], n
}

// levels is how many levels a row or column may have.
func (by scaling) levels() int64 {
	if by.signed {
		return levelsOfSign
	}
	return levelsAlone
}

// scales are the numbers of the rows and columns.
func (x *scaleSums) scales(words uint64, by scaling) *scales {
	out := &scales{row: make([]uint8, len(x.row)), col: make([]uint8, len(x.col))}
	level := x.leveller(words, by)
	for i := range x.row {
		out.row[i] = uint8(min(max(level(x.ofRow(words, i)), 0), by.levels()-1))
	}
	for i := range x.col {
		sum, n := x.ofColumn(words, i)
		out.col[i] = uint8(min(max(level(sum, n), 0), by.levels()-1))
		if by.signed {
			out.col[i] |= signClass(x.negative[i], n) << signShift
		}
	}
	return out
}

// cost estimates what the numbers take, in units of 2^-16 bits.
func (x *scales) cost() uint64 {
	var counts [256]uint64
	for _, v := range x.row {
		counts[v]++
	}
	for _, v := range x.col {
		counts[v]++
	}
	bits, _ := entropy(counts[:])
	if all := uint64(len(x.row)+len(x.col)) * 8 * rans.LogOne; bits > all || bits*mostScale < all {
		return all
	}
	return bits
}

// signClass says in one of seven numbers which part of n numbers is negative.
func signClass(negative, n uint64) (class uint8) {
	for _, limit := range []uint64{10, 16, 19, 21, 24, 30} { // of 40
		if 40*negative > limit*n {
			class++
		}
	}
	return class
}

// tryScales chooses tables by scale, for the tensor as it has been analysed, where that pays: sets and bySet are its counts,
// as they are and as symbols of the first field.
func (e *Encoding) tryScales(exp uint, upper planes.Field, sets []*hist, bySet [][]uint64, alphabet int) error {
	lengths := e.rowLengths()
	if len(lengths) == 0 || e.whole || e.plans[0].zstd {
		return nil
	}
	// The values that come up, numbered, and how often they do without their sign.
	var number [1 << topBits]uint16
	var values []uint16
	var often [1 << (topBits - 1)]uint64
	for v := range number[:1<<upper.Sym] {
		count := uint64(0)
		for _, h := range sets {
			count += uint64(h.top[v])
		}
		if count > 0 {
			number[v] = uint16(len(values))
			values = append(values, uint16(v))
			often[v&(1<<(upper.Sym-1)-1)] += count
		}
	}
	highest, above := uint64(1)<<(upper.Sym-1)-1, uint64(0)
	for ; highest > 0 && above+often[highest] <= e.words/outlying; highest-- {
		above += often[highest]
	}
	most := logOf((highest+1)<<(upper.Shift+upper.Rest), e.width()-1, exp)
	least := most - min(most, scaleOctaves<<scaleLog)

	_, _, alone := cluster(bySet, alphabet)
	alone += e.words * uint64(e.fields[0].Rest) * rans.LogOne
	best, found := alone-alone/4096, (*Encoding)(nil) // below that it is not worth the time
	for _, cols := range lengths {
		sums, err := e.sumScales(exp, cols, least, most)
		if err != nil {
			return err
		}
		ways := sums.scalings(e.words)
		by := make([]*scales, len(ways))
		for i, w := range ways {
			by[i] = sums.scales(e.words, w)
		}
		counts, err := e.countByScale(upper, cols, by, len(values), &number)
		if err != nil {
			return err
		}
		for i, w := range ways {
			with := *e
			with.scales, with.param = by[i], uint32(cols)
			if cost := with.chooseByScale(exp, upper, w.signed, values, counts[i]); cost < best {
				best, found = cost, &with
			}
		}
	}
	if found == nil {
		return nil
	}
	if err := found.sample(); err != nil {
		return err
	}
	if found.size() < e.size() {
		found.bits, found.exact = e.bits-min(e.bits, alone-best), e.exact-min(e.exact, alone-best)
		*e = *found
	}
	return nil
}

// countByScale counts, for each of the scales and by class, the n values, which are numbered.
func (e *Encoding) countByScale(upper planes.Field, cols uint64, by []*scales, n int, number *[1 << topBits]uint16) ([][]uint64, error) {
	all := make([]uint64, len(by)*classCount*n)
	var mu sync.Mutex
	shift, mask := (upper.Shift+upper.Rest)&63, uint64(1)<<upper.Sym-1
	err := e.tensor.Run(e.groups(), func(g int, s *Scratch) error {
		counts := room(&s.encode.byScale, len(all))
		clear(counts)
		for b := g * GroupBlocks; b < min((g+1)*GroupBlocks, e.blocks()); b++ {
			words, err := e.load(b, s)
			if err != nil {
				return err
			}
			for i, w := range words {
				words[i] = uint64(number[w>>shift&mask%(1<<topBits)])
			}
			for k, x := range by {
				counts := counts[k*classCount*n:][:classCount*n]
				left, at := words, uint64(b)*BlockWords
				for row, c := at/cols, at%cols; len(left) > 0; row, c = row+1, 0 {
					m := min(cols-c, uint64(len(left)))
					r, col := x.row[row], x.col[c:c+m]
					for i, v := range left[:m] {
						counts[int(r+col[i])*n+int(v)]++
					}
					left = left[m:]
				}
			}
		}
		addCounts(&mu, all, counts)
		return nil
	})
	out := make([][]uint64, len(by))
	for k := range out {
		out[k] = all[k*classCount*n:][:classCount*n]
	}
	return out, err
}

// chooseByScale chooses the first field and its tables for the scales that are set, and says what the field then takes. all
// are the counts of the values by class.
func (e *Encoding) chooseByScale(exp uint, upper planes.Field, signed bool, values []uint16, all []uint64) uint64 {
	n := len(values)
	// Classes are merged to tables with two mantissa bits in the symbol; how many it has then is chosen for these tables.
	sign := uint(boolInt(signed))
	fieldOf := func(j uint) (f planes.Field, ok bool) {
		m, s := upper.Bits(), exp+j+sign
		if exp+j+1 > uint(upper.Sym) || m-s > planes.MaxRest {
			return f, false
		}
		return planes.Field{Shift: upper.Shift, Sym: uint8(s), Rest: uint8(m - s), Rotate: !signed}, true
	}
	fold := func(f planes.Field, counts []uint64, to []uint64) {
		drop, mask := symbolOf(upper, f)
		for i, c := range counts {
			to[uint(values[i])>>drop&mask] += c
		}
	}
	j := uint(2)
	f, ok := fieldOf(j)
	for ; !ok && j > 0; f, ok = fieldOf(j) {
		j--
	}
	if !ok {
		return ^uint64(0)
	}
	byClass := make([][]uint64, classCount)
	for i := range byClass {
		byClass[i] = make([]uint64, 1<<f.Sym)
		fold(f, all[i*n:(i+1)*n], byClass[i])
	}
	tables, of, _ := cluster(byClass, rans.MaxSymbols)
	if len(tables) == 0 {
		return ^uint64(0)
	}
	byTable := make([]uint64, len(tables)*n)
	for i, t := range of {
		for v, c := range all[i*n : (i+1)*n] {
			byTable[int(t)*n+v] += c
		}
	}
	best := ^uint64(0)
	for j := uint(0); j <= 6; j++ {
		f, ok := fieldOf(j)
		if !ok {
			continue
		}
		cost := e.words * uint64(f.Rest) * rans.LogOne
		built := make([]*rans.Table, len(tables))
		for t := range built {
			counts := make([]uint64, 1<<f.Sym)
			fold(f, byTable[t*n:(t+1)*n], counts)
			table, c := rans.Build(counts, rans.MaxSymbols, patchBits)
			if built[t] = table; table == nil {
				c = ^uint64(0) / MaxTables / 2
			}
			cost += c
		}
		if cost < best {
			best = cost
			e.fields, e.sym, e.plans = slices.Clone(e.fields), slices.Clone(e.sym), slices.Clone(e.plans)
			e.fields[0], e.plans[0] = f, plan{rans: true}
			e.sym[0] = &tableSet{tables: built, classes: (*[classCount]uint8)(of)}
		}
	}
	if best == ^uint64(0) {
		return best
	}
	return best + e.scales.cost() + classCount*4*rans.LogOne
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}
