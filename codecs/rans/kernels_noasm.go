//go:build !amd64 || purego

package rans

type tierTables struct{}

func (d *Decoder) kernel() *kernel { return nil }

func (s *Set) kernel(*lanes, []uint16, []uint8) int { return 0 }
