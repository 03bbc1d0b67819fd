package tests

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/codecs/gpu"
	"bigsmall.dev/bigsmall/core"
	"bigsmall.dev/bigsmall/tests/go/ptx"
)

// These run the PTX that is shipped over what the encoder writes, in an emulator that checks every access, and compare with
// the plain decoder. Speed and races between warps only a GPU shows.

// onDevice is a tensor as kernels get it: payload with its slack, program, record.
type onDevice struct {
	name    string
	want    []byte // by the plain decoder
	word    int
	blocks  int
	fields  int
	coded   bool // a stream of the coder in every block, and only of the first field
	payload *ptx.Region
	program *ptx.Region
	record  *ptx.Region
	out     *ptx.Region
	points  *ptx.Region
	status  *ptx.Region
}

const guard = 64

func place(name string, base uint64, n int, writable bool) *ptx.Region {
	r := &ptx.Region{Name: name, Base: base, Bytes: make([]byte, n), Writable: writable}
	for i := range r.Bytes {
		r.Bytes[i] = 0x5a
	}
	return r
}

func prepare(t *testing.T, r *core.Reader, i int) *onDevice {
	t.Helper()
	info, err := r.Tensor(i)
	require.NoError(t, err)
	n, m, err := r.Plan(i, nil, nil, nil)
	if err == nil {
		payload, program := make([]byte, n), make([]byte, m)
		if _, _, err = r.Plan(i, payload, program, nil); err == nil {
			d := &onDevice{name: info.Name, want: make([]byte, info.Bytes), word: int(program[13]), fields: int(program[12])}
			require.NoError(t, r.Decode(i, d.want, nil))
			d.blocks = int(binary.LittleEndian.Uint32(program[8:]))
			d.payload = &ptx.Region{Name: "payload", Base: 0x1_0000_0000, Bytes: append(payload, make([]byte, gpu.Slack)...)}
			d.program = &ptx.Region{Name: "program", Base: 0x2_0000_0000, Bytes: program}
			d.record = place("record", 0x3_0000_0000, gpu.RecordBytes, false)
			d.out = place("out", 0x4_0000_0000, len(d.want)+guard, true)
			d.points = place("restart points", 0x5_0000_0000, gpu.RestartBytes(d.blocks, 3), true)
			d.status = place("status", 0x6_0000_0000, 4, true)
			for k, base := range []uint64{d.payload.Base, d.out.Base, d.program.Base, d.points.Base} {
				binary.LittleEndian.PutUint64(d.record.Bytes[8*k:], base)
			}
			d.coded = true
			planes := program[binary.LittleEndian.Uint32(program[16:]):]
			for b := range d.blocks {
				for f := range d.fields {
					kind := planes[(b*d.fields+f)*gpu.PlaneBytes+24]
					d.coded = d.coded && (kind == gpu.Coded) == (f == 0)
				}
			}
			return d
		}
	}
	require.Equal(t, core.UnsupportedFeature, core.StatusOf(err), "%s: %v", info.Name, err)
	return nil
}

var kernels = func() *ptx.Module {
	m, err := ptx.Parse(gpu.PTX)
	if err != nil {
		panic(err)
	}
	return m
}()

// launch runs a kernel over the tensor's streams and gives its status.
func (d *onDevice) launch(t *testing.T, kernel string, segments int, args ...any) uint32 {
	t.Helper()
	binary.LittleEndian.PutUint32(d.status.Bytes, gpu.Sound)
	mem := []*ptx.Region{d.payload, d.program, d.record, d.out, d.points, d.status}
	quads := (d.blocks*segments + gpu.Streams - 1) / gpu.Streams
	all := append([]any{d.record.Base, uint64(0), uint32(0)}, args...)
	require.NoError(t, kernels.Launch(kernel, quads, gpu.Threads, mem, 2_000_000, append(all, d.status.Base)...), d.name)
	return binary.LittleEndian.Uint32(d.status.Bytes)
}

func (d *onDevice) segmentsLog(log int) {
	binary.LittleEndian.PutUint32(d.program.Bytes[24:], uint32(log))
}

func (d *onDevice) decode(t *testing.T, segments int) uint32 {
	t.Helper()
	for i := range d.out.Bytes {
		d.out.Bytes[i] = 0x5a
	}
	kernel := map[int]string{1: gpu.Decode8, 2: gpu.Decode16, 4: gpu.Decode32}[d.word]
	return d.launch(t, kernel, segments, uint64(0))
}

func (d *onDevice) requireEqual(t *testing.T) {
	t.Helper()
	n := len(d.want)
	require.True(t, string(d.want) == string(d.out.Bytes[:n]), "%s differs", d.name)
	for _, b := range d.out.Bytes[n:] {
		require.Equal(t, byte(0x5a), b, "%s: a write behind the end", d.name)
	}
}

// kernelZoo is small tensors of every form that the kernels have.
func kernelZoo() []tensor {
	r := rand.New(rand.NewPCG(3, 4))
	half := func(n int) []byte { // binary16 numbers, subnormal ones among them
		var b []byte
		for range n {
			b = binary.LittleEndian.AppendUint16(b, uint16(r.IntN(2)<<15|min(int(math.Abs(r.NormFloat64())*2500), 31743)))
		}
		return b
	}
	widened := func(n int) []byte {
		var b []byte
		for range n {
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(int(r.NormFloat64()*300))*0x1p-24))
		}
		return b
	}
	spiked := func(b []byte, word, n int) []byte {
		for range n {
			at := r.IntN(len(b)/word) * word
			b[at+word-1] = byte(r.IntN(256))
		}
		return b
	}
	nan := bf16(r, 3000, 0.02)
	for i := 0; i < len(nan); i += 600 {
		binary.LittleEndian.PutUint16(nan[i:], uint16(0x7f81+i))
	}
	shifted := bf16(r, 6000, 0.02)
	for i := 0; i < len(shifted); i += 2 {
		shifted[i] &= 0xf0
	}
	wide := func(n int) []byte {
		var b []byte
		for range n {
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(float32(math.Exp(r.NormFloat64()*20))))
		}
		return b
	}
	var f8 []byte
	for _, v := range half(9000) {
		f8 = append(f8, v&0xbf)
	}
	list := []tensor{
		{"nan", "BF16", nil, nan},
		{"shifted", "BF16", nil, shifted},
		{"few patches", "BF16", nil, spiked(bf16(r, 9000, 0.02), 2, 9)},
		{"many patches", "BF16", nil, spiked(bf16(r, 20000, 0.02), 2, 200)},
		{"half", "F16", nil, half(9000)},
		{"widened", "F32", nil, widened(9000)},
		{"f32", "F32", nil, spiked(f32(r, 9000, 0.02), 4, 40)},
		{"wide", "F32", nil, wide(9000)},
		{"f8", "F8_E4M3", nil, f8},
		{"f8 e5m2", "F8_E5M2", nil, f8},
		{"two blocks", "BF16", nil, spiked(bf16(r, 65537, 0.02), 2, 70)},
		{"five blocks", "BF16", nil, append(bf16(r, 4*65536, 0.02), bf16(r, 1000, 3e4)...)},
	}
	for _, n := range []int{1, 31, 32, 33, 127, 128, 129, 160, 4095} {
		list = append(list, tensor{"bf16 of " + string(rune('0'+n%10)) + string(rune('a'+n%26)), "BF16", nil, bf16(r, n, 0.02)})
		list = append(list, tensor{"f32 of " + string(rune('0'+n%10)) + string(rune('a'+n%26)), "F32", nil, f32(r, n, 0.02)})
	}
	words := map[string]int{"BF16": 2, "F16": 2, "F32": 4}
	for i := range list {
		list[i].shape = []uint64{uint64(len(list[i].data) / max(words[list[i].dtype], 1))}
	}
	return list
}

func openZoo(t *testing.T, mode codecs.Mode) *core.Reader {
	t.Helper()
	dir := t.TempDir()
	in := write(t, filepath.Join(dir, "in.safetensors"), safetensors(kernelZoo(), nil))
	_, err := core.Compress(in, filepath.Join(dir, "x.bs"), core.Options{Mode: mode}, nil)
	require.NoError(t, err)
	r, err := core.Open(filepath.Join(dir, "x.bs"), "")
	require.NoError(t, err)
	t.Cleanup(r.Close)
	return r
}

func TestKernelsDecode(t *testing.T) {
	words, halves, fields, restarted := map[int]int{}, 0, map[int]int{}, 0
	for _, mode := range modes {
		r := openZoo(t, mode)
		for i := range r.Len() {
			d := prepare(t, r, i)
			if d == nil {
				continue
			}
			words[d.word]++
			fields[d.fields]++
			if d.program.Bytes[15] == 1 {
				halves++
			}
			require.Equal(t, uint32(gpu.Sound), d.launch(t, gpu.Verify, 1), d.name)
			require.Equal(t, uint32(gpu.Sound), d.decode(t, 1), d.name)
			d.requireEqual(t)
			if !d.coded || mode != codecs.Inference || d.blocks > 2 {
				continue
			}
			restarted++
			for log := 1; log <= 3; log++ {
				d.segmentsLog(log)
				require.Equal(t, uint32(gpu.Sound), d.launch(t, gpu.Restart, 1), d.name)
				require.Equal(t, uint32(gpu.Sound), d.decode(t, 1<<log), d.name)
				d.requireEqual(t)
			}
			if d.word > 1 {
				d.gather(t)
			}
		}
	}
	require.GreaterOrEqual(t, min(words[1], words[2], words[4], halves, fields[1], fields[3], restarted), 2, "%v %v %d %d", words, fields, halves, restarted)
}

// gather compares rows, some of which do not exist.
func (d *onDevice) gather(t *testing.T) {
	t.Helper()
	const row = 61
	rows := len(d.want) / d.word / row
	if rows == 0 {
		return
	}
	ids := []int64{0, int64(rows - 1), int64(rows / 2), 0}
	list := place("ids", 0x7_0000_0000, 8*len(ids), false)
	for k, id := range ids {
		binary.LittleEndian.PutUint64(list.Bytes[8*k:], uint64(id))
	}
	out := place("rows", 0x8_0000_0000, len(ids)*row*d.word+guard, true)
	mem := []*ptx.Region{d.payload, d.program, d.record, d.points, d.status, list, out}
	status := func() uint32 {
		binary.LittleEndian.PutUint32(d.status.Bytes, gpu.Sound)
		require.NoError(t, kernels.Launch(gpu.Gather, len(ids), gpu.Threads, mem, 2_000_000,
			d.record.Base, list.Base, uint32(len(ids)), uint32(row), out.Base, d.status.Base))
		return binary.LittleEndian.Uint32(d.status.Bytes)
	}
	require.Equal(t, uint32(gpu.Sound), status(), d.name)
	for k, id := range ids {
		n := row * d.word
		require.Equal(t, d.want[int(id)*n:][:n], out.Bytes[k*n:][:n], d.name)
	}
	for _, b := range out.Bytes[len(ids)*row*d.word:] {
		require.Equal(t, byte(0x5a), b, d.name)
	}
	binary.LittleEndian.PutUint64(list.Bytes[16:], uint64(rows))
	require.Equal(t, uint32(2), status(), d.name)
}

// Whatever the bytes of a payload are, kernels stay within the memory they are given; and changed bytes are found.
func TestKernelsAndDamage(t *testing.T) {
	r := openZoo(t, codecs.Balanced)
	rng := rand.New(rand.NewPCG(5, 6))
	runs := 0
	for i := range r.Len() {
		d := prepare(t, r, i)
		if d == nil || d.blocks > 1 {
			continue
		}
		whole := append([]byte{}, d.payload.Bytes...)
		at := int(binary.LittleEndian.Uint64(d.program.Bytes[gpu.HeadBytes:]))
		end := len(whole) - gpu.Slack
		for turn := range 12 {
			copy(d.payload.Bytes, whole)
			switch turn % 3 {
			case 0:
				d.payload.Bytes[at+rng.IntN(end-at)] ^= 1 << rng.IntN(8)
			case 1: // the coder starts from anywhere and goes anywhere
				for k := at; k < min(at+400, end); k++ {
					d.payload.Bytes[k] = byte(rng.IntN(256))
				}
			default:
				for k := at; k < end; k++ {
					d.payload.Bytes[k] = byte(rng.IntN(256))
				}
			}
			found := d.launch(t, gpu.Verify, 1) != gpu.Sound
			if binary.LittleEndian.Uint32(d.program.Bytes[gpu.HeadBytes+20:]) == 1 {
				require.True(t, found, "%s: damage %d is not found", d.name, turn)
			}
			d.decode(t, 1)
			for _, b := range d.out.Bytes[len(d.want):] {
				require.Equal(t, byte(0x5a), b, d.name)
			}
			runs++
		}
	}
	require.Greater(t, runs, 100)
}
