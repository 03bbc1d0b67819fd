"""bigsmall in vLLM itself, on a CPU. `make test-vllm` runs it in an environment of its own."""

from __future__ import annotations

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


@pytest.mark.parametrize("name", ["sharded", "head"])
def test_same_greedy_tokens(models, name: str) -> None:
    """`sharded` through the whole engine; `head` says in its config that it has no head of its own, and has one."""
    packed = result(run_vllm("generate.py", models.packed(name), "bigsmall"))
    original = result(run_vllm("generate.py", models.original(name), "safetensors"))
    assert packed == original
    assert len(set(packed[0])) > 4


def test_missing_shard(models, tmp_path) -> None:
    shards = sorted(models.packed("sharded").glob("*.bs"))
    for path in models.packed("sharded").iterdir():
        if path != shards[-1]:
            (tmp_path / path.name).symlink_to(path)
    output = run_vllm("parameters.py", tmp_path, "bigsmall", expect=1)
    assert shards[-1].name in output
    assert "FileMissing" in output
