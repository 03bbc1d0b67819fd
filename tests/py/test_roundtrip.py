"""What goes in comes out, bit for bit: as a file, as numpy arrays and as torch tensors."""

from __future__ import annotations

import numpy as np
import pytest

import bigsmall
from helpers import (
    DTYPES,
    MODES,
    array_bytes,
    bfloat16,
    every_dtype,
    n_bytes,
    storage_shape,
    weights,
    write_safetensors,
)


def all_16_bit_patterns():
    bits = np.arange(65536, dtype="<u2")
    shuffled = np.random.default_rng(0).permutation(bits)
    return {
        "bf16.in_order": ("BF16", (256, 256), bits.tobytes()),
        "bf16.shuffled": ("BF16", (65536,), shuffled.tobytes()),
        "fp16.in_order": ("F16", (256, 256), bits.tobytes()),
        "fp16.shuffled": ("F16", (65536,), shuffled.tobytes()),
    }


def special_floats():
    """NaNs with payloads of both signs, infinities, zeros and subnormals, alone and among weights."""
    random = np.random.default_rng(1)
    f32 = np.concatenate(
        [
            random.integers(0x7F800000, 0x80000000, 4000, dtype="<u4"),
            random.integers(0xFF800000, 0x100000000, 4000, dtype="<u4"),
            random.integers(0, 0x00800000, 4000, dtype="<u4"),
            np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 1, 0x80000001], dtype="<u4"),
        ]
    )
    among = weights(2, 20000).view("<u4").copy()
    among[::97] = f32[: len(among[::97])]
    f64 = random.integers(0x7FF0000000000000, 0x7FFFFFFFFFFFFFFF, 3000, dtype="<u8")
    return {
        "f32": ("F32", f32.shape, f32.tobytes()),
        "f32.among": ("F32", among.shape, among.tobytes()),
        "bf16.among": ("BF16", among.shape, (among >> 16).astype("<u2").tobytes()),
        "f64": ("F64", f64.shape, f64.tobytes()),
        "c64": ("C64", (f64.size,), f64.tobytes()),
    }


def odd_shapes():
    tensors = {}
    for dtype in ("F32", "BF16", "F16", "F8_E4M3", "I64", "BOOL"):
        for name, shape in {
            "scalar": (),
            "one": (1,),
            "nothing": (0,),
            "no_rows": (0, 7),
            "no_columns": (7, 0),
            "seven": (2, 1, 3, 1, 2, 3, 2),
        }.items():
            size = n_bytes(dtype, shape)
            data = (np.arange(size) % 2).astype(np.uint8).tobytes()
            tensors[f"{dtype}.{name}"] = (dtype, shape, data)
    tensors["F4.nothing"] = ("F4", (0, 4), b"")
    tensors["F6.nothing"] = ("F6_E2M3", (0,), b"")
    return tensors


def names():
    words = [
        "",
        " ",
        "a/b\\c",
        '"quoted"',
        "tab\tand\nline",
        "вес.слой",
        "重み.0",
        "وزن",
        "weight\u0301",
        "wéight",
        "🙂" * 40,
        "\x01\x7f",
        "x" * 5000,
        "__metadata",
    ]
    return {word: ("U8", (3,), bytes([number, 0, 255])) for number, word in enumerate(words)}


def compressible():
    random = np.random.default_rng(3)
    rows = np.cumsum(random.integers(-2, 3, (300, 200)), axis=0).astype("<i2")
    few = random.choice(weights(9, 5), 70000)
    return {
        "bf16": ("BF16", (700, 300), bfloat16(weights(4, 700, 300))),
        "f16": ("F16", (300, 301), weights(5, 300, 301).astype("<f2").tobytes()),
        "f32": ("F32", (300, 301), weights(6, 300, 301).tobytes()),
        "f32.of_f16": ("F32", (300, 301), weights(7, 300, 301).astype("<f2").astype("<f4").tobytes()),
        "f32.of_bf16": ("F32", (90000,), (weights(8, 90000).view("<u4") & 0xFFFF0000).tobytes()),
        "constant": ("BF16", (90000,), b"\x80\x3f" * 90000),
        "zeros": ("F32", (90000,), bytes(360000)),
        "few": ("F32", (70000,), few.astype("<f4").tobytes()),
        "rows": ("I16", rows.shape, rows.tobytes()),
        "mask": ("BOOL", (400, 400), np.tri(400, dtype=np.uint8).tobytes()),
        "f4": ("F4", (200, 600), random.bytes(60000)),
    }


def tied():
    data = bfloat16(weights(10, 200, 64))
    return {
        "embed": ("BF16", (200, 64), data),
        "head": ("BF16", (200, 64), data),
        "other_shape": ("BF16", (64, 200), data),
        "other_dtype": ("F16", (200, 64), data),
    }


CASES = {
    "every_dtype": every_dtype,
    "all_16_bit_patterns": all_16_bit_patterns,
    "special_floats": special_floats,
    "odd_shapes": odd_shapes,
    "names": names,
    "compressible": compressible,
    "tied": tied,
    "no_tensors": dict,
}


def expect_numpy(tensors, arrays) -> None:
    import ml_dtypes

    assert set(arrays) == set(tensors)
    for name, (dtype, shape, data) in tensors.items():
        array = arrays[name]
        assert array.shape == storage_shape(dtype, shape), name
        assert array.tobytes() == data, name
        assert array.flags.carray, name  # in C order and writable
        assert array.flags.owndata, name
        if dtype in ("F4", "F6_E2M3", "F6_E3M2"):
            assert array.dtype == np.uint8, name
        elif dtype == "BF16" or dtype.startswith("F8"):
            assert array.dtype == getattr(ml_dtypes, DTYPES[dtype][1]), name
        else:
            assert array.dtype == np.dtype(DTYPES[dtype][1]), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_round_trip(make, tmp_path, case: str, mode: str) -> None:
    tensors = CASES[case]()
    source, target = make(tensors, {"format": "pt", "слово": "значение"}, mode)
    restored = tmp_path / "restored.safetensors"
    assert bigsmall.decompress(target, restored) == str(restored)
    assert restored.read_bytes() == source.read_bytes()
    expect_numpy(tensors, bigsmall.decompress(target))
    assert bigsmall.verify(target, source)
    info = bigsmall.info(target)
    assert info["mode"] == mode
    assert info["tensor_count"] == len(tensors)
    assert info["file_size"] == target.stat().st_size


@pytest.mark.parametrize("case", CASES)
def test_torch(make, case: str) -> None:
    torch = pytest.importorskip("torch")
    tensors = {
        name: tensor
        for name, tensor in CASES[case]().items()
        if isinstance(getattr(torch, DTYPES[tensor[0]][1], None), torch.dtype)
    }
    _, target = make(tensors)
    for verify in (False, True):
        loaded = bigsmall.load(target, verify=verify)
        assert set(loaded) == set(tensors)
        for name, (dtype, shape, data) in tensors.items():
            tensor = loaded[name]
            assert tensor.dtype == getattr(torch, DTYPES[dtype][1]), name
            assert tuple(tensor.shape) == storage_shape(dtype, shape), name
            assert array_bytes(tensor) == data, name


def test_torch_tied_tensors_have_their_own_memory(make) -> None:
    pytest.importorskip("torch")
    _, target = make(tied())
    loaded = bigsmall.load(target)
    loaded["embed"].zero_()
    assert array_bytes(loaded["head"]) == tied()["head"][2]


def test_torch_meta_device(make) -> None:
    torch = pytest.importorskip("torch")
    _, target = make({"w": ("BF16", (4, 6), bytes(48))})
    (tensor,) = bigsmall.load(target, "meta").values()
    assert tensor.device.type == "meta"
    assert tensor.shape == (4, 6)
    assert tensor.dtype == torch.bfloat16


def test_torch_without_the_dtype(make, monkeypatch) -> None:
    torch = pytest.importorskip("torch")
    _, target = make({"scale": ("F8_E8M0", (4,), b"abcd"), "other": ("F32", (1,), b"1234")})
    monkeypatch.delattr(torch, "float8_e8m0fnu", raising=False)
    with pytest.raises(bigsmall.errors.Unsupported, match=r"'scale' is float8_e8m0fnu.*torch 2\.7"):
        bigsmall.load(target)


def test_torch_has_no_float6(make) -> None:
    pytest.importorskip("torch")
    _, target = make({"six": ("F6_E2M3", (4,), b"abc")})
    with pytest.raises(bigsmall.errors.Unsupported, match="'six' is F6_E2M3"):
        bigsmall.load(target)


@pytest.mark.parametrize(
    "header",
    [
        b'{"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{ "a" : {"shape":[1], "dtype":"F32","data_offsets":[0,4]},\n'
        b'"b":{"data_offsets":[4,8],"dtype":"F32","shape":[1]}}  ',
        b'{"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},'
        b'"__metadata__":{}}',
    ],
    ids=["order", "spaces", "escapes", "metadata_last"],
)
def test_header_text_is_restored(tmp_path, header: bytes) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(len(header).to_bytes(8, "little") + header + b"abcdefgh")
    bigsmall.compress(source, tmp_path / "model.bs", sha256=True)
    bigsmall.decompress(tmp_path / "model.bs", tmp_path / "restored.safetensors")
    assert (tmp_path / "restored.safetensors").read_bytes() == source.read_bytes()
    assert {name: array.tobytes() for name, array in bigsmall.decompress(tmp_path / "model.bs").items()} == {
        "a": b"abcd",
        "b": b"efgh",
    }


def test_weights_become_smaller(make) -> None:
    source, target = make({"w": ("BF16", (1000, 400), bfloat16(weights(0, 1000, 400)))})
    assert target.stat().st_size < 0.75 * source.stat().st_size
    info = bigsmall.info(target)
    assert info["source_bytes"] == source.stat().st_size
    assert info["ratio_pct"] == pytest.approx(100 * target.stat().st_size / source.stat().st_size, abs=0.01)


def test_sha256_is_stored(make) -> None:
    import hashlib

    source, target = make(every_dtype(), sha256=True)
    assert bigsmall.info(target)["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    _, without = make(every_dtype(), stem="without")
    assert bigsmall.info(without)["sha256"] is None


def test_info_lists_the_tensors(make) -> None:
    import hashlib

    tensors = every_dtype()
    _, target = make(tensors)
    listed = bigsmall.info(target)["tensors"]
    assert [entry["name"] for entry in listed] == list(tensors)
    for entry in listed:
        dtype, shape, data = tensors[entry["name"]]
        assert entry["source_dtype"] == dtype
        assert entry["dtype"] == DTYPES[dtype][1]
        assert tuple(entry["source_shape"]) == shape
        assert tuple(entry["shape"]) == storage_shape(dtype, shape)
        assert entry["n_bytes"] == len(data)
        assert entry["md5"] == hashlib.md5(data).hexdigest()
        assert isinstance(entry["codec"], str)
        assert entry["compressed_bytes"] >= 0


def test_paths_of_any_kind(tmp_path) -> None:
    folder = tmp_path / "путь с пробелом 🙂"
    folder.mkdir()
    source = write_safetensors(folder / "模型.safetensors", every_dtype((2, 4)))
    target = folder / "模型.bs"
    assert bigsmall.compress(str(source), str(target)) == str(target)
    assert bigsmall.verify(str(target), str(source))
    expect_numpy(every_dtype((2, 4)), bigsmall.decompress(target))


def test_reader_from_memory(make) -> None:
    from bigsmall.numpy import read
    from bigsmall.reader import Reader

    tensors = every_dtype()
    _, target = make(tensors)
    with Reader.from_memory(target.read_bytes()) as reader:
        expect_numpy(tensors, read(reader, reader.tensors))


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_workers_do_not_change_the_result(make, tmp_path, workers: int) -> None:
    tensors = compressible()
    _, expected = make(tensors)
    _, target = make(tensors, stem="again", workers=workers)
    assert target.read_bytes() == expected.read_bytes()
    expect_numpy(tensors, bigsmall.decompress(target, workers=workers))
