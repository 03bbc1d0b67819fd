"""What the product writes is what the specification texts say: a reader that was written from these alone gives the
source back, and every form of the texts occurs here."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

import bigsmall
from helpers import DTYPES, MODES, bfloat16, every_dtype, weights, write_safetensors

pytest.importorskip("xxhash")
pytest.importorskip("zstandard")

from reference_reader import (
    BLOCK_KINDS,
    CODECS,
    TRANSFORMS,
    BsFile,
    RefusedError,
    alias_table,
    xxh3,
)

Array = np.ndarray[Any, Any]
BLOCK = 65536
GROUP = 4 * BLOCK


def normal(n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(n)


def integers(low: int, high: int, n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(low, high, n)


def small_integers(values: Array) -> Array:
    return np.clip(np.rint(values), -128, 127).astype("i1")


def half_words(n: int) -> Array:
    """float32 values that float16 holds, subnormals, infinities and NaNs among them."""
    half = weights(1, n).astype("<f2")
    half.view("<u2")[:3000] = integers(0, 65536, 3000)
    # Through the bits: a conversion of numpy's may quieten NaNs.
    bits = half.astype("<f4").view("<u4")
    nan = np.isnan(half)
    words = half.view("<u2").astype("<u4")
    bits[nan] = (words >> 15 << 31 | 0x7F800000 | (words & 1023) << 13)[nan]
    return bits


def scaled(rows: int, columns: int, spread: float = 1, bias: float = 2, rare: float = 1e3) -> Array:
    """float32 values whose scale differs by row and by column, and with a bias their sign by column."""
    random = np.random.default_rng(rows)
    scale = np.exp(spread * (random.standard_normal((rows, 1)) + random.standard_normal(columns))) * 0.02
    values = (random.standard_normal((rows, columns)) + bias * random.standard_normal(columns)) * scale
    values[::97, ::89] *= rare
    return values.astype("<f4")


def rows_alike(rows: int, columns: int) -> Array:
    """float32 values: the same in every row, in another order, and half of the columns larger than the others."""
    half = np.random.default_rng(rows).permuted(np.tile(weights(1, columns // 2), (2 * rows, 1)), axis=1)
    return half.reshape(rows, columns) * np.repeat(np.array([1, 32], "<f4"), columns // 2)


def upper_halves(values: Array) -> Array:
    """float32 values cut to bfloat16, in their shape."""
    return (values.view("<u4") >> 16).astype("<u2")


def skewed_by_group(make: Callable[[Array], Any]) -> Any:
    """Two groups that call for different tables; the second has one block and a ragged end."""
    return make(np.concatenate([normal(GROUP, 1), normal(1003, 2) * 1e-5]))


# Name: mode, dtype, values, the forms that it is here for.
CASES: dict[str, tuple[str, str, Callable[[], Any], list[str]]] = {
    "stored": ("balanced", "U8", lambda: integers(0, 256, 70000).astype("u1"), ["block.stored"]),
    "tiny": ("balanced", "U8", lambda: b"abc", ["block.stored", "codec.bs_stored"]),
    "text": ("balanced", "U8", lambda: np.frombuffer(b"the quick brown fox " * 999, "u1"), ["block.zstd"]),
    "bf16": (
        "balanced",
        "BF16",
        lambda: bfloat16(np.concatenate([weights(1, 300), [1e30], weights(2, 70000)])),
        [
            "codec.bs_planes",
            "transform.plain",
            "block.coded",
            "field.rotated",
            "plane.coded.buckets_64",
            "plane.coded.patched",
            "plane.coded.ragged",
        ],
    ),
    "one_exponent": (
        "balanced",
        "BF16",
        lambda: bfloat16(np.random.default_rng(0).random(3000) + 1),
        ["plane.constant"],
    ),
    "rare_high_bytes": (
        "balanced",
        "I32",
        lambda: np.minimum(np.random.default_rng(0).zipf(1.5, 10000), 1 << 30).astype("<i4"),
        ["plane.constant.patched", "plane.constant.patches_stored"],
    ),
    "wide_bytes": ("balanced", "I8", lambda: small_integers(normal(40001) * 20), ["plane.coded.buckets_256"]),
    "f32": ("balanced", "F32", lambda: weights(3, 5000), ["plane.raw"]),
    "counting": ("balanced", "I64", lambda: np.arange(9000, dtype="<i8"), ["plane.zstd"]),
    "zero_low_bits": (
        "balanced",
        "F32",
        lambda: weights(4, 3000).view("<u4") & 0xFFFFF000,
        ["transform.plain.shifted"],
    ),
    "of_half": ("balanced", "F32", lambda: half_words(20000), ["transform.half"]),
    "of_short_half": (
        "balanced",
        "F32",
        lambda: (weights(5, 9000).astype("<f2").view("<u2") & 0xFFF8).view("<f2").astype("<f4"),
        ["transform.half.shifted"],
    ),
    "few": (
        "balanced",
        "F64",
        lambda: np.random.default_rng(0).choice(normal(16), 9000),
        ["transform.palette", "codec.bs_lowcard"],
    ),
    "same": ("balanced", "F16", lambda: b"ab" * 9000, ["transform.palette", "plane.constant"]),
    "rows": (
        "balanced",
        "I16",
        # A row that divides no block, and more than one block.
        lambda: np.cumsum(integers(-2, 3, 331 * 211).reshape(331, 211), axis=0).astype("<i2"),
        ["transform.row_difference", "codec.bs_rowdelta", "plane.coded.patches_stored"],
    ),
    "float_rows": (
        "balanced",
        "F32",
        lambda: (normal(300) + 0.01 * normal(200 * 300).reshape(200, 300)).astype("<f4"),
        ["transform.row_difference"],
    ),
    "tables_by_group": ("balanced", "BF16", lambda: skewed_by_group(bfloat16), ["plane.tables_by_group"]),
    "mixed_tables": (
        "balanced",
        "I8",
        lambda: small_integers(np.concatenate([normal(GROUP) * 2, normal(9001) * 30])),
        ["plane.tables_by_group", "plane.coded.buckets_64", "plane.coded.buckets_256"],
    ),
    "scales": (
        "storage",
        "BF16",
        lambda: upper_halves(scaled(3000, 50, rare=1e25)),  # more than one block
        ["scales.zstd", "plane.coded.tables_by_class", "plane.coded.buckets_256"],
    ),
    "few_columns": ("storage", "F32", lambda: scaled(9000, 40), ["scales.zstd", "plane.coded.patched"]),
    "scales_of_half": (
        "storage",
        "F32",
        lambda: scaled(200, 300, 0.5).astype("<f2").astype("<f4"),
        ["scales.zstd", "transform.half"],
    ),
    "rows_alike": ("storage", "BF16", lambda: upper_halves(rows_alike(3000, 600)), ["scales.raw"]),
}

BASE_FORMS = [
    "codec.bs_delta",
    "transform.base_difference",
    "difference.constant",
    "difference.constant.patched",
    "difference.coded.buckets_64",
    "difference.coded.patched",
    "difference.coded.ragged",
    "difference.coded.tables_by_class",
]


def as_bytes(values: Any) -> bytes:
    return values if isinstance(values, bytes) else np.ascontiguousarray(values).tobytes()


def tensor(dtype: str, values: Any) -> tuple[str, tuple[int, ...], bytes]:
    data = as_bytes(values)
    shape = values.shape if getattr(values, "ndim", 1) == 2 else (len(data) * 8 // DTYPES[dtype][0],)
    return dtype, shape, data


def read(target: Path, source: Path, base: dict[str, bytes] | None = None) -> BsFile:
    """Reads a file and compares it with its source."""
    file = BsFile(target, base)
    assert file.source() == source.read_bytes()
    return file


def test_worked_example_of_alias_tables() -> None:
    threshold, alias, offset = alias_table([4000, 90, 6])
    assert threshold[:4] == [38, 64, 6, 0]
    assert alias[:4] == [1, 1, 0, 0]
    assert [offset[0], *offset[2:6]] == [26, 32, 96, 160, 224]


def test_every_form_has_its_case() -> None:
    aimed = {form for *_, forms in CASES.values() for form in forms} | set(BASE_FORMS)
    every = {f"transform.{name}" for name in TRANSFORMS} | {f"block.{kind}" for kind in BLOCK_KINDS}
    every |= {f"codec.{name}" for name in CODECS}
    every |= {f"plane.{kind}" for kind in ("raw", "constant", "coded.buckets_64", "coded.buckets_256", "zstd")}
    every |= {"scales.raw", "scales.zstd"}
    assert every <= aimed


@pytest.mark.parametrize("case", CASES)
def test_form(make, case: str) -> None:
    mode, dtype, values, forms = CASES[case]
    source, target = make({"tensor": tensor(dtype, values())}, mode=mode, sha256=True)
    file = read(target, source)
    missing = [form for form in forms if not file.forms[form]]
    assert not missing, dict(file.forms)


@pytest.mark.parametrize("mode", MODES)
def test_every_dtype(make, mode: str) -> None:
    """Of random bits, of few values, and of words whose bits differ in how often they are set."""
    tensors = every_dtype()
    random = np.random.default_rng(0)
    for dtype, (_, shape, data) in every_dtype((2, 1201, 8)).items():
        bits = np.frombuffer(data, "u1")
        few = bits & (1 if dtype == "tensor.BOOL" else 129)
        skewed = few if dtype == "tensor.BOOL" else bits & random.integers(0, 256, bits.size).astype("u1")
        # The upper byte of wide words as that of floats of similar size.
        step = DTYPES[dtype[7:]][0] // 8
        if step > 1:
            skewed = bits.copy()
            skewed[step - 1 :: step] = 60 + (skewed[step - 1 :: step] & 131)
        tensors[f"few.{dtype}"] = (dtype[7:], shape, few.tobytes())
        tensors[f"skewed.{dtype}"] = (dtype[7:], shape, skewed.tobytes())
    source, target = make(tensors, {"format": "pt"}, mode)
    file = read(target, source)
    assert {entry.dtype for entry in file.entries.values()} == {name for _, name in DTYPES.values()}
    assert file.forms["block.coded"] > len(DTYPES)


def test_ties_and_odd_tensors(make) -> None:
    data = bfloat16(weights(1, 1000))
    tensors = {
        "embed": ("BF16", (10, 100), data),
        "head": ("BF16", (100, 10), data),
        "as_f16": ("F16", (1000,), data),
        "scalar": ("F32", (), b"abcd"),
        "nothing": ("F32", (0, 3), b""),
        "nothing_too": ("BF16", (3, 0), b""),
        "f4.odd": ("F4", (2, 3), b"abc"),
        "f6": ("F6_E3M2", (2, 2), b"def"),
        "重み": ("U8", (3,), b"ghi"),
    }
    file = read(*reversed(make(tensors, {"format": "pt", "": "\x00é"})))
    assert file.forms["tie"] == 2
    # Nothing but tensors without elements, and nothing at all.
    for number, empty in enumerate([{"nothing": ("F32", (0, 3), b"")}, {}]):
        read(*reversed(make(empty, stem=f"empty{number}")))


def test_ties_between_shards(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    data = bfloat16(weights(1, 1000))
    shards = {"a.safetensors": "embed", "b.safetensors": "head"}
    for shard, name in shards.items():
        write_safetensors(model / shard, {name: ("BF16", (1000,), data)})
    index = {"metadata": {}, "weight_map": {name: shard for shard, name in shards.items()}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    bigsmall.compress(model, tmp_path / "out")
    files = [read(tmp_path / "out" / f"{shard[0]}.bs", model / shard) for shard in shards]
    assert sum(file.forms["tie.shard"] for file in files) == 1


def bases_and_tunes() -> Iterator[tuple[str, Any, Any]]:
    """dtype, base and fine-tune."""
    # Numbers of both signs around zero, some of which the tuning flips, and some that it leaves.
    base = normal(30001, 1) * np.exp2(integers(-3, 4, 30001, 2)) * 0.02
    tuned = base * (1 + 0.01 * normal(30001, 3)) + normal(30001, 4) * 1e-4
    tuned[::5] = base[::5]
    specials = [np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40]
    base[:6], tuned[3:9] = specials, specials
    for dtype, make in {
        "BF16": bfloat16,
        "F16": lambda x: x.astype("<f2"),
        "F32": lambda x: x.astype("<f4"),
        "F64": lambda x: x,
        "C64": lambda x: x[:30000].astype("<f4"),
        # The upper bytes of half numbers are F8_E5M2.
        "F8_E5M2": lambda x: (x.astype("<f2").view("<u2") >> 8).astype("u1"),
        "F8_E4M3": lambda x: (x.astype("<f2").view("<u2") >> 7).astype("u1"),
        "F8_E8M0": lambda x: (x.astype("<f2").view("<u2") >> 7).astype("u1"),
        "F4": lambda x: (x.astype("<f2").view("<u2") >> 7).astype("u1"),
    }.items():
        yield dtype, make(base), make(tuned)
    for dtype in ("I8", "U16", "I32", "I64"):
        width = int(dtype[1:])
        steps = ((np.clip(x, -15, 15) * 2.0 ** (width - 5)).astype("<i8") for x in (base[9:], tuned[9:]))
        yield dtype, *(words.astype(f"<i{width // 8}") for words in steps)
    # Differences of all lengths from 0 to 64.
    n = 65 * 600
    length = np.arange(n, dtype="<u8") % 65
    random = np.frombuffer(np.random.default_rng(5).bytes(8 * n), "<u8")
    z = np.where(length > 0, (random | np.uint64(1 << 63)) >> (64 - np.maximum(length, 1)), 0).astype("<u8")
    base_words = integers(0, 1000, n, 6).astype("<u8")
    yield "U64", base_words, base_words + np.where(z & 1 > 0, ~(z >> 1), z >> 1)
    # A handful of numbers that changed.
    few = np.arange(9000, dtype="<u4") ** 2
    yield "U32", few, few + (np.arange(9000) % 1000 == 500).astype("<u4")


def test_base_differences(tmp_path: Path) -> None:
    base, tuned = {}, {}
    for number, (dtype, old, new) in enumerate(bases_and_tunes()):
        base[f"{number}.{dtype}"], tuned[f"{number}.{dtype}"] = tensor(dtype, old), tensor(dtype, new)
    tuned["new"] = ("BF16", (1000,), bfloat16(weights(1, 1000)))
    source = write_safetensors(tmp_path / "tuned.safetensors", tuned)
    target = tmp_path / "tuned.bs"
    bigsmall.compress_delta(source, write_safetensors(tmp_path / "base.safetensors", base), target)
    base_bytes = {name: data for name, (_, _, data) in base.items()}
    file = read(target, source, base_bytes)
    missing = [form for form in BASE_FORMS if not file.forms[form]]
    assert not missing, dict(file.forms)
    assert file.forms["codec.bs_delta"] == len(base)
    for wrong in (None, {}, {**base_bytes, "0.BF16": bytes(len(base_bytes["0.BF16"]))}):
        with pytest.raises(RefusedError, match="wrong_base"):
            BsFile(target, wrong).source()


class Sealed:
    """A file of one tensor whose bytes can be changed behind the checksums, as malice or a faulty writer would."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.start = struct.unpack("<Q", data[-40:-32])[0]
        self.header = data[10 : self.start]
        (self.entry,) = json.loads(self.header)["tensors"]
        self.checksum = self.entry["extra"]["checksum"]
        self.blocks = self.start + self.entry["extra"]["head"]
        self.index = self.start + 24 + struct.unpack("<I", data[self.start + 20 :][:4])[0]
        self.end = self.start + self.entry["compressed_bytes"]

    def change(self, at: int, mask: int) -> bytes:
        """The file with bits of one byte of the payload flipped and all checksums put right."""
        data = bytearray(self.data)
        data[at] ^= mask
        begin, index = self.blocks, self.index
        while begin <= at < self.end:
            end = begin + struct.unpack("<I", data[index:][:4])[0]
            data[index + 4 : index + 12] = struct.pack("<Q", xxh3(bytes(data[begin:end])))
            begin, index = end, index + 12
        fresh = f"{xxh3(bytes(data[self.start : self.blocks])):016x}"
        data[10 : self.start] = self.header.replace(self.checksum.encode(), fresh.encode())
        data[-24:-16] = struct.pack("<Q", xxh3(bytes(data[: self.start])))
        data[-8:] = struct.pack("<Q", xxh3(bytes(data[-48:-8])))
        return bytes(data)

    def places(self) -> Iterator[int]:
        """The bytes of the payload but for lengths and checksums of blocks. Of a stream's words every third will do."""
        yield from range(self.start, self.index)
        yield from range(self.index + (self.blocks - self.index) // 12 * 12, self.blocks + 150)
        yield from range(self.blocks + 150, self.end - 100, 3)
        yield from range(max(self.blocks + 150, self.end - 100), self.end)


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("balanced", lambda: bfloat16(np.append(weights(1, 400), [1e30]))),
        ("inference", lambda: weights(1, 303)),
        ("inference", lambda: (weights(1, 999).astype("<f2").view("<u2") >> 8).astype("u1")),
    ],
    ids=["BF16", "F32", "F8_E5M2"],
)
def test_no_byte_is_without_meaning(
    make, request: pytest.FixtureRequest, tmp_path: Path, mode: str, values: Callable[[], Any]
) -> None:
    """A payload of one block: whatever byte of it changes, both readers notice, without the help of its checksums."""
    dtype = request.node.callspec.id
    source, target = make({"tensor": tensor(dtype, values())}, mode=mode)
    assert read(target, source).forms["plane.coded"] == 1
    sealed = Sealed(target.read_bytes())
    assert sealed.change(sealed.start, 0) == sealed.data
    changed, restored = tmp_path / "changed.bs", tmp_path / "restored.safetensors"
    readers = {"reference": lambda: BsFile(changed).source(), "product": lambda: bigsmall.decompress(changed, restored)}
    accepted = []
    for place in sealed.places():
        # Numbers of the head are small; in blocks the bits that pad a string are the upper ones of its last byte.
        changed.write_bytes(sealed.change(place, 1 if place < sealed.blocks else 128))
        for name, reader in readers.items():
            try:
                reader()
            except (RefusedError, bigsmall.errors.BigSmallError):
                continue
            accepted.append((name, place - sealed.start))
    assert not accepted, f"head of {sealed.blocks - sealed.start} bytes"


def test_parity(tmp_path: Path) -> None:
    source, target = tmp_path / "model.safetensors", tmp_path / "model.bs"
    write_safetensors(source, {"tensor": ("BF16", (30_000,), bfloat16(weights(1, 30_000)))})
    for parity in (1, 30, 100):
        bigsmall.compress(source, target, parity=parity)
        assert "parity" in read(target, source).sections
        data = bytearray(target.read_bytes())
        data[-150] ^= 1
        target.write_bytes(data)
        with pytest.raises(RefusedError, match="parity"):
            BsFile(target).source()


def test_damage(make, tmp_path: Path) -> None:
    source, target = make({"tensor": ("BF16", (3000,), bfloat16(weights(1, 3000)))})
    data = target.read_bytes()
    changed = tmp_path / "changed.bs"
    header = len(data[:4096].rstrip())
    places = [*range(0, header, 7), *range(4090, len(data), 29), *range(len(data) - 48, len(data))]
    for place in places:
        changed.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(RefusedError):
            BsFile(changed).source()
    for length in (0, 9, 10, 4000, 5000, len(data) - 1):
        changed.write_bytes(data[:length])
        with pytest.raises(RefusedError):
            BsFile(changed).source()
    read(target, source)
