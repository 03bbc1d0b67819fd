package tests

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Imports go one way: capi -> core -> codecs -> codecs/{rans, planes} -> codecs/cpu, and beside it core -> codecs/md5; codecs/gpu
// is a text and its layout, for all three.
func TestImportsGoOneWay(t *testing.T) {
	const module = "bigsmall.dev/bigsmall/"
	allowed := map[string][]string{
		"capi": {"core", "codecs", "codecs/cpu", "codecs/gpu"}, "core": {"codecs", "codecs/md5", "codecs/gpu", "codecs/reference"}, "codecs/reference": {},
		"codecs": {"codecs/rans", "codecs/planes", "codecs/gpu"}, "codecs/gpu": {},
		"codecs/rans": {"codecs/planes", "codecs/cpu"}, "codecs/planes": {"codecs/cpu"}, "codecs/md5": {"codecs/cpu"},
		"codecs/cpu": {},
	}
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", "../../capi", "../../core/...", "../../codecs/...").Output()
	require.NoError(t, err)
	d := json.NewDecoder(strings.NewReader(string(out)))
	seen := 0
	for d.More() {
		var p struct {
			ImportPath string
			Imports    []string
		}
		require.NoError(t, d.Decode(&p))
		name := strings.TrimPrefix(p.ImportPath, module)
		may, known := allowed[name]
		require.True(t, known, "a new package %s: say here what it may import", name)
		seen++
		for _, i := range p.Imports {
			if rest, ours := strings.CutPrefix(i, module); ours {
				require.Contains(t, may, rest, "%s imports %s", name, rest)
			}
			if name != "capi" {
				require.NotEqual(t, "C", i)
				require.NotEqual(t, "os/signal", i)
			}
		}
	}
	require.Len(t, allowed, seen)
}
