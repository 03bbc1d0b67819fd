package core

import (
	"os"
	"syscall"
	"unsafe"
)

// hugePages asks for huge pages where a destination is large. Memory that is touched for the first time comes page by
// page, and at 4 KiB each that takes longer than decoding. It is a hint: whether it is heard is the system's affair.
func hugePages(dst []byte) {
	const large = 4 << 20
	if len(dst) < large {
		return
	}
	page := uintptr(os.Getpagesize())
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(dst))) % page
	inner := dst[skip:]
	_ = syscall.Madvise(inner[:uintptr(len(inner))&^(page-1)], syscall.MADV_HUGEPAGE)
}
