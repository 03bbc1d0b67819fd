"""How Python uses a CUDA device: what is passed to the library, and what happens where there is none. Where a device is
needed, torch's tensors are in the memory of the driver of the tests, which the process itself cannot touch."""

from __future__ import annotations

import contextlib
import re
import textwrap
import threading
import warnings
from pathlib import Path

import fakecuda
import pytest

import bigsmall
from bigsmall import errors
from bigsmall.reader import Destination, Reader
from helpers import run_script

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from bigsmall import cuda, placement  # noqa: E402
from bigsmall.integrations import huggingface  # noqa: E402

HERE = Path(__file__).resolve().parent

# What every child begins with. torch here may have no CUDA at all, so what is asked of it is replaced.
PRELUDE = '''
import contextlib, ctypes, os, signal, sys, threading, warnings, weakref
sys.path.insert(0, HERE)
import torch
import bigsmall
from bigsmall import _native, cuda, errors, layers, placement
from bigsmall import torch as bigsmall_torch
from bigsmall.reader import Reader
from fakecuda import Driver

warnings.simplefilter("error")  # none is expected unless a test says so
driver = Driver()

@contextlib.contextmanager
def in_context():
    before = driver.make("cuCtxGetCurrent")
    driver("cuCtxSetCurrent", context)
    try:
        yield
    finally:
        driver("cuCtxSetCurrent", before)

def call(function, *arguments):
    with in_context():
        driver(function, *arguments)

def make(function, *arguments):
    with in_context():
        return driver.make(function, *arguments)

def tensor_at(address, n_bytes, free):
    memory = (ctypes.c_char * max(n_bytes, 1)).from_address(address)
    weakref.finalize(memory, call, free, address)
    return torch.frombuffer(memory, dtype=torch.uint8)[:n_bytes]

def device_memory(n_bytes, device):
    assert device == torch.device("cuda", 0)
    return tensor_at(make("cuMemAlloc_v2", max(n_bytes, 1)), n_bytes, "cuMemFree_v2")

def page_locked(n_bytes, device):
    return tensor_at(make("cuMemHostAlloc", n_bytes, 0), n_bytes, "cuMemFreeHost")

class Stream:
    def __init__(self, device):
        self.cuda_stream = make("cuStreamCreate", 1)
        weakref.finalize(self, call, "cuStreamDestroy_v2", self.cuda_stream)

entered = []  # the threads of the library's calls

@contextlib.contextmanager
def current(stream, device):
    entered.append(threading.current_thread())
    with in_context():
        yield

def empty(tensor, shape=None, device="cpu", plain=bigsmall_torch.empty):
    made = plain(tensor, shape)
    if torch.device(device).type == "cpu":
        return made
    return device_memory(made.nbytes, torch.device(device)).view(made.dtype).reshape(made.shape)

def use_driver():
    """Lets device "cuda" be the driver's."""
    global context
    context = driver.context()
    driver("cuCtxSetCurrent", 0)
    cuda.side_stream, cuda.current_stream = Stream, lambda device: None
    cuda.page_locked, cuda.device_memory, cuda._current = page_locked, device_memory, current
    bigsmall_torch.empty, bigsmall_torch._check_cuda = empty, lambda device: None
    torch.cuda.current_device = lambda: 0

def bits(tensor):
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""

def compare(got, want):
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert (tensor.dtype, tensor.shape) == (want[name].dtype, want[name].shape), name
        with in_context():
            assert driver.read(tensor.data_ptr(), tensor.nbytes) == bits(want[name]), name

def clean(report="1 modules"):
    """Nothing was done wrong, and all memory and streams were given back but the kernels."""
    assert driver.faults() == "", driver.faults()
    assert driver.report() == report, driver.report()

def why(path, device):
    try:
        bigsmall.load(path, device)
    except errors.BigSmallError as error:
        return type(error), str(error)
    raise AssertionError("no error")
'''


def child(code: str, *arguments: object, fake_driver: bool = True, **fake: object) -> str:
    """Runs code in a process with the driver of the tests; its output."""
    script = f"HERE = {str(HERE)!r}\n" + PRELUDE + textwrap.dedent(code)
    return run_script(script, *arguments, timeout=150, env=fakecuda.environment(**fake) if fake_driver else None)


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
            f"layers.{k}.w": torch.randn(70000, generator=generator).half(),
            f"layers.{k}.host": torch.arange(3000),
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


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ({"devices": 0}, "no CUDA device|does not start"),
        ({"driver": 10020}, r"CUDA 10\.2"),
        ({"cc": 61}, r"6\.1"),
    ],
)
def test_why_a_device_does_not_decode(folder: Path, fake: dict[str, object], words: str) -> None:
    code = """
    bigsmall_torch._check_cuda, torch.cuda.current_device = (lambda device: None), lambda: 0
    bigsmall_torch.empty = lambda tensor, shape=None, device="cpu", plain=bigsmall_torch.empty: plain(tensor, shape)
    placement.Cuda = lambda tensors, device: placement.Device(tensors)
    want = bigsmall.load(sys.argv[1])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            got = bigsmall.load(sys.argv[1], "cuda")
            assert all(bits(got[name]) == bits(want[name]) for name in want)
    assert {warning.category for warning in said} == {UserWarning}
    print(*[warning.message for warning in said], sep="\\n")
    """
    said = child(code, folder, **fake).splitlines()
    assert len(said) == 1
    assert re.search(words, said[0])
    assert said[0].count("on the CPU") == 1


@pytest.mark.parametrize("order", ["late", "thread"])
def test_whole_models_layers_and_tensors(folder: Path, order: str) -> None:
    code = """
    use_driver()
    path = sys.argv[1]
    want = bigsmall.load(path)
    calls = []
    decode_cuda = Reader._decode_cuda
    Reader._decode_cuda = lambda self, *a: calls.append(len(a[0])) or decode_cuda(self, *a)
    Reader.decode_many = Reader.decode_range = None  # the CPU does nothing

    compare(bigsmall.load(path, "cuda"), want)
    assert calls == [10]  # both shards at once; an empty tensor takes no call
    compare(bigsmall.load(path + "/model-00001-of-00002.bs", torch.device("cuda")),
            {name: tensor for name, tensor in want.items() if "1" in name})
    clean()

    with bigsmall.safe_open(path, "pt", "cuda") as file:
        compare(file.get_tensors(["w1", "f2"]), {name: want[name] for name in ("w1", "f2")})
        compare({"w2": file.get_tensor("w2"), "e1": file.get_tensor("e1")}, {name: want[name] for name in ("w2", "e1")})
        for index in (..., slice(None), (slice(0, 300), ...)):
            compare({"w2": file.get_slice("w2")[index]}, {"w2": want["w2"]})
    clean()

    with bigsmall.StreamingLoader(path, "cuda") as loader:
        assert loader.device == torch.device("cuda", 0)
        got = loader.load_non_layer_tensors()
        for name, tensors in loader.iter_layers():
            assert set(tensors) == {name + ".w", name + ".host"}
            got.update(tensors)
        compare(got, want)
        compare(loader.load_layer(2), {name: want[name] for name in ("layers.2.w", "layers.2.host")})
    del got, tensors
    assert {thread.name for thread in entered} == {"MainThread", "bigsmall-layers"}
    clean()
    """
    child(code, folder, order=order)


def test_from_many_threads(folder: Path) -> None:
    code = """
    from concurrent.futures import ThreadPoolExecutor
    use_driver()
    want = bigsmall.load(sys.argv[1])
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(lambda _: bigsmall.load(sys.argv[1], "cuda"), range(6)):
            compare(got, want)
    del got
    assert threading.main_thread() not in entered
    clean()
    """
    child(code, folder, order="random")


def test_files_that_come_part_by_part(folder: Path) -> None:
    """Of a model that is read over a network: what is decoded is there before, and is let go afterwards."""
    code = """
    use_driver()
    from bigsmall import reader as reader_module
    reader_module._FETCH_BYTES = 1 << 18
    names = sorted(os.listdir(sys.argv[1]))

    class Coming:
        label = "owner/model/"
        files = [(name, open(os.path.join(sys.argv[1], name), "rb").read()) for name in names]
        held = 0

        @contextlib.contextmanager
        def hold(self, spans, stop=None):
            self.held += len(spans)
            yield
            self.held -= len(spans)

    parts = Coming()
    with Reader.from_parts(parts) as reader:
        compare(bigsmall_torch.read(reader, reader.tensors, torch.device("cuda")), bigsmall.load(sys.argv[1]))
    assert len(entered) > 2
    assert parts.held == 0
    clean()
    """
    child(code, folder)


def test_control_c(folder: Path) -> None:
    """It comes while the library's call is about to begin on a thread of its own, whose context it is. Nothing is
    written when KeyboardInterrupt is raised, and the next load is whole."""
    code = """
    use_driver()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _native._LONG_CALL_BYTES = 0

    @contextlib.contextmanager
    def interrupted(stream, device):
        with current(stream, device):
            os.kill(os.getpid(), signal.SIGINT)
            while not stop.is_set():  # until the main thread has seen it
                pass
            yield

    stop = threading.Event()
    wait_out = _native._wait_out
    def waiting(*events):
        stop.set()
        wait_out(*events)
    _native._wait_out = waiting
    cuda._current = interrupted
    try:
        bigsmall.load(sys.argv[1], "cuda")
    except KeyboardInterrupt:
        pass
    else:
        raise SystemExit("no KeyboardInterrupt")
    assert [thread.name for thread in entered] == ["bigsmall"]
    clean(driver.report() and "1 modules")  # the kernels may not be loaded yet
    cuda._current = current
    compare(bigsmall.load(sys.argv[1], "cuda"), bigsmall.load(sys.argv[1]))
    clean()
    """
    child(code, folder, order="late")


def test_damage_and_failures(folder: Path, tmp_path: Path) -> None:
    """A damaged file gives the error that it gives on the CPU; a device that fails is no reason to use the CPU."""
    whole = (folder / "model-00001-of-00002.bs").read_bytes()
    with Reader(folder / "model-00001-of-00002.bs") as reader:
        span = reader.locate(reader.find("w1"))
    for number, at in enumerate((span.offset + 1, span.offset + span.n_bytes // 2)):
        damaged = bytearray(whole)
        damaged[at] ^= 8
        (tmp_path / f"bad{number}.bs").write_bytes(damaged)
    code = """
    use_driver()
    good, *bad = sys.argv[1:]
    for path in bad:
        kind, text = why(path, "cuda")
        assert (kind, text) == why(path, "cpu")
        assert issubclass(kind, errors.Corrupt) and "w1" in text and path in text
        clean(driver.report() and "1 modules")
    compare(bigsmall.load(good, "cuda"), bigsmall.load(good))
    driver.fail("cuLaunchKernel:2:700")
    kind, text = why(good, "cuda")
    assert kind is errors.DeviceError and "CUDA_ERROR_ILLEGAL_ADDRESS" in text, text
    """
    child(code, folder, *sorted(tmp_path.glob("bad*.bs")), order="random")


def test_memory_to_stage_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is by the work's size; less where the device has less, and none that is page-locked where there is none."""
    mib = 1 << 20
    room = 1 << 40
    asked: list[int] = []

    def device_memory(n_bytes: int, device: torch.device) -> torch.Tensor:
        asked.append(n_bytes)
        if n_bytes > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.empty(n_bytes, dtype=torch.uint8)

    def page_locked(n_bytes: int, device: torch.device) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    class Stream:
        cuda_stream = 77

    monkeypatch.setattr(cuda, "device_memory", device_memory)
    monkeypatch.setattr(cuda, "page_locked", page_locked)
    monkeypatch.setattr(cuda, "side_stream", lambda device: Stream())
    device = torch.device("cuda", 0)
    for n_bytes, size in ((0, 4), (4 * mib, 4), (4 * mib + 1, 8), (100 * mib, 128), (1 << 40, 128)):
        job = cuda.Workspace(device, n_bytes).job
        assert (job.host_bytes, job.device_bytes) == (size * mib, size * mib)
    room = 17 * mib
    del asked[:]
    job = cuda.Workspace(device, 1 << 40).job
    assert asked == [128 * mib, 64 * mib, 32 * mib, 16 * mib]
    assert job.device_bytes == job.host_bytes or job.device_bytes == 16 * mib
    assert int(job.device) != 0
    room = 3 * mib
    with pytest.raises(errors.NoDevice, match="cuda:0 has no 4 MiB left"):
        cuda.Workspace(device, 1 << 40)


def test_a_device_without_memory_to_spare_has_the_cpu_decode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(n_bytes: int, device: torch.device) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "device_memory", full)
    monkeypatch.setattr(placement, "_warned", False)
    monkeypatch.setattr(placement, "Cuda", lambda tensors, device: placement.Device(tensors))
    want = bigsmall.load(folder)
    got = {name: torch.full_like(tensor, 3) for name, tensor in want.items()}
    with Reader(folder) as reader, pytest.warns(UserWarning, match="cuda:0 has no 4 MiB left.*decoded on the CPU"):
        placement.decode(reader, reader.tensors, got, torch.device("cuda", 0))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_verify_looks_at_what_the_device_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = ""

    def decode(reader, tensors, into, device, **options) -> None:
        reader.decode_many([Destination(tensor, into[tensor.name].data_ptr()) for tensor in tensors])
        if spoilt:
            into[spoilt].view(torch.uint8).reshape(-1)[-1] ^= 1

    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "decode", decode)
    monkeypatch.setattr(placement, "_SMALLEST_BUFFER_BYTES", 1000)  # so that tensors are copied back in parts
    with Reader(folder) as reader:
        into = bigsmall.load(folder)
        placement.decode(reader, reader.tensors, into, torch.device("cuda", 0), verify=True)
        for spoilt in ("w1", "layers.2.host"):
            placement.decode(reader, reader.tensors, into, torch.device("cuda", 0))
            with pytest.raises(errors.ChecksumMismatch, match=f"{spoilt}.*MD5 of the decoded bytes"):
                placement.decode(reader, reader.tensors, into, torch.device("cuda", 0), verify=True)


def test_layers_are_decoded_on_the_callers_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch gives out the memory of a layer again after what is queued on that one, where the caller computes."""
    own = threading.local()
    log = []
    read = bigsmall.StreamingLoader._read

    @contextlib.contextmanager
    def on_stream(stream):
        own.stream = stream
        yield
        own.stream = None

    def noted(self, *arguments):
        log.append((getattr(own, "stream", None), threading.current_thread().name))
        return read(self, *arguments)

    own.stream = "the caller's"
    monkeypatch.setattr(cuda, "current_stream", lambda device: getattr(own, "stream", None))
    monkeypatch.setattr(cuda, "on_stream", on_stream)
    monkeypatch.setattr(bigsmall.StreamingLoader, "_read", noted)
    with bigsmall.StreamingLoader(folder, "cpu") as loader:
        assert [name for name, _ in loader.iter_layers()] == ["layers.1", "layers.2"]
    assert log == [("the caller's", "bigsmall-layers")] * 2


def test_which_device_map_is_one_gpu() -> None:
    gpu = torch.device("cuda", 1)
    for places in ("cuda:1", gpu, {"": gpu}, {"": "cuda:1"}):
        assert huggingface._gpu_of(places) == gpu
    for places in (None, "cpu", "auto", "balanced", {}, {"": "cpu"}, {"": "disk"}, {"a": "cuda:0", "b": "cuda:0"}):
        assert huggingface._gpu_of(places) == "cpu"


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
