package core

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"syscall"

	"bigsmall.dev/bigsmall/codecs"
)

// Status says what went wrong. The numbers are those of bs_status in bigsmall.h.
type Status int32

const (
	OK                 Status = 0
	InvalidArgument    Status = 10
	DstTooSmall        Status = 12
	NotFound           Status = 14
	UnsupportedVersion Status = 20
	UnsupportedCodec   Status = 22
	UnsupportedFeature Status = 24
	Corrupt            Status = 30
	Truncated          Status = 32
	Checksum           Status = 34
	WrongBase          Status = 36
	IO                 Status = 40
	Cancelled          Status = 50
	NoDevice           Status = 60
	DeviceFailed       Status = 62
	Poisoned           Status = 90
	Internal           Status = 91
	Forked             Status = 92
)

var statusNames = map[Status]string{
	OK: "ok", InvalidArgument: "invalid_argument", DstTooSmall: "dst_too_small", NotFound: "not_found",
	UnsupportedVersion: "unsupported_version", UnsupportedCodec: "unsupported_codec",
	UnsupportedFeature: "unsupported_feature", Corrupt: "corrupt", Truncated: "truncated", Checksum: "checksum",
	WrongBase: "wrong_base", IO: "io", Cancelled: "cancelled", NoDevice: "no_device", DeviceFailed: "device", Poisoned: "poisoned", Internal: "internal",
	Forked: "forked",
}

// String is the status's name, as bs_status_name gives it.
func (s Status) String() string {
	if n, ok := statusNames[s]; ok {
		return n
	}
	return "unknown"
}

// Error is what every function of this package returns: a status, the file and tensor it is about, and the numbers.
type Error struct {
	Status Status
	File   string // as the caller named it, or ""
	Tensor string // or ""
	Msg    string
	Err    error // the cause, for errors.Is
}

func (e *Error) Error() string {
	s := e.Msg
	if e.Tensor != "" {
		s = fmt.Sprintf("tensor %q: %s", e.Tensor, s)
	}
	if e.File != "" {
		s = finalName(e.File) + ": " + s
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// Errno is the operating system's number for an IO error, or 0. On Windows, whose numbers are others, it is the number
// that C has for the commonest of them, else EIO.
func (e *Error) Errno() int {
	var n syscall.Errno
	found := errors.As(e.Err, &n)
	if found && runtime.GOOS != "windows" {
		return int(n)
	}
	const diskFull = syscall.Errno(112) // ERROR_DISK_FULL
	switch {
	case errors.Is(e.Err, fs.ErrNotExist):
		return 2 // ENOENT
	case errors.Is(e.Err, fs.ErrExist):
		return 17 // EEXIST
	case errors.Is(e.Err, fs.ErrPermission):
		return 13 // EACCES
	case found && n == diskFull:
		return 28 // ENOSPC
	case found:
		return 5 // EIO
	}
	return 0
}

func failf(s Status, format string, args ...any) *Error {
	return &Error{Status: s, Msg: fmt.Sprintf(format, args...)}
}

// at names the file and tensor an error is about, where it does not name them itself.
func at(err error, file, tensor string) error {
	if err == nil {
		return nil
	}
	e := *asError(err)
	if e.File == "" {
		e.File = file
	}
	if e.Tensor == "" {
		e.Tensor = tensor
	}
	return &e
}

// StatusOf is the status of an error of this package.
func StatusOf(err error) Status {
	if err == nil {
		return OK
	}
	return asError(err).Status
}

// AsError gives any error the form of this package's.
func AsError(err error) *Error { return asError(err) }

func asError(err error) *Error {
	var own *Error
	var codec *codecs.Error
	var path *fs.PathError
	var link *os.LinkError
	var sys *os.SyscallError
	var panicked *PanicError
	switch {
	case errors.As(err, &own):
		return own
	case errors.As(err, &panicked):
		return &Error{Status: Internal, Msg: "fault in the library: " + fmt.Sprint(panicked.Value), Err: err}
	case errors.As(err, &codec):
		s := map[codecs.Kind]Status{codecs.Invalid: InvalidArgument, codecs.Unsupported: UnsupportedFeature,
			codecs.Corrupt: Corrupt, codecs.Checksum: Checksum, codecs.Internal: Internal}[codec.Kind]
		return &Error{Status: s, Msg: err.Error(), Err: err}
	case errors.Is(err, context.Canceled):
		return &Error{Status: Cancelled, Msg: "cancelled", Err: err}
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return &Error{Status: Truncated, Msg: "the file ends too early; it is incomplete or was changed while it was read", Err: err}
	case errors.As(err, &path):
		return &Error{Status: IO, File: path.Path, Msg: path.Err.Error(), Err: err}
	case errors.As(err, &link):
		return &Error{Status: IO, File: link.New, Msg: link.Err.Error(), Err: err}
	case errors.As(err, &sys):
		return &Error{Status: IO, Msg: err.Error(), Err: err}
	}
	return &Error{Status: IO, Msg: err.Error(), Err: err}
}

// PanicError is a panic caught in a goroutine of this package.
type PanicError struct {
	Value any
	Stack []byte
}

func (p *PanicError) Error() string { return fmt.Sprint(p.Value) }
