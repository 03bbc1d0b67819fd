package tests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/core"
)

// vetted are the functions of dependencies that start goroutines. A panic in one would end the process that loaded this
// library. Each is here with why no call of ours comes to it; TestNoGoroutineOfADependency watches.
var vetted = map[string]string{
	"github.com/klauspost/compress/huff0: (Scratch).compress4Xp":          "nothing calls it",
	"github.com/klauspost/compress/zstd: (Decoder).Reset":                 "of streams; only DecodeAll is used",
	"github.com/klauspost/compress/zstd: (Decoder).startStreamDecoder":    "of streams",
	"github.com/klauspost/compress/zstd: (Encoder).nextBlock":             "of streams; only EncodeAll is used",
	"github.com/klauspost/compress/zstd: (Encoder).startJobWorkers":       "of streams",
	"github.com/klauspost/reedsolomon: (reedSolomon).codeSomeShardsAVXP":  "WithMaxGoroutines(1)",
	"github.com/klauspost/reedsolomon: (reedSolomon).codeSomeShardsGFNI":  "WithMaxGoroutines(1)",
	"github.com/klauspost/reedsolomon: (reedSolomon).codeSomeShardsP":     "WithMaxGoroutines(1)",
	"github.com/klauspost/reedsolomon: (reedSolomon).updateParityShardsP": "Update is not used",
	"github.com/klauspost/reedsolomon: cReadShards":                       "of streams, which are not used",
	"github.com/klauspost/reedsolomon: cWriteShards":                      "of streams",
}

// The one place that starts goroutines of ours, and recovers their panics.
const starter = "core: (runState).work"

type goPackage struct {
	ImportPath, Dir   string
	GoFiles, CgoFiles []string
	Standard          bool
}

func packages(t *testing.T) (all []goPackage) {
	t.Helper()
	out, err := exec.Command("go", "list", "-deps", "-json=ImportPath,Dir,GoFiles,CgoFiles,Standard", "../../capi").Output()
	require.NoError(t, err)
	d := json.NewDecoder(strings.NewReader(string(out)))
	for d.More() {
		var p goPackage
		require.NoError(t, d.Decode(&p))
		if !p.Standard {
			all = append(all, p)
		}
	}
	return all
}

// functions calls f for every function of a package.
func (p goPackage) functions(t *testing.T, f func(name string, d *ast.FuncDecl)) {
	t.Helper()
	for _, file := range append(slices.Clone(p.GoFiles), p.CgoFiles...) {
		tree, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.SkipObjectResolution|parser.ParseComments)
		require.NoError(t, err)
		for _, d := range tree.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				require.False(t, starts(d), "%s: a goroutine outside of a function", file)
				continue
			}
			name := fn.Name.Name
			if fn.Recv != nil {
				kind := fn.Recv.List[0].Type
				if star, ok := kind.(*ast.StarExpr); ok {
					kind = star.X
				}
				name = fmt.Sprintf("(%v).%s", kind, name)
			}
			f(name, fn)
		}
	}
}

// starts reports whether a goroutine is started within n.
func starts(n ast.Node) (found bool) {
	ast.Inspect(n, func(n ast.Node) bool {
		_, ok := n.(*ast.GoStmt)
		found = found || ok
		return !found
	})
	return found
}

func TestGoroutinesStartInOnePlace(t *testing.T) {
	const module = "bigsmall.dev/bigsmall/"
	var ours, others []string
	for _, p := range packages(t) {
		p.functions(t, func(name string, d *ast.FuncDecl) {
			if !starts(d) {
				return
			}
			if rest, mine := strings.CutPrefix(p.ImportPath, module); mine {
				ours = append(ours, rest+": "+name)
			} else {
				others = append(others, p.ImportPath+": "+name)
			}
		})
	}
	require.Equal(t, []string{starter}, ours)
	require.ElementsMatch(t, slices.Collect(maps.Keys(vetted)), others, "look whether a call of this library comes there, and write it down")
}

// While everything that uses a dependency runs, no goroutine is one that a dependency created.
func TestNoGoroutineOfADependency(t *testing.T) {
	r := rand.New(rand.NewPCG(8, 8))
	text := bytes.Repeat([]byte("a text that zstd likes better than any symbols; "), 30_000)
	for range 200 {
		text[r.IntN(len(text))]++
	}
	dir := t.TempDir()
	source := write(t, filepath.Join(dir, "m.safetensors"), safetensors([]tensor{
		{"a", "BF16", []uint64{300_000}, bf16(r, 300_000, .02)}, {"b", "U8", []uint64{uint64(len(text))}, text}}, nil))
	var stop atomic.Bool
	looked, found := 0, make(chan string, 1)
	go func() {
		buf := make([]byte, 1<<20)
		foreign := ""
		for !stop.Load() {
			looked++
			for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
				if strings.Contains(g, "created by github.com/") {
					foreign = g
				}
			}
		}
		found <- foreign
	}()
	path := filepath.Join(dir, "m.bs")
	for range 8 {
		_, err := core.Compress(source, path, core.Options{Parity: 30, Mode: codecs.Storage}, nil)
		require.NoError(t, err)
		bs, err := os.ReadFile(path)
		require.NoError(t, err)
		clear(bs[5000:30_000])
		require.NoError(t, os.WriteFile(path, bs, 0o644))
		_, err = core.Repair(path, "", nil)
		require.NoError(t, err)
		_, err = core.Decompress(path, filepath.Join(dir, "back.safetensors"), "", core.Options{}, nil)
		require.NoError(t, err)
	}
	stop.Store(true)
	require.Empty(t, <-found)
	require.Greater(t, looked, 100)
}

// Every function that C calls goes through `call`, which recovers, but for those that do nothing that could panic.
func TestEveryExportRecovers(t *testing.T) {
	harmless := []string{"go_version", "go_status_name", "go_dtype_name", "go_workers", "go_set_workers", "go_cpu", "go_compress_bound"}
	bodies := map[string]*ast.FuncDecl{}
	var exports []string
	for _, p := range packages(t) {
		if p.ImportPath != "bigsmall.dev/bigsmall/capi" {
			continue
		}
		p.functions(t, func(name string, d *ast.FuncDecl) {
			bodies[name] = d
			if d.Doc != nil && strings.Contains(d.Doc.Text()+d.Doc.List[len(d.Doc.List)-1].Text, "//export "+name) {
				exports = append(exports, name)
			}
		})
	}
	require.Greater(t, len(exports), 30)
	// A body of one statement that hands everything on, at last to call.
	var guarded func(name string, depth int) bool
	guarded = func(name string, depth int) bool {
		d := bodies[name]
		if name == "call" {
			return true
		}
		if d == nil || depth == 0 {
			return false
		}
		for _, s := range d.Body.List {
			var x ast.Expr
			switch s := s.(type) {
			case *ast.ReturnStmt:
				if len(s.Results) == 1 {
					x = s.Results[0]
				}
			case *ast.ExprStmt:
				x = s.X
			}
			if c, ok := x.(*ast.CallExpr); ok {
				if f, ok := c.Fun.(*ast.Ident); ok && guarded(f.Name, depth-1) {
					return true
				}
			}
		}
		return false
	}
	for _, name := range exports {
		if !slices.Contains(harmless, name) {
			require.True(t, guarded(name, 4), "%s does not go through call", name)
		}
	}
}
