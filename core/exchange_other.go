//go:build !linux && !darwin

package core

import "errors"

func exchange(string, string) error { return errors.ErrUnsupported }
