"""The loaders that others are derived from."""

from __future__ import annotations

import abc
import dataclasses
import glob
import os
from typing import Any, Callable


@dataclasses.dataclass
class LoadConfig:
    load_format: str = "auto"
    download_dir: str | None = None
    model_loader_extra_config: Any = dataclasses.field(default_factory=dict)
    safetensors_load_strategy: str | None = None
    use_tqdm_on_load: bool = True


class BaseModelLoader(abc.ABC):
    def __init__(self, load_config) -> None:
        self.load_config = load_config

    @abc.abstractmethod
    def download_model(self, model_config) -> None: ...

    @abc.abstractmethod
    def load_weights(self, model, model_config) -> None: ...

    def load_model(self, vllm_config, model_config, prefix=""):
        model = vllm_config.make_model(model_config)
        self.load_weights(model, model_config)
        return model


class DefaultModelLoader(BaseModelLoader):
    @dataclasses.dataclass
    class Source:
        model_or_path: str
        revision: str | None
        subfolder: str | None = None
        prefix: str = ""
        fall_back_to_pt: bool = True
        allow_patterns_overrides: list | None = None
        is_unused_weight: Callable[[str], bool] | None = None

    counter_before_loading_weights = 0.0

    def __init__(self, load_config) -> None:
        super().__init__(load_config)
        self.local_expert_ids = None
        extra = load_config.model_loader_extra_config
        if not isinstance(extra, dict):
            raise ValueError("model_loader_extra_config must be a dict")
        unexpected = set(extra) - {"enable_multithread_load", "num_threads", "enable_weights_track"}
        if unexpected:
            raise ValueError(f"Unexpected extra config keys for load format {load_config.load_format}: {unexpected}")
        self.enable_weights_track = extra.get("enable_weights_track", True)

    def _prepare_weights(self, source) -> list[str]:
        if self.load_config.load_format != "auto":
            raise ValueError(f"Unknown load_format: {self.load_config.load_format}")
        folder = os.path.join(source.model_or_path, source.subfolder or "")
        for pattern in source.allow_patterns_overrides or ["*.safetensors", "*.pt"]:
            files = sorted(glob.glob(os.path.join(folder, pattern)))
            if files:
                return files
        raise RuntimeError(f"Cannot find any model weights with `{source.model_or_path}`")

    def _get_weights_iterator(self, source):
        import safetensors.torch
        import torch

        files = self._prepare_weights(source)
        states = (
            safetensors.torch.load_file(file) if file.endswith(".safetensors") else torch.load(file) for file in files
        )
        return ((source.prefix + name, tensor) for state in states for name, tensor in state.items())

    def get_all_weights(self, model_config, model):
        main = DefaultModelLoader.Source(
            model_config.model,
            model_config.revision,
            allow_patterns_overrides=getattr(model, "allow_patterns_overrides", None),
            is_unused_weight=getattr(model, "is_unused_checkpoint_weight", None),
        )
        yield from self._get_weights_iterator(main)
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)

    def download_model(self, model_config) -> None:
        self._prepare_weights(DefaultModelLoader.Source(model_config.model, model_config.revision))

    def load_weights(self, model, model_config) -> None:
        self.local_expert_ids = model_config.local_expert_ids
        if model_config.quantization == "torchao":
            self.load_config.safetensors_load_strategy = "torchao"
        loaded = model.load_weights(self.get_all_weights(model_config, model))
        missing = {name for name, _ in model.named_parameters()} - loaded
        if self.enable_weights_track and missing:
            raise ValueError(f"Following weights were not initialized from checkpoint: {missing}")
