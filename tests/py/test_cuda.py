"""How Python uses a CUDA device: what is passed to the library, and what happens where there is none."""

from __future__ import annotations

import warnings
from pathlib import Path

import fakecuda
import pytest
import torch
from safetensors.torch import save_file

import bigsmall
from bigsmall import cuda, placement
from bigsmall.reader import Reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two shards."""
    root = tmp_path_factory.mktemp("model")
    for k in (1, 2):
        generator = torch.Generator().manual_seed(k)
        tensors = {
            f"w{k}": (torch.randn(300, 517, generator=generator) * 0.02).bfloat16(),
            f"n{k}": torch.ones(7),
            f"f{k}": torch.randn(3000, generator=generator),
            f"e{k}": torch.empty(0),
        }
        save_file(tensors, root / f"m{k}.safetensors")
        (root / "bs").mkdir(exist_ok=True)
        bigsmall.compress(root / f"m{k}.safetensors", root / "bs" / f"model-0000{k}-of-00002.bs")
    return root / "bs"


def test_without_a_device_the_cpu_decodes_and_says_so_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_warned", False)
    monkeypatch.setattr(cuda, "unavailable", lambda device: "there is no CUDA driver: none")
    monkeypatch.setattr(placement, "Cuda", lambda tensors, device: placement.Device(tensors))
    reader = Reader(folder)
    want = bigsmall.load(folder, "cpu")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            got = {name: torch.full_like(tensor, 3) for name, tensor in want.items()}
            placement.decode(reader, reader.tensors, got, torch.device("cuda"))
            assert all(torch.equal(got[name], want[name]) for name in want)
    assert len(said) == 1
    assert "there is no CUDA driver" in str(said[0].message)
    assert "CPU" in str(said[0].message)


def test_a_directory_goes_in_one_call(folder: Path) -> None:
    """Reader.decode_cuda, and errors.NoDevice and DeviceError, with the driver of the tests."""
    import os
    import subprocess
    import sys

    code = f"""
import sys, contextlib
sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})
from fakecuda import Driver
from bigsmall import _native, errors
from bigsmall.reader import Destination, Reader
import numpy as np

class Workspace:
    job = _native.cuda_job(0, _native.Memory(0, 0), _native.Memory(0, 0))
    entered = 0
    @contextlib.contextmanager
    def current(self):
        self.entered += 1
        yield

workspace = Workspace()
reader = Reader(sys.argv[1])
try:
    reader.decode_cuda([Destination(reader.find("w1"), 256)], workspace)
except errors.NoDevice as error:
    assert isinstance(error, errors.DeviceError) and isinstance(error, RuntimeError)
    assert "no CUDA context is current" in str(error)
else:
    raise SystemExit("no error")
driver = Driver()
driver.context()
workspace.entered = 0
places = [Destination(t, driver.alloc(max(t.n_bytes, 1))) for t in reader.tensors]
reader.decode_cuda(places, workspace)
assert workspace.entered == 1
for t, address in places:
    want = np.empty(max(t.n_bytes, 1), np.uint8)
    reader.decode_many([Destination(t, want.ctypes.data)])
    assert driver.read(address, t.n_bytes) == want[:t.n_bytes].tobytes(), t.name
weight = reader.find("w2")
n = reader.weight_bytes(weight)
assert weight.n_bytes * 0.6 < n < weight.n_bytes * 0.8
owner = driver.alloc(n)
handle = reader.open_weight(weight, _native.Memory(owner, n), workspace, owner)
for name in ("n1", "e1"):
    try:
        reader.weight_bytes(reader.find(name))
    except errors.Unsupported as error:
        assert name in str(error) and "keep it decoded" in str(error)
    else:
        raise SystemExit(name)
del handle
assert driver.faults() == "", driver.faults()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, **fakecuda.environment()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
