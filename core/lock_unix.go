//go:build unix

package core

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

const renamesOpenFiles = true

// lock takes the lock of an open file or directory if nobody has it. It ends with the last of the file's descriptors, so
// with the process at the latest.
func lock(f *os.File) lockState {
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err {
	case nil:
		return lockHeld
	case syscall.EWOULDBLOCK:
		return lockTaken
	}
	return lockUnknown
}
