//go:build !amd64 || purego

package rans

type tierTables struct{}

func (d *Decoder) kernel() *kernel { return nil }
