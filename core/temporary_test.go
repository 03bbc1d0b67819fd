package core

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

func listed(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func put(t *testing.T, path, text string) string {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
	return path
}

// What a killed process left goes; what a living one makes, and what only looks like it, stays.
func TestLeftovers(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "m.bs")
	living, err := newTemporary(target, 0o600, false)
	require.NoError(t, err)
	defer living.abandon()
	put(t, filepath.Join(dir, ".m.bs.tmp-123-0123abcd"), "half")
	put(t, filepath.Join(dir, ".m.bs.tmp-124-0123abcd", "in", "x.bs"), "half")
	others := []string{".m.bs.tmp-123-0123abc", ".m.bs.tmp-x", ".n.bs.tmp-123-0123abcd", ".xm.bs.tmp-123-0123abcd", "m.bs.tmp-123-0123abcd"}
	for _, name := range others {
		put(t, filepath.Join(dir, name), "another's")
	}
	require.NoError(t, os.Symlink("m.bs", filepath.Join(dir, ".m.bs.tmp-125-0123abcd")))
	next, err := newTemporary(target, 0, false)
	require.NoError(t, err)
	require.NoError(t, next.publish())
	require.ElementsMatch(t, append(others, ".m.bs.tmp-125-0123abcd", "m.bs", filepath.Base(living.Name())), listed(t, dir))
}

func TestLongNames(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, strings.Repeat("n", 255))
	tmp, err := newTemporary(target, 0o600, false)
	require.NoError(t, err)
	require.NoError(t, tmp.publish())
	require.Equal(t, []string{filepath.Base(target)}, listed(t, dir))
}

// A directory that was moved aside when its process died comes back, unless something has its name.
func TestLeftoverOfAReplacement(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "m")
	put(t, filepath.Join(dir, ".m.old-123-0123abcd", "weights"), "old")
	sweep(target)
	require.Equal(t, []string{"m"}, listed(t, dir))
	put(t, filepath.Join(dir, ".m.old-123-0123abcd", "weights"), "older")
	sweep(target)
	require.Equal(t, []string{"m"}, listed(t, dir))
	text, err := os.ReadFile(filepath.Join(target, "weights"))
	require.NoError(t, err)
	require.Equal(t, "old", string(text))
}

func TestDirectoriesTakeTheirPlace(t *testing.T) {
	for name, replace := range map[string]func(*temporaryTree) error{"at once": (*temporaryTree).replace, "by two renames": (*temporaryTree).replaceByTwo} {
		dir := t.TempDir()
		target := filepath.Join(dir, "m")
		put(t, filepath.Join(target, "old"), "old")
		tmp, err := newTemporaryTree(target, 0o755, true)
		require.NoError(t, err, name)
		put(t, filepath.Join(tmp.name, "new"), "new")
		require.NoError(t, replace(tmp), name)
		require.Equal(t, []string{"new"}, listed(t, target), name)
		tmp.abandon()
		require.Equal(t, []string{"m"}, listed(t, dir), name)
	}
}

// Without force only what is empty gives way, also where it came while the new one was made.
func TestDirectoriesDoNotReplace(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "m")
	for _, found := range []string{"nothing", "empty", "full"} {
		tmp, err := newTemporaryTree(target, 0o755, false)
		require.NoError(t, err)
		put(t, filepath.Join(tmp.name, "new"), "new")
		want := "new"
		switch found {
		case "empty":
			require.NoError(t, os.Mkdir(target, 0o755))
		case "full":
			want = "old"
			put(t, filepath.Join(target, want), "old")
		}
		err = tmp.publish()
		require.Equal(t, found == "full", err != nil, found)
		require.Equal(t, []string{want}, listed(t, target), found)
		require.Equal(t, []string{"m"}, listed(t, dir), found)
		require.NoError(t, os.RemoveAll(target))
	}
	put(t, filepath.Join(target, "old"), "old")
	_, err := newTemporaryTree(target, 0o755, false)
	require.ErrorIs(t, err, os.ErrExist)
	require.Equal(t, []string{"m"}, listed(t, dir))
}

// Many at one target do not take each other's for leftovers.
func TestManyAtOneTarget(t *testing.T) {
	target := filepath.Join(t.TempDir(), "m")
	var group sync.WaitGroup
	failures := make(chan error, 16)
	for range 8 {
		group.Add(1)
		go func() {
			defer group.Done()
			for range 150 {
				tree, err := newTemporaryTree(target, 0o755, false)
				if err == nil {
					err = os.WriteFile(filepath.Join(tree.name, "x"), nil, 0o600)
					tree.abandon()
				}
				if err == nil {
					var file *temporary
					if file, err = newTemporary(target, 0, false); err == nil {
						_, err = file.WriteString("x")
						file.abandon()
					}
				}
				if err != nil {
					failures <- err
					return
				}
			}
		}()
	}
	group.Wait()
	close(failures)
	for err := range failures {
		require.NoError(t, err)
	}
	require.Empty(t, listed(t, filepath.Dir(target)))
}
