// Package ptx runs PTX kernels of integers on the CPU, to test what is shipped where there is no GPU.
//
// A warp's 32 lanes go on together; where branches part them, those at the lowest address go first, until they meet
// again. Warps of a CTA take turns at barriers. Every access to memory is checked: it lies in a region that the test gave,
// aligned, and is written only where that may be. What real hardware leaves undefined is an error: a lane that a vote or
// a shuffle names and that is elsewhere, a barrier that some lanes of a warp do not reach. Time, caches and the order of
// memory between warps are not modelled.
package ptx

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"regexp"
	"strconv"
	"strings"
)

const lanes = 32

// Region is memory that a kernel may use, from address Base on.
type Region struct {
	Name     string
	Base     uint64
	Bytes    []byte
	Writable bool
}

// Module is a parsed text.
type Module struct {
	kernels map[string]*kernel
	globals []*Region
	symbols map[string]uint64 // addresses, of shared memory its offset
	shared  int
}

type kernel struct {
	name   string
	params map[string]int // byte offsets
	sizes  []int
	code   []instruction
	lines  []int // of the text, for errors
	regs   int
	local  int
}

// instruction is run for the lanes of a mask.
type instruction struct {
	run     func(w *warp, mask uint32) error
	guard   int // predicate, or -1
	not     bool
	branch  int // target, or -1
	exit    bool
	barrier bool
}

type warp struct {
	c     *cta
	regs  [][lanes]uint64
	pc    [lanes]int
	alive uint32
	first int // index of lane 0 in the CTA
	local []byte
	last  *Region
}

type cta struct {
	m      *Module
	k      *kernel
	mem    []*Region
	shared []byte
	params []byte
	id, n  uint32
	steps  int
}

const globalBase = 0x10_0000_0000 // of the module's own variables

// Launch runs a kernel with ctas CTAs of threads threads, a multiple of 32. Arguments are uint64 or uint32. More than
// `steps` instructions of a warp in a CTA are an error.
func (m *Module) Launch(name string, ctas, threads int, mem []*Region, steps int, args ...any) error {
	k := m.kernels[name]
	if k == nil {
		return fmt.Errorf("no kernel %s", name)
	}
	var params []byte
	for i, a := range args {
		for len(params)%k.sizes[i] != 0 {
			params = append(params, 0)
		}
		switch v := a.(type) {
		case uint64:
			params = binary.LittleEndian.AppendUint64(params, v)
		case uint32:
			params = binary.LittleEndian.AppendUint32(params, v)
		}
	}
	if len(args) != len(k.sizes) {
		return fmt.Errorf("%s takes %d arguments, not %d", name, len(k.sizes), len(args))
	}
	for id := range ctas {
		c := &cta{m: m, k: k, mem: append(mem, m.globals...), params: params, id: uint32(id), n: uint32(ctas), steps: steps}
		c.shared = make([]byte, m.shared)
		for i := range c.shared {
			c.shared[i] = 0xa5
		}
		if err := c.run(threads); err != nil {
			return fmt.Errorf("%s, CTA %d: %w", name, id, err)
		}
	}
	return nil
}

func (c *cta) run(threads int) error {
	var warps []*warp
	for first := 0; first < threads; first += lanes {
		w := &warp{c: c, first: first, alive: 1<<lanes - 1, regs: make([][lanes]uint64, c.k.regs), local: make([]byte, lanes*c.k.local)}
		for r := range w.regs {
			for l := range w.regs[r] {
				w.regs[r][l] = 0xdeadbeefcafebabe
			}
		}
		warps = append(warps, w)
	}
	for {
		running := 0
		for _, w := range warps {
			if w.alive == 0 {
				continue
			}
			if err := w.run(); err != nil {
				return err
			}
			if w.alive != 0 {
				running++
			}
		}
		if running == 0 {
			return nil
		}
	}
}

// run goes on to the next barrier or the end.
func (w *warp) run() error {
	k := w.c.k
	for step := 0; w.alive != 0; step++ {
		if step > w.c.steps {
			return fmt.Errorf("line %d: still running after %d instructions", k.lines[w.pc[bits.TrailingZeros32(w.alive)]], step)
		}
		pc := w.pc[bits.TrailingZeros32(w.alive)]
		mask := uint32(0)
		for rest := w.alive; rest != 0; rest &= rest - 1 {
			switch l := bits.TrailingZeros32(rest); {
			case w.pc[l] < pc:
				pc, mask = w.pc[l], 1<<l
			case w.pc[l] == pc:
				mask |= 1 << l
			}
		}
		in := &k.code[pc]
		taken := mask
		if in.guard >= 0 {
			taken = 0
			for rest := mask; rest != 0; rest &= rest - 1 {
				l := bits.TrailingZeros32(rest)
				if (w.regs[in.guard][l]&1 != 0) != in.not {
					taken |= 1 << l
				}
			}
		}
		next := pc + 1
		for rest := mask &^ taken; rest != 0; rest &= rest - 1 {
			w.pc[bits.TrailingZeros32(rest)] = next
		}
		if taken == 0 {
			continue
		}
		fail := func(err error) error { return fmt.Errorf("line %d, warp %d: %w", k.lines[pc], w.first/lanes, err) }
		switch {
		case in.exit:
			w.alive &^= taken
			continue
		case in.branch >= 0:
			next = in.branch
		case in.barrier:
			if taken != w.alive {
				return fail(fmt.Errorf("a barrier that lanes %08x of %08x reach", taken, w.alive))
			}
		default:
			if err := in.run(w, taken); err != nil {
				return fail(err)
			}
		}
		for rest := taken; rest != 0; rest &= rest - 1 {
			w.pc[bits.TrailingZeros32(rest)] = next
		}
		if in.barrier {
			return nil
		}
	}
	return nil
}

// memory finds n bytes.
func (w *warp) memory(address uint64, n int, write bool) ([]byte, error) {
	r := w.last
	if r == nil || address < r.Base || address-r.Base >= uint64(len(r.Bytes)) {
		r = nil
		for _, x := range w.c.mem {
			if address >= x.Base && address-x.Base < uint64(len(x.Bytes)) {
				r = x
			}
		}
	}
	if r == nil {
		return nil, fmt.Errorf("%d bytes at %#x, where there is nothing", n, address)
	}
	w.last = r
	at := address - r.Base
	switch {
	case at+uint64(n) > uint64(len(r.Bytes)):
		return nil, fmt.Errorf("%d bytes at byte %d of the %d of %s", n, at, len(r.Bytes), r.Name)
	case address%uint64(n) != 0:
		return nil, fmt.Errorf("%d bytes at %#x, which is not aligned", n, address)
	case write && !r.Writable:
		return nil, fmt.Errorf("a write to %s", r.Name)
	}
	return r.Bytes[at:][:n], nil
}

func inside(b []byte, at uint64, n int, what string) ([]byte, error) {
	if at+uint64(n) > uint64(len(b)) || at%uint64(n) != 0 {
		return nil, fmt.Errorf("%d bytes at %d of %d bytes of %s memory", n, at, len(b), what)
	}
	return b[at:][:n], nil
}

func load(b []byte) uint64 {
	switch len(b) {
	case 1:
		return uint64(b[0])
	case 2:
		return uint64(binary.LittleEndian.Uint16(b))
	case 4:
		return uint64(binary.LittleEndian.Uint32(b))
	}
	return binary.LittleEndian.Uint64(b)
}

func store(b []byte, v uint64) {
	switch len(b) {
	case 1:
		b[0] = byte(v)
	case 2:
		binary.LittleEndian.PutUint16(b, uint16(v))
	case 4:
		binary.LittleEndian.PutUint32(b, uint32(v))
	default:
		binary.LittleEndian.PutUint64(b, v)
	}
}

// ---- parsing ----

var (
	variable = regexp.MustCompile(`^\.(global|shared|local)\s+\.align\s+(\d+)\s+\.(\w+)\s*(\w+)(?:\[(\d+)\])?(?:\s*=\s*(.*))?;$`)
	param    = regexp.MustCompile(`^\.param\s+\.(u64|u32)\s+(\w+),?$`)
	register = regexp.MustCompile(`^\.reg\s+\.\w+\s+(%\w+)<(\d+)>;$`)
	plainReg = regexp.MustCompile(`^\.reg\s+\.\w+\s+(%\w+);$`)
	guarded  = regexp.MustCompile(`^@(!?)(%\w+)\s+(.*)$`)
)

type parser struct {
	m      *Module
	k      *kernel
	regs   map[string]int
	labels map[string]int
	fixes  []func() error
	local  map[string]uint64
}

// Parse reads a module.
func Parse(text string) (*Module, error) {
	m := &Module{kernels: map[string]*kernel{}, symbols: map[string]uint64{}}
	p := &parser{m: m}
	next := uint64(globalBase)
	for number, line := range strings.Split(text, "\n") {
		if i := strings.Index(line, "//"); i >= 0 {
			line = line[:i]
		}
		line = strings.TrimSpace(line)
		if err := p.line(line, number+1, &next); err != nil {
			return nil, fmt.Errorf("line %d: %q: %w", number+1, line, err)
		}
	}
	return m, nil
}

func (p *parser) line(line string, number int, next *uint64) error {
	m := p.m
	switch {
	case line == "" || line == "{" || line == "(" || line == ")":
		return nil
	case strings.HasPrefix(line, ".version"), strings.HasPrefix(line, ".target"), strings.HasPrefix(line, ".address_size"),
		strings.HasPrefix(line, ".maxntid"), strings.HasPrefix(line, ".minnctapersm"), strings.HasPrefix(line, ".pragma"):
		return nil
	case strings.HasPrefix(line, ".visible .entry"):
		p.k = &kernel{name: strings.Trim(strings.Fields(line)[2], "("), params: map[string]int{}}
		p.regs, p.labels, p.fixes, p.local = map[string]int{}, map[string]int{}, nil, map[string]uint64{}
		m.kernels[p.k.name] = p.k
		return nil
	case line == "}":
		for _, f := range p.fixes {
			if err := f(); err != nil {
				return err
			}
		}
		p.k = nil
		return nil
	}
	if f := variable.FindStringSubmatch(line); f != nil {
		return p.variable(f, next)
	}
	if p.k == nil {
		return fmt.Errorf("not understood")
	}
	if f := param.FindStringSubmatch(line); f != nil {
		size, at := 8, 0
		if f[1] == "u32" {
			size = 4
		}
		for i, s := range p.k.sizes {
			at = (at + s - 1) / s * s
			at += p.k.sizes[i]
		}
		p.k.params[f[2]] = (at + size - 1) / size * size
		p.k.sizes = append(p.k.sizes, size)
		return nil
	}
	if f := register.FindStringSubmatch(line); f != nil {
		n, _ := strconv.Atoi(f[2])
		for i := range n {
			p.reg(f[1] + strconv.Itoa(i))
		}
		return nil
	}
	if f := plainReg.FindStringSubmatch(line); f != nil {
		p.reg(f[1])
		return nil
	}
	if label, ok := strings.CutSuffix(line, ":"); ok {
		p.labels[label] = len(p.k.code)
		return nil
	}
	in := instruction{guard: -1, branch: -1}
	body := strings.TrimSuffix(line, ";")
	if f := guarded.FindStringSubmatch(body); f != nil {
		r, ok := p.regs[f[2]]
		if !ok {
			return fmt.Errorf("register %s", f[2])
		}
		in.guard, in.not, body = r, f[1] == "!", f[3]
	}
	if err := p.compile(&in, body); err != nil {
		return err
	}
	p.k.code, p.k.lines = append(p.k.code, in), append(p.k.lines, number)
	return nil
}

func (p *parser) reg(name string) {
	p.regs[name] = p.k.regs
	p.k.regs++
}

func (p *parser) variable(f []string, next *uint64) error {
	sizes := map[string]int{"b8": 1, "u8": 1, "u32": 4, "u64": 8}
	size, ok := sizes[f[3]]
	if !ok {
		return fmt.Errorf("type %s", f[3])
	}
	n := 1
	if f[5] != "" {
		n, _ = strconv.Atoi(f[5])
	}
	align, _ := strconv.Atoi(f[2])
	switch f[1] {
	case "shared":
		p.m.shared = (p.m.shared + align - 1) / align * align
		p.m.symbols[f[4]] = uint64(p.m.shared)
		p.m.shared += n * size
	case "local":
		p.local[f[4]] = uint64(p.k.local)
		p.k.local += n * size
	default:
		b := make([]byte, n*size)
		for i, v := range strings.Split(strings.Trim(f[6], "{}"), ",") {
			if v = strings.TrimSpace(v); v != "" {
				x, err := number(v)
				if err != nil {
					return err
				}
				store(b[i*size:][:size], x)
			}
		}
		p.m.symbols[f[4]] = *next
		p.m.globals = append(p.m.globals, &Region{Name: f[4], Base: *next, Bytes: b})
		*next += uint64(len(b)+255) &^ 255
	}
	return nil
}

func number(s string) (uint64, error) {
	s = strings.TrimSuffix(s, "U")
	if v, err := strconv.ParseInt(s, 0, 64); err == nil {
		return uint64(v), nil
	}
	return strconv.ParseUint(s, 0, 64)
}
