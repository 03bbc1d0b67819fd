"""Files of the original bigsmall package, read and written; `make test-reference` installs releases 1.0.0 and 4.0.0 in
environments of their own and goes both ways with real models. Golden files of all codecs are read in every run."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bigsmall
from bigsmall import errors
from bigsmall.reader import Reader
from helpers import REPOSITORY, bfloat16, run_script, tree, weights, write_safetensors

GOLDEN = REPOSITORY / "tests" / "go" / "testdata" / "reference"
FILES = sorted(GOLDEN.glob("*/*.bs"))


def md5s(path: Path) -> dict[str, str]:
    """Those that a file's header has."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<I", data, 6)
    return {tensor["name"]: tensor["md5"] for tensor in json.loads(data[10 : 10 + length])["tensors"]}


def sums(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: hashlib.md5(array.tobytes()).hexdigest() for name, array in arrays.items()}


def base_of(path: Path) -> Path | None:
    return path.with_name("delta_base.safetensors") if path.name == "delta_ft.bs" else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_golden_files(path: Path, tmp_path: Path) -> None:
    want, base = md5s(path), base_of(path)
    assert sums(bigsmall.decompress(path, base=base)) == want
    with bigsmall.safe_open(path, "np", base=base) as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            assert hashlib.md5(tensor.tobytes()).hexdigest() == want[name]
            if tensor.ndim and file.get_slice(name).get_dtype() != "F4":
                assert file.get_slice(name)[1:3].tobytes() == tensor[1:3].tobytes()
    bigsmall.decompress(path, tmp_path / "out.safetensors", base=base)
    bigsmall.compress(tmp_path / "out.safetensors", tmp_path / "ours.bs")
    assert sums(bigsmall.decompress(tmp_path / "ours.bs")) == want
    bigsmall.convert(path, tmp_path / "converted.bs", base=base, parity=2)
    assert sums(bigsmall.decompress(tmp_path / "converted.bs", base=base)) == want
    assert bigsmall.verify(path, base=base)
    assert bigsmall.info(path)["tensor_count"] == len(want)


def test_loads_to_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = GOLDEN / "v1" / "mixed.bs"
    tensors = bigsmall.load(path)
    for name, md5 in md5s(path).items():
        tensor = tensors[name]
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert hashlib.md5(data).hexdigest() == md5


@pytest.mark.parametrize("version", ["v1", "v4"])
def test_shards(version: str, tmp_path: Path) -> None:
    """Also tensors that are in no shard, each shard by itself, and the directory converted and restored."""
    folder = GOLDEN / version / "sharded_repo"
    whole = bigsmall.decompress(folder)
    one_by_one: dict[str, Any] = {}
    for path in sorted(folder.glob("*.bs")):
        one_by_one.update(bigsmall.decompress(path))
    assert sums(one_by_one) == sums(whole)
    if version == "v4":
        assert whole["lm_head.weight"].tobytes() == whole["model.embed_tokens.weight"].tobytes()
    bigsmall.decompress(folder, tmp_path / "restored")
    index = json.loads((tmp_path / "restored" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    bigsmall.convert(folder, tmp_path / "ours")
    assert sums(bigsmall.decompress(tmp_path / "ours")) == sums(whole)
    bigsmall.decompress(tmp_path / "ours", tmp_path / "again")
    assert tree(tmp_path / "again").keys() == tree(tmp_path / "restored").keys() - {"bigsmall.index.bin"}


def test_md5_is_what_guards_them(tmp_path: Path) -> None:
    """It is compared by default; without it damage passes, which is why one has to ask for that."""
    pytest.importorskip("torch")
    path = tmp_path / "damaged.bs"
    data = bytearray((GOLDEN / "v1" / "fp8_basic.bs").read_bytes())
    (length,) = struct.unpack_from("<I", data, 6)
    silent = 0
    for at in range(10 + length + 1000, len(data), (len(data) - length) // 40):
        data[at] ^= 8
        path.write_bytes(data)
        data[at] ^= 8
        for call in (bigsmall.decompress, bigsmall.load, lambda p: bigsmall.load(p, verify=True)):
            with pytest.raises(errors.Corrupt, match=r"damaged\.bs"):
                call(path)
        assert not bigsmall.verify(path)
        try:
            bigsmall.load(path, verify=False)
            silent += 1
        except errors.Corrupt:
            pass
    assert silent
    with pytest.raises(errors.Corrupt):
        bigsmall.convert(path, tmp_path / "converted.bs")
    assert not (tmp_path / "converted.bs").exists()


def test_deltas_need_their_base(tmp_path: Path) -> None:
    path = GOLDEN / "v1" / "delta_ft.bs"
    out = tmp_path / "out"
    for call in (bigsmall.decompress, lambda p: bigsmall.decompress(p, out), lambda p: bigsmall.convert(p, out)):
        with pytest.raises(errors.WrongBase, match="delta_base"):
            call(path)
    data = bytearray((GOLDEN / "v1" / "delta_base.safetensors").read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    data[8 + length :] = bytes(x ^ 1 for x in data[8 + length :])
    (tmp_path / "other.safetensors").write_bytes(data)
    with pytest.raises(errors.WrongBase, match=r"other\.safetensors"):
        bigsmall.decompress(path, base=tmp_path / "other.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "other.safetensors"]


def test_unknown_codecs_are_named(tmp_path: Path) -> None:
    data = (GOLDEN / "v1" / "fp8_basic.bs").read_bytes().replace(b'"codec":"fp8_cat_ac"', b'"codec":"bf16_v8_xx"', 1)
    path = tmp_path / "new.bs"
    path.write_bytes(data)
    with pytest.raises(errors.Unsupported, match=r"new\.bs.*bf16_v8_xx.*the original bigsmall package"):
        bigsmall.load(path) if "torch" in sys.modules else bigsmall.decompress(path)


def test_compat(tmp_path: Path) -> None:
    tensors = {"w": ("BF16", (40, 700), bfloat16(weights(1, 40, 700))), "b": ("F32", (300,), weights(2, 300).tobytes())}
    source, path = write_safetensors(tmp_path / "m.safetensors", tensors, {"format": "pt"}), tmp_path / "m.bs"
    bigsmall.compress(source, path, compat="1.0")
    assert path.read_bytes()[4:6] == b"\x01\x00"
    assert bigsmall.info(path)["writer"] == ""
    assert bigsmall.verify(path)
    bigsmall.decompress(path, tmp_path / "back.safetensors")
    assert sums(bigsmall.decompress(path)) == {
        name: hashlib.md5(data).hexdigest() for name, (_, _, data) in tensors.items()
    }
    write_safetensors(tmp_path / "f64.safetensors", {"wide": ("F64", (2,), bytes(16))})
    before = path.read_bytes()
    with pytest.raises(errors.Unsupported, match=r"wide.*float64"):
        bigsmall.compress(tmp_path / "f64.safetensors", path, compat="1.0")
    for options in ({"compat": "2.0"}, {"compat": "1.0", "parity": 2}, {"compat": "1.0", "sha256": True}):
        with pytest.raises(errors.InvalidArgument):
            bigsmall.compress(source, path, **options)
    assert path.read_bytes() == before
    done = subprocess.run(
        [sys.executable, "-m", "bigsmall", "convert", str(path), str(tmp_path / "ours.bs"), "--storage"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert bigsmall.info(tmp_path / "ours.bs")["mode"] == "storage"


# ---- the original package itself ----

THERE = """
import hashlib, json, os, sys
os.environ["BIGSMALL_DISABLE_VERSION_CHECK"] = "1"
import bigsmall
quiet = {} if bigsmall.__version__.startswith("1.") else {"progress": False}
work, source, path = sys.argv[1:]
if __name__ == "__main__":
    if work == "compress":
        bigsmall.compress(source, path, workers=1, **quiet)
    else:
        found = bigsmall.decompress(path, **quiet).items()
        print(json.dumps({name: hashlib.md5(array.tobytes()).hexdigest() for name, array in found}))
"""

INSTALL = bool(os.environ.get("BIGSMALL_REFERENCE"))
WITH_THE_ORIGINAL = pytest.mark.skipif(not INSTALL, reason="make test-reference installs the original package")


def originals() -> list[tuple[str, str]]:
    """Versions, and the Pythons that have them."""
    sys.path.insert(0, str(REPOSITORY / "scripts" / "bench"))
    from rivals import install, requirements

    found = []
    for package, spec in requirements().items():
        if package.startswith("bigsmall-"):
            python, why = install(package, spec, REPOSITORY / "build")
            assert python is not None, why
            found.append((package.partition("-")[2], python))
    return found


def source_sums(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    at = 8 + length
    return {
        name: hashlib.md5(data[at + x["data_offsets"][0] : at + x["data_offsets"][1]]).hexdigest()
        for name, x in header.items()
    }


SOURCES = (
    sorted((REPOSITORY / "build" / "weights").glob("*/*.safetensors")) if WITH_THE_ORIGINAL.args == (False,) else []
)


@WITH_THE_ORIGINAL
@pytest.mark.parametrize("version", ["1.0.0", "4.0.0"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_both_ways_with_real_models(tmp_path: Path, version: str, source: Path) -> None:
    python = dict(originals())[version]
    want = source_sums(source)
    path = tmp_path / "there.bs"
    command = [python, "-c", THERE, "compress", str(source), str(path)]
    subprocess.run(command, check=True, timeout=160, cwd=tmp_path)
    assert sums(bigsmall.decompress(path)) == want
    if version != "1.0.0":
        return
    bigsmall.compress(source, path, compat="1.0")
    done = subprocess.run(
        [python, "-c", THERE, "decompress", "", str(path)],
        check=True, timeout=160, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == want


@WITH_THE_ORIGINAL
def test_every_kind_of_tensor_there(tmp_path: Path) -> None:
    """compat="1.0" of what real models seldom have."""
    dice = np.random.default_rng(3)
    bits = dice.integers(0, 65536, 5000, dtype=np.uint16)
    tensors = {
        "bf16.bits": ("BF16", (50, 100), bits.tobytes()),
        "f16.bits": ("F16", (5000,), bits.tobytes()),
        "bf16.tied": ("BF16", (100, 50), bits.tobytes()),
        "bf16.one": ("BF16", (1,), b"ab"),
        "bf16.none": ("BF16", (0, 7), b""),
        "bf16.equal": ("BF16", (5000,), b"ab" * 5000),
        "bf16.skew": ("BF16", (60_000,), np.where(dice.random(60_000) < 0.001, 0x4000, 0x3F80).astype("<u2").tobytes()),
        "bf16.large": ("BF16", (300, 1000), bfloat16(weights(4, 300, 1000))),
        "f32": ("F32", (7, 1000), weights(5, 7, 1000).tobytes()),
        "f8": ("F8_E4M3", (90_000,), (dice.integers(0, 30, 90_000) + 40).astype(np.uint8).tobytes()),
        "few": ("I32", (600,), dice.integers(0, 9, 600).astype("<i4").tobytes()),
        "scalar": ("F32", (), b"abcd"),
        "ids": ("I64", (500,), np.arange(500).tobytes()),
        "mask": ("BOOL", (100,), bytes([0, 1] * 50)),
        'name "é"': ("U8", (3,), b"abc"),
    }
    source = write_safetensors(tmp_path / "m.safetensors", tensors, {"format": "pt"})
    bigsmall.compress(source, tmp_path / "m.bs", compat="1.0")
    for version, python in originals():
        done = subprocess.run(
            [python, "-c", THERE, "decompress", "", str(tmp_path / "m.bs")],
            check=True, timeout=600, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert json.loads(done.stdout.splitlines()[-1]) == source_sums(source), version


def test_reader_skips_only_when_asked() -> None:
    run_script(
        "import sys\nfrom bigsmall.reader import Reader\nfrom bigsmall.numpy import read\n"
        "with Reader(sys.argv[1], check_md5=False) as reader:\n    assert read(reader, reader.tensors)\n",
        GOLDEN / "v1" / "lowcard.bs",
    )
    assert Reader(GOLDEN / "v1" / "lowcard.bs").info()["tensors"]
