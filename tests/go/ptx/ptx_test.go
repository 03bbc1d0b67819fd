package ptx

import (
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs/gpu"
)

// of is a kernel with a u64 parameter, %rd1, and a thread's number, %r1.
func of(body string) string {
	return `.version 6.4
.target sm_75
.address_size 64
.shared .align 4 .b8 room[256];
.visible .entry k(
	.param .u64 k_param_0
)
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<20>;
	.reg .b64 %rd<20>;
	ld.param.u64 %rd1, [k_param_0];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
` + body + `
	ret;
}`
}

func run(t *testing.T, body string, threads int) ([]uint32, error) {
	m, err := Parse(of(body))
	require.NoError(t, err)
	r := &Region{Name: "out", Base: 0x1000, Bytes: make([]byte, 4*threads), Writable: true}
	err = m.Launch("k", 1, threads, []*Region{r}, 10000, uint64(0x1000))
	out := make([]uint32, threads)
	for i := range out {
		out[i] = binary.LittleEndian.Uint32(r.Bytes[4*i:])
	}
	return out, err
}

func TestLanesPartAndMeet(t *testing.T) {
	out, err := run(t, `
	and.b32 %r2, %r1, 1;
	setp.eq.s32 %p1, %r2, 0;
	mov.u32 %r3, 7;
	@%p1 bra $even;
	mov.u32 %r3, 9;
$even:
	bar.warp.sync -1;
	vote.sync.ballot.b32 %r4, %p1, -1;
	add.s32 %r3, %r3, %r4;
	st.global.u32 [%rd3], %r3;`, 32)
	require.NoError(t, err)
	for i, v := range out {
		require.Equal(t, uint32(0x55555555+7+2*(i&1)), v)
	}
}

func TestWarpsMeetAtBarriers(t *testing.T) {
	out, err := run(t, `
	shl.b32 %r2, %r1, 2;
	st.shared.u32 [%r2], %r1;
	bar.sync 0;
	xor.b32 %r3, %r1, 63;
	shl.b32 %r3, %r3, 2;
	ld.shared.u32 %r4, [%r3];
	st.global.u32 [%rd3], %r4;`, 64)
	require.NoError(t, err)
	for i, v := range out {
		require.Equal(t, uint32(63-i), v)
	}
}

func TestArithmetic(t *testing.T) {
	for _, c := range []struct {
		body string
		want uint32
	}{
		{"mov.u32 %r2, 0x12345678; mov.u32 %r3, 0x9abcdef0; shf.r.wrap.b32 %r4, %r2, %r3, 8;", 0xf0123456},
		{"mov.u32 %r2, 0x12345678; mov.u32 %r3, 0x9abcdef0; shf.r.clamp.b32 %r4, %r2, %r3, 40;", 0x9abcdef0},
		{"mov.u32 %r2, 0x12345678; mov.u32 %r3, 0x9abcdef0; shf.l.wrap.b32 %r4, %r2, %r3, 8;", 0xbcdef012},
		{"mov.u32 %r2, 0x12345678; mov.u32 %r3, 0x9abcdef0; prmt.b32 %r4, %r2, %r3, 0x7b40;", 0x9a00f078},
		{"mov.u32 %r2, 5; mov.u32 %r3, 0xffffffff; bfi.b32 %r4, %r2, %r3, 4, 8;", 0xfffff05f},
		{"mov.u32 %r2, 1; shl.b32 %r4, %r2, 32;", 0},
		{"mov.u32 %r2, 0xf0; clz.b32 %r4, %r2;", 24},
		{"mov.u64 %rd4, 0xffffffffffffffff; mul.hi.u64 %rd5, %rd4, %rd4; cvt.u32.u64 %r4, %rd5;", 0xfffffffe},
		{"mov.u32 %r2, 3; setp.lt.s32 %p1, %r2, -1; selp.b32 %r4, 1, 2, %p1;", 2},
		{"mov.u32 %r2, 3; setp.lt.u32 %p1, %r2, -1; selp.b32 %r4, 1, 2, %p1;", 1},
	} {
		out, err := run(t, lines(c.body)+"\n\tst.global.u32 [%rd3], %r4;", 32)
		require.NoError(t, err, c.body)
		require.Equal(t, fmt.Sprintf("%#x", c.want), fmt.Sprintf("%#x", out[5]), c.body)
	}
}

func lines(body string) string {
	out := ""
	for _, c := range body {
		out += string(c)
		if c == ';' {
			out += "\n"
		}
	}
	return out
}

func TestWhatIsWrongIsFound(t *testing.T) {
	for body, want := range map[string]string{
		"ld.global.u32 %r2, [%rd3+128];":                                                                "where there is nothing",
		"add.s64 %rd4, %rd3, 2;\nld.global.u32 %r2, [%rd4];":                                            "not aligned",
		"mov.u32 %r2, 252;\nld.shared.u64 %rd4, [%r2];":                                                 "shared memory",
		"$again:\nbra $again;":                                                                          "still running",
		"setp.lt.u32 %p1, %r1, 5;\n@%p1 bra $on;\nbar.sync 0;\n$on:":                                    "a barrier that lanes",
		"setp.lt.u32 %p1, %r1, 5;\n@%p1 bra $on;\nvote.sync.ballot.b32 %r2, %p1, -1;\n$on:":             "names the lanes",
		"setp.lt.u32 %p1, %r1, 5;\n@%p1 bra $on;\nshfl.sync.idx.b32 %r2, %r1, 3, 31, 0xffffffe0;\n$on:": "elsewhere",
	} {
		_, err := run(t, body, 32)
		require.ErrorContains(t, err, want, body)
	}
	m, err := Parse(of("st.global.u32 [%rd3], %r1;"))
	require.NoError(t, err)
	r := &Region{Name: "constants", Base: 0x1000, Bytes: make([]byte, 128)}
	require.ErrorContains(t, m.Launch("k", 1, 32, []*Region{r}, 100, uint64(0x1000)), "a write to constants")
	_, err = Parse(of("fma.rn.f32 %r2, %r3, %r4, %r5;"))
	require.ErrorContains(t, err, "instruction fma.rn.f32")
}

// The text that is shipped parses whole.
func TestParsesTheKernels(t *testing.T) {
	m, err := Parse(gpu.PTX)
	require.NoError(t, err)
	for _, name := range []string{gpu.Decode8, gpu.Decode16, gpu.Decode32, gpu.Restart, gpu.Verify, gpu.Gather} {
		require.NotNil(t, m.kernels[name], name)
	}
}
