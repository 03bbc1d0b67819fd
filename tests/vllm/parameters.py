"""parameters.py MODEL LOAD_FORMAT ...: for each pair the SHA-256 of every parameter of vLLM's model, which was filled
with NaN before the weights were loaded, and was not processed after it: that empties some parameters on a CPU."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype


def parameters(model_path: str, load_format: str) -> dict[str, list[object]]:
    arguments = EngineArgs(
        model=model_path, load_format=load_format, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        if not torch.distributed.is_initialized():
            meeting = tempfile.NamedTemporaryFile()  # noqa: SIM115 - it lives as long as the process
            init_distributed_environment(1, 0, f"file://{meeting.name}", 0, "gloo")
            initialize_model_parallel()
        model = initialize_model(vllm_config=config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    found: dict[str, list[object]] = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
        found[name] = [list(parameter.shape), bool(parameter.isnan().any()), hashlib.sha256(data).hexdigest()]
    return found


if __name__ == "__main__":
    pairs = list(zip(sys.argv[1::2], sys.argv[2::2]))
    print("RESULT", json.dumps([parameters(*pair) for pair in pairs]))
