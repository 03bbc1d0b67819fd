"""Models read from a Hub: downloaded, by ranges, and by the hook. The Hub is a fake one on loopback, so each part runs
in a process of its own, whose environment names it before huggingface_hub is imported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bigsmall
from fakehub import FakeHub
from helpers import REPOSITORY, bfloat16, run_script, weights, write_safetensors

pytest.importorskip("torch")
pytest.importorskip("huggingface_hub")

# What every script begins with: the arguments, and whether two dicts of tensors are the same bits.
PRELUDE = """
import os, sys, json, threading
from pathlib import Path
import torch
import bigsmall
from bigsmall import errors, hub
repo, source = sys.argv[1:3]

def plain(folder):
    from safetensors.torch import load_file
    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors

def same(ours, theirs):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape, name
        a, b = (t.contiguous().flatten().view(torch.uint8) for t in (ours[name], theirs[name]))
        assert torch.equal(a, b), name

def raises(kind, text, call):
    try:
        call()
    except kind as error:
        assert text in str(error), str(error)
        return error
    raise AssertionError(f"no {kind}")

def bs_on_disk():
    files = [path for path in Path(os.environ["HF_HOME"]).rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if path.read_bytes()[:4] == b"BGSM"]

def mark(name):
    # Puts a mark in the log of the Hub.
    import urllib.error, urllib.request
    try:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mark/" + name)
    except urllib.error.HTTPError:
        pass
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with FakeHub(tmp_path_factory.mktemp("hub")) as made:
        yield made


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source and `.bs` directories of a model in two shards, with ties across them and tensors of all kinds."""
    root = tmp_path_factory.mktemp("shards")
    source = root / "source"
    source.mkdir()
    tied = bfloat16(weights(1, 300, 128))
    first = {
        "embed.weight": ("BF16", (300, 128), tied),
        "layers.0.w": ("BF16", (700, 400), bfloat16(weights(2, 700, 400))),
        "layers.0.norm": ("F32", (128,), weights(3, 128).tobytes()),
        "scalar": ("F32", (), weights(4, 1).tobytes()),
        "empty": ("F32", (0, 4), b""),
    }
    second = {
        "layers.1.w": ("F32", (500, 300), weights(5, 500, 300).tobytes()),
        "layers.1.norm": ("F32", (128,), weights(6, 128).tobytes()),
        "head.weight": ("BF16", (300, 128), tied),
    }
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name, tensors in zip(names, (first, second)):
        write_safetensors(source / name, tensors, {"format": "pt"})
    weight_map = {key: name for name, tensors in zip(names, (first, second)) for key in tensors}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (source / "config.json").write_text("{}")
    bigsmall.compress(source, root / "bs")
    return root


def run(hub: FakeHub, home: Path, code: str, *args: object, token: str = "x", **env: str) -> str:
    hub.log.clear()
    return run_script(PRELUDE + code, *args, env={**hub.env(home, token), **env})


def between_marks(hub: FakeHub) -> dict[str, list[tuple[str, str]]]:
    """Method and path of the requests after each mark, sorted."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for method, path, _, _ in hub.log:
        if path.startswith("/mark/"):
            current = found.setdefault(path.removeprefix("/mark/"), [])
        else:
            current.append((method, path))
    return {name: sorted(requests) for name, requests in found.items()}


def bytes_asked(hub: FakeHub) -> int:
    """Bytes of `.bs` files that were asked for by ranges."""
    total = 0
    for method, path, ranges, _ in hub.log:
        if method == "GET" and "/resolve/" in path and path.endswith(".bs") and ranges:
            first, last = ranges.removeprefix("bytes=").split("-")
            total += int(last) - int(first) + 1
    return total


@pytest.mark.parametrize("redirect", [False, True])
def test_download_then_from_the_cache(hub: FakeHub, shards: Path, tmp_path: Path, redirect: bool) -> None:
    hub.add("me/model", shards / "bs")
    hub.redirect = redirect
    code = """
want = plain(source)
mark("cold")
same(bigsmall.from_pretrained(repo), want)
assert len(bs_on_disk()) == 2, bs_on_disk()
mark("local")
same(bigsmall.from_pretrained("hf://" + repo, local_files_only=True), want)
mark("cached")  # ranges of what is in the cache are read there
same(bigsmall.from_pretrained(repo, stream=True), want)
"""
    run(hub, tmp_path, code, "me/model", shards / "source")
    hub.redirect = False
    seen = between_marks(hub)
    assert seen["cold"]
    assert not seen["local"]
    assert not [path for _, path in seen["cached"] if path.endswith(".bs")]
    code = "same(bigsmall.from_pretrained(repo), plain(source))"
    run(hub, tmp_path, code, "me/model", shards / "source", HF_HUB_OFFLINE="1")
    assert not hub.log


@pytest.mark.parametrize("redirect", [False, True])
def test_by_ranges_nothing_is_stored(hub: FakeHub, shards: Path, tmp_path: Path, redirect: bool) -> None:
    hub.add("me/model", shards / "bs")
    hub.redirect = redirect
    code = "same(bigsmall.from_pretrained(repo, stream=True), plain(source))\nassert not bs_on_disk(), bs_on_disk()"
    run(hub, tmp_path, code, "me/model", shards / "source")
    hub.redirect = False
    assert all(entry[3] == "Bearer x" for entry in hub.log if "/resolve/" in entry[1])
    # Opening reads 256 KiB at the beginning of each file and 64 KiB at its end. A payload half in them comes again.
    size = sum(file.stat().st_size for file in (shards / "bs").glob("*.bs"))
    assert bytes_asked(hub) <= size + 2 * ((256 << 10) + (64 << 10))


@pytest.mark.parametrize("parity", [0, 50])
def test_reader_fetches_what_it_needs(hub: FakeHub, tmp_path: Path, parity: int) -> None:
    """One tensor of a large file costs its bytes; a slice of it too, and slices after it nothing. No parity is read."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = {f"t{i}": ("BF16", (1 << 10, 1 << 10), bfloat16(weights(i, 1 << 10, 1 << 10))) for i in range(6)}
    write_safetensors(source / "model.safetensors", tensors)
    bigsmall.compress(source, tmp_path / "bs", parity=parity)
    hub.add("me/large", tmp_path / "bs")
    said = bigsmall.info(tmp_path / "bs")
    size = said["file_size"] - said["parity_bytes"]
    run(
        hub, tmp_path,
        """
from bigsmall.torch import read
reader = hub.open_reader(repo)
print(len(reader))
want = plain(source)
same(read(reader, [reader.find("t4")], torch.device("cpu")), {"t4": want["t4"]})
""",
        "me/large", source,
    )  # fmt: skip
    asked = bytes_asked(hub)
    assert asked < (256 << 10) + (64 << 10) + size // 6 + (64 << 10), (asked, size)
    run(
        hub, tmp_path,
        """
from bigsmall.streaming import torch_slices, TensorSlice
slices = torch_slices(hub.open_reader(repo), TensorSlice)
want = plain(source)["t2"]
for row in range(0, 1024, 100):
    assert torch.equal(slices["t2"][row], want[row])
""",
        "me/large", source,
    )  # fmt: skip
    assert bytes_asked(hub) < (256 << 10) + (64 << 10) + size // 6 + (64 << 10)


def test_many_threads_and_a_fork(hub: FakeHub, shards: Path, tmp_path: Path) -> None:
    hub.add("me/model", shards / "bs")
    run(
        hub, tmp_path,
        """
from bigsmall.torch import read
reader, want = hub.open_reader(repo), plain(source)
failures = []

def work(seed):
    try:
        names = sorted(want)
        for step in range(6):
            name = names[(seed * 5 + step * 3) % len(names)]
            same(read(reader, [reader.find(name)], torch.device("cpu")), {name: want[name]})
    except BaseException as error:
        failures.append(error)

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not failures, failures
child = os.fork()
if child == 0:
    code = 1
    try:
        torch.set_num_threads(1)
        out = bytearray(want["layers.1.w"].numel() * 4)
        tensor = reader.find("layers.1.w")
        import numpy
        array = numpy.frombuffer(out, dtype=numpy.uint8)
        from bigsmall.reader import Destination
        reader.decode_many([Destination(tensor, array.__array_interface__["data"][0])])
        code = 0 if bytes(out) == want["layers.1.w"].numpy().tobytes() else 2
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
""",
        "me/model", shards / "source",
    )  # fmt: skip


def test_revisions_subfolders_and_a_moving_branch(hub: FakeHub, shards: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    (older / "sub").mkdir(parents=True)
    write_safetensors(tmp_path / "m.safetensors", {"a": ("F32", (100,), weights(9, 100).tobytes())})
    bigsmall.compress(tmp_path / "m.safetensors", older / "sub" / "model.bs")
    sha = hub.add("me/moving", older)
    hub.add("me/moving", shards / "bs")
    code = """
for stream in (True, False):
    def load(**options):
        return bigsmall.from_pretrained(repo, stream=stream, **options)
    same(load(revision=sys.argv[3], subfolder="sub"), plain(source))
    same(load(), plain(sys.argv[4]))
    raises(FileNotFoundError, "sub", lambda: load(subfolder="sub"))
    raises(FileNotFoundError, "nosuch", lambda: load(revision="nosuch"))
    raises(errors.InvalidArgument, "leads out", lambda: load(subfolder="../x"))
"""
    run(hub, tmp_path, code, "me/moving", tmp_path, sha, shards / "source")
    assert not [entry for entry in hub.log if "resolve/main" in entry[1] and entry[1].endswith(".bs")]


def test_who_may_not_read_is_told(hub: FakeHub, shards: Path, tmp_path: Path) -> None:
    hub.add("me/secret", shards / "bs", private=True)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text("{}")
    hub.add("me/none", tmp_path / "none")
    code = """
for stream in (True, False):
    def load(name, **options):
        return bigsmall.from_pretrained(name, stream=stream, **options)
    for who in ("stranger", "unknown", False):
        raises((FileNotFoundError, PermissionError), "me/secret", lambda: load(repo, token=who))
    raises(FileNotFoundError, "no .bs file", lambda: load("me/none"))
    raises(FileNotFoundError, "me/nowhere", lambda: load("me/nowhere"))
    same(load(repo), plain(source))
"""
    run(hub, tmp_path / "home", code, "me/secret", shards / "source")


def test_no_network(hub: FakeHub, shards: Path, tmp_path: Path) -> None:
    hub.add("me/model", shards / "bs")
    run(hub, tmp_path / "full", "bigsmall.from_pretrained(repo)", "me/model", shards / "source")
    dead = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    code = "same(bigsmall.from_pretrained(repo, stream=True), plain(source))"
    run(hub, tmp_path / "full", code, "me/model", shards / "source", **dead)
    code = 'raises(OSError, "me/model", lambda: bigsmall.from_pretrained(repo, stream=True))'
    run(hub, tmp_path / "empty", code, "me/model", shards / "source", **dead)


def test_connections_that_break(hub: FakeHub, shards: Path, tmp_path: Path) -> None:
    hub.add("me/model", shards / "bs")
    hub.cut(3, after=5000)
    run(
        hub, tmp_path, "same(bigsmall.from_pretrained(repo, stream=True), plain(source))", "me/model", shards / "source"
    )  # fmt: skip
    assert hub.cuts_left == 0


def test_damaged_repositories(hub: FakeHub, shards: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Any) -> None:
        target = tmp_path / name
        shutil.copytree(shards / "bs", target)
        change(target)
        hub.add(f"me/{name}", target)

    def flip(folder: Path) -> None:
        file = folder / "model-00001-of-00002.bs"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    def cut(folder: Path) -> None:
        file = folder / "model-00001-of-00002.bs"
        file.write_bytes(file.read_bytes()[:-100])

    broken("flipped", flip)
    broken("cut", cut)
    broken("short", lambda folder: (folder / "model-00001-of-00002.bs").write_bytes(b"BGSM"))
    broken("void", lambda folder: (folder / "model-00001-of-00002.bs").write_bytes(b""))
    broken("lacking", lambda folder: (folder / "model-00001-of-00002.bs").unlink())
    broken(
        "swapped",
        lambda folder: shutil.copy(folder / "model-00002-of-00002.bs", folder / "model-00001-of-00002.bs"),
    )
    code = """
for name, kind, text in (
    ("flipped", errors.ChecksumMismatch, "model-00001"), ("cut", errors.Truncated, "model-00001"),
    ("short", errors.Truncated, "model-00001"), ("void", errors.Corrupt, "model-00001"),
    ("lacking", FileNotFoundError, "model-00001"), ("swapped", (errors.Corrupt, errors.InvalidArgument), "model-0000"),
):
    for stream in (True, False):
        raises(kind, text, lambda: bigsmall.from_pretrained(f"me/{name}", stream=stream))
"""
    run(hub, tmp_path / "home", code, "me/flipped", shards / "source")


def test_delta_with_its_base_on_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    base = weights(1, 200, 200)
    tuned = (base + (abs(weights(2, 200, 200)) < 0.001) * 1e-4).astype("<f4")
    for name, values in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "model.safetensors", {"w": ("F32", (200, 200), values.tobytes())})
    bigsmall.compress(tmp_path / "base", tmp_path / "base-bs")
    bigsmall.compress_delta(tmp_path / "tuned", tmp_path / "base", tmp_path / "delta")
    hub.add("me/base", tmp_path / "base")
    hub.add("me/base-bs", tmp_path / "base-bs")
    hub.add("me/delta", tmp_path / "delta")
    code = """
for base in ("me/base", "me/base-bs", sys.argv[3]):
    for stream in (True, False):
        same(bigsmall.from_pretrained(repo, base=base, stream=stream), plain(source))
raises(errors.WrongBase, "base", lambda: bigsmall.from_pretrained(repo, stream=True))
"""
    run(hub, tmp_path / "home", code, "me/delta", tmp_path / "tuned", tmp_path / "base")


def test_ctrl_c_while_the_network_stands_still(hub: FakeHub, shards: Path, tmp_path: Path) -> None:
    hub.add("me/model", shards / "bs")
    code = """
import signal, time
reader = hub.open_reader(repo)
def later():
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)
from bigsmall.torch import read
Path(sys.argv[3]).touch()
while Path(sys.argv[3]).exists():
    time.sleep(0.01)
threading.Thread(target=later).start()
try:
    read(reader, reader.tensors, torch.device("cpu"))
except KeyboardInterrupt:
    pass
else:
    raise AssertionError
"""
    import threading
    import time

    flag = tmp_path / "flag"

    def slow() -> None:
        while not flag.exists():
            time.sleep(0.01)
        hub.delay = 120  # longer than the script may take
        flag.unlink()

    waiter = threading.Thread(target=slow)
    waiter.start()
    try:
        run(hub, tmp_path / "home", code, "me/model", shards / "source", flag)
    finally:
        flag.touch()
        waiter.join()
        hub.delay = 0


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for name, size in (("single", "10GB"), ("sharded", "100KB")):
        model.save_pretrained(root / name, max_shard_size=size)
        bigsmall.compress(root / name, root / f"{name}-bs")
    torch.save(model.state_dict(), root / "weights.bin")
    (root / "pickle").mkdir()
    shutil.copy(root / "single" / "config.json", root / "pickle")
    shutil.move(root / "weights.bin", root / "pickle" / "pytorch_model.bin")
    return root


LOAD = """
import transformers
cls = transformers.AutoModelForCausalLM
if sys.argv[3] == "hook":
    bigsmall.install_hook()
want = cls.from_pretrained(source).state_dict()
for name in sys.argv[4:]:
    for step, options in (("cold", {}), ("warm", {}), ("local", {"local_files_only": True})):
        mark(f"{name}-{step}")
        same(cls.from_pretrained(f"me/{name}", **options).state_dict(), want)
"""


def test_hook_loads_repositories(hub: FakeHub, models: Path, tmp_path: Path) -> None:
    kinds = ("single", "sharded")
    for kind in kinds:
        hub.add(f"me/{kind}", models / f"{kind}-bs")
    run(hub, tmp_path / "a", LOAD, "", models / "single", "hook", *kinds, DISABLE_SAFETENSORS_CONVERSION="1")
    seen = between_marks(hub)
    for kind in kinds:
        assert [path for _, path in seen[f"{kind}-cold"] if path.endswith(".bs")]
        assert not [path for method, path in seen[f"{kind}-warm"] if method == "GET" and "/resolve/" in path]
        assert len(seen[f"{kind}-warm"]) < len(seen[f"{kind}-cold"])
        assert not seen[f"{kind}-local"]
    code = """
import transformers
bigsmall.install_hook()
transformers.AutoModelForCausalLM.from_pretrained(repo, use_safetensors=True)
"""
    run(hub, tmp_path / "b", code, "me/sharded", models)
    assert not [entry for entry in hub.log if "discussions" in entry[1]], "the converter was asked"


def test_ordinary_repositories_see_the_same_requests(hub: FakeHub, models: Path, tmp_path: Path) -> None:
    kinds = ("plain-single", "plain-sharded", "plain-pickle")
    for kind in kinds:
        hub.add(f"me/{kind}", models / kind.removeprefix("plain-"))
    seen = {}
    for hooked in ("hook", "none"):
        home = tmp_path / hooked
        run(hub, home, LOAD, "", models / "single", hooked, *kinds, DISABLE_SAFETENSORS_CONVERSION="1")
        seen[hooked] = between_marks(hub)
    assert all(seen["none"][f"{kind}-cold"] for kind in kinds)
    assert seen["hook"] == seen["none"]


def test_from_pretrained_of_the_integration(hub: FakeHub, models: Path, tmp_path: Path) -> None:
    hub.add("me/sharded", models / "sharded-bs")
    code = """
import transformers
from bigsmall.integrations import huggingface
cls = transformers.AutoModelForCausalLM
want = cls.from_pretrained(source).state_dict()
for stream in (True, False):
    same(huggingface.from_pretrained(repo, cls, stream=stream).state_dict(), want)
    assert bool(bs_on_disk()) != stream
"""
    run(hub, tmp_path, code, "me/sharded", models / "sharded")


def test_repositories_of_the_original_package(hub: FakeHub, tmp_path: Path) -> None:
    """Whose index may name tensors that are in no shard: downloaded and by ranges."""
    folder = REPOSITORY / "tests" / "go" / "testdata" / "reference" / "v4" / "sharded_repo"
    hub.add("me/old", folder)
    code = """
want = {name: torch.from_numpy(array.view(np.uint8)) for name, array in bigsmall.decompress(source).items()}
for stream in (True, False):
    got = bigsmall.from_pretrained(repo, stream=stream)
    assert got.keys() == want.keys() and "lm_head.weight" in got
    for name, tensor in got.items():
        assert torch.equal(tensor.view(torch.uint8), want[name].reshape(tensor.view(torch.uint8).shape)), name
"""
    run(hub, tmp_path, "import numpy as np\n" + code, "me/old", folder)
