"""Models layer by layer: `StreamingLoader` decodes the next layer while the caller computes with this one."""

from __future__ import annotations

import atexit
import math
import mmap
import os
import queue
import re
import sys
import threading
import weakref
from collections.abc import Generator, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Callable, NamedTuple

from bigsmall import errors
from bigsmall import torch as bigsmall_torch
from bigsmall.hub import open_reader
from bigsmall.reader import Destination, Reader, TensorInfo, split_by_bytes

# isort: split
from bigsmall import cuda  # after bigsmall.torch, which says what to do where torch is missing

if TYPE_CHECKING:
    import torch

# A number after one of these is a layer's.
LAYER_WORDS = ("layers", "layer", "blocks", "block", "h")

# The first of these in a name is the layer's number; what is numbered inside a layer (experts, T5's `layer`) is part
# of it. Nine digits: more are no layer, and Python refuses to read very many.
_LAYER = re.compile(rf"(?:^|\.)(?P<stack>{'|'.join(LAYER_WORDS)})\.(?P<number>0|[1-9][0-9]{{0,8}})(?=\.|$)")

# A decode cannot be stopped midway, so this much is what a close or Ctrl-C waits for: by the CPU, and by a GPU, which
# takes far more to be busy ...
_STEP_BYTES = 128 << 20
_GPU_STEP_BYTES = 1 << 30

# ... and where a slow network makes it take longer than this, the thread is left to end by itself.
_PATIENCE_SECONDS = 5

# Tensors smaller than this come from malloc.
_OWN_PAGES_BYTES = 64 << 10


class LayerName(NamedTuple):
    """A layer: "model.layers.3" is number 3 of the stack "model.layers"."""

    stack: str
    number: int

    def __str__(self) -> str:
        return f"{self.stack}.{self.number}"


def layer_of(name: str) -> LayerName | None:
    """The layer that a tensor belongs to by its name, or None."""
    found = _LAYER.search(name)
    return None if found is None else LayerName(name[: found.end("stack")], int(found["number"]))


class StreamingLoader:
    """A model's tensors layer by layer, for models that do not fit into memory.

    path_or_repo : `.bs` file or directory, or the id of a Hub repo, of which only what is decoded is fetched
    device       : where the tensors are to be; None for CUDA where there is a device, else the CPU
    base         : the base model (`.safetensors`, `.bs` or directory) where the file is a delta
    workers      : threads of a decode, None for all available

    subfolder, revision, token, cache_dir and local_files_only are those of transformers' `from_pretrained`.

    A tensor is in a layer where its name has a number after `layers`, `layer`, `blocks`, `block` or `h`; the first one
    counts: "encoder.block.0.layer.1.weight" is in layer 0 of the stack "encoder.block". The numbers may begin anywhere
    and have holes. All other tensors are non-layer tensors.

        with StreamingLoader("model-bs") as loader:
            fixed = loader.load_non_layer_tensors()
            for name, tensors in loader.iter_layers():      # "model.layers.0", {"model.layers.0.mlp...": tensor, ...}
                ...

    Tensors are fresh memory of the caller, named as in the file. The loader keeps none of them: with what the loop
    above holds, two layers and the non-layer tensors are in memory at most, and less than 64 MB more. Bytes that are on
    their way from the Hub, or to another device, come on top. A GPU decodes by itself, as `bigsmall.load` says, beside
    what is computed on it: use the tensors on the stream that is current where the loop begins.

    All methods may be called from many threads at once. After a fork() the child's loader goes on by itself.

    Opening and decoding raise what `bigsmall.load` raises; decoding raises InvalidArgument once the loader is closed.
    """

    def __init__(
        self,
        path_or_repo: str | os.PathLike[str],
        device: str | int | torch.device | None = None,
        *,
        base: str | os.PathLike[str] | None = None,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        workers: int | None = None,
    ) -> None:
        self._reader: Reader | None = None
        self._prefetchers: weakref.WeakSet[_Prefetcher] = weakref.WeakSet()
        if device is None:
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device: torch.device = bigsmall_torch.open_device(device)
        self.path = os.fsdecode(path_or_repo)
        self.workers = workers
        self._reader = open_reader(
            path_or_repo,
            base=base,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        self._non_layer: list[TensorInfo] = []
        layers: dict[LayerName, list[TensorInfo]] = {}
        for tensor in self._reader.tensors:
            layer = layer_of(tensor.name)
            (self._non_layer if layer is None else layers.setdefault(layer, [])).append(tensor)
        self._layers = {layer: layers[layer] for layer in sorted(layers)}

    # ---- what is in it ----

    @property
    def reader(self) -> Reader:
        """The opened files."""
        return self._opened()

    @property
    def tensors(self) -> list[TensorInfo]:
        """All tensors, in the order of the file."""
        return self._opened().tensors

    @property
    def stacks(self) -> dict[str, list[int]]:
        """The stacks, sorted by name, and the numbers of their layers, ascending: {"model.layers": [0, 1, 2]}."""
        stacks: dict[str, list[int]] = {}
        for stack, number in self._layers:
            stacks.setdefault(stack, []).append(number)
        return stacks

    @property
    def layer_names(self) -> list[str]:
        """The layers in the order of `iter_layers`: ["model.layers.0", "model.layers.1", ...]."""
        return [str(layer) for layer in self._layers]

    @property
    def n_layers(self) -> int:
        """Number of layers, of all stacks together."""
        return len(self._layers)

    @property
    def non_layer_names(self) -> list[str]:
        """Names of the tensors that are in no layer, in the order of the file."""
        return [tensor.name for tensor in self._non_layer]

    def tensor_names(self, layer: int | str, stack: str | None = None) -> list[str]:
        """Names of one layer's tensors, in the order of the file. Arguments and errors are those of `load_layer`."""
        return [tensor.name for tensor in self._layers[self._find(layer, stack)]]

    def _find(self, layer: int | str, stack: str | None) -> LayerName:
        if isinstance(layer, str):
            named = layer_of(layer)
            if stack is not None or named is None or str(named) != layer:
                raise errors.InvalidArgument(
                    f"layer {layer!r}, stack {stack!r}: give a number and a stack, or a name such as 'model.layers.3'"
                )
        else:
            named = LayerName(self._only_stack() if stack is None else self._known_stack(stack), layer)
        if named not in self._layers:
            numbers = self.stacks.get(named.stack)
            known = f"the stacks are {list(self.stacks)}" if numbers is None else f"{named.stack} has {_spans(numbers)}"
            raise errors.NotFound(f"{self.path}: there is no layer {named}: {known}")
        return named

    def _only_stack(self) -> str:
        stacks = list(self.stacks)
        if not stacks:
            raise errors.NotFound(f"{self.path}: no tensor's name has the number of a layer")
        if len(stacks) > 1:
            raise errors.InvalidArgument(f"{self.path} has several stacks of layers, so name one of them: {stacks}")
        return stacks[0]

    def _known_stack(self, stack: str) -> str:
        stacks = list(self.stacks)
        if stack not in stacks:
            raise errors.NotFound(f"{self.path}: there is no stack {stack!r}: the stacks are {stacks}")
        return stack

    # ---- decoding ----

    def load_non_layer_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that are in no layer: embeddings, final norm, head."""
        return self._read(self._non_layer)

    def load_layer(self, layer: int | str, stack: str | None = None) -> dict[str, torch.Tensor]:
        """The tensors of one layer: of a number in `stack`, which a model of one stack need not name, or of a name out
        of `layer_names`. NotFound where there is no such layer, InvalidArgument where the stack is not clear."""
        return self._read(self._layers[self._find(layer, stack)])

    def load_tensor(self, name: str) -> torch.Tensor:
        """One tensor by its full name. NotFound (a KeyError) where there is none."""
        return self._read([self._opened().find(name)])[name]

    def iter_layers(self, stack: str | None = None) -> Generator[tuple[str, dict[str, torch.Tensor]], None, None]:
        """Names and tensors of all layers, or those of one stack, stack by stack and in the order of their numbers.

        The next layer, and only that, is decoded on a thread of its own meanwhile. An error comes up at its layer.
        Leaving the loop ends the thread, and so does `close()` of what this returns. NotFound where there is no such
        stack.
        """
        if stack is not None:
            self._known_stack(stack)
        self._opened()
        return self.iter_groups(
            (str(layer), tensors) for layer, tensors in self._layers.items() if stack in (None, layer.stack)
        )

    def iter_groups(
        self,
        groups: Iterable[tuple[str, Sequence[TensorInfo]]],
        change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> Generator[tuple[str, dict[str, torch.Tensor]], None, None]:
        """`iter_layers` over any groups of the file's tensors. `change(name, tensor)` makes of each tensor what is
        given out, on the other thread."""
        upcoming = iter(groups)
        prefetcher = _Prefetcher(self, change)
        try:
            asked = prefetcher.ask(next(upcoming, None))
            while asked is not None:
                if not prefetcher.usable:  # in a child of fork(), where its thread does not exist
                    prefetcher = _Prefetcher(self, change)
                    prefetcher.ask(asked)
                name = asked[0]
                # A list, so that nothing here holds the tensors while the caller has them.
                taken = [prefetcher.take()]
                asked = prefetcher.ask(next(upcoming, None))
                if asked is None:
                    prefetcher.close()  # whoever took the last group may never come back
                yield name, taken.pop()
        finally:
            prefetcher.close()

    def _read(
        self,
        tensors: Sequence[TensorInfo],
        change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
        stop: threading.Event | None = None,
    ) -> dict[str, torch.Tensor]:
        reader = self._opened()
        loaded: dict[str, torch.Tensor] = {}
        for step in split_by_bytes(tensors, _GPU_STEP_BYTES if self.device.type == "cuda" else _STEP_BYTES):
            if stop is not None and stop.is_set():
                break
            if self.device.type == "cpu":
                fresh = {
                    tensor.name: own_pages(tensor.shape, bigsmall_torch.empty(tensor, (0,)).dtype) for tensor in step
                }
                places = [Destination(tensor, bigsmall_torch.address(fresh[tensor.name])) for tensor in step]
                reader.decode_many(places, workers=self.workers)
            else:
                fresh = bigsmall_torch.read(reader, step, self.device, workers=self.workers)
            loaded.update(fresh)
            del fresh
            if change is not None:
                for tensor in step:
                    loaded[tensor.name] = change(tensor.name, loaded[tensor.name])
        return loaded

    # ---- lifetime ----

    def _opened(self) -> Reader:
        reader = self._reader
        if reader is None:
            raise errors.InvalidArgument(f"{self.path}: the loader is closed")
        return reader

    def close(self) -> None:
        """Ends all iterations and closes the files. Closing twice is allowed."""
        self._reader = None
        for prefetcher in list(self._prefetchers):
            prefetcher.close()

    def __enter__(self) -> StreamingLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = " closed" if self._reader is None else ""
        return f"<bigsmall.StreamingLoader {self.path!r} {self.n_layers} layers on {self.device}{closed}>"


class _Prefetcher:
    """Decodes one group of tensors after the other on a thread of its own: `ask` for one, later `take` it."""

    def __init__(self, loader: StreamingLoader, change: Callable[[str, torch.Tensor], torch.Tensor] | None) -> None:
        self._read = loader._read
        self._change = change
        self._process = os.getpid()
        # The caller's, on which the tensors are used: torch gives out their memory again only after that.
        self._stream = cuda.current_stream(loader.device)
        # Not one thread a group: starting one waits for it, and so would let it decode while the caller, who is about
        # to drop the layer before, still holds that.
        self._asked: queue.SimpleQueue[Sequence[TensorInfo] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[dict[str, torch.Tensor] | None, BaseException | None]] = queue.SimpleQueue()
        self._stop, self._finished = threading.Event(), threading.Event()
        self._closed_error = f"{loader.path}: the loader is closed"
        loader._prefetchers.add(self)
        _running.add(self)
        threading.Thread(target=self._run, name="bigsmall-layers", daemon=True).start()

    @property
    def usable(self) -> bool:
        """False in a child of fork(): threads stay with the parent."""
        return self._process == os.getpid()

    def _run(self) -> None:
        try:
            while True:
                tensors = self._asked.get()
                if tensors is None:
                    return
                try:
                    with cuda.on_stream(self._stream):
                        self._done.put((self._read(tensors, self._change, self._stop), None))
                except BaseException as error:  # raised again in the thread that takes the group
                    self._done.put((None, error))
                if self._stop.is_set():
                    return
        finally:
            # Whoever waits in `take` while another thread closes the loader.
            self._done.put((None, errors.InvalidArgument(self._closed_error)))
            self._finished.set()

    def ask(self, group: tuple[str, Sequence[TensorInfo]] | None) -> tuple[str, Sequence[TensorInfo]] | None:
        """Has the group decoded, where there is one; returns it."""
        if group is not None:
            self._asked.put(group[1])
        return group

    def take(self) -> dict[str, torch.Tensor]:
        """The group that was asked for, once it is decoded; or the error that came up."""
        loaded, error = self._done.get()
        if loaded is not None and not self._stop.is_set():
            return loaded
        try:
            raise error or errors.InvalidArgument(self._closed_error)
        finally:
            del error  # a cycle with this frame would keep what was decoded of the group in memory

    def close(self) -> None:
        """Returns when the thread has ended. Closing twice, and in a child of fork(), is allowed."""
        if not self.usable:
            return
        self._stop.set()
        self._asked.put(None)
        # When Python ends, threads stand still for good.
        if not sys.is_finalizing():
            self._finished.wait(_PATIENCE_SECONDS)


_running: weakref.WeakSet[_Prefetcher] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """Before Python ends: it stops threads where they are, which inside of torch ends the process by SIGABRT."""
    for prefetcher in list(_running):
        prefetcher.close()


def own_pages(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A fresh tensor in main memory with undefined contents, which the system has back as soon as it is dropped. malloc
    would keep much of it: each large block that is freed raises the size up to which blocks come from the heap."""
    import torch

    empty = torch.empty(0, dtype=dtype, device="cpu")
    n_bytes = math.prod(shape) * empty.element_size()
    if n_bytes >= _OWN_PAGES_BYTES and hasattr(mmap, "MAP_PRIVATE"):
        try:
            pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # the system has a limit on their number, too
            pass
        else:
            # The storage keeps the pages alive. Of views torch would remember the tensor that they were made of.
            storage = torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()
            return empty.set_(storage, 0, tuple(shape))
    return torch.empty(tuple(shape), dtype=dtype, device="cpu")


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: "0 to 3, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)
