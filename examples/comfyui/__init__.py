"""A custom node for ComfyUI that has no nodes: with it every loader node offers `.bs` files and loads them."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from typing import Any

import comfy.utils
import folder_paths

import bigsmall

NODE_CLASS_MAPPINGS: dict[str, type] = {}  # without it ComfyUI takes the import for failed

_MARK = "_loads_bs"


def _with_bs(original: Any) -> Any:
    """ComfyUI's load_torch_file, which also takes `.bs`."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_torch_file(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        path = os.fspath(next(iter(given.values())))
        if not path.lower().endswith(".bs"):
            return original(*args, **kwargs)
        with bigsmall.safe_open(path, framework="pt", device=given.get("device")) as file:
            tensors = file.get_tensors()
            return (tensors, file.metadata()) if given.get("return_metadata") else tensors

    setattr(load_torch_file, _MARK, True)
    return load_torch_file


def _install() -> None:
    folder_paths.supported_pt_extensions.add(".bs")  # one set, shared by all kinds of models
    original = comfy.utils.load_torch_file
    if hasattr(original, _MARK):
        return
    replacement = _with_bs(original)
    for name, module in list(sys.modules.items()):
        # Some of ComfyUI's modules have imported the function by name.
        if name.split(".")[0] == "comfy" and getattr(module, "load_torch_file", None) is original:
            module.load_torch_file = replacement


_install()
