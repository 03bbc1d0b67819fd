"""The Triton kernel, run by Triton's interpreter on the CPU, against the library's own decoder; and compiled for GPUs
that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import bigsmall

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from safetensors.torch import save_file  # noqa: E402


def child(code: str, *arguments: object, interpret: bool = True) -> str:
    """Runs code in a process of its own: Triton decides at import whether it interprets."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small tensors: the interpreter makes some ten thousand words a second."""
    generator = torch.Generator().manual_seed(5)
    small = torch.randn(9, 517, generator=generator) * 0.02
    spiky = torch.randn(9, 700, generator=generator) * 0.02
    spiky.view(-1)[torch.randint(0, spiky.numel(), (40,), generator=generator)] *= 1e20
    spiky.view(-1)[::997] = float("nan")
    half = small.half()
    half.view(-1)[:6] = torch.tensor([6e-8, -3e-7, 0, -0.0, float("inf"), float("nan")])
    tensors = {
        "bf16": small.bfloat16(),
        "bf16.spiky": spiky.bfloat16(),
        "f16": half,
        "f32": spiky,
        "f32.of.f16": half.float(),
        "f32.of.bf16": small.bfloat16().float(),
        "f8": (small * 8).to(torch.float8_e4m3fn),
        "wide": torch.exp(torch.randn(4000, generator=generator) * 25),
        "blocks": (torch.randn(65536 + 33, generator=generator) * 0.02).bfloat16(),
        "noise": torch.randint(-30000, 30000, (1000,), generator=generator).to(torch.int16).view(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
    }
    for n in (31, 32, 33, 1000):
        tensors[f"n{n}"] = (torch.randn(n, generator=generator) * 0.02).bfloat16()
    folder = tmp_path_factory.mktemp("triton")
    save_file(tensors, folder / "zoo.safetensors")
    bigsmall.compress(folder / "zoo.safetensors", folder / "zoo.bs")
    return folder / "zoo.bs"


def test_equals_the_library(file: Path) -> None:
    out = child(
        """
        import sys, torch, bigsmall
        from bigsmall import _triton
        from bigsmall.reader import Reader
        reader = Reader(sys.argv[1])
        want = bigsmall.load(sys.argv[1], "cpu")
        got = {name: torch.full((t.numel() * t.element_size(),), 0x55, dtype=torch.uint8) for name, t in want.items()}
        made = 0
        class Counted(_triton._Plan):
            def launch(self, *how):
                global made
                made += 1
                return super().launch(*how)
        _triton._Plan = Counted
        _triton.decode(reader, [(t, got[t.name]) for t in reader.tensors])
        def bits(t):
            return t.reshape(-1).view(torch.uint8)
        print(made, [name for name in want if not torch.equal(bits(got[name]), bits(want[name]))])
        """,
        file,
    )
    made, bad = out.split(maxsplit=1)
    assert bad.strip() == "[]"
    assert int(made) >= 9


def test_finds_damage(file: Path) -> None:
    """Streams that are none of an encoder: the library verifies what it reads, so they are changed afterwards."""
    out = child(
        """
        import sys, torch, random
        from bigsmall import _triton
        from bigsmall.reader import Reader
        reader = Reader(sys.argv[1])
        t = reader.find("bf16.spiky")
        plan = _triton._Plan(reader, t, False)
        destination = torch.zeros(t.n_bytes, dtype=torch.uint8)
        assert plan.launch(destination, torch.device("cpu")).all()
        random.seed(1)
        plane = int(plan.program[16:20].view(torch.int32)[0])
        at = int(plan.program[96:104].view(torch.int64)[0]) + int(plan.program[plane:][:4].view(torch.int32)[0])
        found = 0
        for turn in range(12):
            whole = plan.payload.clone()
            for k in range(at, at + 128 + 200):
                if turn % 2 or k == at + 130 + turn * 7:
                    plan.payload[k] = random.randrange(256) if turn % 2 else plan.payload[k] ^ 16
            found += not plan.launch(destination, torch.device("cpu")).all()
            plan.payload.copy_(whole)
        print(found)
        """,
        file,
    )
    assert int(out) >= 11


@pytest.mark.parametrize(
    ("backend", "target", "warp"), [("cuda", 90, 32), ("hip", "gfx942", 64), ("hip", "gfx90a", 64)]
)
def test_compiles(backend: str, target: object, warp: int) -> None:
    out = child(
        f"""
        import triton
        from triton.backends import backends
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from bigsmall import _triton
        name = {{"hip": "amd", "cuda": "nvidia"}}[{backend!r}]
        if name not in backends:
            print("skip: this Triton has no backend " + name)
            raise SystemExit
        types = ["*u8", "*i16", "*i32"] * 2 + ["*i16", "*i32", "*i32", "i64", "i32", "i32"]
        names = _triton._decode_field.arg_names
        signature = dict(zip(names, types)) | {{"half": "constexpr", "join": "constexpr"}}
        source = ASTSource(_triton._decode_field, signature, {{"half": False, "join": False}})
        target = GPUTarget({backend!r}, {target!r}, {warp})
        try:
            done = triton.compile(source, target=target, options={{"num_warps": 1}})
        except Exception as error:  # an older Triton wants the linker of ROCm
            if "ld.lld not found" not in str(error):
                raise
            print("skip:", error)
            raise SystemExit
        print("compiled", sorted(done.asm))
        """,
        interpret=False,
    )
    if out.startswith("skip"):
        pytest.skip(out)
    assert out.startswith("compiled")
