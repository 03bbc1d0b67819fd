package tests

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/zeebo/xxh3"

	"bigsmall.dev/bigsmall/core"
)

// withParity makes a `.bs` file with so much parity, and one without.
func withParity(t *testing.T, percent int, n int) (path string, whole, plain []byte) {
	t.Helper()
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(3, uint64(n)))
	source := write(t, filepath.Join(dir, "in", "m.safetensors"), safetensors([]tensor{
		{"a", "BF16", []uint64{uint64(n)}, bf16(r, n, .02)}, {"b", "U8", []uint64{5}, []byte{1, 2, 3, 4, 5}}}, nil))
	read := func(name string, percent int) []byte {
		_, err := core.Compress(source, filepath.Join(dir, name), core.Options{Parity: percent}, nil)
		require.NoError(t, err)
		bs, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		return bs
	}
	return filepath.Join(dir, "m.bs"), read("m.bs", percent), read("plain.bs", 0)
}

// repaired damages a file and repairs it.
func repaired(t *testing.T, path string, whole []byte, damage func(b []byte) []byte) (core.Repaired, error) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, damage(bytes.Clone(whole)), 0o644))
	return core.Repair(path, "", nil)
}

func requireBytes(t *testing.T, want []byte, path, what string) {
	t.Helper()
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got), what)
}

func TestParityTakesWhatWasAskedFor(t *testing.T) {
	for _, percent := range []int{1, 2, 10, 50, 100} {
		_, whole, plain := withParity(t, percent, 3_000_000)
		got := 100 * float64(len(whole)-len(plain)) / float64(len(plain))
		require.InDelta(t, float64(percent), got, .3+.04*float64(percent), "%d percent", percent)
	}
}

// Any single flipped bit, in the parity too, is repaired; the file is then what it was.
func TestParityRepairsEveryFlip(t *testing.T) {
	path, whole, _ := withParity(t, 10, 3000)
	r := rand.New(rand.NewPCG(5, 5))
	for i := 0; i < len(whole); i += 1 + r.IntN(60) {
		bit := byte(1) << r.IntN(8)
		did, err := repaired(t, path, whole, func(b []byte) []byte { b[i] ^= bit; return b })
		require.NoError(t, err, "byte %d", i)
		require.Equal(t, 1, did.Repaired, "byte %d", i)
		requireBytes(t, whole, path, "byte")
	}
}

func TestParityRepairs(t *testing.T) {
	path, whole, plain := withParity(t, 2, 6_000_000)
	header := int(10 + binary.LittleEndian.Uint32(whole[6:]))
	section := len(plain) - 48 // it begins where the plain file's trailer does
	r := rand.New(rand.NewPCG(6, 6))
	zero := func(from, to int) func([]byte) []byte {
		return func(b []byte) []byte { clear(b[from:to]); return b }
	}
	for name, damage := range map[string]func([]byte) []byte{
		"nothing":            nil,
		"the header":         zero(0, header),
		"the magic":          zero(0, 4),
		"a burst":            func(b []byte) []byte { r := len(b) / 70; clear(b[r*20 : r*21]); return b },
		"first head, table":  zero(section, section+500),
		"last table, head":   zero(len(whole)-500, len(whole)-48),
		"the trailer":        zero(len(whole)-48, len(whole)),
		"half of the parity": zero(section+(len(whole)-section)/2, len(whole)),
		"cut":                func(b []byte) []byte { return b[:len(b)-len(b)/80] },
		"cut by a byte":      func(b []byte) []byte { return b[:len(b)-1] },
		"something behind":   func(b []byte) []byte { return append(b, whole[:5000]...) },
		"cut and a flip":     func(b []byte) []byte { b[header+9] ^= 1; return b[:len(b)-3000] },
		"trailer of another": func(b []byte) []byte { copy(b[len(b)-48:], plain[len(plain)-48:]); return b },
		"scattered": func(b []byte) []byte {
			for range 12 {
				b[r.IntN(len(b)-300)] ^= byte(1 + r.IntN(255))
			}
			return b
		},
	} {
		if damage == nil {
			did, err := repaired(t, path, whole, func(b []byte) []byte { return b })
			require.NoError(t, err, name)
			require.Equal(t, core.Repaired{Files: 1}, did, name)
			continue
		}
		require.NoError(t, os.WriteFile(path, damage(bytes.Clone(whole)), 0o644))
		rep, err := core.Verify(path, "", "", nil)
		require.True(t, err != nil || len(rep.Bad) > 0, "%s: verify is content", name)
		did, err := core.Repair(path, "", nil)
		require.NoError(t, err, name)
		require.Equal(t, 1, did.Repaired, name)
		requireBytes(t, whole, path, name)
	}
	rep, err := core.Verify(path, "", "", nil)
	require.NoError(t, err)
	require.Empty(t, rep.Bad)
}

// What parity cannot repair stays as it is, and the message says how much it was.
func TestParityBeyondRepair(t *testing.T) {
	path, whole, plain := withParity(t, 2, 6_000_000)
	for name, c := range map[string]struct {
		damage func(b []byte) []byte
		says   string
	}{
		"too much":       {func(b []byte) []byte { clear(b[4096 : 4096+len(b)/20]); return b }, "beyond repair"},
		"cut in half":    {func(b []byte) []byte { return b[:len(b)/3] }, "trailer"},
		"another's tail": {func(b []byte) []byte { return append(b[:len(plain)/2], plain[len(plain)/2:]...) }, "parity"},
	} {
		_, err := repaired(t, path, whole, c.damage)
		require.Error(t, err, name)
		require.ErrorContains(t, err, c.says, name)
		require.ErrorContains(t, err, path, name)
		requireBytes(t, c.damage(bytes.Clone(whole)), path, name)
		left, err := filepath.Glob(filepath.Join(filepath.Dir(path), ".m.bs*"))
		require.NoError(t, err)
		require.Empty(t, left, name)
	}
}

func TestRepairWithoutParity(t *testing.T) {
	path, _, plain := withParity(t, 2, 100_000)
	did, err := repaired(t, path, plain, func(b []byte) []byte { return b })
	require.NoError(t, err)
	require.Equal(t, core.Repaired{Files: 1}, did)
	_, err = repaired(t, path, plain, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	require.Equal(t, core.Checksum, core.StatusOf(err))
	require.ErrorContains(t, err, "no parity")
	require.ErrorContains(t, err, `"a"`)
	for _, c := range []struct {
		percent int
		status  core.Status
	}{{-1, core.InvalidArgument}, {101, core.InvalidArgument}} {
		_, err := core.Compress(path, path+".x", core.Options{Parity: c.percent}, nil)
		require.Equal(t, c.status, core.StatusOf(err))
	}
}

func TestRepairElsewhereAndDirectories(t *testing.T) {
	path, whole, plain := withParity(t, 5, 200_000)
	damaged := bytes.Clone(whole)
	clear(damaged[5000:9000])
	require.NoError(t, os.WriteFile(path, damaged, 0o644))
	require.NoError(t, os.Chmod(path, 0o600))
	out := filepath.Join(t.TempDir(), "out.bs")
	did, err := core.Repair(path, out, nil)
	require.NoError(t, err)
	require.Equal(t, 1, did.Repaired)
	require.Positive(t, did.Pieces)
	requireBytes(t, whole, out, "elsewhere")
	requireBytes(t, damaged, path, "the damaged one")
	info, err := os.Stat(out)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())

	dir := filepath.Dir(path) // m.bs and plain.bs
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "deep"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "deep", "n.bs"), damaged, 0o644))
	plain[len(plain)/2] ^= 1
	require.NoError(t, os.WriteFile(filepath.Join(dir, "plain.bs"), plain, 0o644))
	did, err = core.Repair(dir, "", nil)
	require.ErrorContains(t, err, "plain.bs")
	require.Equal(t, 3, did.Files)
	require.Equal(t, 2, did.Repaired)
	requireBytes(t, whole, path, "in the directory")
	requireBytes(t, whole, filepath.Join(dir, "deep", "n.bs"), "below it")
}

// gfMul multiplies in GF(2^8) modulo x^8+x^4+x^3+x^2+1.
func gfMul(a, b byte) (p byte) {
	for ; b > 0; b >>= 1 {
		if b&1 > 0 {
			p ^= a
		}
		carry := a & 0x80
		if a <<= 1; carry > 0 {
			a ^= 0x1d
		}
	}
	return p
}

// The section is what FORMAT.md says, computed here in the plainest way.
func TestParityIsWhatTheFormatSays(t *testing.T) {
	_, whole, plain := withParity(t, 3, 500_000)
	u16 := func(at int) int { return int(binary.LittleEndian.Uint16(whole[at:])) }
	u64 := func(at int) int { return int(binary.LittleEndian.Uint64(whole[at:])) }
	section := len(plain) - 48
	require.Equal(t, "BGSMPAR\n", string(whole[section:section+8]))
	require.Equal(t, len(whole), u64(section+8))
	require.Equal(t, section, u64(section+16))
	data, parity := u16(section+28), u16(section+30)
	pieces := (section + 4095) / 4096
	rows := (pieces + data - 1) / data
	protected := append(bytes.Clone(whole[:section]), make([]byte, data*rows*4096-section)...)
	table := section + 64
	first := table + (4*(pieces+parity*rows)+63)/64*64
	last := first + parity*rows*4096
	require.Equal(t, whole[table:first], whole[last:len(whole)-48-64])
	require.Equal(t, whole[section:section+64], whole[len(whole)-48-64:len(whole)-48])
	inverse := map[byte]byte{}
	for a := 1; a < 256; a++ {
		for b := 1; b < 256; b++ {
			if gfMul(byte(a), byte(b)) == 1 {
				inverse[byte(a)] = byte(b)
			}
		}
	}
	r := rand.New(rand.NewPCG(7, 7))
	for range 200 {
		m, row, at := r.IntN(parity), r.IntN(rows), r.IntN(4096)
		want := byte(0)
		for c := range data {
			want ^= gfMul(protected[(c*rows+row)*4096+at], inverse[byte(data+m)^byte(c)])
		}
		require.Equal(t, want, whole[first+(m*rows+row)*4096+at])
	}
	for i := range pieces {
		require.Equal(t, uint32(xxh3.Hash(protected[i*4096:][:4096])), binary.LittleEndian.Uint32(whole[table+4*i:]))
	}
	require.Equal(t, xxh3.Hash(whole[section:len(whole)-48]), binary.LittleEndian.Uint64(whole[len(whole)-48+32:]))
}
