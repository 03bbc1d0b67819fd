package codecs

import "fmt"

// Kind says what the caller can do about an error. core and the C library give each a status of its own.
type Kind int

const (
	Invalid     Kind = iota + 1 // the call is wrong
	Unsupported                 // valid, but newer than this library or outside what it knows
	Corrupt                     // the bytes contradict the format
	Checksum                    // stored and computed checksums differ
	Internal                    // a fault of this library
)

// Error is what this package returns: what is wrong, with the numbers.
type Error struct {
	Kind Kind
	Msg  string
}

func (e *Error) Error() string { return e.Msg }

func errorf(k Kind, format string, args ...any) error {
	return &Error{k, fmt.Sprintf(format, args...)}
}

func corrupt(format string, args ...any) error { return errorf(Corrupt, format, args...) }
