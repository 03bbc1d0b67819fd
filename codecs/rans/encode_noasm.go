//go:build !amd64 || purego

package rans

type kernels struct{}

// turns codes what is left of the blocks, whole turns.
func (e *Encoder) turns(blocks []coding) {
	for i := range blocks {
		e.turnsGeneric(&blocks[i])
	}
}

// MapWords has no fast way here.
func (e *Encoder) MapWords(_ []uint8, _ []byte, _ int, _ uint8, _ uint16, patches []Patch) (int, []Patch) {
	return 0, patches
}
