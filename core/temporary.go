package core

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
)

// What is being written stands beside its target, in a file or directory that becomes the target at once, or vanishes.
// Whoever makes it holds a lock on it. A process that is killed leaves it behind without one: the next that writes to the
// same target takes it away.

type lockState int

const (
	lockHeld    lockState = iota // it is ours now
	lockTaken                    // by another
	lockUnknown                  // there are no locks here
)

// temporary is such a file.
type temporary struct {
	*os.File
	target    string
	noReplace bool
}

// newTemporary makes the file that will become target. It gets the permissions of what it replaces, else mode's, those of
// the source: what was private stays private. A mode of 0 stands for what any new file gets.
func newTemporary(target string, mode os.FileMode, noReplace bool) (*temporary, error) {
	if noReplace {
		if _, err := os.Lstat(target); err == nil {
			return nil, existsAlready(target)
		}
	}
	target, err := followLinks(target)
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(target); err == nil {
		if !info.Mode().IsRegular() {
			return nil, &Error{Status: InvalidArgument, File: target, Msg: "is a directory or a device: give the name of a file to write"}
		}
		mode = info.Mode()
	}
	if _, err := os.Stat(filepath.Dir(target)); err != nil {
		return nil, inFile(err, filepath.Dir(target))
	}
	sweep(target)
	create := os.FileMode(0o600)
	if mode == 0 {
		create = 0o666 // less the umask
	}
	f, _, err := makeBeside(target, func(name string) (*os.File, error) {
		return os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, create)
	})
	if err != nil {
		return nil, err
	}
	t := &temporary{f, target, noReplace}
	if mode != 0 {
		if err := f.Chmod(mode.Perm()); err != nil {
			t.abandon()
			return nil, err
		}
	}
	return t, nil
}

func existsAlready(path string) error {
	return &Error{Status: IO, File: path, Msg: "exists already", Err: os.ErrExist}
}

// followLinks is what a link names, which is what is replaced: it keeps pointing where it points.
func followLinks(path string) (string, error) {
	name := path
	for range 40 {
		to, err := os.Readlink(path)
		if err != nil {
			return path, nil
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(path), to)
		}
		path = to
	}
	return "", &Error{Status: IO, File: name, Msg: "links to itself", Err: syscall.ELOOP}
}

// A name beside target is the target's with one of these and numbers of its own behind.
const (
	newMark = ".tmp-" // what will become the target
	oldMark = ".old-" // a directory that was it; see replaceByTwo
)

var leftover = regexp.MustCompile(`^(\.tmp-|\.old-)[0-9]+-[0-9a-f]{8}$`)

// beside matches an element of a path that is such a name.
var beside = regexp.MustCompile(`(^|[/\\])\.([^/\\]+)\.tmp-[0-9]+-[0-9a-f]{8}($|[/\\])`)

// finalName is what a user knows a file by that is being written, or that is in a directory that is.
func finalName(path string) string {
	for beside.MatchString(path) { // of two in a row the separator between them belongs to the first
		path = beside.ReplaceAllString(path, "$1$2$3")
	}
	return path
}

// longestName leaves room in the 255 bytes that a name may have.
const longestName = 200

// hidden is what the names beside target begin with.
func hidden(target string) string {
	base := filepath.Base(target)
	return "." + base[:min(len(base), longestName)]
}

func besideName(target, mark string) string {
	return filepath.Join(filepath.Dir(target), fmt.Sprintf("%s%s%s-%08x", hidden(target), mark, pid, rand.Uint32()))
}

// makeBeside makes a new file or directory next to target, opened and locked.
func makeBeside(target string, create func(name string) (*os.File, error)) (f *os.File, name string, err error) {
	for {
		name = besideName(target, newMark)
		if f, err = create(name); err != nil {
			if os.IsExist(err) || errors.Is(err, errSwept) {
				continue
			}
			return nil, "", err
		}
		taken := lock(f) == lockTaken // by someone who found it before it was locked, and removes it
		if !taken {
			made, err1 := f.Stat()
			now, err2 := os.Lstat(name)
			taken = err1 == nil && (os.IsNotExist(err2) || err2 == nil && !os.SameFile(made, now))
		}
		if !taken {
			return f, name, nil
		}
		f.Close()
	}
}

// errSwept says that a directory was taken for a leftover before it could be locked.
var errSwept = errors.New("removed by another process")

// sweep removes what processes that are no more left beside target. What it cannot remove stays.
func sweep(target string) {
	dir, base := filepath.Dir(target), hidden(target)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), base)
		if !ours || !leftover.MatchString(rest) || !e.IsDir() && !e.Type().IsRegular() {
			continue
		}
		name := filepath.Join(dir, e.Name())
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		if lock(f) == lockHeld {
			if !strings.HasPrefix(rest, oldMark) || os.Rename(name, target) != nil {
				os.RemoveAll(name)
			}
		}
		f.Close()
	}
}

// publish syncs the file and gives it its name. The lock is kept until it has it.
func (t *temporary) publish() error {
	err := t.Sync()
	if err == nil && !renamesOpenFiles {
		err = t.Close()
	}
	switch {
	case err != nil:
	case t.noReplace:
		err = t.rename()
	default:
		err = os.Rename(t.Name(), t.target)
	}
	if err != nil {
		t.abandon()
		return err
	}
	t.Close()
	syncDir(t.target)
	return nil
}

// rename gives the file its name unless something has it. Unlike a rename, a link never replaces; where the file system has
// no links, another look must do.
func (t *temporary) rename() error {
	err := os.Link(t.Name(), t.target)
	switch {
	case err == nil:
		return os.Remove(t.Name())
	case os.IsExist(err):
		return existsAlready(t.target)
	}
	if _, err := os.Lstat(t.target); err == nil {
		return existsAlready(t.target)
	}
	return os.Rename(t.Name(), t.target)
}

// abandon removes the file; a second time it does nothing.
func (t *temporary) abandon() {
	os.Remove(t.Name())
	t.Close()
}

// temporaryTree is a directory that will become another.
type temporaryTree struct {
	lock         *os.File
	name, target string
	force        bool
}

// newTemporaryTree makes the directory that will become target, with the permissions of mode. force replaces a target that
// holds something.
func newTemporaryTree(target string, mode os.FileMode, force bool) (*temporaryTree, error) {
	target, err := followLinks(filepath.Clean(target))
	if err != nil {
		return nil, err
	}
	sweep(target)
	if info, err := os.Stat(target); err == nil {
		if !info.IsDir() {
			return nil, &Error{Status: IO, File: target, Msg: "exists and is no directory", Err: os.ErrExist}
		}
		entries, err := os.ReadDir(target)
		if err != nil && !os.IsNotExist(err) { // gone while it was read, as one that was replaced: publish looks again
			return nil, err
		}
		if len(entries) > 0 && !force {
			return nil, notEmpty(target)
		}
	}
	f, name, err := makeBeside(target, func(name string) (*os.File, error) {
		if err := os.Mkdir(name, 0o700); err != nil {
			return nil, err
		}
		f, err := os.Open(name)
		if os.IsNotExist(err) {
			err = errSwept
		}
		return f, err
	})
	if err != nil {
		return nil, err
	}
	t := &temporaryTree{f, name, target, force}
	if err := os.Chmod(name, mode.Perm()|0o700); err != nil {
		t.abandon()
		return nil, err
	}
	return t, nil
}

func notEmpty(target string) error {
	return &Error{Status: IO, File: target, Msg: "exists and is not empty: remove it, or replace it by force", Err: os.ErrExist}
}

// publish gives the directory its name.
func (t *temporaryTree) publish() error {
	err := os.Rename(t.name, t.target)
	if errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ENOTEMPTY) {
		switch {
		case t.force:
			err = t.replace()
		case syscall.Rmdir(t.target) == nil: // it was empty
			err = os.Rename(t.name, t.target)
		default:
			err = notEmpty(t.target)
		}
	}
	t.abandon() // of a replaced target, what was there before
	if err == nil {
		syncDir(t.target)
	}
	return err
}

// replace changes places with the target, at once where the system can do that.
func (t *temporaryTree) replace() error {
	err := exchange(t.name, t.target)
	if errors.Is(err, errors.ErrUnsupported) {
		return t.replaceByTwo()
	}
	return err
}

// replaceByTwo does it by two renames, between which nothing is at the target. Of a process that is killed there, sweep
// puts the old one back.
func (t *temporaryTree) replaceByTwo() error {
	old, err := os.Open(t.target)
	if err != nil {
		return err
	}
	defer old.Close()
	lock(old)
	aside := besideName(t.target, oldMark)
	if err := os.Rename(t.target, aside); err != nil {
		return err
	}
	if err := os.Rename(t.name, t.target); err != nil {
		return errors.Join(err, os.Rename(aside, t.target))
	}
	t.name = aside
	return nil
}

// abandon removes the directory; where it has become the target there is nothing to remove.
func (t *temporaryTree) abandon() {
	os.RemoveAll(t.name)
	t.lock.Close()
}

// syncDir makes a rename durable; file systems that cannot are left alone.
func syncDir(path string) {
	if d, err := os.Open(filepath.Dir(path)); err == nil {
		_ = d.Sync()
		d.Close()
	}
}
