package core_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"

	"bigsmall.dev/bigsmall/codecs"
	"bigsmall.dev/bigsmall/core"
)

// The bytes of float32 values, little-endian and in C order.
func floats(values ...float32) []byte {
	var b []byte
	for _, v := range values {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
	}
	return b
}

// temporary is a folder, and what removes it.
func temporary() (folder string, remove func()) {
	folder, err := os.MkdirTemp("", "bigsmall")
	if err != nil {
		panic(err)
	}
	return folder, func() { os.RemoveAll(folder) }
}

// write makes a file of one tensor.
func write(path string) error {
	w, err := core.Create(path, []core.Spec{{Name: "weight", DType: codecs.F32, Shape: []uint64{2, 3}}}, "", core.Options{})
	if err != nil {
		return err
	}
	defer w.Close() // without Finish, nothing of the file remains
	if err := w.Put(0, floats(1, 2, 3, 4, 5, 6), nil); err != nil {
		return err
	}
	_, err = w.Finish()
	return err
}

// A file of tensors in memory, and a row of one of them.
func Example() {
	folder, remove := temporary()
	defer remove()
	path := filepath.Join(folder, "model.bs")
	if err := write(path); err != nil {
		panic(err)
	}

	r, err := core.Open(path, "")
	if err != nil {
		panic(err)
	}
	defer r.Close()
	i, err := r.Find("weight")
	if err != nil {
		panic(err)
	}
	t, err := r.Tensor(i)
	if err != nil {
		panic(err)
	}
	row := make([]byte, 3*4)
	if err := r.DecodeRange(i, 3, 3, row, nil); err != nil { // reads only the blocks that hold it
		panic(err)
	}
	fmt.Println(t.Name, t.DType, t.Shape, math.Float32frombits(binary.LittleEndian.Uint32(row)))
	// Output: weight float32 [2 3] 4
}

// A checkpoint in and out again: the same bytes.
func ExampleCompress() {
	folder, remove := temporary()
	defer remove()
	source := filepath.Join(folder, "model.safetensors")
	header := `{"weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}`
	content := append(binary.LittleEndian.AppendUint64(nil, uint64(len(header))), header...)
	content = append(content, floats(.1, .2, .3, .4)...)
	if err := os.WriteFile(source, content, 0o644); err != nil {
		panic(err)
	}

	compressed, restored := filepath.Join(folder, "model.bs"), filepath.Join(folder, "restored.safetensors")
	done, err := core.Compress(source, compressed, core.Options{Mode: codecs.Storage}, &core.Job{Workers: 2})
	if err != nil {
		panic(err)
	}
	if _, err := core.Decompress(compressed, restored, "", core.Options{}, nil); err != nil {
		panic(err)
	}
	again, err := os.ReadFile(restored)
	if err != nil {
		panic(err)
	}
	fmt.Println(done.Tensors, string(again) == string(content))
	// Output: 1 true
}

// Errors tell what kind they are.
func ExampleStatusOf() {
	folder, remove := temporary()
	defer remove()
	_, err := core.Open(filepath.Join(folder, "nothing.bs"), "")
	fmt.Println(core.StatusOf(err), errors.Is(err, fs.ErrNotExist))

	path := filepath.Join(folder, "model.bs")
	if err := write(path); err != nil {
		panic(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	content[len(content)/2] ^= 1
	if err := os.WriteFile(path, content, 0o644); err != nil {
		panic(err)
	}
	report, err := core.Verify(path, "", "", nil)
	if err != nil {
		panic(err)
	}
	fmt.Println(len(report.Bad), "problem")
	// Output:
	// io true
	// 1 problem
}
