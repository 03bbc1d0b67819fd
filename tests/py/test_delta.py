"""Fine-tunes as differences to a base model."""

from __future__ import annotations

import numpy as np
import pytest

import bigsmall
from helpers import MODES, array_bytes, bfloat16, every_dtype, tree, weights, write_safetensors


def base_and_finetune(dtype: str):
    base = weights(1, 400, 300)
    random = np.random.default_rng(2)
    fine = base * (1 + 0.003 * random.standard_normal(base.shape)).astype("<f4")
    fine[::5] = base[::5]  # rows that were not trained
    pack = {"BF16": bfloat16, "F16": lambda x: x.astype("<f2").tobytes(), "F32": lambda x: x.astype("<f4").tobytes()}
    return [{"w": (dtype, (400, 300), pack[dtype](values))} for values in (base, fine)]


@pytest.fixture
def pair(tmp_path):
    """pair(base, fine) writes both and gives their paths."""

    def write(base, fine):
        return (
            write_safetensors(tmp_path / "base.safetensors", base),
            write_safetensors(tmp_path / "fine.safetensors", fine, {"format": "pt"}),
        )

    return write


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_round_trip(pair, tmp_path, dtype: str, mode: str) -> None:
    tensors = base_and_finetune(dtype)
    base, fine = pair(*tensors)
    delta = tmp_path / "fine.bs"
    assert bigsmall.compress_delta(fine, base, delta, mode) == str(delta)
    restored = tmp_path / "restored.safetensors"
    assert bigsmall.decompress_delta(delta, base, restored) == str(restored)
    assert restored.read_bytes() == fine.read_bytes()
    arrays = bigsmall.decompress_delta(delta, base)
    assert arrays["w"].tobytes() == tensors[1]["w"][2]
    assert bigsmall.decompress(delta, base=base)["w"].tobytes() == tensors[1]["w"][2]
    assert bigsmall.verify(delta, fine, base=base)
    alone = tmp_path / "alone.bs"
    bigsmall.compress(fine, alone, mode)
    assert delta.stat().st_size < alone.stat().st_size


def test_base_may_be_compressed(pair, tmp_path) -> None:
    tensors = base_and_finetune("BF16")
    base, fine = pair(*tensors)
    bigsmall.compress(base, tmp_path / "base.bs")
    bigsmall.compress_delta(fine, tmp_path / "base.bs", tmp_path / "fine.bs")
    for given in (base, tmp_path / "base.bs"):
        assert bigsmall.decompress_delta(tmp_path / "fine.bs", given)["w"].tobytes() == tensors[1]["w"][2]


def test_everything_that_can_differ(pair, tmp_path) -> None:
    base = every_dtype((6, 40, 8), seed=0)
    fine = every_dtype((6, 40, 8), seed=1)
    fine["tensor.F32"] = ("F32", (40,), weights(1, 40).tobytes())  # another shape
    fine["tensor.I8"] = ("F16", (960,), fine["tensor.I8"][2])  # another dtype
    fine["added"] = ("BF16", (30,), bfloat16(weights(3, 30)))
    fine["tensor.U8"] = base["tensor.U8"]  # the same
    fine["empty"] = base["empty"] = ("F32", (0, 3), b"")
    del fine["tensor.BOOL"]
    base_path, fine_path = pair(base, fine)
    bigsmall.compress_delta(fine_path, base_path, tmp_path / "fine.bs", sha256=True)
    bigsmall.decompress_delta(tmp_path / "fine.bs", base_path, tmp_path / "restored.safetensors")
    assert (tmp_path / "restored.safetensors").read_bytes() == fine_path.read_bytes()


def test_finetune_equal_to_its_base(pair, tmp_path) -> None:
    base_tensors, _ = base_and_finetune("BF16")
    base, fine = pair(base_tensors, base_tensors)
    bigsmall.compress_delta(fine, base, tmp_path / "fine.bs")
    assert (tmp_path / "fine.bs").stat().st_size < 5000
    assert bigsmall.decompress_delta(tmp_path / "fine.bs", base)["w"].tobytes() == base_tensors["w"][2]


def test_load_and_slices(pair, tmp_path) -> None:
    tensors = base_and_finetune("BF16")
    base, fine = pair(*tensors)
    bigsmall.compress_delta(fine, base, tmp_path / "fine.bs")
    data = np.frombuffer(tensors[1]["w"][2], "<u2").reshape(400, 300)
    with bigsmall.safe_open(tmp_path / "fine.bs", "np", base=base) as file:
        for index in (slice(10, 20), (slice(None), slice(5, 9)), 399):
            assert file.get_slice("w")[index].tobytes() == data[index].tobytes()
    pytest.importorskip("torch")
    loaded = bigsmall.load(tmp_path / "fine.bs", base=base, verify=True)
    assert array_bytes(loaded["w"]) == data.tobytes()


def test_directories(tmp_path) -> None:
    base_tensors, fine_tensors = base_and_finetune("BF16")
    extra = {"norm": ("F32", (50,), weights(5, 50).tobytes())}
    for name, tensors in (("base", base_tensors), ("fine", fine_tensors)):
        folder = tmp_path / name
        folder.mkdir()
        # The base is cut into shards differently from the fine-tune.
        if name == "base":
            write_safetensors(folder / "model.safetensors", {**tensors, **extra})
        else:
            write_safetensors(folder / "model-00001-of-00002.safetensors", tensors)
            write_safetensors(folder / "model-00002-of-00002.safetensors", extra)
        (folder / "config.json").write_text(f'{{"name": "{name}"}}')
    bigsmall.compress_delta(tmp_path / "fine", tmp_path / "base", tmp_path / "delta")
    bigsmall.decompress_delta(tmp_path / "delta", tmp_path / "base", tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(tmp_path / "fine")


def test_info_names_the_base(pair, tmp_path) -> None:
    base, fine = pair(*base_and_finetune("BF16"))
    bigsmall.compress_delta(fine, base, tmp_path / "fine.bs")
    info = bigsmall.info(tmp_path / "fine.bs")
    assert info["model_type"] == "delta"
    assert info["base_model"]
