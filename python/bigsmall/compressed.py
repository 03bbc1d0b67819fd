"""Weights that stay compressed in the memory of a GPU and are decoded just before they are used.

A matrix is decoded whole, into memory that all modules of a model share, and then the very product runs that the
ordinary module would run: same shape, strides, dtype and alignment. So results are equal bit for bit. Parts of a
matrix would stay in the second cache until the product reads them, but a product of another shape may run another
kernel, which adds in another order; and a part has too few streams to keep a GPU busy. On an H100 a BF16 matrix of
4096 x 4096 decodes in 68 us, and larger ones at 0.75 TB/s and more.

The output layer of a language model is larger than all others and is decoded in slices of rows: for the shapes of
Llama 3 8B on an H100 that gave the same bits too, which other shapes need not. `max_scratch_bytes` of its size avoids
it.

Needs torch and a CUDA device of compute capability 7.5 or higher.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from bigsmall import _native, errors
from bigsmall.layers import StreamingLoader
from bigsmall.reader import Reader, TensorInfo

# isort: split
import torch  # after layers, which says what to do where it is missing

from bigsmall import cuda

_BLOCK_ELEMENTS = 1 << 16

# Of the library's parts of device memory.
_ALIGNMENT = 256

# A row that is gathered alone has at most this many elements; see bs_weight_gather.
_LONGEST_ROW = 1 << 14

# Of a model, matrices that are larger than this and than any but the output layer's are decoded and multiplied in
# slices of rows.
_LEAST_WHOLE_BYTES = 128 << 20

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class CompressedWeight:
    """A matrix of shape [rows, columns] that is compressed in the memory of a GPU.

    reader : an open file that has it; it may be closed afterwards
    tensor : name or description of a 2-D tensor of bfloat16, float16 or float32
    device : a CUDA device

    Unsupported where its form is one for the CPU (keep it decoded then), NoDevice or DeviceError from the device, and
    what decoding raises for damaged files: every block is verified on the device.
    """

    def __init__(self, reader: Reader, tensor: str | TensorInfo, device: torch.device) -> None:
        if isinstance(tensor, str):
            tensor = reader.find(tensor)
        self.dtype: torch.dtype = getattr(torch, tensor.dtype.name)
        if len(tensor.shape) != 2 or self.dtype not in _DTYPES:
            raise errors.Unsupported(
                f"{reader.path}: tensor {tensor.name!r} of shape {list(tensor.shape)} and dtype {tensor.dtype.name} is "
                "no matrix of bfloat16, float16 or float32: keep it decoded"
            )
        self.rows, self.columns = tensor.shape
        self.device = device
        size = reader.weight_bytes(tensor)
        # More, so that the library's part is aligned wherever the allocator puts it.
        self.buffer = cuda.device_memory(size + _ALIGNMENT, device)
        address = _aligned(self.buffer.data_ptr())
        workspace = cuda.Workspace(device, tensor.n_bytes)
        self.handle = reader.open_weight(tensor, _native.Memory(address, size), workspace, self.buffer)

    @property
    def n_bytes(self) -> int:
        """Bytes that it has decoded."""
        return int(self.rows * self.columns * self.dtype.itemsize)

    @property
    def n_bytes_compressed(self) -> int:
        """Bytes that it takes of the device's memory."""
        return int(self.buffer.numel())

    def decode(self, out: torch.Tensor, first_row: int = 0) -> None:
        """Starts decoding rows to `out`, of shape [n, columns] and contiguous, on the current stream. The first element
        of first_row must be the first of a block of 65,536 elements, and the last that of one or of the matrix."""
        stream = cuda.current_stream_number(self.device)
        ffi, lib = _native.library()
        error = ffi.new("bs_error *")
        status = lib.bs_weight_decode(
            self.handle.raw,
            first_row * self.columns,
            out.numel(),
            out.data_ptr(),
            out.numel() * out.element_size(),
            ffi.cast("void *", stream),
            error,
        )
        _native.check(status, error)

    def gather(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Starts decoding row ids[i] to out[i], on the current stream. ids: int64, [n]; out: [n, columns]; both
        contiguous."""
        ffi, lib = _native.library()
        error = ffi.new("bs_error *")
        status = lib.bs_weight_gather(
            self.handle.raw,
            ids.data_ptr(),
            ids.numel(),
            self.columns,
            out.data_ptr(),
            out.numel() * out.element_size(),
            ffi.cast("void *", cuda.current_stream_number(self.device)),
            error,
        )
        _native.check(status, error)

    def decoded(self) -> torch.Tensor:
        """All of it, as an ordinary tensor."""
        out = torch.empty(self.rows, self.columns, dtype=self.dtype, device=self.device)
        if out.numel():
            self.decode(out)
        return out


class _Batch:
    """Weights that are decoded together, by one launch, one behind the other in memory of the device."""

    def __init__(self, weights: Sequence[CompressedWeight], memory: torch.Tensor) -> None:
        self.views: dict[CompressedWeight, torch.Tensor] = {}
        at = 0
        for weight in weights:
            self.views[weight] = _matrix(memory[at:], weight.rows, weight)
            at += _aligned(weight.n_bytes)
        self._device = weights[0].device
        ffi, lib = _native.library()
        handles = ffi.new("bs_weight *[]", [weight.handle.raw for weight in weights])
        places = ffi.new("uint64_t[]", [view.data_ptr() for view in self.views.values()])
        n_bytes, error, out = ffi.new("size_t *"), ffi.new("bs_error *"), ffi.new("bs_weight_batch **")
        _native.check(lib.bs_weight_batch_bytes(handles, len(weights), n_bytes, error), error)
        notes = cuda.device_memory(n_bytes[0] + _ALIGNMENT, self._device)
        workspace = cuda.Workspace(self._device, 1)
        with workspace.current():
            status = lib.bs_weight_batch_open(
                handles, places, len(weights), _aligned(notes.data_ptr()), n_bytes[0], workspace.job, out, error
            )
        _native.check(status, error)
        self._handle = _native.Handle(out[0], lib.bs_weight_batch_close, (notes, memory, list(weights)))

    def decode(self) -> None:
        ffi, lib = _native.library()
        error = ffi.new("bs_error *")
        stream = ffi.cast("void *", cuda.current_stream_number(self._device))
        _native.check(lib.bs_weight_batch_decode(self._handle.raw, stream, error), error)


def _aligned(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def _matrix(memory: torch.Tensor, rows: int, weight: CompressedWeight) -> torch.Tensor:
    return memory[: rows * weight.columns * weight.dtype.itemsize].view(weight.dtype).view(rows, weight.columns)


class Scratch:
    """Device memory that the modules of one model decode to. Threads take turns at it, product by product, and streams
    wait for each other; only CUDA graphs must not be replayed while something else uses it.

    A model asks for its matrices in the same order at every pass. From the second pass on, those that follow each
    other are decoded together, as many as there is room for: a matrix alone seldom keeps a GPU busy. One that comes in
    another order is decoded when it comes.

    max_bytes : of a matrix that is decoded whole; None for any
    """

    def __init__(self, device: torch.device, max_bytes: int | None = None) -> None:
        self.device = device
        self.max_bytes = max_bytes
        self._memory = cuda.device_memory(0, device)
        self._lock = threading.Lock()
        self._stream: Any = None  # that used it last
        self._order: list[CompressedWeight] | None = []  # of the first pass; None when it is known
        self._batches: dict[CompressedWeight, _Batch] = {}  # by the first weight of each
        self._coming: Iterator[tuple[CompressedWeight, torch.Tensor]] = iter(())  # decoded and not asked for yet

    def reserve(self, n_bytes: int) -> None:
        """Takes the memory. Before the first use."""
        self._memory = cuda.device_memory(n_bytes, self.device)

    @property
    def n_bytes(self) -> int:
        """Bytes of the memory."""
        return int(self._memory.numel())

    def _whole(self, weight: CompressedWeight) -> bool:
        return self.max_bytes is None or weight.n_bytes <= self.max_bytes

    def rows_at_a_time(self, weight: CompressedWeight) -> int:
        """All rows, or as many as a slice has: whole blocks of elements, and slices as equal as may be."""
        if self._whole(weight):
            return weight.rows
        assert self.max_bytes is not None
        # Every unit-th row begins a block. A single unit may be more than max_bytes, but not much of the memory.
        unit = _BLOCK_ELEMENTS // math.gcd(_BLOCK_ELEMENTS, weight.columns)
        most = max(self.max_bytes // (weight.columns * weight.dtype.itemsize * unit), 1) * unit
        slices = -(-weight.rows // most)
        return int(min(-(-weight.rows // (slices * unit)) * unit, weight.rows))

    def get(self, weight: CompressedWeight) -> torch.Tensor:
        """The whole matrix, decoded; good until another one is asked for."""
        if self._order is not None:
            self._learn(weight)
        # What was decoded with others is given out once and in order: a pass that begins anew, as in a CUDA graph or
        # after an error, takes nothing for decoded.
        following, view = next(self._coming, (None, None))
        if following is weight:
            return view
        batch = self._batches.get(weight)
        if batch is None:
            return self._alone(weight, 0, weight.rows)
        batch.decode()
        self._coming = iter(batch.views.items())
        return next(self._coming)[1]

    def _alone(self, weight: CompressedWeight, first: int, rows: int) -> torch.Tensor:
        self._coming = iter(())
        n_bytes = rows * weight.columns * weight.dtype.itemsize
        if self._memory.numel() < n_bytes:
            self._memory = cuda.device_memory(n_bytes, self.device)
        view = _matrix(self._memory, rows, weight)
        weight.decode(view, first)
        return view

    def _learn(self, weight: CompressedWeight) -> None:
        """Notes the order of the first pass, and makes batches of it when the second begins."""
        assert self._order is not None
        if not self._order or weight is not self._order[0]:
            if weight not in self._order:
                self._order.append(weight)
            return
        if len(self._order) == 1 or cuda.is_capturing():  # batches need memory of their own
            return
        order, self._order = self._order, None
        batch: list[CompressedWeight] = []
        used = 0
        for one in order:
            if batch and (used + one.n_bytes > self._memory.numel() or one.dtype != batch[0].dtype):
                self._make(batch)
                batch, used = [], 0
            batch.append(one)
            used += _aligned(one.n_bytes)
        self._make(batch)

    def _make(self, weights: Sequence[CompressedWeight]) -> None:
        if len(weights) > 1:
            self._batches[weights[0]] = _Batch(weights, self._memory)

    def product(self, x: torch.Tensor, weight: CompressedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """torch.nn.functional.linear of the decoded weight."""
        with self._lock:
            self._take_over()
            return self._product(x, weight, bias)

    def _take_over(self) -> None:
        """Has the current stream wait for the products of another one that used the memory last."""
        stream = cuda.current_stream(self.device)
        if stream != self._stream:
            # A capture begins when the device is idle, and must not wait for what is outside of it.
            if self._stream is not None and not cuda.is_capturing():
                stream.wait_stream(self._stream)
            self._stream, self._coming = stream, iter(())

    def _product(self, x: torch.Tensor, weight: CompressedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        rows = self.rows_at_a_time(weight)
        if rows == weight.rows:
            return torch.nn.functional.linear(x, self.get(weight), bias)
        out = torch.empty(*x.shape[:-1], weight.rows, dtype=x.dtype, device=x.device)
        for first in range(0, weight.rows, rows):
            n = min(rows, weight.rows - first)
            part = self._alone(weight, first, n)
            out[..., first : first + n] = torch.nn.functional.linear(
                x, part, None if bias is None else bias[first : first + n]
            )
        return out


class CompressedLinear(torch.nn.Module):  # type: ignore[misc]
    """torch.nn.Linear whose weight stays compressed. For inference: it has no gradients, and its weight is no
    parameter.

    weight  : of shape [out_features, in_features]
    bias    : of shape [out_features], or None
    scratch : the memory to decode to, of the model that this is part of; None for its own
    """

    def __init__(
        self, weight: CompressedWeight, bias: torch.Tensor | None = None, scratch: Scratch | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.rows, weight.columns
        self.compressed = weight
        self.scratch = scratch or Scratch(weight.device)
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias, requires_grad=False))

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight: a new tensor at every use."""
        return self.compressed.decoded()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scratch.product(x, self.compressed, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{_share(self.compressed)}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _refuse_to_move(fn, self.compressed)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight


class CompressedEmbedding(torch.nn.Module):  # type: ignore[misc]
    """torch.nn.Embedding whose weight, of shape [num_embeddings, embedding_dim], stays compressed. The rows that are
    asked for are decoded and no others. For inference.

    An index that is out of range gives a row of NaN: unlike torch.nn.Embedding, which stops the device.
    """

    def __init__(self, weight: CompressedWeight, padding_idx: int | None = None) -> None:
        super().__init__()
        if weight.columns > _LONGEST_ROW:
            raise errors.Unsupported(f"rows of {weight.columns} elements, of at most {_LONGEST_ROW}: keep it decoded")
        self.num_embeddings, self.embedding_dim = weight.rows, weight.columns
        self.padding_idx = padding_idx
        self.compressed = weight

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight: a new tensor at every use."""
        return self.compressed.decoded()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"indices of dtype {ids.dtype}, not int64 or int32")
        flat = ids.reshape(-1).to(torch.int64).contiguous()
        shape = (flat.numel(), self.embedding_dim)
        out = torch.full(shape, torch.nan, dtype=self.compressed.dtype, device=self.compressed.device)
        if flat.numel():
            self.compressed.gather(flat, out)
        return out.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {_share(self.compressed)}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _refuse_to_move(fn, self.compressed)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight


def _share(weight: CompressedWeight) -> str:
    return f"dtype={weight.dtype}, compressed to {weight.n_bytes_compressed / max(weight.n_bytes, 1):.0%}"


def _refuse_to_move(fn: Any, weight: CompressedWeight) -> None:
    """`fn` is what Module.to and its like do to every parameter."""
    probe = torch.empty(0, dtype=weight.dtype, device=weight.device)
    moved = fn(probe)
    if moved.dtype != probe.dtype or moved.device != probe.device:
        raise errors.InvalidArgument(
            f"a weight that is compressed in the memory of {weight.device} stays there, and of dtype {weight.dtype}: "
            "load the model without resident='compressed' to move or change it"
        )


# ---- models of transformers ------------------------------------------------------------------------------------------


def resident_model(
    path: str | os.PathLike[str],
    config: Any,
    config_source: str,
    device: torch.device,
    *,
    dtype: Any = None,
    model_class: Any = None,
    max_scratch_bytes: int | None = None,
) -> Any:
    """A model of transformers whose linear layers and embeddings are compressed on a GPU; its other parameters are
    ordinary. Of the decoded model never more than those are in the GPU's memory.

    config            : the model's, as transformers reads it from config_source, a directory or repository
    dtype             : the checkpoint's; None or "auto" for the one that config.json names, or else that of the weights
    model_class       : an Auto class or a class of transformers, None for AutoModelForCausalLM
    max_scratch_bytes : of the matrices that are decoded whole, larger ones are decoded in slices of rows; None for all
                        but the output layer's

    Raises what `bigsmall.StreamingModel` raises; NoDevice where no GPU decodes; InvalidArgument where dtype is another
    than the checkpoint's.
    """
    from bigsmall import streaming_model as making

    why = cuda.unavailable(device)
    if why is not None:
        raise errors.NoDevice(f"{os.fsdecode(path)}: resident='compressed' needs a GPU that decodes: {why}")
    loader = StreamingLoader(path, device)
    try:
        wanted = making.dtype_of(dtype, config, loader.tensors)
        model = making.skeleton(config, wanted, config_source, model_class)
        _fill(model, loader, wanted, Scratch(device, max_bytes=max_scratch_bytes))
    finally:
        loader.close()
    return model


def _fill(model: Any, loader: StreamingLoader, dtype: torch.dtype, scratch: Scratch) -> None:
    from bigsmall import streaming_model as making

    empty = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if torch.is_tensor(tensor)}
    sources = making.sources_of(model, empty, loader)
    making.places_of(model, sources, empty, loader)  # raises where shapes differ
    keep_in_fp32 = making.kept_in_fp32(model, empty)
    making.make_buffers(model, sources)
    reader = loader.reader
    untied = empty.keys() - sources.keys()
    kept: dict[str, CompressedWeight | None] = {}  # by the tensor, which several modules may share
    by_name = making.ties_what_is_missing(model)
    done: set[str] = set()
    if scratch.max_bytes is None:
        head = model.get_output_embeddings()
        bodies = [m.weight for m in model.modules() if type(m) is torch.nn.Linear and m is not head]
        scratch.max_bytes = max([_LEAST_WHOLE_BYTES, *(w.numel() * w.element_size() for w in bodies)])
    sizes = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) not in (torch.nn.Linear, torch.nn.Embedding):
            continue
        parameter = module.weight
        own = f"{name}.weight"
        names = [other for other, tensor in empty.items() if tensor is parameter]
        if by_name and own in sources:
            names = [own]
        source = next((sources[other] for other in names if other in sources), None)
        if source is None or keep_in_fp32.intersection(names):
            continue
        stored = getattr(torch, source.dtype.name)
        if stored != dtype:
            raise errors.InvalidArgument(
                f"{loader.path}: tensor {source.name!r} is of dtype {stored}, and the model is to be of {dtype}: a "
                'weight that stays compressed keeps its dtype; pass dtype="auto" or the checkpoint\'s own'
            )
        if isinstance(module, torch.nn.Embedding) and (module.max_norm is not None or source.shape[1] > _LONGEST_ROW):
            kept[source.name] = None
        if source.name not in kept:
            kept[source.name] = _compressed(reader, source, loader.device)
        weight = kept[source.name]
        if weight is None:
            continue
        if isinstance(module, torch.nn.Embedding):
            new: torch.nn.Module = CompressedEmbedding(weight, module.padding_idx)
        else:
            new = CompressedLinear(weight, module.bias, scratch)
            sizes.append(_aligned(scratch.rows_at_a_time(weight) * weight.columns * dtype.itemsize))
        new.train(module.training)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        done.update(names)
    sizes = sorted(sizes, reverse=True)
    scratch.reserve(sum(sizes[:2]))
    others = {name: source for name, source in sources.items() if name not in done}
    making.fill(loader, list(making.places_of(model, others, empty, loader).values()))
    making.finish(model, loader, untied - done or None, set())


def _compressed(reader: Reader, tensor: TensorInfo, device: torch.device) -> CompressedWeight | None:
    """The weight, or None where its form is one for the CPU."""
    try:
        return CompressedWeight(reader, tensor, device)
    except errors.Unsupported:
        return None
