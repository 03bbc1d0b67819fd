"""The PTX that is shipped, assembled for the GPUs it is for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from helpers import REPOSITORY

triton = pytest.importorskip("triton")

PTX = REPOSITORY / "codecs" / "gpu" / "kernel.ptx"
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def test_header_is_old_enough_for_every_driver() -> None:
    text = PTX.read_text(encoding="ascii")
    assert ".version 6.4\n.target sm_75\n" in text


@pytest.mark.skipif(not PTXAS.exists(), reason="this Triton has no ptxas")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90", "sm_100"])
def test_assembles(architecture: str, tmp_path: Path) -> None:
    command = [str(PTXAS), f"-arch={architecture}", "-v", str(PTX), "-o", str(tmp_path / "out.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", done.stderr, flags=re.DOTALL)
    registers = {name: int(n) for name, n in found}
    assert set(registers) == {"bs_decode8", "bs_decode16", "bs_decode32", "bs_restart", "bs_verify", "bs_gather"}
    # Eight CTAs of 128 threads share 65,536 registers.
    assert all(n <= 64 for name, n in registers.items() if name != "bs_gather"), registers
