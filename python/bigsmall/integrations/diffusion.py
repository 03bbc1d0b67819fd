"""diffusers: pipelines and their components from `.bs` files.

    is_diffusion_model                       what a file or directory holds, by its headers
    compress_diffusion, decompress_diffusion  a weight file, a component or a whole pipeline directory, and back
    load_pipeline                            a ready pipeline, without a decompressed copy on disk
    diffusers_patches                        what makes diffusers' own `from_pretrained` take `.bs` (see install_hook)

Needs diffusers 0.35 or newer and accelerate for loading; importing this module loads neither.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import inspect
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from bigsmall import api, errors, hub
from bigsmall.reader import Reader, TensorInfo, split_by_bytes

if TYPE_CHECKING:
    import torch

PathLike = Union[str, "os.PathLike[str]"]
Shape = tuple[int, ...]

_EXT = ".bs"
_SOURCE_EXT = ".safetensors"
_PIPELINE = "model_index.json"
_CONFIG = "config.json"

# Names of weight files without their extension, as the two libraries write them.
_DIFFUSERS_STEM = "diffusion_pytorch_model"
_TRANSFORMERS_STEM = "model"

# Weights that are cast are decoded in groups of this size, so that no model is in memory in both dtypes.
_CAST_BYTES = 128 << 20

# One pipeline is loaded at a time. While a model is made, accelerate, diffusers and transformers change the default
# dtype and methods of torch.nn.Module, which count for the whole process; threads that did so at once would undo the
# wrong change. Decoding uses all cores as it is.
_loading = threading.Lock()


# ---- what a file or directory holds ----------------------------------------------------------------------------------

# A module that makes an embedding of the timestep: every denoiser has one.
_TIMESTEP = re.compile(
    r"(^|\.)(\w*time(step)?_\w*embed\w*|timestep_\w*proj|time_in|t_embed\w*|adaln\w*)\.", re.IGNORECASE
)
# Blocks of U-Nets, control nets, VAEs and of the transformers of Flux and Stable Diffusion 3, as diffusers and the
# original checkpoints name them.
_BLOCKS = re.compile(
    r"(^|\.)((down|up|input|output|double|single|joint)_blocks\.\d+|single_transformer_blocks\.\d+|mid_block|middle_block)\."
)
# The first or last convolution of an image or video autoencoder.
_AUTOENCODER = re.compile(
    r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|conv_out|conv1|block_in|layers\.0)\.(conv\.)?weight$"
)


def is_diffusion_model(path: PathLike) -> bool:
    """Whether this is a diffusion pipeline or one of its networks: U-Net, transformer, VAE or control net. Only names,
    shapes and JSON files are read; no tensor is decoded.

    path : a pipeline directory, the directory of one component, or one `.safetensors` or `.bs` file

    A directory is decided by its JSON files. It is one where `model_index.json` names diffusers (`_diffusers_version`,
    or a component of that library), or where `config.json` has `_class_name`, which diffusers writes; it is none where
    `config.json` has `architectures` or `model_type`, which transformers writes. Without these files it is one where
    any of its weight files is.

    A file is one where at least one of these holds:
    - a matrix lies in a module that embeds the timestep (time_embedding, timestep_embedder, t_embedder, time_in,
      adaLN_modulation, ...);
    - a tensor lies in down_blocks, up_blocks, mid_block, single_transformer_blocks, or the input_, output_, double_,
      single_, joint_blocks and middle_block of original checkpoints;
    - `encoder` or `decoder` begins or ends with a convolution over two or three dimensions (conv_in, conv_out, ...).
    Language models and text encoders have none of these. Autoencoders for sound and those made of transformers cannot
    be told from other networks by a lone file; their directories can.

    Raises OSError where there is nothing at `path`, InvalidArgument where a file is neither `.safetensors` nor `.bs` or
    is damaged (Corrupt for a damaged `.bs` file).
    """
    folder = os.fsdecode(path)
    if not os.path.isdir(folder):
        return _is_diffusion_network(_header(folder))
    pipeline = _read_json(os.path.join(folder, _PIPELINE))
    if pipeline is not None:
        libraries = [entry[0] for entry in pipeline.values() if isinstance(entry, list) and entry]
        return "_diffusers_version" in pipeline or "diffusers" in libraries
    config = _read_json(os.path.join(folder, _CONFIG))
    if config is not None:
        if "_class_name" in config:
            return True
        if "architectures" in config or "model_type" in config:
            return False
    files = [name for name in sorted(os.listdir(folder)) if name.endswith((_EXT, _SOURCE_EXT))]
    return any(_is_diffusion_network(_header(os.path.join(folder, name))) for name in files)


def _is_diffusion_network(shapes: Mapping[str, Shape]) -> bool:
    return any(
        (len(shape) == 2 and _TIMESTEP.search(name) is not None)
        or _BLOCKS.search(name) is not None
        or (len(shape) >= 4 and _AUTOENCODER.match(name) is not None)
        for name, shape in shapes.items()
    )


def _header(file: str) -> dict[str, Shape]:
    """Names and shapes of the tensors of one `.safetensors` or `.bs` file. The shapes are those of torch's storage for
    `.bs`, of the header for `.safetensors`; they differ for float4 alone."""
    if file.endswith(_EXT):
        with Reader(file) as reader:
            return {tensor.name: tensor.shape for tensor in reader.tensors}
    if not os.path.exists(file):
        raise _missing(file, "No such file or directory")
    if not file.endswith(_SOURCE_EXT):
        raise errors.InvalidArgument(f"{file} is neither a {_SOURCE_EXT} nor a {_EXT} file")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise errors.InvalidArgument(f"{file} is no {_SOURCE_EXT} file: {error}") from error


def _read_json(file: str) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file."""
    try:
        with open(file, encoding="utf-8") as text:
            read = json.load(text)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise errors.InvalidArgument(f"{file} is no JSON: {error}") from error
    if not isinstance(read, dict):
        raise errors.InvalidArgument(f"{file} holds no JSON object")
    return read


def _missing(path: str, text: str) -> errors.FileMissing:
    return errors.FileMissing(errno.ENOENT, f"{path}: {text}", path)


# ---- files and directories -------------------------------------------------------------------------------------------


def compress_diffusion(
    src: PathLike,
    dst: PathLike,
    mode: str = "balanced",
    workers: int | None = None,
    *,
    sha256: bool = False,
    overwrite: bool = True,
    force: bool = False,
    progress: bool = False,
) -> str:
    """Compresses a pipeline, one of its components, or one weight file; returns `dst`.

    src : a pipeline directory (with model_index.json), the directory of a component, or a `.safetensors` file
    dst : the new directory, or `.bs` file

    Every weight file `X.safetensors` of every folder becomes `X.bs`; variants and the numbers of shards stay in the
    names. The index of a sharded component becomes bigsmall.index.json in its folder; the index of a variant is kept as
    it is. Everything else (schedulers, tokenizers, code, weights of other formats) is copied byte for byte. `src` is
    only read, and `dst` appears whole or not at all.

    The other arguments, and the errors, are those of `bigsmall.compress`. A directory that holds no diffusion model
    (see is_diffusion_model) is an InvalidArgument.
    """
    if os.path.isdir(src) and not is_diffusion_model(src):
        raise errors.InvalidArgument(
            f"{os.fsdecode(src)} holds neither a diffusers pipeline ({_PIPELINE}) nor a component of one: "
            "bigsmall.compress takes any model directory"
        )
    return api.compress(src, dst, mode, workers, sha256=sha256, overwrite=overwrite, force=force, progress=progress)


def decompress_diffusion(
    src: PathLike,
    dst: PathLike,
    *,
    workers: int | None = None,
    overwrite: bool = True,
    force: bool = False,
    progress: bool = False,
) -> str:
    """Gives back what compress_diffusion was given, byte for byte, indexes and all; returns `dst`.

    src : the `.bs` file or directory
    dst : the `.safetensors` file, or the new directory, to write; it appears whole or not at all

    The other arguments, and the errors, are those of `bigsmall.decompress`.
    """
    return api.decompress(src, dst, workers=workers, overwrite=overwrite, force=force, progress=progress)


# ---- weight files of a component -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """The `.bs` files that hold one component: a single file, or shards and what their index says. `label` is what
    messages call them. A folder in place of files is opened as one model."""

    paths: list[str]
    label: str
    weight_map: dict[str, str] | None = None


def _single(path: str) -> _Chosen:
    return _Chosen([path], path)


def _weight_map(index: dict[str, Any], path: str, stem: str, variant: str | None) -> dict[str, str] | None:
    """Tensor to `.bs` file as a bigsmall.index.json says for the weights of that name and variant; None where it lists
    others. It holds the source's indexes, one for each variant, but for those that the original package wrote."""
    sources = index.get("metadata", {}).get("source_indexes") or []
    wanted = f"{stem}{_SOURCE_EXT}.index.json" if variant is None else f"{stem}{_SOURCE_EXT}.index.{variant}.json"
    found: dict[str, str] | None = None
    for source in sources:
        if source["name"] == wanted:
            files = hub.parse_index(source["text"], f"{path}: {wanted}")["weight_map"]
            found = {name: file[: -len(_SOURCE_EXT)] + _EXT for name, file in files.items()}
    if not sources and variant is None and all(file.startswith(stem) for file in index["weight_map"].values()):
        found = index["weight_map"]
    if found is not None:
        hub.shards_of({"weight_map": found}, path)
    return found


def _from_index(folder: str, stem: str, variant: str | None) -> _Chosen | None:
    """The shards that the folder's bigsmall.index.json lists for that name and variant; None where it lists none.
    FileMissing where one is not there."""
    path = os.path.join(folder, hub.INDEX_NAME)
    if not os.path.isfile(path):
        return None
    weight_map = _weight_map(hub.read_index(path), path, stem, variant)
    if not weight_map:
        return None
    paths = [os.path.join(folder, file) for file in sorted(set(weight_map.values()))]
    for shard in paths:
        if not os.path.isfile(shard):
            raise _missing(shard, f"{hub.INDEX_NAME} lists this shard, which is missing")
    return _Chosen(paths, path, weight_map)


def _variant_of(name: str) -> str | None:
    """The variant of a weight file: fp16 of `model.fp16.bs` and of `model.fp16-00001-of-00002.bs`."""
    parts = name.split(".")
    return re.sub(r"-\d+-of-\d+$", "", parts[1]) if len(parts) > 2 else None


def _choose(folder: str, stem: str, variant: str | None) -> _Chosen | None:
    """The `.bs` files to load from a component's folder; None where it has none, or where only other formats fit.

    The files of the variant come first, then the plain ones, as in diffusers; files of other formats only where no
    `.bs` is of the same kind. FileMissing where every weight file is of another variant, or a shard is not there.
    """
    try:
        names = set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return None
    ours = sorted(name for name in names if name.endswith(_EXT))
    if not ours:
        return None
    for kind in dict.fromkeys((variant, None)):
        chosen = _from_index(folder, stem, kind)
        if chosen is not None:
            return chosen
        single = stem + _EXT if kind is None else f"{stem}.{kind}{_EXT}"
        if single in names:
            return _single(os.path.join(folder, single))
        of_kind = sorted(name for name in names if kind is None or _variant_of(name) == kind)
        old = [name for name in of_kind if kind is not None and name.startswith(stem) and name.endswith(_EXT)]
        if old:
            raise errors.Unsupported(
                f"{os.path.join(folder, old[0])} is a shard of variant {kind!r} that no index lists: load the original "
                "with diffusers and save it again, then compress that"
            )
        if any(name.endswith((_SOURCE_EXT, ".bin")) for name in of_kind):
            return None
    wanted = f"{stem}{_EXT}" if variant is None else f"{stem}{_EXT} and none of variant {variant!r}"
    raise _missing(folder, f"it has no {wanted}, but {', '.join(ours)}: name the variant to load by variant=...")


class _Weights:
    """The opened `.bs` files of one component: `tensors` maps names to the reader and its tensor."""

    def __init__(self, chosen: _Chosen) -> None:
        self.chosen = chosen
        self.readers: list[Reader] = []
        self.tensors: dict[str, tuple[Reader, TensorInfo]] = {}
        with contextlib.ExitStack() as opening:
            for path in chosen.paths:
                reader = opening.enter_context(Reader(path))
                self.readers.append(reader)
                for tensor in reader.tensors:
                    if tensor.name in self.tensors:
                        raise errors.Corrupt(
                            f"tensor {tensor.name!r} is in {self.tensors[tensor.name][0].path} and in {path}"
                        )
                    self.tensors[tensor.name] = (reader, tensor)
            if chosen.weight_map is not None:
                file_of = {name: os.path.basename(reader.path) for name, (reader, _) in self.tensors.items()}
                hub.check_index({"weight_map": chosen.weight_map}, chosen.label, file_of)
            self._stack = opening.pop_all()

    @property
    def label(self) -> str:
        return self.chosen.label

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


# ---- a component -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Component:
    """A network of a pipeline: its name in model_index.json, its class, and its folder."""

    name: str
    cls: Any
    folder: str

    @property
    def of_diffusers(self) -> bool:
        return issubclass(self.cls, _diffusers().ModelMixin)

    @property
    def stem(self) -> str:
        return _DIFFUSERS_STEM if self.of_diffusers else _TRANSFORMERS_STEM


def _import(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name != name.split(".", maxsplit=1)[0]:  # it is there but lacks something itself
            raise
        raise ModuleNotFoundError(
            f"{what} needs {missing.name}, which is not installed: pip install bigsmall[diffusion]", name=missing.name
        ) from missing


def _diffusers(module: str = "") -> Any:
    return _import("diffusers" + module, "loading a pipeline")


def _component_class(name: str, library: str, class_name: str, folder: str, trust_remote_code: bool) -> Any:
    """The class that model_index.json names, found as diffusers finds it: it imports only libraries that it knows."""
    pipelines = _diffusers(".pipelines")
    loading = _diffusers(".pipelines.pipeline_loading_utils")
    find = loading.get_class_obj_and_candidates
    options: dict[str, Any] = {"component_name": name, "cache_dir": folder}
    if "trust_remote_code" in inspect.signature(find).parameters:
        options["trust_remote_code"] = trust_remote_code
    cls, _ = find(
        library, class_name, loading.ALL_IMPORTABLE_CLASSES, pipelines, hasattr(pipelines, library), **options
    )
    if not inspect.isclass(cls):
        raise errors.Unsupported(
            f"{os.path.join(folder, _PIPELINE)}: component {name!r} is a {class_name} of {library}, which the "
            "installed version does not have"
        )
    return cls


def _component(name: str, entry: Sequence[Any], folder: str, trust_remote_code: bool) -> _Component | None:
    """The component where it is a network; None for schedulers, tokenizers and the like."""
    import torch

    where = os.path.join(folder, name)
    cls = _component_class(name, entry[0], entry[1], folder, trust_remote_code)
    return _Component(name, cls, where) if issubclass(cls, torch.nn.Module) else None


def _empty_model(component: _Component, dtype: torch.dtype | None) -> Any:
    """The model of a diffusers component without memory for its weights. Buffers that no file holds are real."""
    import torch

    accelerate = _import("accelerate", "loading a pipeline")
    modeling = _diffusers(".models.modeling_utils")
    cls = component.cls
    if "from_pretrained" in vars(cls) and cls not in (modeling.ModelMixin, modeling.LegacyModelMixin):
        raise errors.Unsupported(
            f"component {component.name!r} is a {cls.__name__}, which loads its parts by itself: call "
            "bigsmall.install_hook() and then from_pretrained of the pipeline"
        )
    config = cls.load_config(component.folder)
    if config.get("quantization_config") is not None:
        raise errors.Unsupported(
            f"component {component.name!r} was quantised by {config['quantization_config'].get('quant_method')}: call "
            "bigsmall.install_hook() and then from_pretrained of the pipeline, or decompress it first"
        )
    if issubclass(cls, modeling.LegacyModelMixin):
        cls = _diffusers(".models.model_loading_utils")._fetch_remapped_cls_from_config(config, cls)
    before = torch.get_default_dtype()
    try:
        # As diffusers does: it makes the dtype of buffers that are no weights.
        if dtype is not None and dtype.itemsize > 1:
            torch.set_default_dtype(dtype)
        with accelerate.init_empty_weights(include_buffers=False):
            return cls.from_config(config)
    finally:
        torch.set_default_dtype(before)


def _named_as_in(model: Any, weights: _Weights) -> dict[str, tuple[Reader, TensorInfo]]:
    """The tensors under the names that the model has today; those that it ignores by design are left out."""
    named = dict(weights.tensors)
    # Names of attention layers have changed; only single files can be that old.
    if weights.chosen.weight_map is None and hasattr(model, "_fix_state_dict_keys_on_load"):
        model._fix_state_dict_keys_on_load(named)
    expected = model.state_dict()
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return {
        name: found
        for name, found in named.items()
        if name in expected or not any(re.search(pattern, name) for pattern in ignored)
    }


def _difference(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> str | None:
    """The first difference between the tensors of a model and those of a file, in words; None where there is none."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"tensor {name!r} {list(expected[name])} is not in the file"
        if name not in expected:
            return f"tensor {name!r} {list(found[name])} is not in the model"
        if expected[name] != found[name]:
            return f"tensor {name!r} is {list(found[name])} in the file and {list(expected[name])} in the model"
    return None


def _shapes_of(tensors: Mapping[str, tuple[Reader, TensorInfo]]) -> dict[str, Shape]:
    return {name: tensor.shape for name, (_, tensor) in tensors.items()}


def _expected_shapes(model: Any) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _refuse_different(
    component: _Component, model: Any, found: Mapping[str, tuple[Reader, TensorInfo]], path: str
) -> None:
    """Raises where the file is not exactly the model's, before anything is decoded."""
    expected, shapes = _expected_shapes(model), _shapes_of(found)
    first = _difference(expected, shapes)
    if first is None:
        return
    missing, unexpected = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    several = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    raise errors.InvalidArgument(
        f"{path} does not fit component {component.name!r} ({type(model).__name__}, {component.folder}): {first}"
        + (f" ({'; '.join(several)})" if several else "")
    )


@dataclass(frozen=True)
class _Placement:
    """How weights are loaded: their dtype (None for that of the model), device, and the threads."""

    dtype: torch.dtype | dict[str, torch.dtype] | None
    device_map: str | None
    workers: int | None
    verify: bool
    progress: bool

    def dtype_of(self, component: str) -> torch.dtype | None:
        """The dtype for a component: diffusers takes one for all, or a dict with "default"."""
        import torch

        if isinstance(self.dtype, dict):
            return self.dtype.get(component, self.dtype.get("default", torch.float32))  # as diffusers does
        return self.dtype


def _load_diffusers_model(component: _Component, weights: _Weights, placement: _Placement) -> Any:
    import torch

    dtype = placement.dtype_of(component.name)
    model = _empty_model(component, dtype)
    found = _named_as_in(model, weights)
    _refuse_different(component, model, found, weights.label)
    state = _decode(model, found, dtype, placement)
    model.load_state_dict(state, strict=True, assign=True)
    device = torch.device(placement.device_map or "cpu")
    if device.type != "cpu":
        model.to(device)  # the buffers that no file holds; the weights are there
    if dtype is not None and dtype.itemsize == 1 and not _kept_in_float32(model):
        model.to(dtype)
    model.register_to_config(_name_or_path=component.folder)
    return model.eval()


def _kept_in_float32(model: Any) -> list[str]:
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    return [kept] if isinstance(kept, str) else list(kept)


def _decode(
    model: Any, found: Mapping[str, tuple[Reader, TensorInfo]], dtype: torch.dtype | None, placement: _Placement
) -> dict[str, torch.Tensor]:
    """The model's state_dict from the files, cast as diffusers casts: floating-point weights to `dtype`, but float32 in
    modules that want it; where it is None, everything to the dtype that the model has."""
    import torch

    from bigsmall.torch import empty, read

    kept = _kept_in_float32(model)
    device = torch.device(placement.device_map or "cpu")
    own = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def wanted(name: str, stored: torch.dtype) -> torch.dtype:
        if dtype is None:
            return own[name]
        if not stored.is_floating_point:
            return stored
        return torch.float32 if any(part in kept for part in name.split(".")) else dtype

    state: dict[str, torch.Tensor] = {}
    readers = {id(reader): reader for reader, _ in found.values()}
    for key, reader in readers.items():
        target = {tensor.name: name for name, (owner, tensor) in found.items() if id(owner) == key}
        groups: list[list[TensorInfo]] = [[]]
        cast: list[TensorInfo] = []
        for tensor in reader.tensors:
            if tensor.name in target:
                stored = empty(tensor, [0]).dtype
                (groups[0] if wanted(target[tensor.name], stored) == stored else cast).append(tensor)
        for group in groups + split_by_bytes(cast, _CAST_BYTES):
            loaded = read(
                reader, group, device, workers=placement.workers, verify=placement.verify, progress=placement.progress
            )
            for tensor in group:
                name = target[tensor.name]
                value = loaded.pop(tensor.name)
                state[name] = value.to(wanted(name, value.dtype))
    return state


def _load_transformers_model(component: _Component, weights: _Weights, placement: _Placement) -> Any:
    from bigsmall.integrations import huggingface

    options: dict[str, Any] = {"dtype": placement.dtype_of(component.name), "output_loading_info": True}
    if placement.device_map is not None:
        options["device_map"] = placement.device_map
    if len(weights.chosen.paths) == 1:
        model, report = huggingface.from_pretrained(
            weights.chosen.paths[0], component.cls, config_dir=component.folder, **options
        )
    else:
        config = component.cls.config_class.from_pretrained(component.folder)
        tensors = _tensors_for_transformers(weights, placement)
        model, report = component.cls.from_pretrained(None, config=config, state_dict=tensors, **options)
        model.name_or_path = model.config._name_or_path = component.folder
    # What is there too many transformers reports: old files of text encoders have tensors that no model wants today.
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise errors.InvalidArgument(
            f"{weights.label} does not fit component {component.name!r} ({type(model).__name__}, {component.folder}): "
            f"{len(lacking)} missing: {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}"
        )
    return model.eval()


def _tensors_for_transformers(weights: _Weights, placement: _Placement) -> dict[str, Any]:
    """The tensors of several files, decoded as the model takes them; transformers 4 wants them decoded."""
    import torch

    from bigsmall.integrations.huggingface import LazyTensor
    from bigsmall.streaming import torch_slices
    from bigsmall.torch import read

    modeling = _import("transformers.modeling_utils", "a text encoder")
    tensors: dict[str, Any] = {}
    for reader in weights.readers:
        if hasattr(modeling, "load_shard_file"):
            tensors.update(read(reader, reader.tensors, torch.device("cpu"), workers=placement.workers))
        else:
            tensors.update(torch_slices(reader, LazyTensor))
    return tensors


def _load_component(component: _Component, weights: _Weights, placement: _Placement) -> Any:
    if component.of_diffusers:
        return _load_diffusers_model(component, weights, placement)
    transformers = _import("transformers", f"component {component.name!r}")
    if issubclass(component.cls, transformers.PreTrainedModel):
        return _load_transformers_model(component, weights, placement)
    raise errors.Unsupported(
        f"component {component.name!r} is a {component.cls.__name__}, a model of neither diffusers nor transformers: "
        "decompress it first"
    )


# ---- pipelines -------------------------------------------------------------------------------------------------------


def load_pipeline(
    path_or_repo: PathLike,
    pipe_class: Any = None,
    torch_dtype: Any = None,
    variant: str | None = None,
    device_map: str | None = None,
    *,
    config_dir: PathLike | None = None,
    component: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = False,
    **kwargs: Any,
) -> Any:
    """A ready diffusers pipeline from `.bs` files, which are decoded straight into its models.

    path_or_repo : a pipeline directory as compress_diffusion makes it, or a Hub repo id ("owner/name"). Or, with
                   `config_dir`, the `.bs` file (or directory of shards) of one component
    pipe_class   : the pipeline's class, None for the one that model_index.json names
    torch_dtype  : a torch.dtype, or a dict of component to dtype with "default"; None for float32 in models of
                   diffusers and for transformers' default. `dtype=` is another name for it
    variant      : load the files of that variant ("fp16") where a component has any
    device_map   : None or "cpu", or "cuda": weights are decoded to the GPU at once
    config_dir   : a pipeline directory or repo id. The component whose tensor names and shapes are exactly those of the
                   file gets its weights from the file; all others come from there, from `.bs` or `.safetensors`
    component    : the name of that component where several fit
    revision, token, cache_dir, local_files_only : for a repo id, as in diffusers
    workers      : threads, None for all available
    verify       : compare the MD5 of every tensor of diffusers models too; every block's checksum is always verified
    progress     : show a bar on standard error for models of diffusers, where that is a terminal
    kwargs       : go to from_pretrained of the pipeline's class. A component given there is not loaded

    Where a folder has both, `.bs` files are preferred to `.safetensors`; components without `.bs` are loaded by
    diffusers. A model of diffusers gets its weights without a second copy of them in memory (128 MiB more where they
    are cast), and nothing is written to disk. Every tensor of such a model must be in the files, in its shape, and
    nothing else. On any error no pipeline is returned. Threads that call this at once load one after the other.

    Raises FileMissing (nothing there, or a missing shard), InvalidArgument (no pipeline, weights that do not fit, a
    file that fits no component or several), Corrupt, Truncated or ChecksumMismatch (a damaged file), Unsupported
    (quantised models, other device maps), WrongBase (a delta: restore it by bigsmall.decompress with its base first),
    and what diffusers raises.
    """
    diffusers = _diffusers()
    dtype = kwargs.pop("dtype", None)
    if dtype is not None and torch_dtype is not None:
        raise errors.InvalidArgument("dtype and torch_dtype are the same argument: give one of them")
    placement = _Placement(torch_dtype if dtype is None else dtype, device_map, workers, verify, progress)
    _check_placement(placement)
    if kwargs.get("quantization_config") is not None:
        raise errors.Unsupported(
            "load_pipeline loads weights as they are: to quantise them, call bigsmall.install_hook() and then "
            "from_pretrained of the pipeline"
        )
    if component is not None and config_dir is None:
        raise errors.InvalidArgument(
            "component= names what the file replaces in the pipeline of config_dir=, which is missing"
        )
    where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    pipe_class = diffusers.DiffusionPipeline if pipe_class is None else pipe_class
    folder = _pipeline_folder(path_or_repo if config_dir is None else config_dir, pipe_class, variant, where, kwargs)
    entries = _entries(folder, path_or_repo, kwargs)
    file = None if config_dir is None else os.fsdecode(path_or_repo)
    options: dict[str, Any] = {"variant": variant, "device_map": device_map, **where}
    # diffusers is renaming this argument and warns where it gets the old name.
    renamed = hasattr(importlib.import_module("diffusers.utils"), "_resolve_dtype")
    options["dtype" if renamed else "torch_dtype"] = placement.dtype
    options = {name: value for name, value in options.items() if value is not None}
    with _loading:
        trusted = bool(kwargs.get("trust_remote_code", False))
        given = _load_components(folder, entries, file, component, variant, placement, trusted)
        return pipe_class.from_pretrained(folder, **given, **options, **kwargs)


def _load_components(
    folder: str,
    entries: Mapping[str, Sequence[Any]],
    file: str | None,
    component: str | None,
    variant: str | None,
    placement: _Placement,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """The components that come from `.bs` files, and None for those that the pipeline does not have. `file` replaces
    the weights of one of them."""
    loaded: dict[str, Any] = {name: None for name, entry in entries.items() if entry[0] is None}
    networks: dict[str, _Component] = {}
    for name, entry in entries.items():
        network = None if entry[0] is None else _component(name, entry, folder, trust_remote_code)
        if network is not None:
            networks[name] = network
    with contextlib.ExitStack() as opened:
        todo: list[tuple[_Component, _Weights]] = []
        if file is not None:
            own = opened.enter_context(_Weights(_single(file)))
            replaced = _matching(own, networks, component, variant, folder)
            todo.append((replaced, own))
            del networks[replaced.name]
        # Everything is found and opened before the first tensor is decoded.
        for network in networks.values():
            chosen = _choose(network.folder, network.stem, variant)
            if chosen is not None:
                todo.append((network, opened.enter_context(_Weights(chosen))))
        for network, weights in todo:
            loaded[network.name] = _load_component(network, weights, placement)
    return loaded


def _check_placement(placement: _Placement) -> None:
    import torch

    if placement.device_map not in (None, "cpu", "cuda"):
        raise errors.Unsupported(
            f"device_map={placement.device_map!r}: load_pipeline knows None, 'cpu' and 'cuda'. For other placements "
            "call bigsmall.install_hook() and then from_pretrained of the pipeline"
        )
    if placement.device_map == "cuda" and not torch.cuda.is_available():
        raise errors.Unsupported(
            "device_map='cuda': torch finds no CUDA device. Install a driver and a CUDA build of torch, or leave "
            "device_map out"
        )
    each = placement.dtype.values() if isinstance(placement.dtype, dict) else [placement.dtype]
    for dtype in each:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise errors.InvalidArgument(
                f"torch_dtype {dtype!r} is no floating-point torch.dtype, such as torch.float16"
            )


def _entries(folder: str, asked: PathLike, kwargs: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """The components of model_index.json, but those that the caller brings: name to (library, class)."""
    index = _read_json(os.path.join(folder, _PIPELINE))
    if index is None:
        raise errors.InvalidArgument(
            f"{folder} has no {_PIPELINE}, so it is no pipeline directory. To put the weights of one component into a "
            f"pipeline, call load_pipeline({os.fsdecode(asked)!r}, config_dir=<pipeline directory>)"
        )
    return {
        name: entry
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and name not in kwargs
    }


def _matching(
    weights: _Weights, networks: Mapping[str, _Component], asked: str | None, variant: str | None, folder: str
) -> _Component:
    """The only component with exactly these tensors."""
    if asked is not None and asked not in networks:
        raise errors.InvalidArgument(
            f"{folder} has no network {asked!r} to replace, but {', '.join(networks) or 'none'}"
        )
    compared = networks if asked is None else {asked: networks[asked]}
    differences = {name: _compare(network, weights, variant) for name, network in compared.items()}
    fitting = [name for name, difference in differences.items() if difference is None]
    if len(fitting) == 1:
        return networks[fitting[0]]
    if fitting:
        raise errors.InvalidArgument(
            f"{weights.label} fits several components of {folder}, which have the same tensor names and shapes: "
            f"{', '.join(fitting)}. Say which by component=..."
        )
    told = "; ".join(f"{name} ({networks[name].cls.__name__}): {what}" for name, what in differences.items())
    raise errors.InvalidArgument(
        f"{weights.label} fits no component of {folder}. Compared: {told or 'it has no networks'}"
    )


def _compare(component: _Component, weights: _Weights, variant: str | None) -> str | None:
    """The first difference between a file and a component, in words; None where they fit."""
    if component.of_diffusers:
        if not os.path.isfile(os.path.join(component.folder, _CONFIG)):
            return f"{component.folder} has no {_CONFIG}"
        model = _empty_model(component, None)
        return _difference(_expected_shapes(model), _shapes_of(_named_as_in(model, weights)))
    # Names in files of transformers are not always those of the model: only another file tells.
    there = _stored_shapes(component, variant)
    if there is None:
        return f"{component.folder} has no weights to compare with"
    return _difference(there, _shapes_of(weights.tensors))


def _stored_shapes(component: _Component, variant: str | None) -> dict[str, Shape] | None:
    """Names and shapes of the weights in a component's folder, `.bs` or `.safetensors`; None where there are none."""
    chosen = _choose(component.folder, component.stem, variant)
    if chosen is not None:
        with _Weights(chosen) as weights:
            return _shapes_of(weights.tensors)
    for kind in dict.fromkeys((variant, None)):
        dotted = "" if kind is None else f".{kind}"
        single = os.path.join(component.folder, component.stem + dotted + _SOURCE_EXT)
        if os.path.isfile(single):
            return _header(single)
        index = _read_json(os.path.join(component.folder, f"{component.stem}{_SOURCE_EXT}.index{dotted}.json"))
        if index is not None:
            files = sorted(set(index["weight_map"].values()))
            parts = [_header(os.path.join(component.folder, os.path.basename(file))) for file in files]
            return {tensor: shape for part in parts for tensor, shape in part.items()}
    return None


# ---- repos -----------------------------------------------------------------------------------------------------------


def _pipeline_folder(
    path_or_repo: PathLike, pipe_class: Any, variant: str | None, where: dict[str, Any], kwargs: Mapping[str, Any]
) -> str:
    """The local folder of a pipeline; a repo is downloaded to the Hub cache."""
    path = os.fsdecode(path_or_repo)
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise errors.InvalidArgument(
            f"{path} is a file: give a pipeline directory, or name one by config_dir=... to load the file into"
        )
    if not hub.is_repo_id(path):
        raise _missing(path, "No such file or directory")
    return _download(hub.repo_id(path), pipe_class, variant, where, kwargs)


def _download(repo: str, pipe_class: Any, variant: str | None, where: dict[str, Any], kwargs: Mapping[str, Any]) -> str:
    """Downloads what load_pipeline needs. Of components with `.bs` that is the files of the variant, or the plain ones;
    the others are left to diffusers, whose own rules know other formats only. Without network, what is in the cache."""
    library = hub.library()
    with hub.hub_errors(repo, where["revision"]):
        listing = None
        if not where["local_files_only"]:
            try:
                listing = library.HfApi(token=where["token"], **hub.who()).list_repo_files(
                    repo, revision=where["revision"]
                )
            except Exception as error:
                if not hub.is_network_failure(error):
                    raise
        if listing is None:
            found = library.hf_hub_download(repo, _PIPELINE, **{**where, "local_files_only": True}, **hub.who())
            return str(os.path.dirname(found))
    folders: dict[str, set[str]] = {}
    for file in listing:
        folder, _, name = file.partition("/")
        if name and "/" not in name:
            folders.setdefault(folder, set()).add(name)
    ours = {
        folder: names
        for folder, names in folders.items()
        if folder not in kwargs and any(name.endswith(_EXT) for name in names)
    }
    wanted = [f"{folder}/{name}" for folder, names in ours.items() for name in _needed(names, variant)]
    rest = {name for folder, names in folders.items() if folder not in ours for name in names}
    of_variant = variant if any(_variant_of(name) == variant for name in rest) else None
    download = getattr(pipe_class, "download", _diffusers().DiffusionPipeline.download)
    passed = {**kwargs, **dict.fromkeys(ours)}
    with hub.hub_errors(repo, where["revision"]):
        base = os.fspath(download(repo, variant=of_variant, **where, **passed))
        if not wanted:
            return str(base)
        got = hub.snapshot(repo, allow_patterns=wanted, **where, **hub.who())
    if not os.path.samefile(got, base):
        raise errors.InvalidArgument(f"{repo} changed while it was downloaded: call load_pipeline again")
    return got


def _needed(names: Iterable[str], variant: str | None) -> list[str]:
    """Of the files of a component with `.bs`, those to download: the weights of the variant where it has any, else the
    plain ones, and everything that is no weights."""
    names = set(names)
    ours = {name for name in names if name.endswith(_EXT)}
    others = {name for name in names - ours if not name.endswith((_SOURCE_EXT, ".bin", ".msgpack", ".onnx", ".h5"))}
    chosen = {name for name in ours if variant is not None and _variant_of(name) == variant}
    plain = {name for name in ours if _variant_of(name) is None}
    return sorted(others | (chosen or plain or ours))


# ---- what diffusers' own from_pretrained needs -----------------------------------------------------------------------

Factory = Callable[[Callable[..., Any]], Callable[..., Any]]


def diffusers_patches() -> dict[str, dict[str, Factory]]:
    """The names to replace so that from_pretrained of diffusers' models and pipelines, and from_single_file, take
    `.bs`: module to attribute to what makes, from the function that stands there, the one that takes its place.

    Components of transformers need its own patches. Ordinary checkpoints pass through untouched and, on the Hub, with
    the same requests; where `.safetensors` and `.bs` are both there, the first is used.
    """
    return {
        "diffusers.models.model_loading_utils": {"load_state_dict": wrap_load_state_dict},
        "diffusers.models.modeling_utils": {
            "load_state_dict": wrap_load_state_dict,
            "_fetch_index_file": wrap_fetch_index_file,
            "_get_checkpoint_shard_files": wrap_get_checkpoint_shard_files,
            "_get_model_file": wrap_get_model_file,
        },
        "diffusers.loaders.single_file_utils": {"load_state_dict": wrap_load_state_dict},
        "diffusers.pipelines.pipeline_utils": {"variant_compatible_siblings": wrap_variant_compatible_siblings},
    }


class _Shards(str):
    """The path of a bigsmall.index.json that stands for all shards of one component."""

    chosen: _Chosen


def _shards(chosen: _Chosen) -> _Shards:
    made = _Shards(chosen.label)
    made.chosen = chosen
    return made


class _ShardsFile(type(Path())):  # type: ignore[misc]
    """The same where diffusers wants a Path."""

    chosen: _Chosen


def wrap_load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the tensors of a `.bs` file, or of all shards of a component."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_state_dict(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        file = next(iter(given.values()), None)
        if isinstance(file, _Shards):
            chosen = file.chosen
        elif isinstance(file, (str, os.PathLike)) and os.fsdecode(file).endswith(_EXT):
            chosen = _single(os.fsdecode(file))
        else:
            return original(*args, **kwargs)
        import torch

        from bigsmall.torch import read

        device = torch.device(given.get("map_location") or "cpu")
        tensors: dict[str, Any] = {}
        with _Weights(chosen) as weights:
            for reader in weights.readers:
                tensors.update(read(reader, reader.tensors, device))
        return tensors

    return load_state_dict


def wrap_fetch_index_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """Finds the shards of a local folder that has no safetensors of that variant, and checks their headers."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _fetch_index_file(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if (found is not None and os.path.isfile(found)) or not given["is_local"] or not given["use_safetensors"]:
            return found
        folder = os.path.join(given["pretrained_model_name_or_path"], given["subfolder"] or "")
        variant = given["variant"]
        single = _DIFFUSERS_STEM if variant is None else f"{_DIFFUSERS_STEM}.{variant}"
        if os.path.isfile(os.path.join(folder, single + _SOURCE_EXT)):
            return found
        chosen = _from_index(folder, _DIFFUSERS_STEM, variant)
        if chosen is None:
            return found
        with _Weights(chosen):
            made = _ShardsFile(chosen.label)
            made.chosen = chosen
            return made

    return _fetch_index_file


def wrap_get_checkpoint_shard_files(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gives the shards that were found before."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _get_checkpoint_shard_files(*args: Any, **kwargs: Any) -> Any:
        index = signature.bind(*args, **kwargs).arguments.get("index_filename")
        if not isinstance(index, _ShardsFile):
            return original(*args, **kwargs)
        weight_map = dict(index.chosen.weight_map or {})
        return index.chosen.paths, {"all_checkpoint_keys": list(weight_map), "weight_map": weight_map}

    return _get_checkpoint_shard_files


def wrap_get_model_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where there is no `X.safetensors`, gives `X.bs`, or of a repo all its shards."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _get_model_file(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except OSError as missing:
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            name = given["weights_name"]
            local = os.path.isdir(given["pretrained_model_name_or_path"])
            if not name.endswith(_SOURCE_EXT) or not (local or _not_in_repo(missing)):
                raise

            def fetch(file: str) -> Any:
                given["weights_name"] = file
                return original(*bound.args, **bound.kwargs)

            with contextlib.suppress(OSError):
                return fetch(name[: -len(_SOURCE_EXT)] + _EXT)
            stem, _, variant = name[: -len(_SOURCE_EXT)].partition(".")
            index: str | None = None
            if not local and stem == _DIFFUSERS_STEM:
                with contextlib.suppress(OSError):
                    index = fetch(hub.INDEX_NAME)
            if index is not None:
                weight_map = _weight_map(hub.read_index(index), index, stem, variant or None)
                if weight_map:
                    paths = [fetch(shard) for shard in sorted(set(weight_map.values()))]
                    return _shards(_Chosen(paths, index, weight_map))
            raise

    return _get_model_file


def _not_in_repo(error: OSError) -> bool:
    """Whether diffusers found the repo but not the file in it; after anything else further requests are in vain."""
    from huggingface_hub.utils import EntryNotFoundError

    return isinstance(error, EntryNotFoundError) or isinstance(error.__cause__, EntryNotFoundError)


def wrap_variant_compatible_siblings(original: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a variant of `.bs` files count as one when a pipeline's files are chosen for download."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def variant_compatible_siblings(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        names = set(bound.arguments["filenames"])
        twins = {name[: -len(_EXT)] + _SOURCE_EXT: name for name in names if name.endswith(_EXT)}
        twins = {source: name for source, name in twins.items() if source not in names}
        if bound.arguments.get("variant") is None or not twins:
            return original(*args, **kwargs)
        # Where no folder has safetensors diffusers wants to ignore them, which must not hit our stand-ins.
        ignored = tuple(pattern.lstrip("*") for pattern in bound.arguments.get("ignore_patterns") or ())
        others = {name for name in names - set(twins.values()) if not (ignored and name.endswith(ignored))}
        bound.arguments.update(filenames=others | twins.keys(), ignore_patterns=None)
        usable, of_variant = original(*bound.args, **bound.kwargs)
        return {twins.get(name, name) for name in usable}, {twins.get(name, name) for name in of_variant}

    return variant_compatible_siblings


__all__ = [
    "compress_diffusion",
    "decompress_diffusion",
    "diffusers_patches",
    "is_diffusion_model",
    "load_pipeline",
]
