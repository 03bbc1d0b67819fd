package main

import (
	_ "bigsmall.dev/asm/ext"
	. "github.com/mmcloughlin/avo/build"
)

func main() {
	ConstraintExpr("amd64,!purego")
	Generate()
}
