"""BigSmall: lossless compression of neural-network weights.

    compress, decompress            files and model directories, to and from `.safetensors`
    compress_delta, decompress_delta  fine-tunes as differences to a base model
    load, safe_open                 torch tensors or numpy arrays from `.bs` files
    from_pretrained                 the weights of a model, local or on the Hugging Face Hub
    install_hook, uninstall_hook    lets transformers, diffusers and others load `.bs` files
    StreamingLoader, StreamingModel  a model layer by layer
    CompressedLinear, CompressedEmbedding  modules whose weights stay compressed in the memory of a GPU
    compress_for_hub, upload_to_hub  repositories of `.bs` files
    save_file                       `.bs` files from tensors in memory
    info, breakdown, verify         what a file holds, where its bytes go, and whether it is whole
    cpu, set_cpu                    which instructions do the work (or BIGSMALL_CPU: generic, avx2, avx512)
    errors                          the exceptions

Importing this loads neither numpy nor torch nor the native library; each comes with the first use that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigsmall import errors
    from bigsmall.api import (
        BadTensor,
        RepairResult,
        VerifyReport,
        breakdown,
        compress,
        compress_delta,
        convert,
        cpu,
        decompress,
        decompress_delta,
        info,
        repair,
        set_cpu,
        verify,
    )
    from bigsmall.compressed import CompressedEmbedding, CompressedLinear
    from bigsmall.hub import from_pretrained
    from bigsmall.integrations.huggingface import install_hook, uninstall_hook
    from bigsmall.layers import StreamingLoader
    from bigsmall.numpy import save_file
    from bigsmall.publish import compress_for_hub, upload_to_hub
    from bigsmall.streaming import safe_open
    from bigsmall.streaming_model import StreamingModel
    from bigsmall.torch import load

    __version__: str

# Name to the module that has it.
_EXPORTS = {
    "BadTensor": "api",
    "CompressedEmbedding": "compressed",
    "CompressedLinear": "compressed",
    "RepairResult": "api",
    "StreamingLoader": "layers",
    "StreamingModel": "streaming_model",
    "VerifyReport": "api",
    "breakdown": "api",
    "compress": "api",
    "compress_delta": "api",
    "compress_for_hub": "publish",
    "convert": "api",
    "cpu": "api",
    "decompress": "api",
    "decompress_delta": "api",
    "from_pretrained": "hub",
    "info": "api",
    "install_hook": "integrations.huggingface",
    "load": "torch",
    "repair": "api",
    "safe_open": "streaming",
    "save_file": "numpy",
    "set_cpu": "api",
    "uninstall_hook": "integrations.huggingface",
    "upload_to_hub": "publish",
    "verify": "api",
}

__all__ = [
    "BadTensor",
    "CompressedEmbedding",
    "CompressedLinear",
    "RepairResult",
    "StreamingLoader",
    "StreamingModel",
    "VerifyReport",
    "__version__",
    "breakdown",
    "compress",
    "compress_delta",
    "compress_for_hub",
    "convert",
    "cpu",
    "decompress",
    "decompress_delta",
    "errors",
    "from_pretrained",
    "info",
    "install_hook",
    "load",
    "repair",
    "safe_open",
    "save_file",
    "set_cpu",
    "uninstall_hook",
    "upload_to_hub",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("bigsmall")
    elif name == "errors":
        value = importlib.import_module("bigsmall.errors")
    elif name in _EXPORTS:
        value = getattr(importlib.import_module(f"bigsmall.{_EXPORTS[name]}"), name)
    else:
        raise AttributeError(f"module 'bigsmall' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
