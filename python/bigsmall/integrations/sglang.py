"""SGLang loads `.bs` models with this class as its load format:

    import sglang
    from bigsmall.integrations.sglang import get_loader_class

    engine = sglang.Engine(model_path=DIR_OR_REPO, load_format=get_loader_class())

SGLang's command line takes only its own formats; start the server from Python, or restore the model with
`bigsmall.integrations.vllm.decompress_to_temp`, which is not only for vLLM.

Written against the source of SGLang 0.5.23, whose `get_model_loader` calls a class that it finds as `load_format`, and
tested on a stub of that; it was never run in SGLang itself, which needs a GPU. What SGLang does only where it reads the
files itself does not happen: prefetching, a staggered order of the files, and the check against `--model-checksum`, for
which {"verify": true} compares the checksums in the `.bs` files.

Options for `model_loader_extra_config`: `workers`, `verify` and `base`, as in bigsmall.integrations.vllm.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Iterator
from typing import Any

from bigsmall import errors

_LOADER = "sglang.srt.model_loader.loader"


def __getattr__(name: str) -> Any:
    # SGLang sends the class to its processes by pickle, which looks for it here.
    if name == "BigSmallModelLoader":
        return get_loader_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_loader_class() -> Any:
    """The class `BigSmallModelLoader`, a subclass of SGLang's DefaultModelLoader, for the SGLang that is installed.

    ModuleNotFoundError where there is none; Unsupported where it is made differently from the known one.
    """
    try:
        default = getattr(importlib.import_module(_LOADER), "DefaultModelLoader", None)
    except ModuleNotFoundError as missing:
        if missing.name != "sglang":
            raise
        raise ModuleNotFoundError("SGLang is not installed: pip install sglang", name="sglang") from missing
    lacking = [
        name
        for name in ("_get_weights_iterator", "load_model", "_maybe_download_from_modelscope")
        if not hasattr(default, name)
    ]
    if lacking:
        raise errors.Unsupported(
            f"this SGLang is made differently from the one that bigsmall knows: its DefaultModelLoader lacks "
            f"{', '.join(lacking)}. Restore the model with bigsmall.integrations.vllm.decompress_to_temp instead"
        )
    return _loader_class(default)


@functools.cache
def _loader_class(default: Any) -> Any:
    from bigsmall.integrations import _serving

    class BigSmallModelLoader(default):  # type: ignore[misc]
        """Gives SGLang's models the tensors of `.bs` files. See the module for its options."""

        counter_before_loading_weights: float

        def __init__(self, load_config: Any) -> None:
            self._options, rest = _serving.take_options(load_config.model_loader_extra_config)
            super().__init__(_serving.changed(load_config, model_loader_extra_config=rest))
            self._main: str | None = None

        def download_model(self, model_config: Any) -> None:
            if not self._find(model_config.model_path, model_config.revision):
                raise _serving.nothing_found(model_config.model_path)

        def load_model(self, *, model_config: Any, **more: Any) -> Any:
            self._main = model_config.model_path
            return super().load_model(model_config=model_config, **more)

        def _get_weights_iterator(self, source: Any, **more: Any) -> Iterator[tuple[str, Any]]:
            patterns = getattr(source, "allow_patterns_overrides", None)
            paths = self._find(source.model_or_path, source.revision, patterns)
            is_main = self._main in (None, source.model_or_path)
            if not paths:
                if is_main and (patterns is None or any(name.endswith(".safetensors") for name in patterns)):
                    raise _serving.nothing_found(source.model_or_path)
                # A secondary source is another model, or a small file of another format.
                other = default(_serving.changed(self.load_config, load_format=_auto()))
                return other._get_weights_iterator(source, **more)  # type: ignore[no-any-return]
            readers = _serving.open_readers(paths, self._options.base)
            tensors = _serving.stream(readers, lambda name: True, self._options, show_bar=not self.load_config.tp_rank)
            if self.counter_before_loading_weights == 0.0:
                self.counter_before_loading_weights = time.perf_counter()
            draft = getattr(self.load_config, "draft_model_idx", None)
            if draft is not None:
                return self._filter_mtp_weights(tensors, source.prefix, draft)  # type: ignore[no-any-return]
            return ((source.prefix + name, tensor) for name, tensor in tensors)

        def _find(self, model: str, revision: str | None, patterns: Any = None) -> list[str]:
            # Takes the model from there where SGLANG_USE_MODELSCOPE says so, and gives the name back otherwise.
            model = self._maybe_download_from_modelscope(model, revision)
            return _serving.find(model, revision=revision, cache_dir=self.load_config.download_dir, patterns=patterns)

    BigSmallModelLoader.__qualname__ = "BigSmallModelLoader"
    return BigSmallModelLoader


def _auto() -> Any:
    return importlib.import_module("sglang.srt.configs.load_config").LoadFormat.AUTO
