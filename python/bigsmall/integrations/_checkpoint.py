"""The `.bs` files of one model in a folder, named as transformers and diffusers name theirs: `STEM.bs` and, of a
variant, `STEM.fp16.bs`; or shards, which bigsmall.index.json lists. It holds the source's indexes, one a variant."""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple

from bigsmall import errors, hub
from bigsmall.reader import Reader, TensorInfo

SOURCE = ".safetensors"
OURS = ".bs"


class Checkpoint(NamedTuple):
    """The files of a model: a single one, or shards and what their index says. `label` is what messages call them."""

    paths: list[str]
    label: str
    weight_map: dict[str, str] | None = None  # of shards, tensor to file name
    metadata: dict[str, Any] | None = None  # of shards, the index's


def file_name(stem: str, variant: str | None, suffix: str) -> str:
    """The name of a single file, or with the suffix `.safetensors.index.json` of an index."""
    if variant is None:
        return stem + suffix
    head, _, last = suffix.rpartition(".")
    return f"{stem}{head}.{variant}.{last}"


def single(path: str) -> Checkpoint:
    return Checkpoint([path], path)


def weight_map(index: dict[str, Any], path: str, stem: str, variant: str | None) -> dict[str, str] | None:
    """Tensor to `.bs` file, as a bigsmall.index.json, read from `path`, says for the weights of that name and variant;
    None where it lists others. An index of the original package, which keeps none of the source, is of plain weights.

    Corrupt where a name leads out of the folder, or where the index contradicts itself.
    """
    hub.shards_of(index, path)
    sources = index["metadata"].get("source_indexes") or []
    wanted = file_name(stem, variant, SOURCE + ".index.json")
    for number, source in enumerate(sources):
        if source["name"] != wanted:
            continue
        files = hub.parse_index(source["text"], f"{path}: {wanted}")["weight_map"]
        found = {name: file.removesuffix(SOURCE) + OURS for name, file in files.items()}
        hub.check_names(set(found.values()), path)
        # The first is the one that the folder's own map was made of.
        if number == 0 and set(found.values()) != set(index["weight_map"].values()):
            raise errors.Corrupt(f"{path}: its weight_map and its {wanted} list different shards")
        return found
    if not sources and variant is None and all(file.startswith(stem) for file in index["weight_map"].values()):
        plain: dict[str, str] = index["weight_map"]
        return plain
    return None


def shards(index: dict[str, Any], path: str, stem: str, variant: str | None, folder: str) -> Checkpoint | None:
    """The shards of an index that lie in a folder; None where it lists none of that name and variant. FileMissing where
    one is not there."""
    found = weight_map(index, path, stem, variant)
    return _listed(found, path, folder, index) if found else None


def _listed(weight_map: dict[str, str], path: str, folder: str, index: dict[str, Any]) -> Checkpoint:
    paths = [os.path.join(folder, file) for file in sorted(set(weight_map.values()))]
    for shard in paths:
        if not os.path.isfile(shard):
            raise hub.not_found(shard, f"{os.path.basename(path)} lists this shard, which is missing")
    return Checkpoint(paths, path, weight_map, index["metadata"])


def find(folder: str, stem: str, variant: str | None) -> Checkpoint | None:
    """The `.bs` files of exactly that variant in a folder; None where it has none. FileMissing where a shard is not
    there, Corrupt for a bad index."""
    index = os.path.join(folder, hub.INDEX_NAME)
    if os.path.isfile(index):
        found = shards(hub.read_index(index), index, stem, variant, folder)
        if found is not None:
            return found
    path = os.path.join(folder, file_name(stem, variant, OURS))
    return single(path) if os.path.isfile(path) else None


def find_source(folder: str, stem: str, variant: str | None) -> Checkpoint | None:
    """The same of `.safetensors` files, by their own index."""
    path = os.path.join(folder, file_name(stem, variant, SOURCE + ".index.json"))
    if os.path.isfile(path):
        index = hub.read_index(path)
        hub.shards_of(index, path)
        return _listed(index["weight_map"], path, folder, index)
    path = os.path.join(folder, file_name(stem, variant, SOURCE))
    return single(path) if os.path.isfile(path) else None


class Weights:
    """The opened files of a checkpoint: `tensors` maps names to the reader and its tensor. Use it in a `with` block.

    Opening raises what a Reader raises, and Corrupt where the shards do not hold what their index says: no model is
    ever loaded in part.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.readers: list[Reader] = []
        self.tensors: dict[str, tuple[Reader, TensorInfo]] = {}
        with contextlib.ExitStack() as opening:
            for path in checkpoint.paths:
                reader = opening.enter_context(Reader(path))
                self.readers.append(reader)
                for tensor in reader.tensors:
                    if tensor.name in self.tensors:
                        other = self.tensors[tensor.name][0].path
                        raise errors.Corrupt(f"{path}: tensor {tensor.name!r} is in {other} of this model too")
                    self.tensors[tensor.name] = (reader, tensor)
            if checkpoint.weight_map is not None:
                file_of = {name: os.path.basename(reader.path) for name, (reader, _) in self.tensors.items()}
                hub.check_index({"weight_map": checkpoint.weight_map}, checkpoint.label, file_of)
            self._stack = opening.pop_all()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def check(checkpoint: Checkpoint) -> None:
    """Opens all headers, as Weights does, and closes them again."""
    with Weights(checkpoint):
        pass


def check_folder(folder: str) -> None:
    """Checks, as `check` does, every variant that the index of a folder lists, where it has one."""
    path = os.path.join(folder, hub.INDEX_NAME)
    if not os.path.isfile(path):
        return
    index = hub.read_index(path)
    for source in index["metadata"].get("source_indexes") or []:
        stem, _, rest = source["name"].partition(SOURCE + ".index.")
        found = shards(index, path, stem, rest.rpartition(".")[0] or None, folder)
        if found is not None:
            check(found)
