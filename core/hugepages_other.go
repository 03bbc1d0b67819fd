//go:build !linux

package core

// hugePages is for systems that can be asked for them.
func hugePages([]byte) {}
