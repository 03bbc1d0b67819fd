"""transformers, and the libraries around it: models from `.bs` files.

`from_pretrained` makes a transformers model and changes nothing else. `install_hook` makes the libraries' own functions
take `.bs` files, as if they were `.safetensors`. With both, tensors are decoded one by one, straight into the memory
that the model keeps; nothing is written to disk.

Measured with transformers 4.57 and 5.x; see `tests/py/test_huggingface.py`.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Union

from bigsmall import errors, hub
from bigsmall.integrations import _checkpoint
from bigsmall.integrations._checkpoint import Checkpoint
from bigsmall.integrations._patches import Change, Patches, Target
from bigsmall.reader import Reader
from bigsmall.streaming import TensorSlice, safe_open, torch_slices

Path = Union[str, "os.PathLike[str]"]

_STEM = "model"
# What tells transformers 4 from 5, whose ways of loading differ.
_BY_SHARD = "load_shard_file"
_SINGLE = _STEM + ".bs"


# ---- tensors that are decoded when the model takes them ------------------------------------------------------------


class LazyTensor(TensorSlice):
    """A tensor of a checkpoint for transformers: `[...]` and `.to()` decode it, anew each time."""

    def is_floating_point(self) -> bool:
        return bool(self.dtype.is_floating_point)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The whole tensor, then as torch.Tensor.to()."""
        return self[...].to(*args, **kwargs)


def _lazy_tensors(files: Sequence[str]) -> dict[str, Any]:
    """Name to LazyTensor for all tensors of `.bs` files; what else is among the files (of transformers'
    config.extra_files) comes as it is."""
    import transformers

    tensors: dict[str, Any] = {}
    for file in files:
        if file.endswith(".bs"):
            tensors.update(torch_slices(Reader(file), LazyTensor))
        else:
            tensors.update(transformers.modeling_utils.load_state_dict(file))
    return tensors


def _real_tensors(file: str, device: Any) -> dict[str, Any]:
    """All tensors of a `.bs` file, decoded; on the meta device their shapes and dtypes."""
    from bigsmall.torch import load

    return load(file, device if device is not None else "cpu")


# ---- a model without any hook --------------------------------------------------------------------------------------


def from_pretrained(
    path_or_repo: Path,
    model_class: Any,
    config_dir: Path | None = None,
    *,
    base: Path | None = None,
    variant: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    stream: bool = False,
    device: Any = None,
    resident: str | None = None,
    **kwargs: Any,
) -> Any:
    """A transformers model with the weights of a `.bs` file, a directory of them, or a repository on the Hub.

    model_class : a class of transformers: AutoModel, AutoModelForCausalLM, LlamaForCausalLM, ...
    config_dir  : directory or repository with config.json; None for where the weights are
    base        : of a delta: `.safetensors`, `.bs`, a directory or repository
    variant     : the weights of that name: "fp16" for model.fp16.bs or the shards of that variant. Not with `stream`
    stream      : of a repository, decode as the bytes come, and keep no `.bs` file on disk
    device      : where the whole model goes, such as "cuda": device_map={"": device}
    resident    : "compressed" keeps linear layers and embeddings compressed in the memory of a GPU and decodes each
                  just before its product, for about 0.7 of the memory; results are the ordinary model's, bit for bit.
                  `device` is a GPU then, None for the current one; `dtype` has to be the checkpoint's;
                  max_scratch_bytes is that of bigsmall.compressed.resident_model; other kwargs are refused
    subfolder, revision, token, cache_dir, local_files_only : as in transformers
    kwargs      : for the from_pretrained of model_class: dtype, device_map, output_loading_info, ... Those that are
                  attributes of the configuration change it

    The weights go into the model one by one: no file is written, and the peak of memory is the model and little more.
    Which weights the model lacks or has too many transformers reports, as it does for other checkpoints.

    Raises what `bigsmall.hub.local_path` raises, Corrupt, Truncated, ChecksumMismatch or WrongBase for bad files, and
    what transformers raises.
    """
    _transformers()
    if resident is not None:
        return _resident(
            resident,
            path_or_repo,
            model_class,
            config_dir,
            device,
            base,
            variant,
            stream,
            subfolder,
            kwargs,
            {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only},
        )
    if device is not None:
        if kwargs.get("device_map") is not None:
            raise errors.InvalidArgument("device and device_map both say where the model goes: leave one out")
        kwargs["device_map"] = {"": device}
    for option in ("state_dict", "gguf_file", "weights_only"):
        if kwargs.get(option) is not None:
            raise errors.InvalidArgument(
                f"{option} is not for `.bs` files: call from_pretrained of transformers with it"
            )
    if kwargs.pop("use_safetensors", None) is False:
        raise errors.InvalidArgument("use_safetensors=False asks for pickles: call from_pretrained of transformers")
    if stream and variant is not None:
        raise errors.InvalidArgument("stream=True reads the plain weights: leave it out to load a variant")
    where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    if config_dir is None and not local_files_only and hub.is_repo_id(path_or_repo):
        # So that weights and configuration are of one commit, also where somebody pushes in between.
        revision = hub.commit_of(path_or_repo, revision, token)
    if stream:
        readers = [hub.open_reader(path_or_repo, base=base, subfolder=subfolder, revision=revision, **where)]
    else:
        path = hub.local_path(path_or_repo, subfolder=subfolder, revision=revision, **where)
        base_path = None if base is None else hub.base_of(base, **where)
        if variant is None:
            readers = [Reader(path, base_path)]
        else:
            found = _checkpoint.find(path, _STEM, variant)
            if found is None:
                name = _checkpoint.file_name(_STEM, variant, ".bs")
                raise hub.not_found(os.path.join(path, name), f"there are no weights of the variant {variant!r}")
            _checkpoint.check(found)
            readers = [Reader(file, base_path) for file in found.paths]
    # Beside the weights it is in the same folder and of the same revision.
    source: dict[str, Any] = dict(where) if config_dir is not None else {**where, "subfolder": subfolder}
    if config_dir is None and revision is not None:
        source["revision"] = revision
    config_source = _config_source(path_or_repo, config_dir, source.get("subfolder", ""))
    return model_of(readers, model_class, config_source, source, kwargs)


def _resident(
    resident: str,
    path_or_repo: Path,
    model_class: Any,
    config_dir: Path | None,
    device: Any,
    base: Path | None,
    variant: str | None,
    stream: bool,
    subfolder: str,
    kwargs: dict[str, Any],
    where: dict[str, Any],
) -> Any:
    """from_pretrained with weights that stay compressed on a GPU."""
    import torch

    from bigsmall import compressed, streaming_model

    if resident != "compressed":
        raise errors.InvalidArgument(f'resident is {resident!r}: it may be "compressed", or None')
    if variant is not None or stream or base is not None:
        raise errors.InvalidArgument("resident='compressed' goes with neither variant nor stream nor base")
    known = {"max_scratch_bytes"} & kwargs.keys()
    options = {name: kwargs.pop(name) for name in known}
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
    if kwargs:
        raise errors.InvalidArgument(f"resident='compressed' does not go with {', '.join(sorted(kwargs))}")
    place = torch.device("cuda" if device is None else device)
    if place.type != "cuda":
        raise errors.InvalidArgument(f"resident='compressed' keeps weights in the memory of a GPU, not on {place}")
    path = hub.local_path(path_or_repo, subfolder=subfolder, **where)
    source = dict(where) if config_dir is not None else {**where, "subfolder": subfolder}
    directory = _config_source(path_or_repo, config_dir, source.get("subfolder", ""))
    config = streaming_model.read_config(directory, source)
    model = compressed.resident_model(path, config, directory, place, model_class=model_class, dtype=dtype, **options)
    streaming_model.read_generation_config(model, directory, source)
    model.name_or_path = model.config._name_or_path = str(directory)
    return model


def model_of(
    readers: Sequence[Reader], model_class: Any, config_source: str, source: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    """The same from the opened files of one model. Its config.json and generation_config.json are in `config_source`, a
    directory or repository, to which `source` are the Hub's options."""
    transformers = _transformers()
    trust = {"trust_remote_code": kwargs["trust_remote_code"]} if "trust_remote_code" in kwargs else {}
    code = {"code_revision": kwargs.pop("code_revision")} if "code_revision" in kwargs else {}
    config = kwargs.pop("config", None)
    if config is None or isinstance(config, (str, os.PathLike)):
        config_class = getattr(model_class, "config_class", None)
        reads = transformers.AutoConfig if config_class is None else config_class
        config = reads.from_pretrained(config or config_source, **source, **(trust if config_class is None else {}))
    for name in [name for name in kwargs if name not in ("dtype", "torch_dtype") and hasattr(config, name)]:
        setattr(config, name, kwargs.pop(name))
    concrete = _concrete_class(model_class, config, config_source, {**source, **code}, trust)
    if concrete is not model_class:
        kwargs.pop("trust_remote_code", None)
        config = _config_for(concrete, config)
    places = kwargs.get("device_map")
    if hasattr(transformers.modeling_utils, _BY_SHARD) and isinstance(places, dict) and "disk" in places.values():
        raise errors.Unsupported(
            f"{readers[0].path}: transformers {transformers.__version__} offloads to disk only what it reads itself: "
            "use bigsmall.install_hook() and from_pretrained of the model's class"
        )
    _refuse_torchao(config, readers[0].path)
    tensors: dict[str, Any] = {}
    for reader in readers:
        tensors.update(_decoded(reader) if _zero3() else torch_slices(reader, LazyTensor, _gpu_of(places)))
    loaded = concrete.from_pretrained(None, config=config, state_dict=tensors, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config._name_or_path = str(config_source)
    if "generation_config" not in kwargs and model.can_generate():
        with contextlib.suppress(OSError):  # there may be none
            model.generation_config = transformers.GenerationConfig.from_pretrained(config_source, **source)
    return loaded


def _transformers() -> Any:
    try:
        import transformers.modeling_utils
    except ModuleNotFoundError as missing:
        if missing.name != "transformers":
            raise
        raise ModuleNotFoundError(
            "this needs transformers, which is not installed: pip install bigsmall[hf]", name="transformers"
        ) from missing
    return transformers


def _zero3() -> bool:
    """Whether DeepSpeed spreads the parameters over processes: then transformers wants real tensors."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def _gpu_of(places: Any) -> Any:
    """The GPU that a device_map has the whole model on, where it decodes the tensors; else the CPU."""
    import torch

    if isinstance(places, dict):
        places = places.get("") if len(places) == 1 else None
    try:
        device = torch.device("cpu" if places is None else places)
    except (RuntimeError, TypeError):  # "auto" and the like, which transformers makes a dict of later
        return "cpu"
    return device if device.type == "cuda" else "cpu"


def _decoded(reader: Reader) -> dict[str, Any]:
    import torch

    from bigsmall.torch import read

    return read(reader, reader.tensors, torch.device("cpu"))


def _config_source(path_or_repo: Path, config_dir: Path | None, subfolder: str) -> str:
    """Where transformers finds config.json: a directory or repository."""
    source = path_or_repo if config_dir is None else config_dir
    if hub.is_repo_id(source):
        return hub.repo_id(source)
    path = os.fsdecode(source)
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    if not os.path.isfile(os.path.join(folder, subfolder, "config.json")):
        missing = os.path.join(folder, subfolder, "config.json")
        raise errors.FileMissing(
            errno.ENOENT, f"{missing} is missing: name the directory that has the model's as config_dir", missing
        )
    return folder


def _config_for(model_class: Any, config: Any) -> Any:
    """The configuration that the class takes: of one that has several parts, perhaps that of the text model."""
    part = (getattr(config, "sub_configs", None) or {}).get("text_config")
    if part is None or getattr(model_class, "config_class", None) != part or isinstance(config, part):
        return config
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    return text


def _concrete_class(
    model_class: Any, config: Any, config_source: str, source: dict[str, Any], trust: dict[str, Any]
) -> Any:
    """The class that an Auto class stands for."""
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        if getattr(model_class, "config_class", None) is None:
            raise errors.InvalidArgument(f"{model_class!r} is no class of a model: name one, or an Auto class")
        return model_class
    remote = (getattr(config, "auto_map", None) or {}).get(model_class.__name__)
    if remote is not None and trust.get("trust_remote_code"):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(remote, config_source, **source)
    if type(config) not in mapping:
        raise errors.InvalidArgument(
            f"{model_class.__name__} has no model for the configuration {type(config).__name__} of {config_source}"
        )
    found = mapping[type(config)]
    if isinstance(found, (list, tuple)):
        named = {candidate.__name__: candidate for candidate in found}
        found = next((named[name] for name in config.architectures or () if name in named), found[0])
    return found


# ---- hooks: where transformers looks for weights -------------------------------------------------------------------


_Resolved = tuple[list[str], "dict[str, Any] | None"]  # as _get_resolved_checkpoint_files returns it


def _resolved(checkpoint: Checkpoint) -> _Resolved:
    """The files and, of shards, what transformers' get_checkpoint_shard_files makes of an index."""
    if checkpoint.weight_map is None:
        return checkpoint.paths, None
    _checkpoint.check(checkpoint)
    names = {"all_checkpoint_keys": list(checkpoint.weight_map), "weight_map": dict(checkpoint.weight_map)}
    return checkpoint.paths, {**(checkpoint.metadata or {}), **names}


def _hub_weights(
    repo: str, variant: str | None, options: dict[str, Any], missing: OSError | None = None
) -> _Resolved | None:
    """The `.bs` files of a repository, in the Hub's cache; None where it has none, or where asking for them fails after
    the same failed for others (`missing`)."""
    from transformers.utils.hub import cached_file, cached_files

    quiet = {"_raise_exceptions_for_gated_repo": False, "_raise_exceptions_for_missing_entries": False}
    # Without network or access the original's error says it better.
    with contextlib.suppress(OSError) if missing is not None else contextlib.nullcontext():
        single = _checkpoint.file_name(_STEM, variant, ".bs")
        path = cached_file(repo, hub.INDEX_NAME, **options, **quiet)
        index = None if path is None else hub.read_index(path)
        weight_map = (
            None if index is None else _checkpoint.weight_map(index, f"{repo}/{hub.INDEX_NAME}", _STEM, variant)
        )
        if not weight_map:
            file = cached_file(repo, single, **options, **quiet)
            return None if file is None else ([file], None)
    if path is None or not weight_map or index is None:
        return None
    shards = sorted(set(weight_map.values()))
    files = cached_files(repo, shards, **options, **quiet) or []
    if len(files) < len(shards):
        lacking = ", ".join(sorted(set(shards) - {os.path.basename(file) for file in files}))
        raise errors.FileMissing(
            errno.ENOENT, f"{repo}: {hub.INDEX_NAME} lists {lacking}, which the repository does not have", repo
        )
    return _resolved(Checkpoint(list(files), path, weight_map, index["metadata"]))


_DOWNLOAD_OPTIONS = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "user_agent",
    "revision",
    "subfolder",
    "tqdm_class",
)


def _wrap_resolve(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of _get_resolved_checkpoint_files: `.bs` files where there are no safetensors of that name."""
    signature = inspect.signature(original)

    def resolve(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        name, safe = call.get("pretrained_model_name_or_path"), call.get("use_safetensors")
        other = ("gguf_file", "transformers_explicit_filename", "from_tf", "from_flax")
        if name is None or safe is False or any(call.get(option) for option in other):
            return original(*args, **kwargs)
        name, variant = str(name), call.get("variant")
        given = {**call, **(call.get("download_kwargs") or {})}
        options = {option: given[option] for option in _DOWNLOAD_OPTIONS if given.get(option) is not None}
        options["_commit_hash"] = given.get("commit_hash")
        suffixes = (".safetensors", ".safetensors.index.json")
        safetensors = [_checkpoint.file_name(_STEM, variant, suffix) for suffix in suffixes]
        if os.path.isdir(name):
            folder = os.path.join(name, options.get("subfolder", ""))
            if any(os.path.isfile(os.path.join(folder, file)) for file in safetensors):
                return original(*args, **kwargs)
            found = _checkpoint.find(folder, _STEM, variant)
            return original(*args, **kwargs) if found is None else _resolved(found)
        if os.path.isfile(os.path.join(options.get("subfolder", ""), name)):
            return original(*args, **kwargs)
        if safe:  # the original would now ask the Hub's converter for safetensors
            from transformers.utils.hub import cached_file

            quiet = {"_raise_exceptions_for_gated_repo": False, "_raise_exceptions_for_missing_entries": False}
            if all(cached_file(name, file, **options, **quiet) is None for file in safetensors):
                return _hub_weights(name, variant, options) or original(*args, **kwargs)
            return original(*args, **kwargs)
        # The original first, so that a repository of another kind sees the same requests as ever.
        try:
            theirs = original(*args, **kwargs)
        except OSError as missing:
            ours = _hub_weights(name, variant, options, missing)
            if ours is None:
                raise
            return ours
        if theirs[0] and theirs[0][0] is None:  # so transformers 4 says offline that it has found nothing
            return _hub_weights(name, variant, options) or theirs
        return theirs

    return resolve


def _has_bs(files: Sequence[str] | None) -> bool:
    return any(str(file).endswith(".bs") for file in files or ())


def _wrap_load_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of PreTrainedModel._load_pretrained_model in transformers 5: tensors that are decoded as they are taken."""
    signature = inspect.signature(original)

    def load_pretrained_model(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        files = call.arguments.get("checkpoint_files") or []
        if call.arguments.get("state_dict") is not None or not _has_bs(files):
            return original(*args, **kwargs)
        _refuse_torchao(call.arguments["model"].config, files[0])
        if not _zero3():  # else it calls load_state_dict
            call.arguments["state_dict"] = _lazy_tensors(files)
        return original(*call.args, **call.kwargs)

    return load_pretrained_model


def _refuse_torchao(config: Any, path: str) -> None:
    """Unsupported for a checkpoint that torchao quantised: what its tensors are stands in safetensors metadata that
    transformers reads by itself."""
    quantization = getattr(config, "quantization_config", None)
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", "")
    )
    if str(getattr(method, "value", method)) == "torchao":
        raise errors.Unsupported(
            f"{path}: transformers loads models that torchao quantised from safetensors only: restore them with "
            "`bigsmall decompress` first"
        )


def _wrap_load_shard(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of load_shard_file in transformers 4. Its arguments begin with the file and, where that is "", the tensors."""

    def load_shard_file(args: tuple[Any, ...]) -> Any:
        file = args[0]
        if not file or not _has_bs([file]):
            return original(args)
        if _zero3():
            return original(args)
        return original(("", _lazy_tensors([file]), *args[2:]))

    return load_shard_file


def _wrap_load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of transformers' load_state_dict."""
    signature = inspect.signature(original)

    def load_state_dict(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        file = os.fspath(call.arguments["checkpoint_file"])
        if not _has_bs([file]):
            return original(*args, **kwargs)
        return _real_tensors(file, call.arguments.get("map_location"))

    return load_state_dict


# ---- hooks of other libraries --------------------------------------------------------------------------------------


def _wrap_safe_open(original: type[Any]) -> type[Any]:
    """Of safetensors.safe_open, which is a class of its own kind that cannot be derived from."""

    class Dispatch(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, (original, safe_open))

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            named = args[0] if args else kwargs.get("filename")
            ours = _hook.active and isinstance(named, (str, os.PathLike)) and _has_bs([os.fsdecode(named)])
            return (safe_open if ours else original)(*args, **kwargs)

        def __getattr__(cls, name: str) -> Any:
            return getattr(original, name)

    return Dispatch("safe_open", (), {"__doc__": original.__doc__, "__module__": original.__module__})


def _wrap_accelerate_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of accelerate's load_state_dict(checkpoint_file, device_map=None)."""
    signature = inspect.signature(original)

    def load_state_dict(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        file = os.fspath(call["checkpoint_file"])
        if not _has_bs([file]):
            return original(*args, **kwargs)
        devices = set((call.get("device_map") or {}).values())
        device = devices.pop() if len(devices) == 1 else "cpu"
        return _real_tensors(file, "cpu" if device == "disk" else device)

    return load_state_dict


def _wrap_accelerate_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of accelerate's load_checkpoint_in_model: a folder that holds model.bs and no index stands for that file, and
    shards must hold what their index says."""
    signature = inspect.signature(original)

    def load_checkpoint_in_model(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        folder = call.arguments["checkpoint"]
        if os.path.isdir(folder):
            names = os.listdir(folder)
            others = ("model.safetensors", "pytorch_model.bin")
            if _SINGLE in names and not any(name in others or name.endswith(".index.json") for name in names):
                call.arguments["checkpoint"] = os.path.join(folder, _SINGLE)
            if not any(name in others for name in names):
                _checkpoint.check_folder(folder)
        elif os.path.basename(folder) == hub.INDEX_NAME:
            _checkpoint.check_folder(os.path.dirname(folder))
        return original(*call.args, **call.kwargs)

    return load_checkpoint_in_model


def _wrap_module_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of sentence-transformers' Module.load_torch_weights, by which modules beside the transformer load theirs."""
    signature = inspect.signature(original)

    def load_torch_weights(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except ValueError:
            call = signature.bind(*args, **kwargs).arguments
            cls, name, model = call.pop("cls"), call.pop("model_name_or_path"), call.pop("model", None)
            file = cls.load_file_path(name, filename=_SINGLE, **call)
            if file is None:
                raise
        tensors = _real_tensors(file, "cpu")
        if model is None:
            return tensors
        model.load_state_dict(tensors)
        return model

    return load_torch_weights


# ---- the hook ------------------------------------------------------------------------------------------------------


def _all_of(**wraps: Callable[[Any], Any]) -> Callable[[ModuleType], list[Change]]:
    """A plan for a module that is known to have these names; "__" stands for a dot."""
    return lambda module: [Change(name.replace("__", "."), wrap) for name, wrap in wraps.items()]


def _where_there(library: str, instead: str, **wraps: Callable[[Any], Any]) -> Callable[[ModuleType], list[Change]]:
    """A plan for a module of a library beside the main one: without these names it is left alone, with a warning."""

    def plan(module: ModuleType) -> list[Change]:
        for name in wraps:
            owner: Any = module
            for step in name.split("__"):
                owner = getattr(owner, step, None)
            if owner is None:
                warnings.warn(
                    f"bigsmall.install_hook() does not know this version of {library} ({_version(library)}), "
                    f"which therefore does not load .bs files by itself; {instead}",
                    stacklevel=2,
                )
                return []
        return _all_of(**wraps)(module)

    return plan


def _if_there(**wraps: Callable[[Any], Any]) -> Callable[[ModuleType], list[Change]]:
    """A plan for names that a module may have imported from another one that is changed too."""
    return lambda module: [change for change in _all_of(**wraps)(module) if hasattr(module, change.attribute)]


def _version(library: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "unknown"


def _transformers_plan(module: ModuleType) -> list[Change]:
    model = getattr(module, "PreTrainedModel", None)
    load = inspect.getattr_static(model, "_load_pretrained_model", None)
    function = getattr(load, "__func__", load)
    known = (
        callable(function)
        and _takes(getattr(module, "_get_resolved_checkpoint_files", None), "pretrained_model_name_or_path", "variant")
        and _takes(getattr(module, "load_state_dict", None), "checkpoint_file", "map_location")
        and _takes(function, "state_dict", "checkpoint_files")
    )
    by_shard = hasattr(module, _BY_SHARD)
    if not known or not (by_shard or _takes(function, "load_config")):
        raise errors.Unsupported(
            f"bigsmall.install_hook() does not know this version of transformers ({_version('transformers')}), which "
            "loads weights in another way, or another tool has changed how it does: use "
            "bigsmall.integrations.huggingface.from_pretrained, or a newer bigsmall"
        )
    changes = [
        Change("_get_resolved_checkpoint_files", _wrap_resolve),
        Change("load_state_dict", _wrap_load_state_dict),
    ]
    if by_shard:
        changes.append(Change(_BY_SHARD, _wrap_load_shard))
    else:
        changes.append(Change("PreTrainedModel._load_pretrained_model", _wrap_load_pretrained))
    return [*changes, *_if_there(safe_open=_wrap_safe_open)(module)]


def _takes(function: Any, *names: str) -> bool:
    return callable(function) and set(names) <= set(inspect.signature(function).parameters)


def _targets() -> list[Target]:
    from bigsmall.integrations._diffusers_hook import diffusers_patches

    diffusers = []
    for module, wraps in diffusers_patches().items():
        if module == "diffusers.models.modeling_utils":
            plan = _where_there("diffusers", "bigsmall.integrations.diffusion.load_pipeline does", **wraps)
        else:
            plan = _if_there(**wraps)
        diffusers.append(Target(module, plan))
    st = _where_there(
        "sentence-transformers",
        "bigsmall decompress restores its modules",
        Module__load_torch_weights=_wrap_module_weights,
    )
    accelerate = "bigsmall.load gives the tensors"
    return [
        Target("safetensors", _all_of(safe_open=_wrap_safe_open)),
        Target("safetensors.torch", _if_there(safe_open=_wrap_safe_open)),
        Target("safetensors.numpy", _if_there(safe_open=_wrap_safe_open)),
        Target("transformers.modeling_utils", _transformers_plan),
        Target(
            "transformers.modeling_layers",
            _if_there(_get_resolved_checkpoint_files=_wrap_resolve, safe_open=_wrap_safe_open),
        ),
        Target(
            "accelerate.utils.modeling",
            _where_there(
                "accelerate",
                accelerate,
                load_state_dict=_wrap_accelerate_load,
                load_checkpoint_in_model=_wrap_accelerate_checkpoint,
            ),
        ),
        Target(
            "accelerate.utils",
            _if_there(load_state_dict=_wrap_accelerate_load, load_checkpoint_in_model=_wrap_accelerate_checkpoint),
        ),
        Target("accelerate.big_modeling", _if_there(load_checkpoint_in_model=_wrap_accelerate_checkpoint)),
        Target("accelerate", _if_there(load_checkpoint_in_model=_wrap_accelerate_checkpoint)),
        Target("sentence_transformers.base.modules.module", st),  # since 6.0
        Target("sentence_transformers.models.Module", st),  # before
        *diffusers,
    ]


_hook = Patches(_targets)


def install_hook() -> None:
    """Makes other libraries take `.bs` files, in this process, until `uninstall_hook()`:

    transformers          : from_pretrained of any class, for a directory or repository with `model.bs`, or with shards
                            and bigsmall.index.json. Safetensors files of the same name go first
    safetensors           : safe_open, safetensors.torch.load_file and load_model, by the suffix `.bs`
    accelerate            : load_checkpoint_and_dispatch, load_checkpoint_in_model
    sentence-transformers : the transformer and the modules beside it
    diffusers             : from_pretrained of models and pipelines

    Other checkpoints load as before, with the same requests to the Hub. Nothing is imported by this: a library is
    changed when it is imported. Calling it twice is allowed. A process started by spawn needs a call of its own.

    Raises Unsupported, and changes nothing, where this version of transformers loads weights in a way that is not known
    here; where that is imported later, importing it raises.
    """
    _hook.install()


def uninstall_hook() -> None:
    """Puts everything back as it was before `install_hook()`."""
    _hook.uninstall()
