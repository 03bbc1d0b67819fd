"""Which instructions the library uses, and that files and tensors are the same with all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import bigsmall
from bigsmall import _native, errors
from helpers import MODES, bfloat16, run_script, weights, write_safetensors

TIERS = ("generic", "avx2", "avx512")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch) -> Iterator[None]:
    before = bigsmall.cpu()
    yield
    bigsmall.set_cpu(before)


def use(tier: str) -> None:
    try:
        bigsmall.set_cpu(tier)
    except errors.InvalidArgument as error:
        pytest.skip(str(error))
    assert bigsmall.cpu() == tier


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in small: sizes about those of blocks and below, a heavy tail, rows of zeros, special values."""
    layer = weights(1, 300, 1000)
    layer *= np.exp(0.3 * np.random.default_rng(2).standard_normal((300, 1))).astype("<f4")
    layer[7:9] = 0
    layer[0, :4] = (np.nan, np.inf, -np.inf, -0.0)
    fp8 = (layer * 8).astype(ml_dtypes.float8_e4m3fn)
    narrow = layer.astype(np.float16).astype("<f4")  # as FP32 files that hold narrower numbers
    tensors = {
        "layer.bf16": ("BF16", (300, 1000), bfloat16(layer)),
        "layer.f16": ("F16", (300, 1000), layer.astype("<f2").tobytes()),
        "layer.f32": ("F32", (300, 1000), layer.tobytes()),
        "layer.narrow": ("F32", (300, 1000), narrow.tobytes()),
        "layer.fp8": ("F8_E4M3", (300, 1000), fp8.tobytes()),
        "layer.i64": ("I64", (1000,), np.arange(1000, dtype="<i8").tobytes()),
        "noise": ("U8", (99_999,), np.random.default_rng(3).bytes(99_999)),
    }
    for n in (1, 31, 33, 1023, 65_535, 65_536, 65_537):
        tensors[f"norm.{n}"] = ("BF16", (n,), bfloat16(1 + weights(n, n)))
    return write_safetensors(tmp_path_factory.mktemp("cpu") / "model.safetensors", tensors, {"format": "pt"})


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """plain(mode) is the file that plain Go writes."""
    made: dict[str, bytes] = {}

    def of(mode: str) -> bytes:
        if mode not in made:
            before = bigsmall.cpu()
            bigsmall.set_cpu("generic")
            target = tmp_path_factory.mktemp("plain") / "model.bs"
            bigsmall.compress(source, target, mode)
            bigsmall.set_cpu(before)
            made[mode] = target.read_bytes()
        return made[mode]

    return of


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tier", TIERS)
def test_same_with_all(tier: str, mode: str, source: Path, plain, tmp_path: Path) -> None:
    expected = plain(mode)
    use(tier)
    target, back = tmp_path / "model.bs", tmp_path / "back.safetensors"
    bigsmall.compress(source, target, mode)
    assert target.read_bytes() == expected
    bigsmall.decompress(target, back)
    assert back.read_bytes() == source.read_bytes()
    assert bigsmall.verify(target, source)
    with bigsmall.safe_open(target, "np") as file:
        whole = file.get_tensor("layer.bf16")
        assert file.get_slice("layer.bf16")[150:153, 17:200].tobytes() == whole[150:153, 17:200].tobytes()


@pytest.mark.parametrize("tier", TIERS)
def test_damage_is_found_by_all(tier: str, plain, tmp_path: Path) -> None:
    damaged = bytearray(plain("balanced"))
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "model.bs").write_bytes(damaged)
    use(tier)
    with pytest.raises(errors.Corrupt):
        bigsmall.decompress(tmp_path / "model.bs")


def test_choosing() -> None:
    bigsmall.set_cpu()
    best = bigsmall.cpu()
    assert best in TIERS
    for tier in TIERS[: TIERS.index(best) + 1]:
        bigsmall.set_cpu(tier)
        assert bigsmall.cpu() == tier
    for tier in TIERS[TIERS.index(best) + 1 :]:
        with pytest.raises(errors.InvalidArgument, match=f"no {tier} .*at most {best}"):
            bigsmall.set_cpu(tier)
    bigsmall.set_cpu("generic")
    for wrong in ("sse9", "AVX2", "a\0b", "\udcff"):
        with pytest.raises(errors.InvalidArgument):
            bigsmall.set_cpu(wrong)
        assert bigsmall.cpu() == "generic"
    bigsmall.set_cpu("")
    assert bigsmall.cpu() == best


def test_c_calls() -> None:
    ffi, lib = _native.library()
    error = ffi.new("bs_error *")
    assert lib.bs_set_cpu(b"generic", error) == 0
    assert ffi.string(lib.bs_cpu()) == b"generic"
    assert lib.bs_cpu() == lib.bs_cpu()  # static
    for wrong in (b"sse9", b"\xff"):
        assert lib.bs_set_cpu(wrong, error) == errors.INVALID_ARGUMENT == error.status
        assert b"generic, avx2, avx512" in ffi.string(error.text)
    assert lib.bs_set_cpu(b"sse9", ffi.NULL) == errors.INVALID_ARGUMENT
    assert ffi.string(lib.bs_cpu()) == b"generic"
    assert lib.bs_set_cpu(ffi.NULL, error) == 0
    best = ffi.string(lib.bs_cpu())
    assert lib.bs_set_cpu(b"", ffi.NULL) == 0
    assert ffi.string(lib.bs_cpu()) == best


def test_environment() -> None:
    script = "import bigsmall; print(bigsmall.cpu())"
    best = run_script(script, env={"BIGSMALL_CPU": ""}).strip()
    assert best in TIERS
    assert run_script(script, env={"BIGSMALL_CPU": "generic"}).strip() == "generic"
    # What Python's environment says when the library is loaded counts, not what the process started with.
    late = f"import os; os.environ['BIGSMALL_CPU'] = 'generic'; {script}"
    assert run_script(late, env={"BIGSMALL_CPU": best}).strip() == "generic"
    late = f"import os; del os.environ['BIGSMALL_CPU']; {script}"
    assert run_script(late, env={"BIGSMALL_CPU": "generic"}).strip() == best
    # A call in the program goes before the environment.
    assert run_script(f"import bigsmall; bigsmall.set_cpu(); {script}", env={"BIGSMALL_CPU": "generic"}).strip() == best


def test_wrong_environment(make) -> None:
    _, target = make({"w": ("U8", (1,), b"a")})
    code = """
import os, sys
import bigsmall
from bigsmall import errors
for _ in range(2):
    for work in (bigsmall.cpu, lambda: bigsmall.info(sys.argv[1]), lambda: bigsmall.set_cpu("generic")):
        try:
            work()
        except errors.InvalidArgument as error:
            assert "BIGSMALL_CPU=sse9" in str(error) and "generic, avx2, avx512" in str(error), error
        else:
            raise SystemExit("no error")
maps = {line.split()[-1] for line in open("/proc/self/maps")} if sys.platform == "linux" else set()
assert sum("libbigsmall" in name for name in maps) <= 1, maps
os.environ["BIGSMALL_CPU"] = "generic"
assert bigsmall.info(sys.argv[1])["tensor_count"] == 1
assert bigsmall.cpu() == "generic"
"""
    run_script(code, target, env={"BIGSMALL_CPU": "sse9"})
    code = "import sys; from bigsmall.cli import main; sys.exit(1 - main(['info', sys.argv[1]]))"
    assert run_script(code, target, env={"BIGSMALL_CPU": "sse9"}).startswith("bigsmall: the environment variable BIG")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_of_fork_use_the_same() -> None:
    code = """
import os
import bigsmall
bigsmall.set_cpu("generic")
child = os.fork()
if child == 0:
    os._exit(0 if bigsmall.cpu() == "generic" else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    run_script(code, env={"BIGSMALL_CPU": ""})
