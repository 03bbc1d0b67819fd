package core

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// exchange makes two paths change places at once.
func exchange(a, b string) error {
	switch err := unix.RenamexNp(a, b, unix.RENAME_SWAP); err {
	case nil:
		return nil
	case unix.ENOSYS, unix.EINVAL, unix.ENOTSUP:
		return errors.ErrUnsupported
	default:
		return &os.LinkError{Op: "exchange", Old: a, New: b, Err: err}
	}
}
