package reference

import (
	"fmt"
	"math"
	"slices"
)

// A model gives every symbol of an alphabet at least one of 2^24 slots, nearly as its count and 0.01 would have it. Writer and
// reader must agree in every slot, so each operation on numbers is here in the order in which the original's libraries do it
// (numpy's sum; the quantiser "perfect" of the crate constriction 0.4 and 0.5), and products are wrapped in float64(), which
// forbids Go to fuse them with a sum.

const (
	precision = 24
	total     = 1 << precision
)

// sum adds as numpy does: pairs of halves down to 128, eight partial sums in those.
func sum(p []float64) float64 {
	n := len(p)
	if n < 8 {
		s := math.Copysign(0, -1)
		for _, x := range p {
			s += x
		}
		return s
	}
	if n <= 128 {
		var r [8]float64
		copy(r[:], p)
		i := 8
		for ; i < n-n%8; i += 8 {
			for j := range r {
				r[j] += p[i+j]
			}
		}
		s := ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]))
		for ; i < n; i++ {
			s += p[i]
		}
		return s
	}
	h := n / 2
	h -= h % 8
	return sum(p[:h]) + sum(p[h:])
}

// slot is a symbol on its way to a weight; win is what one more slot would gain, loss what one less would cost.
type slot struct {
	symbol    int
	p         float64
	weight    int
	win, loss float64
}

func (s *slot) rate() {
	s.win = float64(s.p * log1p(1/float64(s.weight)))
	s.loss = math.Inf(1)
	if s.weight > 1 {
		s.loss = float64(-s.p * log1p(-1/float64(s.weight)))
	}
}

// cumulative gives the slots of each symbol: cdf[s] to cdf[s+1]-1. counts has an entry for every symbol of the alphabet.
func cumulative(counts []int) ([]uint32, error) {
	n := len(counts)
	p := make([]float64, n)
	for i, c := range counts {
		p[i] = float64(c) + 0.01
	}
	t := sum(p)
	norm := 0.0
	for i := range p {
		p[i] /= t
		norm += p[i]
	}
	free := total - n
	scale := float64(free) / norm
	slots := make([]slot, n)
	for i, x := range p {
		a := int(float64(x * scale))
		free -= a
		slots[i] = slot{symbol: i, p: x, weight: a + 1}
		if i > 0 && slots[i-1].p == x { // as of most symbols, which do not occur
			slots[i].win, slots[i].loss = slots[i-1].win, slots[i-1].loss
		} else {
			slots[i].rate()
		}
	}
	if free < 0 {
		return nil, fmt.Errorf("counts of a model give no weights")
	}
	for free > 0 {
		slices.SortStableFunc(slots, func(a, b slot) int {
			switch {
			case a.win > b.win:
				return -1
			case a.win < b.win:
				return 1
			}
			return 0
		})
		b := min(free, n)
		for i := range slots[:b] {
			s := &slots[i]
			s.weight++
			if i > 0 && slots[i-1].p == s.p && slots[i-1].weight == s.weight {
				s.win, s.loss = slots[i-1].win, slots[i-1].loss
			} else {
				s.rate()
			}
		}
		free -= b
	}
	for {
		buyer, seller := 0, 0
		for i := 1; i < n; i++ {
			if slots[i].win >= slots[buyer].win { // the last of equals
				buyer = i
			}
			if slots[i].loss < slots[seller].loss { // the first of equals
				seller = i
			}
		}
		if buyer == seller || slots[buyer].win <= slots[seller].loss {
			break
		}
		s, b := &slots[seller], &slots[buyer]
		s.weight--
		s.rate()
		s.win = math.Inf(-1)
		b.weight++
		b.rate()
		b.loss = math.Inf(1)
	}
	cdf := make([]uint32, n+1)
	for _, s := range slots {
		cdf[s.symbol+1] = uint32(s.weight)
	}
	for i := range n {
		cdf[i+1] += cdf[i]
	}
	return cdf, nil
}

// log1p is that of the FreeBSD mathematical library (s_log1p.c) as the Rust crate libm has it, for the arguments 1/w and -1/w.
func log1p(x float64) float64 {
	const (
		ln2Hi = 6.93147180369123816490e-01
		ln2Lo = 1.90821492927058770002e-10
		lg1   = 6.666666666666735130e-01
		lg2   = 3.999999999940941908e-01
		lg3   = 2.857142874366239149e-01
		lg4   = 2.222219843214978396e-01
		lg5   = 1.818357216161805012e-01
		lg6   = 1.531383769920937332e-01
		lg7   = 1.479819860511658591e-01
	)
	hx := uint32(math.Float64bits(x) >> 32)
	k, c, f := 1, 0.0, 0.0
	if hx < 0x3fda827a || hx>>31 != 0 {
		if hx >= 0xbff00000 {
			return math.Inf(-1) // x is -1
		}
		if hx<<1 < 0x3ca00000<<1 {
			return x
		}
		if hx <= 0xbfd2bec4 {
			k, f = 0, x
		}
	}
	if k > 0 {
		u := 1 + x
		bits := math.Float64bits(u)
		hu := uint32(bits>>32) + 0x3ff00000 - 0x3fe6a09e
		k = int(hu>>20) - 0x3ff
		if k < 54 {
			if k >= 2 {
				c = 1 - (u - x)
			} else {
				c = x - (u - 1)
			}
			c /= u
		}
		hu = hu&0x000fffff + 0x3fe6a09e
		f = math.Float64frombits(uint64(hu)<<32|bits&0xffffffff) - 1
	}
	hfsq := float64(float64(0.5*f) * f)
	s := f / (2 + f)
	z := float64(s * s)
	w := float64(z * z)
	t1 := float64(w * (lg2 + float64(w*(lg4+float64(w*lg6)))))
	t2 := float64(z * (lg1 + float64(w*(lg3+float64(w*(lg5+float64(w*lg7)))))))
	r := t2 + t1
	dk := float64(k)
	return float64(s*(hfsq+r)) + (float64(dk*ln2Lo) + c) - hfsq + f + float64(dk*ln2Hi)
}
