"""What the loaders of vLLM and SGLang share: where the weights of a source are, and their tensors one after another."""

from __future__ import annotations

import contextlib
import copy
import errno
import glob
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from bigsmall import errors, hub
from bigsmall.reader import Reader, split_by_bytes

# Bytes that are decoded at once: enough for all workers to be busy, little beside a model.
_GROUP_BYTES = 256 << 20


class Options(NamedTuple):
    """What users may write into `model_loader_extra_config`.

    base    : path of the base model where the model is a delta
    verify  : compare the MD5 of every tensor too
    workers : threads that decode; None for as many as bigsmall.load takes
    """

    base: str | None = None
    verify: bool = False
    workers: int | None = None


def take_options(extra_config: Any) -> tuple[Options, Any]:
    """Ours, and a copy without them for the loader that refuses what it does not know. ValueError for a wrong value,
    and for what speeds up other formats only and would be ignored."""
    if not isinstance(extra_config, dict):
        return Options(), extra_config
    rest = dict(extra_config)
    for key in ("enable_multithread_load", "num_threads"):
        if key in rest:
            raise errors.InvalidArgument(
                f"model_loader_extra_config has {key!r}, which is for other formats: .bs files are always decoded by "
                'many threads, and {"workers": N} sets how many'
            )
    options = Options(**{key: rest.pop(key) for key in Options._fields if key in rest})
    if not (options.base is None or isinstance(options.base, str)):
        raise errors.InvalidArgument(f"model_loader_extra_config: base must be a path, not {options.base!r}")
    if not isinstance(options.verify, bool):
        raise errors.InvalidArgument(f"model_loader_extra_config: verify must be true or false, not {options.verify!r}")
    workers = options.workers
    if not (workers is None or (isinstance(workers, int) and not isinstance(workers, bool) and workers > 0)):
        raise errors.InvalidArgument(f"model_loader_extra_config: workers must be a number above 0, not {workers!r}")
    return options, rest


def changed(load_config: Any, **fields: Any) -> Any:
    """A copy with those fields. The load_config itself is the engine's, which makes other loaders with it."""
    made = copy.copy(load_config)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def find(
    path_or_repo: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    patterns: Sequence[str] | None = None,
) -> list[str]:
    """What a Reader opens to have the weights: their folder, or with `patterns` each file that matches one of them, of
    which only those for safetensors files count (`*.safetensors` stands for `*.bs`). Empty where there is none.

    A repository is downloaded to the Hub's cache first. Raises FileMissing for a path that does not exist, and what
    huggingface_hub raises.
    """
    subfolder = subfolder or ""
    remote = hub.is_repo_id(path_or_repo)
    if patterns is None:
        try:
            folder = hub.local_path(path_or_repo, subfolder=subfolder, revision=revision, cache_dir=cache_dir)
        except errors.FileMissing:  # a repository without `.bs` files
            if not remote:
                raise
            return []
        return [folder] if os.path.isfile(folder) or glob.glob(os.path.join(glob.escape(folder), "*.bs")) else []
    wanted = [re.sub(r"\.safetensors$", ".bs", pattern) for pattern in patterns if pattern.endswith(".safetensors")]
    if not wanted:
        return []
    folder = path_or_repo
    if remote:
        within = [os.path.join(subfolder, pattern) for pattern in wanted]
        repo = hub.repo_id(path_or_repo)
        folder = hub.snapshot(repo, revision=revision, cache_dir=cache_dir, allow_patterns=within)
    folder = os.path.join(folder, subfolder)
    found = {path for pattern in wanted for path in glob.glob(os.path.join(glob.escape(folder), pattern))}
    return sorted(found)


def nothing_found(path_or_repo: str) -> errors.FileMissing:
    """The error for weights without which nothing can be loaded."""
    return errors.FileMissing(
        errno.ENOENT,
        f"{path_or_repo}: this holds no .bs file; load it without this load format, or compress it first with "
        "`bigsmall compress`",
        path_or_repo,
    )


def open_readers(paths: Sequence[str], base: str | None) -> list[Reader]:
    """All of them, or none where one cannot be opened: what is missing shows before anything is decoded."""
    with contextlib.ExitStack() as opened:
        readers = [opened.enter_context(Reader(path, base)) for path in paths]
        opened.pop_all()
    return readers


def stream(
    readers: Sequence[Reader], wanted: Callable[[str], bool], options: Options, *, show_bar: bool
) -> Iterator[tuple[str, Any]]:
    """Names and tensors in main memory, in the order of the files, without those whose name is not `wanted`. The
    readers are closed at the end.

    While the caller uses the tensors of one group, a thread decodes the next: beside what the caller keeps there are
    never more than two groups of 256 MiB, or of one larger tensor.
    """
    torch = importlib.import_module("torch")
    read = importlib.import_module("bigsmall.torch").read
    tqdm = importlib.import_module("tqdm").tqdm
    cpu = torch.device("cpu")
    with contextlib.ExitStack() as stack:
        groups = []
        for reader in readers:
            stack.enter_context(reader)
            chosen = [tensor for tensor in reader.tensors if wanted(tensor.name)]
            groups += [(reader, group) for group in split_by_bytes(chosen, _GROUP_BYTES)]
        bar = stack.enter_context(
            tqdm(
                desc="Loading .bs weights",
                total=sum(tensor.n_bytes for _, group in groups for tensor in group),
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                disable=not (show_bar and sys.stderr is not None and sys.stderr.isatty()),
            )
        )
        # Left first, which waits for the work on its thread: the readers must be open until then.
        pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="bigsmall"))
        work = (
            pool.submit(read, reader, group, cpu, workers=options.workers, verify=options.verify)
            for reader, group in groups
        )
        coming = next(work, None)
        while coming is not None:
            decoded = coming.result()
            coming = next(work, None)
            bar.update(sum(tensor.nbytes for tensor in decoded.values()))
            while decoded:
                name = next(iter(decoded))
                yield name, decoded.pop(name)  # no reference stays here: the memory is the caller's
