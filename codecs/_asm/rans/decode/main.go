// Command decode writes the decoding kernels of package rans.
package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Offsets in rans.turns.
const (
	argTable    = 0
	argSrc      = 8
	argRest     = 40
	argDst      = 72
	argCount    = 104
	argRestStep = 112
	argAhead    = 120
	argState    = 128 // four times 128 bytes
)

// form is what becomes of the 32 symbols of a turn.
type form struct {
	name string
	size int // bytes of an element
	rest restForm
	past bool // stores go past the caches; elements lie on 64 bytes
}

type restForm int

const (
	noRest     restForm = iota
	narrowRest          // fields of at most 8 bits, each within two bytes
	wideRest            // within three
)

var forms = []form{
	{"Words", 2, noRest, false}, {"WordsNarrow", 2, narrowRest, false}, {"WordsWide", 2, wideRest, false},
	{"Bytes", 1, noRest, false}, {"BytesNarrow", 1, narrowRest, false},
	{"WordsPast", 2, noRest, true}, {"WordsNarrowPast", 2, narrowRest, true}, {"WordsWidePast", 2, wideRest, true},
}

func (f form) doc() string {
	s := []string{"words of the symbols alone", "words with a rest of at most 8 bits", "words with a rest of up to 15 bits"}
	if f.size == 1 {
		s = []string{"bytes of the symbols alone", "bytes with a rest of at most 4 bits"}
	}
	if f.past {
		return s[f.rest] + ", past the caches: a.dst on 64 bytes"
	}
	return s[f.rest]
}

func main() {
	ConstraintExpr("amd64,!purego")
	for _, f := range forms {
		for streams := 1; streams <= 4; streams++ {
			alias(f, streams)
		}
	}
	packing := newPacking()
	for _, f := range forms {
		for streams := 1; streams <= 4; streams++ {
			wide(f, streams, packing)
		}
	}
	wanted := wanted()
	for _, f := range slotForms {
		for streams := 1; streams <= 2; streams++ {
			slots(f, streams, wanted)
		}
	}
	set512()
	set256(wanted)
	Generate()
}

func begin(name, doc string) (args, table reg.GPVirtual) {
	TEXT(name, NOSPLIT, "func(a *byte)")
	Pragma("noescape")
	Doc(name + " " + doc)
	args, table = GP64(), GP64()
	Load(Param("a"), args)
	MOVQ(Mem{Base: args, Disp: argTable}, table)
	return args, table
}
