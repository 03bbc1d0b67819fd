"""What makes diffusers' own `from_pretrained` take `.bs` files: the replacements that install_hook() makes in it.

A local folder is loaded shard by shard, as with safetensors. Of a repo on the Hub diffusers asks for one file where it
finds no index, so all shards of a component are decoded before the first is cast: for a moment the component is in
memory in the dtype of its files and in the one that is asked for. bigsmall.integrations.diffusion.load_pipeline does
not need so much.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigsmall import hub
from bigsmall.integrations import _checkpoint
from bigsmall.integrations._checkpoint import OURS, SOURCE, Checkpoint, Weights

_STEM = "diffusion_pytorch_model"

Factory = Callable[[Callable[..., Any]], Callable[..., Any]]


def diffusers_patches() -> dict[str, dict[str, Factory]]:
    """The names to replace so that from_pretrained of diffusers' models and pipelines, and from_single_file, take
    `.bs`: module to attribute to what makes, from the function that stands there, the one that takes its place.

    Components of transformers need its own patches. Ordinary checkpoints pass through untouched and, on the Hub, with
    the same requests; where `.safetensors` and `.bs` are both there, the first is used.
    """
    return {
        "diffusers.models.model_loading_utils": {"load_state_dict": _load_state_dict},
        "diffusers.models.modeling_utils": {
            "load_state_dict": _load_state_dict,
            "_fetch_index_file": _fetch_index_file,
            "_get_checkpoint_shard_files": _get_checkpoint_shard_files,
            "_get_model_file": _get_model_file,
        },
        "diffusers.loaders.single_file_utils": {"load_state_dict": _load_state_dict},
        "diffusers.pipelines.pipeline_utils": {"variant_compatible_siblings": _variant_compatible_siblings},
    }


class _Shards(type(Path())):  # type: ignore[misc]
    """The path of a bigsmall.index.json that stands for all shards of one component."""

    checkpoint: Checkpoint


def _shards(checkpoint: Checkpoint) -> _Shards:
    made = _Shards(checkpoint.label)
    made.checkpoint = checkpoint
    return made


class _Call:
    """A call of a function that was replaced. Its arguments, by name, may be changed before `proceed`."""

    def __init__(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> None:
        self._original = original
        self._bound = bound
        self.arguments = bound.arguments

    def proceed(self) -> Any:
        return self._original(*self._bound.args, **self._bound.kwargs)


def _replacing(change: Callable[[_Call], Any]) -> Factory:
    """Makes what takes a function's place: `change` is given each call."""

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)
        return lambda *args, **kwargs: change(_Call(original, signature.bind(*args, **kwargs)))

    return factory


@_replacing
def _load_state_dict(call: _Call) -> Any:
    """Gives the tensors of a `.bs` file, or of all shards of a component."""
    file = next(iter(call.arguments.values()))
    if isinstance(file, _Shards):
        checkpoint = file.checkpoint
    elif isinstance(file, (str, os.PathLike)) and os.fsdecode(file).endswith(OURS):
        checkpoint = _checkpoint.single(os.fsdecode(file))
    else:
        return call.proceed()
    import torch

    from bigsmall.torch import read

    device = torch.device(call.arguments.get("map_location") or "cpu")
    tensors: dict[str, Any] = {}
    with Weights(checkpoint) as weights:
        for reader in weights.readers:
            tensors.update(read(reader, reader.tensors, device))
    return tensors


@_replacing
def _fetch_index_file(call: _Call) -> Any:
    """Finds the shards of a local folder that has no safetensors of that variant, and checks their headers."""
    found, given = call.proceed(), call.arguments
    if (found is not None and os.path.isfile(found)) or not given["is_local"] or not given["use_safetensors"]:
        return found
    folder = os.path.join(given["pretrained_model_name_or_path"], given["subfolder"] or "")
    if os.path.isfile(os.path.join(folder, _checkpoint.file_name(_STEM, given["variant"], SOURCE))):
        return found
    checkpoint = _checkpoint.find(folder, _STEM, given["variant"])
    if checkpoint is None or checkpoint.weight_map is None:
        return found
    _checkpoint.check(checkpoint)
    return _shards(checkpoint)


@_replacing
def _get_checkpoint_shard_files(call: _Call) -> Any:
    """Gives the shards that were found before."""
    index = call.arguments.get("index_filename")
    if not isinstance(index, _Shards):
        return call.proceed()
    weight_map = dict(index.checkpoint.weight_map or {})
    return index.checkpoint.paths, {"all_checkpoint_keys": list(weight_map), "weight_map": weight_map}


@_replacing
def _get_model_file(call: _Call) -> Any:
    """Where there is no `X.safetensors`, gives `X.bs`, or of a repo all its shards."""
    given = call.arguments
    name = given["weights_name"]

    def fetch(file: str) -> Any:
        given["weights_name"] = file
        return call.proceed()

    try:
        return call.proceed()
    except OSError as missing:
        local = os.path.isdir(given["pretrained_model_name_or_path"])
        if not name.endswith(SOURCE) or not (local or _not_in_repo(missing)):
            raise
        with contextlib.suppress(OSError):
            return fetch(name[: -len(SOURCE)] + OURS)
        stem, _, variant = name[: -len(SOURCE)].partition(".")
        path: str | None = None
        if not local and stem == _STEM:
            with contextlib.suppress(OSError):
                path = fetch(hub.INDEX_NAME)
        if path is not None:
            index = hub.read_index(path)
            weight_map = _checkpoint.weight_map(index, path, stem, variant or None)
            if weight_map:
                paths = [fetch(shard) for shard in sorted(set(weight_map.values()))]
                return _shards(Checkpoint(paths, path, weight_map, index["metadata"]))
        raise


def _not_in_repo(error: OSError) -> bool:
    """Whether diffusers found the repo but not the file in it; after anything else further requests are in vain."""
    from huggingface_hub.utils import EntryNotFoundError

    return isinstance(error, EntryNotFoundError) or isinstance(error.__cause__, EntryNotFoundError)


@_replacing
def _variant_compatible_siblings(call: _Call) -> Any:
    """Lets a variant of `.bs` files count as one when a pipeline's files are chosen for download."""
    given = call.arguments
    names = set(given["filenames"])
    twins = {name[: -len(OURS)] + SOURCE: name for name in names if name.endswith(OURS)}
    twins = {source: name for source, name in twins.items() if source not in names}
    if given.get("variant") is None or not twins:
        return call.proceed()
    # Where no folder has safetensors diffusers wants to ignore them, which must not hit our stand-ins.
    ignored = tuple(pattern.lstrip("*") for pattern in given.get("ignore_patterns") or ())
    others = {name for name in names - set(twins.values()) if not (ignored and name.endswith(ignored))}
    given.update(filenames=others | twins.keys(), ignore_patterns=None)
    usable, of_variant = call.proceed()
    return {twins.get(name, name) for name in usable}, {twins.get(name, name) for name in of_variant}
