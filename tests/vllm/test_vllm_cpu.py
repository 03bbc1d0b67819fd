"""bigsmall in vLLM itself, on a CPU. `make test-vllm` runs it in an environment of its own."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
from conftest import result, run_vllm


def test_every_parameter_is_equal(models) -> None:
    """Before vLLM processes the weights, and none is left as it was made."""
    single, sharded, original = result(
        run_vllm(
            "parameters.py",
            *(models.packed("single"), "bigsmall"),
            *(models.packed("sharded"), "bigsmall"),
            *(models.original("single"), "safetensors"),
        )
    )
    assert "model.layers.1.self_attn.qkv_proj.weight" in original  # fused by vLLM, of three tensors
    assert "model.layers.1.mlp.gate_up_proj.weight" in original
    assert len(original) == 15
    assert not any(has_nan for _, has_nan, _ in original.values())
    assert single == original
    assert sharded == original


@functools.cache
def tokens_of_safetensors(directory: Path) -> list[list[int]]:
    return result(run_vllm("generate.py", directory, "safetensors", 1))


@pytest.mark.parametrize(("name", "processes"), [("sharded", 1), ("sharded", 2), ("head", 1)])
def test_same_greedy_tokens(models, name: str, processes: int) -> None:
    """`sharded` through the whole engine; `head` says in its config that it has no head of its own, and has one."""
    if len(os.sched_getaffinity(0)) < processes:
        pytest.skip("needs a CPU for each process")
    tokens = result(run_vllm("generate.py", models.packed(name), "bigsmall", processes))
    assert tokens == tokens_of_safetensors(models.original(name))
    assert len(set(tokens[0])) > 4


def test_missing_shard(models, tmp_path) -> None:
    shards = sorted(models.packed("sharded").glob("*.bs"))
    for path in models.packed("sharded").iterdir():
        if path != shards[-1]:
            (tmp_path / path.name).symlink_to(path)
    output = run_vllm("parameters.py", tmp_path, "bigsmall", expect=1)
    assert shards[-1].name in output
    assert "FileMissing" in output
