"""diffusers: pipelines and their components from `.bs` files.

    is_diffusion_model                       what a file or directory holds, by its headers
    compress_diffusion, decompress_diffusion  a weight file, a component or a whole pipeline directory, and back
    load_pipeline                            a ready pipeline, without a decompressed copy on disk

What makes diffusers' own `from_pretrained` take `.bs` is bigsmall.install_hook().

Needs diffusers 0.35 or newer and accelerate for loading; importing this module loads neither.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from bigsmall import _native, api, errors, hub
from bigsmall.integrations import _checkpoint
from bigsmall.integrations._checkpoint import OURS, SOURCE, Checkpoint, Weights
from bigsmall.reader import Reader, TensorInfo, split_by_bytes

if TYPE_CHECKING:
    import torch

PathLike = Union[str, "os.PathLike[str]"]
Shape = tuple[int, ...]

_PIPELINE = "model_index.json"
_CONFIG = "config.json"

# Names of weight files without their extension, as the two libraries write them.
_DIFFUSERS_STEM = "diffusion_pytorch_model"
_TRANSFORMERS_STEM = "model"

# Weights are decoded in groups of this size, after each of which a progress bar moves; those that are cast in smaller
# ones, so that no model is in memory in both dtypes.
_GROUP_BYTES = 1 << 30
_CAST_BYTES = 128 << 20

# One pipeline is loaded at a time. While a model is made, accelerate, diffusers and transformers change the default
# dtype and methods of torch.nn.Module, which count for the whole process; threads that did so at once would undo the
# wrong change. Decoding uses all cores as it is. The code of a pipeline may load another one, hence the RLock.
_loading = threading.RLock()


def _after_fork_in_child() -> None:
    """The thread that held the lock is not in the child."""
    global _loading
    _loading = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


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
    files = [name for name in sorted(os.listdir(folder)) if name.endswith((OURS, SOURCE))]
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
    if file.endswith(OURS):
        with Reader(file) as reader:
            return {tensor.name: tensor.shape for tensor in reader.tensors}
    if not os.path.exists(file):
        raise hub.not_found(file, "there is no such file or directory")
    if not file.endswith(SOURCE):
        raise errors.InvalidArgument(f"{file} is neither a {SOURCE} nor a {OURS} file")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise errors.InvalidArgument(f"{file} is no {SOURCE} file: {error}") from error


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


def _variant_of(name: str) -> str | None:
    """The variant of a weight file: fp16 of `model.fp16.bs` and of `model.fp16-00001-of-00002.bs`."""
    parts = name.split(".")
    return re.sub(r"-\d+-of-\d+$", "", parts[1]) if len(parts) > 2 else None


def _choose(folder: str, stem: str, variant: str | None) -> Checkpoint | None:
    """The `.bs` files to load from a component's folder; None where it has none, or where only other formats fit.

    The files of the variant come first, then the plain ones, as in diffusers; files of other formats only where no
    `.bs` is of the same kind. FileMissing where every weight file is of another variant, or a shard is not there.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    ours = sorted(name for name in names if name.endswith(OURS))
    if not ours:
        return None
    for kind in dict.fromkeys((variant, None)):
        chosen = _checkpoint.find(folder, stem, kind)
        if chosen is not None:
            return chosen
        of_kind = sorted(name for name in names if kind is None or _variant_of(name) == kind)
        old = [name for name in of_kind if kind is not None and name.startswith(stem) and name.endswith(OURS)]
        if old:
            raise errors.Unsupported(
                f"{os.path.join(folder, old[0])} is a shard of variant {kind!r} that no index lists: load the original "
                "with diffusers and save it again, then compress that"
            )
        if any(name.endswith((SOURCE, ".bin")) for name in of_kind):
            return None
    wanted = f"{stem}{OURS}" if variant is None else f"{stem}{OURS} and none of variant {variant!r}"
    raise hub.not_found(folder, f"it has no {wanted}, but {', '.join(ours)}: name the variant to load by variant=...")


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
        # As diffusers does: it makes the dtype of buffers that are no weights. torch takes no float8 here.
        if dtype is not None and dtype.itemsize > 1:
            torch.set_default_dtype(dtype)
        with accelerate.init_empty_weights(include_buffers=False):
            return cls.from_config(config)
    finally:
        torch.set_default_dtype(before)


def _named_as_in(model: Any, weights: Weights) -> dict[str, tuple[Reader, TensorInfo]]:
    """The tensors under the names that the model has today; those that it ignores by design are left out."""
    named = dict(weights.tensors)
    # Names of attention layers have changed; only single files can be that old.
    if weights.checkpoint.weight_map is None and hasattr(model, "_fix_state_dict_keys_on_load"):
        model._fix_state_dict_keys_on_load(named)
    expected = model.state_dict()
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return {
        name: found
        for name, found in named.items()
        if name in expected or not any(re.search(pattern, name) for pattern in ignored)
    }


def _difference(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> str | None:
    """How the tensors of a file differ from those of a model, in words: the first one, and how many; None where they do
    not."""
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    reshaped = {name for name in expected.keys() & found.keys() if expected[name] != found[name]}
    if not (missing or unexpected or reshaped):
        return None
    name = min(missing | unexpected | reshaped)
    if name in missing:
        first = f"tensor {name!r} {list(expected[name])} is not in the file"
    elif name in unexpected:
        first = f"tensor {name!r} {list(found[name])} is not in the model"
    else:
        first = f"tensor {name!r} is {list(found[name])} in the file and {list(expected[name])} in the model"
    return f"{first} ({len(missing)} are missing, {len(unexpected)} too many, {len(reshaped)} of another shape)"


def _shapes_of(tensors: Mapping[str, tuple[Reader, TensorInfo]]) -> dict[str, Shape]:
    return {name: tensor.shape for name, (_, tensor) in tensors.items()}


def _expected_shapes(model: Any) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _no_fit(component: _Component, weights: Weights, why: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(
        f"{weights.checkpoint.label} does not fit component {component.name!r} ({component.cls.__name__}, "
        f"{component.folder}): {why}"
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


def _load_diffusers_model(component: _Component, weights: Weights, placement: _Placement) -> Any:
    import torch

    dtype = placement.dtype_of(component.name)
    model = _empty_model(component, dtype)
    found = _named_as_in(model, weights)
    difference = _difference(_expected_shapes(model), _shapes_of(found))  # before anything is decoded
    if difference is not None:
        raise _no_fit(component, weights, difference)
    model.load_state_dict(_decode(component, model, found, placement), strict=True, assign=True)
    if placement.device_map is not None:  # as diffusers does: it moves the buffers that no file holds, and notes where
        _import("accelerate", "loading a pipeline").dispatch_model(
            model, device_map={"": torch.device(placement.device_map)}
        )
    if dtype is not None and dtype.itemsize == 1 and model._keep_in_fp32_modules is None:
        model.to(dtype)  # again the buffers, which were not made in it
    model.register_to_config(_name_or_path=component.folder)
    return model.eval()


def _decode(
    component: _Component, model: Any, found: Mapping[str, tuple[Reader, TensorInfo]], placement: _Placement
) -> dict[str, torch.Tensor]:
    """The model's state_dict from the files, cast as diffusers casts: floating-point weights to the dtype that is asked
    for, but float32 in modules that want it; where none is, everything to the dtype that the model has."""
    import torch

    from bigsmall.torch import empty, read

    dtype = placement.dtype_of(component.name)
    device = torch.device(placement.device_map or "cpu")
    kept = model._keep_in_fp32_modules or []
    kept = [kept] if isinstance(kept, str) else kept
    own = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def wanted(name: str, stored: torch.dtype) -> torch.dtype:
        if dtype is None:
            return own[name]
        if not stored.is_floating_point:
            return stored
        return torch.float32 if any(part in kept for part in name.split(".")) else dtype

    state: dict[str, torch.Tensor] = {}
    total = sum(tensor.n_bytes for _, tensor in found.values())
    with _native.bar(f"loading {component.name}" if placement.progress else None, total) as shown:
        for reader in {id(reader): reader for reader, _ in found.values()}.values():
            target = {tensor.name: name for name, (owner, tensor) in found.items() if owner is reader}
            plain: list[TensorInfo] = []
            cast: list[TensorInfo] = []
            for tensor in reader.tensors:
                if tensor.name in target:
                    stored = empty(tensor, [0]).dtype
                    (plain if wanted(target[tensor.name], stored) == stored else cast).append(tensor)
            for group in split_by_bytes(plain, _GROUP_BYTES) + split_by_bytes(cast, _CAST_BYTES):
                loaded = read(reader, group, device, workers=placement.workers, verify=placement.verify)
                for tensor in group:
                    name = target[tensor.name]
                    value = loaded.pop(tensor.name)
                    state[name] = value.to(wanted(name, value.dtype))
                if shown is not None:
                    shown.update(sum(tensor.n_bytes for tensor in group))
    return state


def _load_transformers_model(component: _Component, weights: Weights, placement: _Placement) -> Any:
    from bigsmall.integrations import huggingface

    options: dict[str, Any] = {"dtype": placement.dtype_of(component.name), "output_loading_info": True}
    if placement.device_map is not None:
        options["device_map"] = placement.device_map
    model, report = huggingface.model_of(weights.readers, component.cls, component.folder, {}, options)
    # What is there too many transformers reports: old files of text encoders have tensors that no model wants today.
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise _no_fit(component, weights, f"tensor {lacking[0]!r} is not in the file ({len(lacking)} are missing)")
    return model.eval()


def _load_component(component: _Component, weights: Weights, placement: _Placement) -> Any:
    if component.of_diffusers:
        return _load_diffusers_model(component, weights, placement)
    transformers = _import("transformers", f"component {component.name!r}")
    if issubclass(component.cls, transformers.PreTrainedModel):
        return _load_transformers_model(component, weights, placement)
    raise errors.Unsupported(
        f"component {component.name!r} is a {component.cls.__name__}, a model of neither diffusers nor transformers: "
        "decompress it first"
    )


# ---- what model_index.json names -------------------------------------------------------------------------------------
#
# It comes with the weights, and importing a module runs it. diffusers 0.35 imports whatever is named there, newer ones
# a few libraries. Here everything is checked before diffusers sees it.


def _refuse_code(path: str, trusted: bool) -> None:
    if not trusted:
        raise errors.Unsupported(
            f"{path} is code that would run here, and comes with the pipeline: read it, and pass "
            "trust_remote_code=True if you trust it"
        )


def _pipeline_class(folder: str, index: Mapping[str, Any], pipe_class: Any, options: Mapping[str, Any]) -> Any:
    """The class of the pipeline, found as diffusers finds it; its from_pretrained knows the pipeline's optional
    components, which that of DiffusionPipeline would load from the folder although they are given."""
    diffusers, loading = _diffusers(), _diffusers(".pipelines.pipeline_loading_utils")
    path = os.path.join(folder, _PIPELINE)
    named, custom = index.get("_class_name"), options.get("custom_pipeline")
    if not isinstance(named, str) and not _are_names(named):
        raise errors.InvalidArgument(f"{path}: its _class_name {named!r} names no pipeline")
    code, class_name = loading._resolve_custom_pipeline_and_cls(folder, index, custom)
    if code is not None and custom is None:
        _refuse_code(code, bool(options.get("trust_remote_code")))
    if not issubclass(pipe_class, diffusers.DiffusionPipeline):
        pipe_class = diffusers.DiffusionPipeline  # an Auto class: what it stands for has the same components
    if code is None and pipe_class is diffusers.DiffusionPipeline:
        known = getattr(diffusers, named, None) if isinstance(named, str) else None
        if not (inspect.isclass(known) and issubclass(known, diffusers.DiffusionPipeline)):
            raise errors.Unsupported(
                f"{path}: the pipeline is a {named!r}, which diffusers {diffusers.__version__} does not have"
            )
    find = loading._get_pipeline_class
    passed = {
        "load_connected_pipeline": options.get("load_connected_pipeline", False),
        "cache_dir": options.get("cache_dir"),
        "revision": options.get("custom_revision"),
        "trust_remote_code": bool(options.get("trust_remote_code")),
    }
    passed = {name: value for name, value in passed.items() if name in inspect.signature(find).parameters}
    return find(pipe_class, config=index, custom_pipeline=code, class_name=class_name, **passed)


def _are_names(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def _read_index(folder: str, asked: PathLike) -> dict[str, Any]:
    index = _read_json(os.path.join(folder, _PIPELINE))
    if index is None:
        raise errors.InvalidArgument(
            f"{folder} has no {_PIPELINE}, so it is no pipeline directory. To put the weights of one component into a "
            f"pipeline, call load_pipeline({os.fsdecode(asked)!r}, config_dir=<pipeline directory>)"
        )
    return index


def _networks(
    folder: str, index: Mapping[str, Any], pipeline: Any, given: Mapping[str, Any], trusted: bool
) -> dict[str, _Component]:
    """The networks that the pipeline's class takes and model_index.json has, but those that the caller gives.
    Schedulers, tokenizers and the like are left to diffusers, and so is what the class does not take."""
    import torch

    networks: dict[str, _Component] = {}
    for name in pipeline._get_signature_keys(pipeline)[0]:
        entry = index.get(name, [None, None])
        if (name in given and given[name] is None) or (isinstance(entry, list) and entry[:1] == [None]):
            continue
        if not _are_names(entry):
            raise errors.InvalidArgument(
                f"{os.path.join(folder, _PIPELINE)}: component {name!r} is {entry!r} and no [library, class]"
            )
        # Of a given component too, since diffusers imports its library.
        cls = _component_class(folder, name, entry[0], entry[1], name in given, trusted)
        if cls is not None and name not in given and issubclass(cls, torch.nn.Module):
            networks[name] = _Component(name, cls, os.path.join(folder, name))
    return networks


def _component_class(folder: str, name: str, library: str, class_name: str, given: bool, trusted: bool) -> Any:
    """The class of a component, found as diffusers finds it; None where that is trusted code in its folder. Unsupported
    where diffusers must not, or cannot, import it."""
    pipelines, loading = _diffusers(".pipelines"), _diffusers(".pipelines.pipeline_loading_utils")
    path = os.path.join(folder, _PIPELINE)
    if re.fullmatch(r"[A-Za-z_][\w.]*", library, re.ASCII) is None:
        raise errors.InvalidArgument(f"{path}: component {name!r} is of {library!r}, which is no name of a library")
    ours = hasattr(pipelines, library)
    code = os.path.join(folder, name, library + ".py")
    if not ours and not given and os.path.isfile(code):
        _refuse_code(code, trusted)
        if any(file.endswith(OURS) for file in os.listdir(os.path.dirname(code))):
            raise errors.Unsupported(
                f"component {name!r} is a {class_name} of {code}, which diffusers loads by itself only: call "
                "bigsmall.install_hook() and then from_pretrained of the pipeline"
            )
        return None
    if not (ours or library in loading.LOADABLE_CLASSES or library in sys.modules):
        raise errors.Unsupported(
            f"{path}: component {name!r} is of {library!r}, which is none of the libraries that diffusers loads from "
            f"({', '.join(loading.LOADABLE_CLASSES)}): if it is your own module, import it first"
        )
    cls: Any = None
    missing: Exception | None = None
    try:
        cls, _ = loading.get_class_obj_and_candidates(
            library, class_name, loading.ALL_IMPORTABLE_CLASSES, pipelines, ours
        )
    except (AttributeError, ValueError) as error:  # the one or the other, by release
        missing = error
    if not inspect.isclass(cls):
        raise errors.Unsupported(
            f"{path}: component {name!r} is a {class_name} of {library}, which the installed version does not have"
        ) from missing
    return cls


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
    progress     : show a bar on standard error for each model of diffusers, where that is a terminal
    kwargs       : go to from_pretrained of the pipeline's class. A component given there is not loaded

    Where a folder has both, `.bs` files are preferred to `.safetensors`; components without `.bs` are loaded by
    diffusers. A model of diffusers gets its weights without a second copy of them in memory (128 MiB more where they
    are cast), and nothing is written to disk. Every tensor of such a model must be in the files, in its shape, and
    nothing else. On any error no pipeline is returned. Threads that call this at once load one after the other.

    No code of the pipeline runs unless `trust_remote_code=True` is given, and no library is imported because
    model_index.json names it, but for diffusers, transformers and what diffusers itself loads from.

    Raises FileMissing (nothing there, or a missing shard), InvalidArgument (no pipeline, weights that do not fit, a
    file that fits no component or several), Corrupt, Truncated or ChecksumMismatch (a damaged file), Unsupported
    (quantised models, other device maps, code that is not trusted, classes that diffusers does not have), WrongBase (a
    delta: restore it by bigsmall.decompress with its base first), and what diffusers raises.
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
    index = _read_index(folder, path_or_repo)
    file = None if config_dir is None else os.fsdecode(path_or_repo)
    options: dict[str, Any] = {"variant": variant, "device_map": device_map, **where}
    # diffusers is renaming this argument and warns where it gets the old name.
    renamed = hasattr(importlib.import_module("diffusers.utils"), "_resolve_dtype")
    options["dtype" if renamed else "torch_dtype"] = placement.dtype
    options = {name: value for name, value in options.items() if value is not None}
    with _loading:
        pipeline = _pipeline_class(folder, index, pipe_class, {**options, **kwargs})
        networks = _networks(folder, index, pipeline, kwargs, bool(kwargs.get("trust_remote_code")))
        given = _load_components(folder, networks, file, component, variant, placement)
        loads = pipeline if issubclass(pipe_class, diffusers.DiffusionPipeline) else pipe_class
        return loads.from_pretrained(folder, **given, **options, **kwargs)


def _load_components(
    folder: str,
    networks: dict[str, _Component],
    file: str | None,
    component: str | None,
    variant: str | None,
    placement: _Placement,
) -> dict[str, Any]:
    """The networks that come from `.bs` files. `file` replaces the weights of one of them."""
    with contextlib.ExitStack() as opened:
        todo: list[tuple[_Component, Weights]] = []
        if file is not None:
            own = opened.enter_context(Weights(_checkpoint.single(file)))
            todo.append((_matching(own, networks, component, variant, folder), own))
        # Everything is found and opened before the first tensor is decoded.
        for network in networks.values():
            if network not in [replaced for replaced, _ in todo]:
                chosen = _choose(network.folder, network.stem, variant)
                if chosen is not None:
                    todo.append((network, opened.enter_context(Weights(chosen))))
        return {network.name: _load_component(network, weights, placement) for network, weights in todo}


def _check_placement(placement: _Placement) -> None:
    import torch

    from bigsmall.torch import as_device

    if placement.device_map not in (None, "cpu", "cuda"):
        raise errors.Unsupported(
            f"device_map={placement.device_map!r}: load_pipeline knows None, 'cpu' and 'cuda'. For other placements "
            "call bigsmall.install_hook() and then from_pretrained of the pipeline"
        )
    as_device(placement.device_map)
    each = placement.dtype.values() if isinstance(placement.dtype, dict) else [placement.dtype]
    for dtype in each:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise errors.InvalidArgument(
                f"torch_dtype {dtype!r} is no floating-point torch.dtype, such as torch.float16"
            )


def _matching(
    weights: Weights, networks: Mapping[str, _Component], asked: str | None, variant: str | None, folder: str
) -> _Component:
    """The only component with exactly these tensors."""
    if asked is not None and asked not in networks:
        raise errors.InvalidArgument(
            f"{folder} has no network {asked!r} to replace, but {', '.join(networks) or 'none'}"
        )
    compared = networks if asked is None else {asked: networks[asked]}
    differences = {name: _compare(network, weights, variant) for name, network in compared.items()}
    fitting = [name for name, difference in differences.items() if difference is None]
    label = weights.checkpoint.label
    if len(fitting) == 1:
        return networks[fitting[0]]
    if fitting:
        raise errors.InvalidArgument(
            f"{label} fits several components of {folder}, which have the same tensor names and shapes: "
            f"{', '.join(fitting)}. Say which by component=..."
        )
    told = "; ".join(f"{name} ({networks[name].cls.__name__}): {what}" for name, what in differences.items())
    raise errors.InvalidArgument(f"{label} fits no component of {folder}. Compared: {told or 'it has no networks'}")


def _compare(component: _Component, weights: Weights, variant: str | None) -> str | None:
    """How a file differs from a component, in words; None where they fit."""
    if component.of_diffusers:
        if not os.path.isfile(os.path.join(component.folder, _CONFIG)):
            return f"{component.folder} has no {_CONFIG}"
        model = _empty_model(component, None)
        return _difference(_expected_shapes(model), _shapes_of(_named_as_in(model, weights)))
    # Names in files of transformers are not always those of the model: only another file tells.
    there = _choose(component.folder, component.stem, variant)
    for kind in dict.fromkeys((variant, None)):
        there = there or _checkpoint.find_source(component.folder, component.stem, kind)
    if there is None:
        return f"{component.folder} has no weights to compare with"
    stored = {name: shape for path in there.paths for name, shape in _header(path).items()}
    return _difference(stored, _shapes_of(weights.tensors))


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
        raise hub.not_found(path, "there is no such file or directory")
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
        if folder not in kwargs and any(name.endswith(OURS) for name in names)
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
    ours = {name for name in names if name.endswith(OURS)}
    others = {name for name in names - ours if not name.endswith((SOURCE, ".bin", ".msgpack", ".onnx", ".h5"))}
    chosen = {name for name in ours if variant is not None and _variant_of(name) == variant}
    plain = {name for name in ours if _variant_of(name) is None}
    return sorted(others | (chosen or plain or ours))


__all__ = [
    "compress_diffusion",
    "decompress_diffusion",
    "is_diffusion_model",
    "load_pipeline",
]
