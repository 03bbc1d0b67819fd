package ptx

import (
	"fmt"
	"math/bits"
	"regexp"
	"strings"
)

// value reads an operand of a lane.
type value func(w *warp, l int) uint64

var (
	split   = regexp.MustCompile(`\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]][^,]*`)
	address = regexp.MustCompile(`^\[([%$\w]+)(?:\+(-?\d+))?\]$`)
)

func (p *parser) compile(in *instruction, body string) error {
	op, rest, _ := strings.Cut(body, " ")
	if i := strings.IndexAny(op, "\t"); i >= 0 {
		op, rest = op[:i], op[i+1:]+" "+rest
	}
	var args []string
	for _, a := range split.FindAllString(strings.TrimSpace(rest), -1) {
		args = append(args, strings.TrimSpace(a))
	}
	f := strings.Split(op, ".")
	kind := f[len(f)-1]
	width := 64
	switch kind {
	case "u8", "b8":
		width = 8
	case "u16", "s16", "b16":
		width = 16
	case "u32", "s32", "b32":
		width = 32
	case "pred":
		width = 1
	}
	switch f[0] {
	case "ret", "exit":
		in.exit = true
		return nil
	case "bra":
		label := args[0]
		k := p.k
		labels := p.labels
		at := len(k.code)
		p.fixes = append(p.fixes, func() error {
			target, ok := labels[label]
			if !ok {
				return fmt.Errorf("no label %s", label)
			}
			if target == len(k.code) {
				return fmt.Errorf("label %s at the end", label)
			}
			k.code[at].branch = target
			return nil
		})
		in.branch = 0
		return nil
	case "bar":
		if op == "bar.sync" {
			in.barrier = true
			return nil
		}
		if op != "bar.warp.sync" {
			return fmt.Errorf("instruction %s", op)
		}
		member, err := p.value(args[0])
		in.run = func(w *warp, mask uint32) error { return w.together(mask, member) }
		return err
	case "ld", "st", "atom":
		return p.access(in, f, args)
	case "vote":
		return p.vote(in, op, args)
	case "shfl":
		return p.shuffle(in, op, args)
	case "mov":
		if strings.HasPrefix(args[0], "{") || strings.HasPrefix(args[1], "{") {
			return p.pack(in, width, args)
		}
	case "setp":
		if len(f) != 3 {
			return fmt.Errorf("instruction %s", op)
		}
		return p.compare(in, f[1], f[2], width, args)
	}
	d, ok := p.regs[args[0]]
	if !ok {
		return fmt.Errorf("register %q", args[0])
	}
	var v [4]value
	if len(args) > 5 {
		return fmt.Errorf("%d operands", len(args))
	}
	for i, a := range args[1:] {
		var err error
		if v[i], err = p.value(a); err != nil {
			return err
		}
	}
	g, err := p.arithmetic(f, op, width)
	if err != nil {
		return err
	}
	n := len(args) - 1
	in.run = func(w *warp, mask uint32) error {
		out := &w.regs[d]
		for rest := mask; rest != 0; rest &= rest - 1 {
			l := bits.TrailingZeros32(rest)
			var a, b, c, e uint64
			a = v[0](w, l)
			if n > 1 {
				b = v[1](w, l)
			}
			if n > 2 {
				c = v[2](w, l)
			}
			if n > 3 {
				e = v[3](w, l)
			}
			out[l] = g(a, b, c, e)
		}
		return nil
	}
	return nil
}

// value makes an operand.
func (p *parser) value(s string) (value, error) {
	not := strings.HasPrefix(s, "!")
	s = strings.TrimPrefix(s, "!")
	if r, ok := p.regs[s]; ok {
		if not {
			return func(w *warp, l int) uint64 { return w.regs[r][l] ^ 1 }, nil
		}
		return func(w *warp, l int) uint64 { return w.regs[r][l] }, nil
	}
	switch s {
	case "%tid.x":
		return func(w *warp, l int) uint64 { return uint64(w.first + l) }, nil
	case "%ctaid.x":
		return func(w *warp, _ int) uint64 { return uint64(w.c.id) }, nil
	case "%nctaid.x":
		return func(w *warp, _ int) uint64 { return uint64(w.c.n) }, nil
	case "%laneid":
		return func(_ *warp, l int) uint64 { return uint64(l) }, nil
	}
	if at, ok := p.m.symbols[s]; ok {
		return func(*warp, int) uint64 { return at }, nil
	}
	if at, ok := p.local[s]; ok {
		return func(*warp, int) uint64 { return at }, nil
	}
	n, err := number(s)
	return func(*warp, int) uint64 { return n }, err
}

// arithmetic is what an instruction makes of its operands, cut to the width of its type.
func (p *parser) arithmetic(f []string, op string, width int) (func(a, b, c, d uint64) uint64, error) {
	mask := ^uint64(0) >> (64 - width)
	type fn = func(a, b, c, d uint64) uint64
	cut := func(g fn) (fn, error) {
		return func(a, b, c, d uint64) uint64 { return g(a&mask, b&mask, c&mask, d&mask) & mask }, nil
	}
	u := uint64(width)
	switch strings.Join(f[:len(f)-1], ".") {
	case "add":
		return cut(func(a, b, _, _ uint64) uint64 { return a + b })
	case "sub":
		return cut(func(a, b, _, _ uint64) uint64 { return a - b })
	case "and":
		return cut(func(a, b, _, _ uint64) uint64 { return a & b })
	case "or":
		return cut(func(a, b, _, _ uint64) uint64 { return a | b })
	case "xor":
		return cut(func(a, b, _, _ uint64) uint64 { return a ^ b })
	case "not":
		return cut(func(a, _, _, _ uint64) uint64 { return ^a })
	case "mov", "cvta.to.global":
		return cut(func(a, _, _, _ uint64) uint64 { return a })
	case "mul.lo":
		return cut(func(a, b, _, _ uint64) uint64 { return a * b })
	case "mad.lo":
		return cut(func(a, b, c, _ uint64) uint64 { return a*b + c })
	case "div":
		if f[1][0] != 'u' {
			break
		}
		return func(a, b, _, _ uint64) uint64 {
			if b&mask == 0 {
				return mask
			}
			return (a & mask) / (b & mask)
		}, nil
	case "min":
		if f[1][0] != 'u' {
			break
		}
		return cut(func(a, b, _, _ uint64) uint64 { return min(a, b) })
	case "mul.wide":
		if f[2][0] != 'u' {
			break
		}
		return func(a, b, _, _ uint64) uint64 { return (a & mask) * (b & mask) }, nil
	case "mul.hi":
		if op != "mul.hi.u64" {
			break
		}
		return func(a, b, _, _ uint64) uint64 { h, _ := bits.Mul64(a, b); return h }, nil
	case "shl":
		return func(a, b, _, _ uint64) uint64 {
			if b &= 0xffffffff; b >= u {
				return 0
			}
			return a << b & mask
		}, nil
	case "shr":
		if f[1][0] != 'u' {
			break
		}
		return func(a, b, _, _ uint64) uint64 {
			if b &= 0xffffffff; b >= u {
				return 0
			}
			return a & mask >> b
		}, nil
	case "popc":
		return cut(func(a, _, _, _ uint64) uint64 { return uint64(bits.OnesCount64(a)) })
	case "clz":
		return cut(func(a, _, _, _ uint64) uint64 { return uint64(bits.LeadingZeros64(a)) - (64 - u) })
	case "selp":
		return func(a, b, c, _ uint64) uint64 {
			if c&1 != 0 {
				return a & mask
			}
			return b & mask
		}, nil
	case "shf.r.wrap", "shf.r.clamp", "shf.l.wrap":
		clamp, left := strings.HasSuffix(op, "clamp.b32"), f[1] == "l"
		return func(a, b, c, _ uint64) uint64 {
			both, n := b<<32|a&0xffffffff, c&0xffffffff
			if clamp {
				n = min(n, 32)
			} else {
				n %= 32
			}
			if left {
				return both << n >> 32
			}
			return both >> n & 0xffffffff
		}, nil
	case "prmt":
		return func(a, b, c, _ uint64) uint64 {
			all, out := b<<32|a&0xffffffff, uint64(0)
			for i := range 4 {
				s := c >> (4 * i)
				v := all >> (8 * (s & 7)) & 0xff
				if s&8 != 0 { // its sign, eight times
					v = uint64(int64(int8(v))>>7) & 0xff
				}
				out |= v << (8 * i)
			}
			return out
		}, nil
	case "bfi":
		return func(a, b, c, d uint64) uint64 {
			c, d = c&0xff, d&0xff
			if c >= u {
				return b & mask
			}
			d = min(d, u-c)
			field := (uint64(1)<<d - 1) << c
			return (b&^field | a<<c&field) & mask
		}, nil
	}
	if f[0] == "cvt" && len(f) == 3 && f[1][0] == 'u' && f[2][0] == 'u' {
		to := map[string]uint64{"u8": 8, "u16": 16, "u32": 32, "u64": 64}[f[1]]
		return func(a, _, _, _ uint64) uint64 { return a & mask & (^uint64(0) >> (64 - to)) }, nil
	}
	return nil, fmt.Errorf("instruction %s", op)
}

func (p *parser) compare(in *instruction, how, kind string, width int, args []string) error {
	d, ok := p.regs[args[0]]
	if !ok || len(args) != 3 {
		return fmt.Errorf("operands %q", args)
	}
	a, err := p.value(args[1])
	if err != nil {
		return err
	}
	b, err := p.value(args[2])
	if err != nil {
		return err
	}
	shift := uint(64 - width)
	signed := kind[0] == 's'
	tests := map[string]func(c int) bool{
		"eq": func(c int) bool { return c == 0 }, "ne": func(c int) bool { return c != 0 },
		"lt": func(c int) bool { return c < 0 }, "le": func(c int) bool { return c <= 0 },
		"gt": func(c int) bool { return c > 0 }, "ge": func(c int) bool { return c >= 0 },
	}
	test := tests[how]
	if test == nil {
		return fmt.Errorf("comparison %s", how)
	}
	in.run = func(w *warp, mask uint32) error {
		for rest := mask; rest != 0; rest &= rest - 1 {
			l := bits.TrailingZeros32(rest)
			x, y := a(w, l)<<shift, b(w, l)<<shift
			c := 0
			switch {
			case x == y:
			case signed && int64(x) < int64(y), !signed && x < y:
				c = -1
			default:
				c = 1
			}
			w.regs[d][l] = 0
			if test(c) {
				w.regs[d][l] = 1
			}
		}
		return nil
	}
	return nil
}

// pack is a mov between a register and its parts.
func (p *parser) pack(in *instruction, width int, args []string) error {
	list := func(s string) (regs []int, err error) {
		for _, name := range strings.Split(strings.Trim(s, "{}"), ",") {
			r, ok := p.regs[strings.TrimSpace(name)]
			if !ok {
				return nil, fmt.Errorf("register %q", name)
			}
			regs = append(regs, r)
		}
		return regs, nil
	}
	a, err := list(args[0])
	if err != nil {
		return err
	}
	b, err := list(args[1])
	if err != nil {
		return err
	}
	in.run = func(w *warp, mask uint32) error {
		for rest := mask; rest != 0; rest &= rest - 1 {
			l := bits.TrailingZeros32(rest)
			if len(a) == 1 {
				part, v := width/len(b), uint64(0)
				for i, r := range b {
					v |= w.regs[r][l] & (1<<part - 1) << (part * i)
				}
				w.regs[a[0]][l] = v
			} else {
				part := width / len(a)
				for i, r := range a {
					w.regs[r][l] = w.regs[b[0]][l] >> (part * i) & (1<<part - 1)
				}
			}
		}
		return nil
	}
	return nil
}

// access is a load, a store or an atomic minimum.
func (p *parser) access(in *instruction, f, args []string) error {
	kind, space, vector := f[len(f)-1], "generic", 1
	size := map[string]int{"u8": 1, "u16": 2, "u32": 4, "u64": 8}[kind]
	for _, x := range f[1 : len(f)-1] {
		switch x {
		case "global", "shared", "local", "param":
			space = x
		case "v2", "v4":
			vector = int(x[1] - '0')
		case "nc", "min":
		default:
			return fmt.Errorf("a qualifier %s", x)
		}
	}
	if size == 0 {
		return fmt.Errorf("type %s", kind)
	}
	isStore, isAtom := f[0] == "st", f[0] == "atom"
	where, data := args[1], args[0]
	if isStore {
		where, data = args[0], args[1]
	}
	m := address.FindStringSubmatch(where)
	if m == nil {
		return fmt.Errorf("address %s", where)
	}
	offset := uint64(0)
	if m[2] != "" {
		offset, _ = number(m[2])
	}
	if space == "param" {
		at, ok := p.k.params[m[1]]
		d := p.regs[data]
		in.run = func(w *warp, mask uint32) error {
			b, err := inside(w.c.params, uint64(at)+offset, size, "parameter")
			for rest := mask; err == nil && rest != 0; rest &= rest - 1 {
				w.regs[d][bits.TrailingZeros32(rest)] = load(b)
			}
			return err
		}
		if !ok {
			return fmt.Errorf("parameter %s", m[1])
		}
		return nil
	}
	base, err := p.value(m[1])
	if err != nil {
		return err
	}
	var to []int
	var from []value
	for _, name := range strings.Split(strings.Trim(data, "{}"), ",") {
		name = strings.TrimSpace(name)
		v, err := p.value(name)
		if err != nil {
			return err
		}
		r, ok := p.regs[name]
		if !ok && !isStore {
			return fmt.Errorf("register %q", name)
		}
		to, from = append(to, r), append(from, v)
	}
	if len(to) != vector {
		return fmt.Errorf("%d parts of a vector of %d", len(to), vector)
	}
	var with value
	if isAtom {
		if with, err = p.value(args[2]); err != nil {
			return err
		}
	}
	n := size * vector
	local := p.k
	in.run = func(w *warp, mask uint32) error {
		for rest := mask; rest != 0; rest &= rest - 1 {
			l := bits.TrailingZeros32(rest)
			at := base(w, l) + offset
			var b []byte
			var err error
			switch space {
			case "shared":
				b, err = inside(w.c.shared, at&0xffffffff, n, "shared")
			case "local":
				b, err = inside(w.local[l*local.local:][:local.local], at, n, "local")
			default:
				b, err = w.memory(at, n, isStore || isAtom)
			}
			if err != nil {
				return fmt.Errorf("lane %d: %w", l, err)
			}
			switch {
			case isAtom:
				old := load(b)
				w.regs[to[0]][l] = old
				store(b, min(old, with(w, l)&(^uint64(0)>>(64-8*size))))
			case isStore:
				for i, v := range from {
					store(b[i*size:][:size], v(w, l))
				}
			default:
				for i, r := range to {
					w.regs[r][l] = load(b[i*size:][:size])
				}
			}
		}
		return nil
	}
	return nil
}

// together makes sure that the lanes a member mask names are those that are here.
func (w *warp) together(mask uint32, member value) error {
	for rest := mask; rest != 0; rest &= rest - 1 {
		l := bits.TrailingZeros32(rest)
		if m := uint32(member(w, l)); m != mask {
			return fmt.Errorf("lane %d names the lanes %08x, and %08x are here", l, m, mask)
		}
	}
	return nil
}

func (p *parser) vote(in *instruction, op string, args []string) error {
	d, ok := p.regs[args[0]]
	a, err := p.value(args[1])
	if err != nil || !ok {
		return fmt.Errorf("operands %q", args)
	}
	member, err := p.value(args[2])
	if err != nil {
		return err
	}
	if op != "vote.sync.ballot.b32" && op != "vote.sync.all.pred" {
		return fmt.Errorf("instruction %s", op)
	}
	all := op == "vote.sync.all.pred"
	in.run = func(w *warp, mask uint32) error {
		if err := w.together(mask, member); err != nil {
			return err
		}
		ballot := uint32(0)
		for rest := mask; rest != 0; rest &= rest - 1 {
			l := bits.TrailingZeros32(rest)
			ballot |= uint32(a(w, l)&1) << l
		}
		v := uint64(ballot)
		if all {
			v = 0
			if ballot == mask {
				v = 1
			}
		}
		for rest := mask; rest != 0; rest &= rest - 1 {
			w.regs[d][bits.TrailingZeros32(rest)] = v
		}
		return nil
	}
	return nil
}

func (p *parser) shuffle(in *instruction, op string, args []string) error {
	dest, pred, both := strings.Cut(args[0], "|")
	d, ok := p.regs[strings.TrimSpace(dest)]
	if !ok || len(args) != 5 {
		return fmt.Errorf("operands %q", args)
	}
	var v [4]value
	for i, a := range args[1:] {
		var err error
		if v[i], err = p.value(a); err != nil {
			return err
		}
	}
	if op != "shfl.sync.bfly.b32" && op != "shfl.sync.idx.b32" {
		return fmt.Errorf("instruction %s", op)
	}
	q := p.regs[strings.TrimSpace(pred)]
	xor := op == "shfl.sync.bfly.b32"
	in.run = func(w *warp, mask uint32) error {
		if err := w.together(mask, v[3]); err != nil {
			return err
		}
		var out [lanes]uint64
		for rest := mask; rest != 0; rest &= rest - 1 {
			l := bits.TrailingZeros32(rest)
			if c := v[2](w, l); c != 31 {
				return fmt.Errorf("a shuffle of parts of a warp (%#x)", c)
			}
			from := int(v[1](w, l) & 31)
			if xor {
				from ^= l
			}
			if mask>>from&1 == 0 {
				return fmt.Errorf("lane %d takes from lane %d, which is elsewhere", l, from)
			}
			out[l] = v[0](w, from) & 0xffffffff
		}
		for rest := mask; rest != 0; rest &= rest - 1 {
			l := bits.TrailingZeros32(rest)
			w.regs[d][l] = out[l]
			if both {
				w.regs[q][l] = 1
			}
		}
		return nil
	}
	return nil
}
