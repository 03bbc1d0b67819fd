"""Decoding on a GPU, beside copies, safetensors and DFloat11: prints a table and ratios, all of one run.

    gpu.py [--layers 32] [--only SECTION ...] [--models FOLDER] [--work FOLDER] [--json FILE]

exact      every tensor of the models in FOLDER (.bs files) and of zoo.safetensors, against the CPU's decoder
decode     compressed to decoded, both in device memory: GB/s of BF16
dfloat11   the same by DFloat11's kernel on the same weights (needs the packages dfloat11, dahuffman, cupy)
load       a model of about 8 GB from page-locked memory, and from the page cache
generate   a model with the shapes of Llama 3 8B, plain and with weights that stay compressed
sanitizer  compute-sanitizer's memcheck and racecheck over small tensors, where it is installed

Weights are synthetic (make_synthetic_llm.py has the model of them): for speed and memory.
Times are medians. FOLDER for --work needs 30 GB; /dev/shm by default.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import torch

import bigsmall
from bigsmall import _native
from bigsmall.compressed import CompressedWeight, _aligned, _Batch
from bigsmall.reader import Reader

HIDDEN, INTER, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 8, 128256
SECTIONS = ("exact", "decode", "dfloat11", "load", "generate", "sanitizer")
RESULTS: dict[str, Any] = {}
DEVICE = torch.device("cuda", 0)


def say(name: str, value: float | str, unit: str = "") -> None:
    RESULTS[name] = value
    print(f"{name:<64} {value if isinstance(value, str) else f'{value:10.3f}'} {unit}", flush=True)


def on_device(function: Callable[[], Any], times: int = 15) -> float:
    """Median milliseconds of the device, after two calls to warm up."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    function()
    function()
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))


def graphed(function: Callable[[], Any], times: int = 15) -> float:
    """The same of a CUDA graph, so that the time it takes to launch does not count."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        function()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return on_device(graph.replay, times)


def by_clock(function: Callable[[], Any], times: int = 5) -> float:
    """Median seconds of the host, the device's work included, after one call to warm up."""
    taken = []
    for turn in range(times + 1):
        gc.collect()
        torch.cuda.synchronize()
        start = time.perf_counter()
        kept = function()
        torch.cuda.synchronize()
        if turn:
            taken.append(time.perf_counter() - start)
        del kept
    return statistics.median(taken)


# ---- data ------------------------------------------------------------------------------------------------------------


def weights(rows: int, columns: int, seed: int, std: float = 0.018) -> Any:
    """w[i, j] = r[i] c[j] x, x a mixture of a normal and a Student's t: see make_synthetic_llm.py."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator, device=DEVICE)
    heavy = torch.randn(rows, columns, generator=generator, device=DEVICE)
    heavy /= (torch.randn(rows, columns, generator=generator, device=DEVICE).abs() + 0.15).sqrt()
    pick = torch.rand(rows, columns, generator=generator, device=DEVICE) < 0.1
    x = torch.where(pick, heavy, normal)
    x *= torch.exp(0.2 * torch.randn(rows, 1, generator=generator, device=DEVICE)) * std
    x *= torch.exp(0.2 * torch.randn(1, columns, generator=generator, device=DEVICE))
    return x.bfloat16()


def shapes(layers: int) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """The shards of a model: embedding, layers, head."""
    yield [("model.embed_tokens.weight", (VOCAB, HIDDEN))]
    for k in range(layers):
        p = f"model.layers.{k}."
        kv = KV_HEADS * HIDDEN // HEADS
        yield [
            (p + "self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
            (p + "self_attn.k_proj.weight", (kv, HIDDEN)),
            (p + "self_attn.v_proj.weight", (kv, HIDDEN)),
            (p + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
            (p + "mlp.gate_proj.weight", (INTER, HIDDEN)),
            (p + "mlp.up_proj.weight", (INTER, HIDDEN)),
            (p + "mlp.down_proj.weight", (HIDDEN, INTER)),
            (p + "input_layernorm.weight", (HIDDEN,)),
            (p + "post_attention_layernorm.weight", (HIDDEN,)),
        ]
    yield [("lm_head.weight", (VOCAB, HIDDEN)), ("model.norm.weight", (HIDDEN,))]


def write_safetensors(path: Path, tensors: dict[str, Any]) -> None:
    header, at = {}, 0
    for name, tensor in tensors.items():
        n = tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


def make_model(folder: Path, layers: int) -> tuple[Path, Path]:
    """The model as shards of `.safetensors` and of `.bs`."""
    source, ours = folder / "source", folder / "bs"
    if (ours / "bigsmall.index.json").exists():
        return source, ours
    shutil.rmtree(folder, ignore_errors=True)
    source.mkdir(parents=True)
    shards = list(shapes(layers))
    weight_map: dict[str, str] = {}
    start = time.perf_counter()
    total = 0
    with ThreadPoolExecutor(6) as pool:
        writing = []
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for k, (tensor, shape) in enumerate(shard):
                made = weights(*shape, 97 * number + k) if len(shape) == 2 else torch.ones(shape).bfloat16()
                tensors[tensor] = made.cpu()
                weight_map[tensor] = name
                total += made.numel() * 2
            writing.append(pool.submit(write_safetensors, source / name, tensors))
            while len(writing) > 8:
                writing.pop(0).result()
        for one in writing:
            one.result()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    (source / "config.json").write_text(json.dumps(config))
    middle = time.perf_counter()
    bigsmall.compress(source, ours)
    end = time.perf_counter()
    sizes = [sum(f.stat().st_size for f in d.glob("model*")) for d in (source, ours)]
    say("model: bytes of BF16", sizes[0] / 1e9, "GB")
    say("model: compressed to", sizes[1] / sizes[0], "of them")
    say("model: making", middle - start, "s")
    say("model: compressing, balanced", total / 1e9 / (end - middle), "GB/s")
    return source, ours


# ---- sections --------------------------------------------------------------------------------------------------------


def differing(path: Path) -> list[str]:
    """Names of the tensors that the device does not decode as the CPU does."""
    want = bigsmall.load(path)
    got = bigsmall.load(path, device="cuda")

    def bits(tensor: Any) -> Any:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return [name for name in want if not torch.equal(bits(want[name]), bits(got[name].cpu()))]


def zoo(folder: Path) -> Path:
    """A file with every form that the device decodes, and some that it does not."""
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(2)
    small = torch.randn(700, 517, generator=g) * 0.02
    spiky = small.clone()
    spiky.view(-1)[torch.randint(0, spiky.numel(), (900,), generator=g)] *= 1e20
    tensors = {
        "bf16": spiky.bfloat16(),
        "f16": small.half(),
        "f32": spiky,
        "f32.of.f16": small.half().float(),
        "f32.of.bf16": small.bfloat16().float(),
        "f8": (small * 8).to(torch.float8_e4m3fn),
        "f8.e5m2": (small * 8).to(torch.float8_e5m2),
        "i64": torch.arange(1000),
        **{f"n{n}": (torch.randn(n, generator=g) * 0.02).bfloat16() for n in (1, 33, 4095, 65535, 65537)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "zoo.safetensors")
    bigsmall.compress(folder / "zoo.safetensors", folder / "zoo.bs", overwrite=True)
    return folder / "zoo.bs"


def exact(options: argparse.Namespace) -> None:
    files = [zoo(options.work), *sorted(Path(options.models).glob("*.bs"))] if options.models else [zoo(options.work)]
    for path in files:
        bad = differing(path)
        n = len(bigsmall.info(path)["tensors"])
        say(f"exact: {path.stem}", f"{n - len(bad)} of {n} tensors bit for bit {bad[:3] if bad else ''}")
    _, ours = make_model(options.work / "model", options.layers)
    shard = sorted(ours.glob("*.bs"))[1]
    bad = differing(shard)
    say("exact: a layer of the synthetic model", "bit for bit" if not bad else f"differs: {bad}")


def decode(options: argparse.Namespace) -> None:
    _, ours = make_model(options.work / "model", options.layers)
    with Reader(ours) as reader:
        q = [CompressedWeight(reader, f"model.layers.{k}.self_attn.q_proj.weight", DEVICE) for k in range(8)]
        up = [CompressedWeight(reader, f"model.layers.{k}.mlp.up_proj.weight", DEVICE) for k in range(4)]
        head = CompressedWeight(reader, "lm_head.weight", DEVICE)
        names = [name for name, shape in list(shapes(2))[1] if len(shape) == 2]
        layer = [CompressedWeight(reader, name, DEVICE) for name in names]
    a = torch.empty(head.rows, head.columns, dtype=torch.bfloat16, device=DEVICE)
    b = torch.empty_like(a)
    say("decode: device-to-device copy", head.n_bytes / on_device(lambda: b.copy_(a)) / 1e6, "GB/s of output")
    say("decode: lm_head, 128256 x 4096", head.n_bytes / on_device(lambda: head.decode(a)) / 1e6, "GB/s of output")
    for label, group in (("4096 x 4096", q), ("14336 x 4096", up)):
        out = a.view(-1)[: group[0].rows * group[0].columns].view(group[0].rows, group[0].columns)

        def one_by_one(group: Any = group, out: Any = out) -> None:
            for weight in group:
                weight.decode(out)

        n = sum(w.n_bytes for w in group)
        say(f"decode: {label}, one launch at a time", n / graphed(one_by_one) / 1e6, "GB/s of output")
    for label, group in (("8 of 4096 x 4096", q), ("the 7 matrices of a layer", layer)):
        n = sum(w.n_bytes for w in group)
        batch = _Batch(group, torch.empty(n + len(group) * _aligned(1), dtype=torch.uint8, device=DEVICE))
        say(f"decode: {label}, in one launch", n / on_device(batch.decode) / 1e6, "GB/s of output")
    n = sum(w.n_bytes for w in layer)
    kept = sum(w.n_bytes_compressed for w in layer)
    say("decode: a layer stays in", kept / n, "of its bytes, restart points included")


def dfloat11_encode(folder: Path) -> None:
    """In a process of its own: DFloat11's encoder is a loop in Python."""
    import contextlib
    import io

    import numpy as np
    from dfloat11_package import utils

    tensor = torch.load(folder / "q.pt")
    with contextlib.redirect_stdout(io.StringIO()):
        _, counter = utils.get_codec(tensor)
        codec, _, table = utils.get_32bit_codec(counter)
        luts = utils.get_luts(table)
        encoded, other, positions, gaps, _ = utils.encode_weights([tensor.reshape(-1)], codec, 8, 512)
    np.savez(
        folder / "dfloat11.npz",
        luts=luts,
        encoded=encoded,
        other=other,
        positions=positions.view(torch.int32),
        gaps=gaps,
    )


def dfloat11_begin(options: argparse.Namespace) -> Any:
    """Starts encoding, beside the other sections."""
    _, ours = make_model(options.work / "model", options.layers)
    with bigsmall.safe_open(ours, framework="pt", device="cpu") as file:
        torch.save(file.get_tensor("model.layers.0.self_attn.q_proj.weight"), options.work / "q.pt")
    return subprocess.Popen(
        [sys.executable, __file__, "--encode-dfloat11", str(options.work)], stderr=subprocess.PIPE, text=True
    )


def dfloat11(options: argparse.Namespace, encoding: Any) -> None:
    import cupy
    import numpy as np
    from dfloat11_package import ptx

    errors = encoding.communicate(timeout=120)[1]
    if encoding.returncode != 0:
        raise RuntimeError(errors[-2000:])
    kernel = cupy.RawModule(path=str(ptx)).get_function("decode")
    made = np.load(options.work / "dfloat11.npz")
    want = torch.load(options.work / "q.pt").reshape(-1)
    copies = []
    for _ in range(8):
        part = {name: torch.from_numpy(made[name]).to(DEVICE) for name in made.files}
        copies.append((part, torch.zeros(want.numel(), dtype=torch.bfloat16, device=DEVICE)))
    positions = made["positions"].view(np.uint32)
    shared = 512 * 4 + 4 + int((positions[1:] - positions[:-1]).max()) * 2
    n_bytes = made["encoded"].size
    grid = (-(-n_bytes // (512 * 8)),)
    streams = [torch.cuda.Stream() for _ in range(4)]

    def launch(copy: Any) -> None:
        pieces, out = copy
        pointers = [pieces[name].data_ptr() for name in ("luts", "encoded", "other", "positions", "gaps")]
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            arguments = [*pointers, out.data_ptr(), made["luts"].shape[0], n_bytes, want.numel()]
            kernel(grid, (512,), arguments, shared_mem=shared)

    def one_by_one() -> None:
        for copy in copies:
            launch(copy)

    def side_by_side() -> None:
        current = torch.cuda.current_stream()
        for stream in streams:
            stream.wait_stream(current)
        for k, copy in enumerate(copies):
            with torch.cuda.stream(streams[k % 4]):
                launch(copy)
        for stream in streams:
            current.wait_stream(stream)

    n = len(copies) * want.numel() * 2
    one_by_one()
    torch.cuda.synchronize()
    same = all(torch.equal(out.cpu().view(torch.int16), want.view(torch.int16)) for _, out in copies)
    assert same, "DFloat11's output differs"
    apart, together = (n / graphed(way) / 1e6 for way in (one_by_one, side_by_side))
    say("dfloat11: 4096 x 4096, one launch at a time", apart, "GB/s of output")
    say("dfloat11: 8 of 4096 x 4096, on 4 streams", together, "GB/s of output")
    size = sum(made[name].nbytes for name in made.files)
    say("dfloat11: the matrix takes", size / (want.numel() * 2), "of its bytes")
    for label, theirs in (
        ("4096 x 4096, one launch at a time", apart),
        ("8 of 4096 x 4096, in one launch", max(apart, together)),
    ):
        if f"decode: {label}" in RESULTS:
            say(f"ratio: {label} / DFloat11", RESULTS[f"decode: {label}"] / theirs, "x (2 wanted)")


def load(options: argparse.Namespace) -> None:
    source, ours = make_model(options.work / "model", options.layers)
    # Embedding, head and as many layers as make about 8 GB.
    n_shards = min(15, options.layers)
    shards = sorted(ours.glob("*.bs"))
    chosen = [shards[0], *shards[1 : 1 + n_shards], shards[-1]]
    plain = [source / shard.with_suffix(".safetensors").name for shard in chosen]
    raw = sum(path.stat().st_size for path in plain)
    ffi, lib = _native.library()

    # From page-locked memory.
    held, files = [], ffi.new("bs_memory_file[]", len(chosen))
    for k, path in enumerate(chosen):
        memory = torch.empty(path.stat().st_size, dtype=torch.uint8, pin_memory=True)
        with open(path, "rb") as file:
            file.readinto(memoryview(memory.numpy()))
        name = ffi.new("char[]", f"part{k}.bs".encode())
        held.append((memory, name))
        files[k].size, files[k].name = ffi.sizeof("bs_memory_file"), name
        files[k].src, files[k].src_len = ffi.cast("void *", memory.data_ptr()), memory.numel()
    out, error = ffi.new("bs_reader **"), ffi.new("bs_error *")
    _native.check(lib.bs_reader_open_memory(files, len(chosen), ffi.NULL, out, error), error)
    count = ffi.new("uint64_t *")
    _native.check(lib.bs_reader_count(out[0], count, error), error)
    described = ffi.new("bs_tensor *")
    described.size = ffi.sizeof("bs_tensor")
    sizes = []
    for k in range(count[0]):
        _native.check(lib.bs_reader_describe(out[0], k, described, error), error)
        sizes.append(described.n_bytes)
    there = [torch.empty(n, dtype=torch.uint8, device=DEVICE) for n in sizes]
    items = ffi.new("bs_cuda_item[]", len(sizes))
    for item, k, tensor in zip(items, range(len(sizes)), there):
        item.index, item.dst, item.dst_cap = k, tensor.data_ptr(), tensor.numel()
    from bigsmall import cuda

    workspace = cuda.Workspace(DEVICE, 1 << 40)

    def ours_pinned() -> None:
        with workspace.current():
            status = lib.bs_reader_decode_cuda(out[0], items, len(items), workspace.job, ffi.NULL, error)
        _native.check(status, error)

    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    pinned.random_(0, 256)
    target = torch.empty_like(pinned, device=DEVICE)

    def raw_pinned() -> None:
        left = raw
        while left > 0:
            n = min(left, pinned.numel())
            target[:n].copy_(pinned[:n], non_blocking=True)
            left -= n

    a, b = by_clock(raw_pinned), by_clock(ours_pinned)
    say("load: bytes of BF16", raw / 1e9, "GB")
    say("load: raw copy from page-locked memory", raw / a / 1e9, "GB/s")
    say("load: ours from page-locked memory", raw / b / 1e9, "GB/s of output")
    say("ratio: page-locked, ours / raw copy", a / b, "x (1.3 wanted)")
    lib.bs_reader_close(out[0])
    held.clear()
    there.clear()
    pinned = target = workspace = items = files = None
    gc.collect()
    torch.cuda.empty_cache()

    # From the page cache.
    from safetensors.torch import load_file

    some = options.work / "some"
    shutil.rmtree(some, ignore_errors=True)
    some.mkdir()
    for path in chosen:
        os.link(path, some / f"part{chosen.index(path)}.bs")
    c = by_clock(lambda: [load_file(path, device="cuda") for path in plain], 3)
    d = by_clock(lambda: bigsmall.load(some, device="cuda"), 3)
    say("load: safetensors.torch.load_file from the page cache", raw / c / 1e9, "GB/s")
    say("load: bigsmall.load from the page cache", raw / d / 1e9, "GB/s of output")
    say("ratio: page cache, ours / safetensors", c / d, "x (1.2 wanted)")


def generate(options: argparse.Namespace) -> None:
    import transformers

    from bigsmall.integrations import huggingface

    transformers.logging.set_verbosity_error()
    _, ours = make_model(options.work / "model", options.layers)
    kind = transformers.AutoModelForCausalLM
    prompt = torch.arange(1, 33, device=DEVICE)[None]
    new = 48

    def run(model: Any) -> tuple[float, Any, Any]:
        with torch.inference_mode():
            logits = model(prompt).logits
            mask = torch.ones_like(prompt)
            how = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            model.generate(prompt, max_new_tokens=8, **how)
            torch.cuda.synchronize()
            taken = []
            for _ in range(2):
                start = time.perf_counter()
                tokens = model.generate(prompt, max_new_tokens=new, min_new_tokens=new, **how)
                torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
        return new / min(taken), logits, tokens

    def graph(model: Any) -> float:
        ids = prompt[:, :1].clone()
        with torch.inference_mode():
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(3):
                    model(ids, use_cache=False)
            side.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                model(ids, use_cache=False)
            return on_device(captured.replay, 8)

    def idle(model: Any) -> None:
        """How much of a token's time the device works."""
        ids = prompt[:, :1].clone()
        with torch.inference_mode():
            eager = on_device(lambda: model(ids, use_cache=False), 8)
        say("generate: one forward, eager, on the device's clock", eager, "ms")

    def measure(label: str, make: Callable[[], Any]) -> tuple[float, Any, Any, int, float]:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        model = make()
        torch.cuda.synchronize()
        say(f"generate: {label}, loading", time.perf_counter() - start, "s")
        memory = torch.cuda.memory_allocated() - before
        say(f"generate: {label}, memory of the weights", memory / 1e9, "GB")
        speed, logits, tokens = run(model)
        say(f"generate: {label}, eager at batch 1", speed, "tokens/s")
        idle(model)
        captured = 0.0
        try:
            captured = 1000 / graph(model)
            say(f"generate: {label}, one token as a CUDA graph", captured, "tokens/s")
        except Exception:
            traceback.print_exc()
        return speed, logits.cpu(), tokens.cpu(), memory, captured

    first = measure("plain", lambda: huggingface.from_pretrained(ours, kind, dtype="auto", device="cuda"))
    second = measure("compressed", lambda: huggingface.from_pretrained(ours, kind, resident="compressed"))
    same = torch.equal(first[1].view(torch.int16), second[1].view(torch.int16))
    say("generate: compressed, logits", "bit for bit" if same else f"differ by {(first[1] - second[1]).abs().max()}")
    say("generate: compressed, tokens", "equal" if torch.equal(first[2], second[2]) else "differ")
    say("ratio: compressed, tokens/s / plain", second[0] / first[0], "x (0.6 wanted)")
    if first[4] and second[4]:
        say("ratio: compressed, as a CUDA graph / plain", second[4] / first[4], "x")
    say("ratio: compressed, memory / plain", second[3] / first[3], "x (0.70 wanted)")


def sanitizer(options: argparse.Namespace) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        say("sanitizer", "compute-sanitizer is not installed")
        return
    path = zoo(options.work)
    code = (
        "import sys, torch, bigsmall\n"
        "got = bigsmall.load(sys.argv[1], device='cuda')\n"
        "from bigsmall.compressed import CompressedWeight\n"
        "from bigsmall.reader import Reader\n"
        "w = CompressedWeight(Reader(sys.argv[1]), 'bf16', torch.device('cuda', 0))\n"
        "w.decoded(); out = torch.empty(3, w.columns, dtype=w.dtype, device='cuda')\n"
        "w.gather(torch.tensor([5, 0, 699], device='cuda'), out); torch.cuda.synchronize(); print('done')\n"
    )
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.sanitizer_seconds, check=False)
        last = [line for line in done.stdout.splitlines() if "SUMMARY" in line or "done" in line]
        say(f"sanitizer: {kind}", f"exit {done.returncode}: {'; '.join(last)}")
        if done.returncode != 0:
            print(done.stdout[-3000:], done.stderr[-1000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/bigsmall-bench"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sanitizer-seconds", type=int, default=60)
    parser.add_argument("--keep", action="store_true", help="leave the model in the work folder")
    parser.add_argument("--encode-dfloat11", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.encode_dfloat11:
        dfloat11_encode(options.encode_dfloat11)
        return
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device: this measures one")
    options.work.mkdir(parents=True, exist_ok=True)
    say("device", torch.cuda.get_device_name(DEVICE))
    say("versions", f"torch {torch.__version__}, bigsmall {bigsmall.__version__}")
    encoding = None
    try:
        if "dfloat11" in options.only:
            encoding = dfloat11_begin(options)
        for name in options.only:
            start = time.perf_counter()
            try:
                if name == "dfloat11":
                    dfloat11(options, encoding)
                else:
                    globals()[name](options)
            except Exception:  # the other sections are worth their time all the same
                traceback.print_exc()
                RESULTS[f"failed: {name}"] = traceback.format_exc(limit=1)
            print(f"-- {name}: {time.perf_counter() - start:.1f} s", flush=True)
            if options.json:
                options.json.write_text(json.dumps(RESULTS, indent=1))
    finally:
        if encoding is not None and encoding.poll() is None:
            encoding.kill()
        if not options.keep:
            shutil.rmtree(options.work, ignore_errors=True)
    if any(name.startswith("failed") for name in RESULTS):
        sys.exit(1)


if __name__ == "__main__":
    main()
