package tests

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/core"
)

// memoryOf reads a figure of this process, such as VmHWM, the most it ever had resident, in bytes.
func memoryOf(t *testing.T, key string) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	require.NoError(t, err)
	m := regexp.MustCompile(key + `:\s+([0-9]+) kB`).FindSubmatch(text)
	require.NotNil(t, m)
	n, err := strconv.ParseInt(string(m[1]), 10, 64)
	require.NoError(t, err)
	return n << 10
}

// What TestRefusingTakesLittle starts: it refuses one file after the other under the limit, which stays.
func TestRefuseInAChild(t *testing.T) {
	dir := os.Getenv("BIGSMALL_TEST_REFUSE")
	if dir == "" {
		t.Skip("only as a child of TestRefusingTakesLittle")
	}
	scratch := t.TempDir()
	_, err := refusal(filepath.Join(dir, "good"), filepath.Join(scratch, "good")) // which warms everything up
	require.NoError(t, err)
	limit := uint64(memoryOf(t, "VmSize") + 256<<20)
	require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_AS, &syscall.Rlimit{Cur: limit, Max: limit}))
	for _, name := range strings.Fields(os.Getenv("BIGSMALL_TEST_FILES")) {
		before := memoryOf(t, "VmHWM")
		fmt.Println("file", name)
		step, err := refusal(filepath.Join(dir, name), filepath.Join(scratch, "out"))
		require.Error(t, err, name)
		header := int64(0)
		if info, err := os.Stat(filepath.Join(dir, name)); step == "open" && err == nil && info.Mode().IsRegular() {
			header = info.Size() // of which the header is nearly all
		}
		require.LessOrEqual(t, memoryOf(t, "VmHWM")-before, 64<<20+4*header, name)
	}
}

// Refusing takes at most 64 MB and four times the header: resident, and under a limit of address space. Running out of
// memory would end the process that loaded the library, and nothing could recover it.
func TestRefusingTakesLittle(t *testing.T) {
	dir := t.TempDir()
	good, err := os.ReadFile(compressed(t, []tensor{{"a", "U8", []uint64{3}, []byte{1, 2, 3}}}))
	require.NoError(t, err)
	write(t, filepath.Join(dir, "good"), good)
	var names []string
	add := func(name string, b []byte) {
		write(t, filepath.Join(dir, name), b)
		names = append(names, name)
	}
	for _, l := range expected(t) {
		if strings.HasPrefix(l.name, "index-") {
			text, err := os.ReadFile(filepath.Join(refuse, l.name, core.IndexName))
			require.NoError(t, err)
			write(t, filepath.Join(dir, l.name, core.IndexName), text)
			write(t, filepath.Join(dir, l.name, "m.bs"), good)
			names = append(names, l.name)
			continue
		}
		b, err := os.ReadFile(filepath.Join(refuse, l.name))
		require.NoError(t, err)
		add(l.name, b)
	}
	for name, b := range swollen(t) {
		add(strings.ReplaceAll(name, " ", "-"), b)
	}
	many := bytes.Repeat([]byte(`"0":"m.bs",`), 300_000)
	for i := range 300_000 {
		copy(many[11*i+1:], strconv.Itoa(i%10))
	}
	write(t, filepath.Join(dir, "index-many", core.IndexName), append(append([]byte(`{"weight_map":{`), many...), `"z":""}}`...))
	write(t, filepath.Join(dir, "index-many", "m.bs"), good)
	names = append(names, "index-many")

	c := exec.Command(os.Args[0], "-test.run", "^TestRefuseInAChild$", "-test.v")
	c.Env = append(os.Environ(), "BIGSMALL_TEST_REFUSE="+dir, "BIGSMALL_TEST_FILES="+strings.Join(names, " "), "GOTRACEBACK=single")
	c.WaitDelay = time.Second
	timer := time.AfterFunc(3*time.Minute, func() { _ = c.Process.Kill() })
	defer timer.Stop()
	out, err := c.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Equal(t, len(names), bytes.Count(out, []byte("file ")), "%s", out)
}
