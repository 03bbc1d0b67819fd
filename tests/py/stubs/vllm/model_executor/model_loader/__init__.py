"""The registry."""

from __future__ import annotations

from vllm.model_executor.model_loader.default_loader import BaseModelLoader, DefaultModelLoader

warnings: list[str] = []
_LOAD_FORMAT_TO_MODEL_LOADER = {"auto": DefaultModelLoader, "safetensors": DefaultModelLoader}


def register_model_loader(load_format: str):
    def register(cls):
        if load_format in _LOAD_FORMAT_TO_MODEL_LOADER:
            warnings.append(f"{load_format} is already registered")
        if not issubclass(cls, BaseModelLoader):
            raise ValueError("not a BaseModelLoader")
        _LOAD_FORMAT_TO_MODEL_LOADER[load_format] = cls
        return cls

    return register


def get_model_loader(load_config):
    if load_config.load_format not in _LOAD_FORMAT_TO_MODEL_LOADER:
        raise ValueError(f"Load format `{load_config.load_format}` is not supported")
    return _LOAD_FORMAT_TO_MODEL_LOADER[load_config.load_format](load_config)
