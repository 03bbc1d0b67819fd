"""`StreamingModel`: a causal language model of transformers that need not fit into memory. Needs transformers 4.57 or
newer."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import os
import re
import threading
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Callable, NamedTuple

from bigsmall import errors, hub
from bigsmall.layers import LAYER_WORDS, LayerName, StreamingLoader, layer_of, own_pages
from bigsmall.reader import TensorInfo

# isort: split
import torch  # after layers, which says what to do where it is missing

_NAMES_SHOWN = 5

_NOT_INSTALLED = "StreamingModel needs transformers, which is not installed: pip install bigsmall[hf]"


class Place(NamedTuple):
    """Where a tensor of the checkpoint goes: a parameter or buffer `name` of a module, `stand_in` while it is away."""

    source: TensorInfo
    module: torch.nn.Module
    name: str
    stand_in: torch.Tensor

    def fill(self, tensor: torch.Tensor) -> None:
        if isinstance(self.stand_in, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, requires_grad=False)
        setattr(self.module, self.name, tensor)

    def empty(self) -> None:
        setattr(self.module, self.name, self.stand_in)


class StreamingModel:
    """A causal language model of transformers whose layers come from a `.bs` file as they are needed.

        model = StreamingModel.from_pretrained("model-bs")
        tokens = model.generate(**tokenizer("Once upon", return_tensors="pt"), max_new_tokens=20)

    Embeddings, final norm and head stay in memory. Each layer is decoded just before it runs, on a thread of its own
    while the layer before it runs, and dropped right after: two layers are in memory at a time.

    The weights are those of the ordinary model, bit for bit. So are the outputs where its weights are as well aligned
    in memory as these, to 64 bytes. Those that transformers maps from a `.safetensors` file may be aligned to their
    elements only, for which some kernels add in another order: then last digits may differ.

    That has its price: every forward pass decodes all layers, and so does every token that `generate` makes. Larger
    batches and longer prompts share it; single tokens take as long as loading the model.

    model  : the transformers model itself; its layers have data only while they run. It is for inference only. Whoever
             calls it directly must not do so from two threads at once: it does not wait for other calls
    loader : the StreamingLoader that the layers come from

    Made by `from_pretrained`. Calls from several threads wait for each other. Works as a context manager, which closes
    the files at its end.
    """

    def __init__(self, model: Any, loader: StreamingLoader, layers: Mapping[LayerName, Sequence[Place]]) -> None:
        self.model = model
        self.loader = loader
        self._layers = {layer: list(layers[layer]) for layer in sorted(layers)}
        self._casts = {place.source.name: place.stand_in.dtype for places in layers.values() for place in places}
        self._in_memory: LayerName | None = None
        self._coming: Generator[tuple[str, dict[str, torch.Tensor]], None, None] | None = None
        self._expected: LayerName | None = None
        self._lock = threading.RLock()
        self._process = os.getpid()
        for layer in self._layers:
            module = model.get_submodule(str(layer))
            module.register_forward_pre_hook(functools.partial(self._before, layer))
            module.register_forward_hook(self._after, always_call=True)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        config_dir: str | os.PathLike[str] | None = None,
        *,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        base: str | os.PathLike[str] | None = None,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        workers: int | None = None,
    ) -> StreamingModel:
        """Opens a model; its layers are not loaded yet.

        path_or_repo : `.bs` file or directory, or the id of a Hub repo, whose layers are fetched as they are needed
        config_dir   : directory or repo with config.json; None where it is beside the weights
        device       : where the model runs; None for CUDA where there is a device, else the CPU
        dtype        : of the parameters, such as torch.bfloat16 or "bfloat16"; None or "auto" for the one that
                       config.json names, or else that of the weights
        base         : the base model where the file is a delta
        workers      : threads of a decode, None for all available

        subfolder, revision, token, cache_dir and local_files_only are those of transformers' `from_pretrained`.

        Raises what `StreamingLoader` raises; FileMissing where there is no config.json; NotFound where a parameter of
        the model is not in the checkpoint; InvalidArgument where a tensor has another shape; Unsupported for quantised
        models, for those whose tensors transformers fuses or reshapes on loading (most mixtures of experts), for those
        without layers that can be told by their names (see StreamingLoader), and for those that need code of their own
        repository, which is never run.
        """
        where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        loader = StreamingLoader(
            path_or_repo, device, base=base, subfolder=subfolder, revision=revision, workers=workers, **where
        )
        try:
            if config_dir is None:
                where.update(subfolder=subfolder, revision=revision)
            directory = _directory(path_or_repo if config_dir is None else config_dir)
            config = read_config(directory, where)
            model = skeleton(config, dtype_of(dtype, config, loader.tensors), directory)
            layers = _load_but_layers(model, loader)
            read_generation_config(model, directory, where)
            return cls(model, loader, layers)
        except BaseException:
            loader.close()
            raise

    # ---- use ----

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The defaults of `generate`."""
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the model runs, and its inputs have to be."""
        return self.loader.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass, without gradients."""
        return self._run(self.model, *args, **kwargs)

    __call__ = forward

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`. Every token decodes all layers."""
        return self._run(self.model.generate, *args, **kwargs)

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._process != os.getpid():  # a child of fork(), where the lock's owner may not exist
            self._lock, self._process = threading.RLock(), os.getpid()
        with self._lock, torch.no_grad():
            try:
                return function(*args, **kwargs)
            finally:
                self._drop_layer()
                self._stop()

    # ---- layers ----

    def _before(self, layer: LayerName, module: torch.nn.Module, args: Any) -> None:
        self._drop_layer()
        if self._coming is None or self._expected != layer:
            self._stop()
            order = [other for other in self._layers if other.stack == layer.stack and other.number >= layer.number]
            self._coming = self.loader.iter_groups(
                [(str(other), [place.source for place in self._layers[other]]) for other in order], self._cast
            )
        try:
            _, tensors = next(self._coming)
        except BaseException:
            self._stop()
            raise
        self._in_memory = layer
        for place in self._layers[layer]:
            place.fill(tensors.pop(place.source.name))
        self._expected = self._following(layer)

    def _following(self, layer: LayerName) -> LayerName | None:
        rest = (other for other in self._layers if other.stack == layer.stack and other.number > layer.number)
        return next(rest, None)

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._drop_layer()

    def _drop_layer(self) -> None:
        if self._in_memory is not None:
            for place in self._layers[self._in_memory]:
                place.empty()
            self._in_memory = None

    def _stop(self) -> None:
        coming, self._coming, self._expected = self._coming, None, None
        if coming is not None:
            coming.close()

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return _as_dtype(tensor, self._casts[name])

    # ---- lifetime ----

    def close(self) -> None:
        """Closes the files; the model can run no more. Closing twice is allowed."""
        self.loader.close()

    def __enter__(self) -> StreamingModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<bigsmall.StreamingModel {type(self.model).__name__} {self.loader!r}>"


# ---- making the model ------------------------------------------------------------------------------------------------


def _directory(path_or_repo: str | os.PathLike[str]) -> str:
    """The folder or repo of a file, folder or repo, as transformers takes it."""
    path = os.fsdecode(path_or_repo)
    if hub.is_repo_id(path_or_repo):
        return path.removeprefix("hf://")
    return os.path.dirname(path) or "." if os.path.isfile(path) else path


def read_config(where: str, options: Mapping[str, Any]) -> Any:
    """config.json of a directory or repository, of a model that needs no code of its own."""
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as missing:
        if missing.name != "transformers":
            raise
        raise ModuleNotFoundError(_NOT_INSTALLED, name="transformers") from missing
    if os.path.isdir(where):
        path = os.path.join(where, options.get("subfolder", ""), "config.json")
        if not os.path.isfile(path):
            raise errors.FileMissing(
                errno.ENOENT, f"{path}: there is no such file; name the directory that has it as config_dir", path
            )
    with _no_custom_code(where):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    if getattr(config, "quantization_config", None) is not None:
        raise errors.Unsupported(f"{where}: quantised models are not for StreamingModel or resident='compressed'")
    return config


@contextlib.contextmanager
def _no_custom_code(where: str) -> Generator[None, None, None]:
    """Around calls with trust_remote_code=False: with None, transformers would ask on the terminal."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise errors.Unsupported(
            f"{where}: the model needs Python code of its repository, which StreamingModel does not run; a newer "
            "transformers may have the model itself"
        ) from error


def read_generation_config(model: Any, where: str, options: Mapping[str, Any]) -> None:
    """Gives the model its defaults of `generate`, where there are some."""
    from transformers import GenerationConfig

    # Without the file it is made of the model's configuration, which the model has done.
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(where, **options)


def dtype_of(wanted: str | torch.dtype | None, config: Any, tensors: Sequence[TensorInfo]) -> torch.dtype:
    """The dtype that transformers makes the model in, with "auto" where none is named."""
    dtype: Any = wanted
    if dtype is None or dtype == "auto":
        dtype = getattr(config, "dtype", None)
        if dtype is None:
            stored = (getattr(torch, tensor.dtype.name, None) for tensor in tensors)
            dtype = next((one for one in stored if one is not None and one.is_floating_point), torch.float32)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise errors.InvalidArgument(f'dtype {wanted!r} is no floating-point type of torch, such as "bfloat16"')
    return dtype


def skeleton(config: Any, dtype: torch.dtype, where: str, model_class: Any = None) -> Any:
    """The model with all parameters on the meta device; model_class is an Auto class or a class of models, None for
    AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM

    parts = [getattr(config, name) for name in getattr(config, "sub_configs", {})]
    for part in [config, *(part for part in parts if part is not None)]:
        part.dtype = dtype
    try:
        # transformers 4, which leaves buffers as the constructors make them.
        from transformers.integrations.accelerate import init_empty_weights as on_meta
    except ImportError:
        # transformers 5, which makes buffers anew after loading.
        on_meta = functools.partial(torch.device, "meta")
    with _no_custom_code(where), torch.device("cpu"), on_meta():  # whatever torch.set_default_device says
        if model_class is None or hasattr(model_class, "_model_mapping"):
            model = (model_class or AutoModelForCausalLM).from_config(config, dtype=dtype, trust_remote_code=False)
        else:
            model = model_class._from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _load_but_layers(model: Any, loader: StreamingLoader) -> dict[LayerName, list[Place]]:
    """Gives the model everything but the parameters of its layers. Returns where those go."""
    empty = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if torch.is_tensor(tensor)}
    layers_of: dict[int, set[LayerName | None]] = {}
    for name, tensor in empty.items():
        layers_of.setdefault(id(tensor), set()).add(layer_of(name))

    def streamed_layer(name: str) -> LayerName | None:
        # What several layers share, or a layer and the rest, stays in memory.
        layer = layer_of(name)
        return layer if layer and layers_of[id(empty[name])] == {layer} and _runs_by_itself(model, layer) else None

    if not any(map(streamed_layer, empty)):
        raise errors.Unsupported(
            f"{loader.path}: StreamingModel does not run {type(model).__name__}: it has no layers that are modules "
            f"with a number after one of {', '.join(LAYER_WORDS)} in their names, so all of it would be in memory; "
            "bigsmall.integrations.huggingface.from_pretrained loads it whole"
        )
    sources = sources_of(model, empty, loader)
    layers: dict[LayerName, list[Place]] = {}
    fixed: list[Place] = []
    for name, place in places_of(model, sources, empty, loader).items():
        layer = streamed_layer(name)
        if layer is not None:
            layers.setdefault(layer, []).append(place)
        else:
            fixed.append(place)

    make_buffers(model, sources)
    fill(loader, fixed)
    for place in (place for places in layers.values() for place in places):
        place.empty()  # in the dtype it will have
    streamed = {id(place.stand_in) for places in layers.values() for place in places}
    finish(model, loader, empty.keys() - sources.keys(), streamed)
    return layers


def places_of(
    model: Any, sources: Mapping[str, TensorInfo], empty: Mapping[str, torch.Tensor], loader: StreamingLoader
) -> dict[str, Place]:
    """Where the tensors go, of parameters and buffers that are on the meta device, by their names in the model."""
    places = {}
    keep_in_fp32 = kept_in_fp32(model, empty)
    for name, source in sources.items():
        tensor = empty[name]
        if tuple(tensor.shape) != source.shape:
            raise errors.InvalidArgument(
                f"{loader.path}: tensor {source.name!r} has shape {list(source.shape)}, and {name!r} of "
                f"{type(model).__name__} has {list(tensor.shape)}: config.json is another model's"
            )
        if name in keep_in_fp32:
            tensor = torch.empty_like(tensor, dtype=torch.float32)
            if isinstance(empty[name], torch.nn.Parameter):
                tensor = torch.nn.Parameter(tensor, requires_grad=False)
        module_name, _, leaf = name.rpartition(".")
        places[name] = Place(source, model.get_submodule(module_name), leaf, tensor)
    return places


def fill(loader: StreamingLoader, places: Sequence[Place]) -> None:
    """Loads the tensors of these places."""
    dtypes = {place.source.name: place.stand_in.dtype for place in places}
    group = ("", [place.source for place in places])
    for _, tensors in loader.iter_groups([group], lambda name, tensor: _as_dtype(tensor, dtypes[name])):
        for place in places:
            place.fill(tensors.pop(place.source.name))


def finish(model: Any, loader: StreamingLoader, untied: set[str] | None, away: set[int]) -> None:
    """Puts buffers where the model runs, ties what the model ties where no tensor was for these names (None: nothing),
    and makes sure that nothing is on the meta device but the tensors with these ids."""
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            module_name, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module_name), leaf, buffer.to(loader.device))
    if untied is not None:
        _tie(model, untied)
    absent = [
        name
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_meta and id(tensor) not in away
    ]
    if absent:
        raise errors.NotFound(
            f"{loader.path} has no tensor for {_listed(absent)} of {type(model).__name__}: it is incomplete, "
            "or names its tensors in another way than this version of transformers"
        )


def _runs_by_itself(model: Any, layer: LayerName) -> bool:
    """Whether the layer is a module that the model calls; lists and single parameters are none."""
    try:
        module = model.get_submodule(str(layer))
    except AttributeError:
        return False
    return type(module).forward is not torch.nn.Module.forward


def sources_of(model: Any, empty: Mapping[str, torch.Tensor], loader: StreamingLoader) -> dict[str, TensorInfo]:
    """The tensor of the checkpoint for each parameter and persistent buffer of the model that has one."""
    prefix = f"{model.base_model_prefix}."

    def in_model(name: str) -> str | None:
        # A checkpoint of the model without its head, or with another one, has names without the prefix, or with it.
        for candidate in (name, prefix + name, name[len(prefix) :] if name.startswith(prefix) else name):
            if candidate in empty:
                return candidate
        return None

    rename = _renamer(model)
    sources: dict[str, TensorInfo] = {}
    unused = []
    for tensor in sorted(loader.tensors, key=lambda tensor: _natural(tensor.name)):
        renamed, fused = rename(tensor.name)
        target = in_model(renamed)
        if target is None:
            target, fused = in_model(tensor.name), False
        if target is None:
            unused.append(tensor.name)
        elif fused:
            raise errors.Unsupported(
                f"{loader.path}: StreamingModel does not run {type(model).__name__}: transformers makes its {target!r} "
                f"of {tensor.name!r} and others on loading, which cannot be done layer by layer"
            )
        elif target in sources:
            raise errors.InvalidArgument(
                f"{loader.path}: tensors {sources[target].name!r} and {tensor.name!r} are both for {target!r} of "
                f"{type(model).__name__}"
            )
        else:
            sources[target] = tensor
    # Older checkpoints have what the model now computes.
    ignored = _any_of([*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"])
    computed = {name for name, _ in model.named_buffers()}
    unused = [name for name in unused if not (ignored.search(name) or computed & {name, prefix + name})]
    if unused:
        warnings.warn(
            f"{loader.path}: {type(model).__name__} has no use for {_listed(unused)}", UserWarning, stacklevel=4
        )
    return sources


def _renamer(model: Any) -> Callable[[str], tuple[str, bool]]:
    """name -> the name that transformers 5 changes it to on loading, and whether it makes another tensor of it, too."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return lambda name: (name, False)
    mapping = get_model_conversion_mapping(model) or []
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def rename(name: str) -> tuple[str, bool]:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        for converter in converters:
            name, matched = converter.rename_source_key(name)
            if matched is not None:
                return name, True
        return name, False

    return rename


def kept_in_fp32(model: Any, names: Iterable[str]) -> set[str]:
    """The names that transformers leaves in float32 in a model of another dtype."""
    dtype = model.config.dtype
    modules: set[str] = set()
    if dtype == torch.float16:
        modules.update(model._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        modules.update(model._keep_in_fp32_modules_strict or ())
    if not modules:
        return set()
    try:
        from transformers.core_model_loading import build_glob_alternation

        pattern = build_glob_alternation(sorted(modules))[0]
    except ImportError:
        pattern = re.compile("|".join(rf"((^|\.){module}($|\.))" for module in sorted(modules)))
    return {name for name in names if pattern.search(name)}


def make_buffers(model: Any, sources: Mapping[str, TensorInfo]) -> None:
    """Gives values to the buffers that no checkpoint has, such as frequencies of rotary embeddings."""
    persistent = model.state_dict(keep_vars=True)
    may_miss = _any_of(model._keys_to_ignore_on_load_missing)
    made = False
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and name not in sources and (name not in persistent or may_miss.search(name)):
            module_name, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module_name), leaf, torch.empty_like(buffer, device="cpu"))
            made = True
    if made:
        for tensor in persistent.values():
            if torch.is_tensor(tensor) and tensor.is_meta:
                tensor._is_hf_initialized = True
        with torch.device("cpu"):
            model.initialize_weights()


def ties_what_is_missing(model: Any) -> bool:
    """Whether a tensor that the checkpoint has stays untied (transformers 5), or is ignored where the model ties it."""
    return "missing_keys" in inspect.signature(model.tie_weights).parameters


def _tie(model: Any, missing: set[str]) -> None:
    """Ties what the model ties, as transformers does after loading a checkpoint that lacks these names."""
    if ties_what_is_missing(model):
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    else:
        model.tie_weights()


def _as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor
    if tensor.device.type != "cpu":
        return tensor.to(dtype)
    return own_pages(tensor.shape, dtype).copy_(tensor)


def _any_of(patterns: Iterable[str] | None) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns or ()) or r"(?!)")  # the last matches nothing


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts numbers in a name by value, and before words."""
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
