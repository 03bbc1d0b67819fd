from __future__ import annotations

import abc
import dataclasses
import glob
import os
import re
from typing import Any

from sglang.srt.configs.load_config import LoadFormat


class BaseModelLoader(abc.ABC):
    def __init__(self, load_config) -> None:
        self.load_config = load_config

    @abc.abstractmethod
    def download_model(self, model_config) -> None: ...

    @abc.abstractmethod
    def load_model(self, *, model_config, device_config): ...


class DefaultModelLoader(BaseModelLoader):
    @dataclasses.dataclass
    class Source:
        model_or_path: str
        revision: str | None
        prefix: str = ""
        fall_back_to_pt: bool = True
        allow_patterns_overrides: list | None = None
        model_config: Any = None

    counter_before_loading_weights = 0.0

    def __init__(self, load_config) -> None:
        super().__init__(load_config)
        unexpected = set(load_config.model_loader_extra_config.keys()) - {"enable_multithread_load", "num_threads"}
        if unexpected:
            raise ValueError(f"Unexpected extra config keys for load format {load_config.load_format}: {unexpected}")

    def _maybe_download_from_modelscope(self, model, revision):
        return model

    def _prepare_weights(self, model, revision, fall_back_to_pt, allow_patterns_overrides=None):
        if self.load_config.load_format != LoadFormat.AUTO:
            raise ValueError(f"Unknown load_format: {self.load_config.load_format}")
        files = sorted(glob.glob(os.path.join(model, "*.safetensors")))
        if not files:
            raise RuntimeError(f"Cannot find any model weights with `{model}`")
        return files

    def _get_weights_iterator(self, source, *, resolved_source=None, startup_prefetch_started=False):
        import safetensors.torch

        files = self._prepare_weights(source.model_or_path, source.revision, source.fall_back_to_pt)
        states = (safetensors.torch.load_file(file) for file in files)
        return ((source.prefix + name, tensor) for state in states for name, tensor in state.items())

    @classmethod
    def _filter_mtp_weights(cls, weights, prefix, draft_model_idx):
        for name, tensor in weights:
            layer = re.match(r"model\.mtp\.layers\.(\d+)\.", name)
            if layer is None:
                yield prefix + name, tensor
            elif int(layer[1]) == draft_model_idx:
                yield prefix + name.replace(layer[0], "model.mtp.layers.0."), tensor

    def _get_all_weights(self, model_config, model):
        yield from self._get_weights_iterator(
            DefaultModelLoader.Source(model_config.model_path, model_config.revision, model_config=model_config)
        )
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)

    def download_model(self, model_config) -> None:
        self._prepare_weights(model_config.model_path, model_config.revision, True)

    def load_model(self, *, model_config, device_config):
        model = model_config.make_model()
        model.load_weights(self._get_all_weights(model_config, model))
        return model


def get_model_loader(load_config, model_config=None):
    if isinstance(load_config.load_format, type):
        return load_config.load_format(load_config)
    return DefaultModelLoader(load_config)
