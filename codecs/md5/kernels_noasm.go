//go:build !amd64 || purego

package md5

const fewest = Lanes

func kernels() func(*args) { return nil }
