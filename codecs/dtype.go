package codecs

import (
	"slices"
	"strings"
)

// DType is an element type. The numbers are those of bs_dtype in bigsmall.h and never change.
type DType uint8

const (
	Bool DType = iota + 1
	U8
	I8
	U16
	I16
	U32
	I32
	U64
	I64
	F16
	BF16
	F32
	F64
	C64
	F8E4M3
	F8E5M2
	F8E4M3FNUZ
	F8E5M2FNUZ
	F8E8M0
	F4
	F6E2M3
	F6E3M2
	endDType
)

type dtypeInfo struct {
	torch  string // as in the header of a .bs file
	source string // as safetensors spells it
	bits   int    // of one value
	word   int    // bytes of what is coded as one number
	exp    uint   // exponent bits where word is one binary float, else 0
	sign   bool   // and whether it has a sign
}

var dtypes = [endDType]dtypeInfo{
	Bool:       {"bool", "BOOL", 8, 1, 0, false},
	U8:         {"uint8", "U8", 8, 1, 0, false},
	I8:         {"int8", "I8", 8, 1, 0, false},
	U16:        {"uint16", "U16", 16, 2, 0, false},
	I16:        {"int16", "I16", 16, 2, 0, false},
	U32:        {"uint32", "U32", 32, 4, 0, false},
	I32:        {"int32", "I32", 32, 4, 0, false},
	U64:        {"uint64", "U64", 64, 8, 0, false},
	I64:        {"int64", "I64", 64, 8, 0, false},
	F16:        {"float16", "F16", 16, 2, 5, true},
	BF16:       {"bfloat16", "BF16", 16, 2, 8, true},
	F32:        {"float32", "F32", 32, 4, 8, true},
	F64:        {"float64", "F64", 64, 8, 11, true},
	C64:        {"complex64", "C64", 64, 4, 8, true}, // two F32
	F8E4M3:     {"float8_e4m3fn", "F8_E4M3", 8, 1, 4, true},
	F8E5M2:     {"float8_e5m2", "F8_E5M2", 8, 1, 5, true},
	F8E4M3FNUZ: {"float8_e4m3fnuz", "F8_E4M3FNUZ", 8, 1, 4, true},
	F8E5M2FNUZ: {"float8_e5m2fnuz", "F8_E5M2FNUZ", 8, 1, 5, true},
	F8E8M0:     {"float8_e8m0fnu", "F8_E8M0", 8, 1, 0, false},
	F4:         {"float4_e2m1fn_x2", "F4", 4, 1, 0, false},
	F6E2M3:     {"float6_e2m3fn", "F6_E2M3", 6, 1, 0, false},
	F6E3M2:     {"float6_e3m2fn", "F6_E3M2", 6, 1, 0, false},
}

// Valid reports whether d is a dtype.
func (d DType) Valid() bool { return d > 0 && d < endDType }

// String is torch's name of the dtype, as in the header of a `.bs` file.
func (d DType) String() string {
	if !d.Valid() {
		return "unknown"
	}
	return dtypes[d].torch
}

// Source is the name safetensors has for the dtype.
func (d DType) Source() string { return dtypes[d].source }

// Bits is the size of one value.
func (d DType) Bits() int { return dtypes[d].bits }

// WordBytes is the size of what is coded as one number: a value, half a complex number, or a byte of packed values.
func (d DType) WordBytes() int { return dtypes[d].word }

// IsFloat reports whether values are floats with a sign.
func (d DType) IsFloat() bool { return dtypes[d].sign }

// ParseDType finds a dtype by torch's name or by the name safetensors has for it.
func ParseDType(name string) (DType, bool) {
	for d := Bool; d < endDType; d++ {
		if dtypes[d].torch == name || dtypes[d].source == name {
			return d, true
		}
	}
	return 0, false
}

// layout is the order in which the safetensors library lays tensors out, the widest dtypes first.
var layout = [...]DType{U64, I64, F64, C64, F32, U32, I32, BF16, F16, U16, I16, F8E5M2FNUZ, F8E4M3FNUZ, F8E8M0, F8E4M3, F8E5M2, I8, U8,
	F6E3M2, F6E2M3, F4, Bool}

// CompareLayout orders tensors as that library does: by dtype, then by name.
func CompareLayout(a DType, nameA string, b DType, nameB string) int {
	if c := slices.Index(layout[:], a) - slices.Index(layout[:], b); c != 0 {
		return c
	}
	return strings.Compare(nameA, nameB)
}
