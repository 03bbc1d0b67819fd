"""Tiny Llama-shaped models on disk, as safetensors and as `.bs`, and vLLM run in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bigsmall

SCRIPTS = Path(__file__).resolve().parent


class Models:
    """Every model twice: `original(name)` has safetensors files, `packed(name)` the `.bs` files made of them."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def original(self, name: str) -> Path:
        return self._root / name

    def packed(self, name: str) -> Path:
        return self._root / f"{name}-bs"

    def add(self, name: str, *, shard: str, tie: bool = False) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,  # or the same token wins everywhere
            tie_word_embeddings=False,
            dtype="bfloat16",
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(self.original(name), max_shard_size=shard)
        if tie:  # the config says so, and the file has another head all the same
            path = self.original(name) / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
        bigsmall.compress(self.original(name), self.packed(name))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    made = Models(tmp_path_factory.mktemp("models"))
    made.add("single", shard="1GB")
    made.add("sharded", shard="100KB")
    made.add("head", shard="1GB", tie=True)
    assert len(list(made.packed("single").glob("*.bs"))) == 1
    assert len(list(made.packed("sharded").glob("*.bs"))) > 2
    for name in ("single", "sharded", "head"):
        assert not list(made.packed(name).glob("*.safetensors"))
    return made


def run_vllm(script: str, *args: object, expect: int = 0) -> str:
    """Output of a script of this directory, run in a process of its own that is killed with its children at the time
    limit."""
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # One CPU for each of two processes, or vLLM refuses to start them on a small machine.
    settings["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0))[:2])
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **settings},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"vLLM hung; it printed:\n{output}") from None
    assert (process.returncode == 0) == (expect == 0), f"exit code {process.returncode}:\n{output}"
    return output


def result(output: str) -> Any:
    """What the script printed by `print("RESULT", json)`."""
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == 1, output
    return json.loads(lines[0][len("RESULT ") :])
