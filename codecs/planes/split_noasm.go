//go:build !amd64 || purego

package planes

func (c Cut) appendKernel(dst, _ []byte, _ uint8) ([]byte, int) { return dst, 0 }
