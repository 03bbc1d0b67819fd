"""Models by local path or by the name of a repository on the Hugging Face Hub, and reading `.bs` files there by ranges.

Needs huggingface_hub (`pip install bigsmall[hf]`) only where a repository is named.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import inspect
import json
import mmap
import os
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Union

from bigsmall import errors
from bigsmall.reader import Reader, Span

if TYPE_CHECKING:
    import torch

Path = Union[str, "os.PathLike[str]"]

INDEX_NAME = "bigsmall.index.json"

_PREFIX = "hf://"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9_][\w.\-]*", re.ASCII)
_FILE_SUFFIXES = (".bs", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json")


def is_repo_id(path_or_repo: Path) -> bool:
    """Whether this names a repository: "owner/name" that is no local path, or "hf://owner/name". No network is used.

    FileMissing where it can only be a local path that does not exist: a name without owner, an absolute path or one
    that begins with . or ~, more than one slash, the suffix of a file, or where the current directory has a folder of
    the owner's name.
    """
    if not isinstance(path_or_repo, str):
        if os.path.exists(path_or_repo):
            return False
        raise _not_found(os.fsdecode(path_or_repo), "there is no such file or directory")
    name = path_or_repo
    if name.startswith(_PREFIX):
        if _REPO_ID.fullmatch(name[len(_PREFIX) :]):
            return True
        raise errors.InvalidArgument(f"{name!r} is no repository: write hf://owner/name")
    if os.path.exists(name):
        return False
    owner = name.split("/")[0]
    if not _REPO_ID.fullmatch(name):
        hint = f"; for a repository on the Hub write {_PREFIX}owner/name" if "/" not in name.strip("/") else ""
        raise _not_found(name, f"there is no such file or directory{hint}")
    if name.lower().endswith(_FILE_SUFFIXES) or os.path.isdir(owner):
        raise _not_found(
            name, f"there is no such file or directory; if a repository on the Hub is meant, write {_PREFIX}{name}"
        )
    return True


def _not_found(path: str, why: str) -> errors.FileMissing:
    return errors.FileMissing(errno.ENOENT, f"{path}: {why}", path)


def repo_id(path_or_repo: Path) -> str:
    """The "owner/name" of what `is_repo_id` says is one."""
    name = os.fsdecode(path_or_repo)
    return name[len(_PREFIX) :] if name.startswith(_PREFIX) else name


def _folder(subfolder: str) -> str:
    """The subfolder as a prefix of the names in a repository."""
    parts = [part for part in subfolder.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts:
        raise errors.InvalidArgument(f"subfolder {subfolder!r} leads out of the model")
    return "".join(part + "/" for part in parts)


# ---- huggingface_hub -----------------------------------------------------------------------------------------------

# How often a download is begun.
_ATTEMPTS = 8


def library() -> Any:
    """The module huggingface_hub. ModuleNotFoundError says how to install it."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "repositories on the Hub need huggingface_hub, which is not installed: pip install bigsmall[hf]",
            name=missing.name,
        ) from missing
    return huggingface_hub


def who() -> dict[str, str]:
    """How requests name their sender."""
    return {"library_name": "bigsmall", "library_version": version("bigsmall")}


def snapshot(repo: str, **options: Any) -> str:
    """snapshot_download that goes on where a connection was lost, which older releases do not do by themselves."""
    snapshot_download = library().snapshot_download
    for _ in range(_ATTEMPTS - 1):
        try:
            return str(snapshot_download(repo, **options))
        except Exception as error:
            if not is_network_failure(error):
                raise
        time.sleep(1)
    return str(snapshot_download(repo, **options))


def is_network_failure(error: BaseException | None) -> bool:
    """Whether there was no answer, or no whole one. The classes depend on the release: of requests, httpx or httpx2."""
    library = type(error).__module__.partition(".")[0]
    return library in ("requests", "httpx", "httpx2", "httpcore", "urllib3") or isinstance(error, ConnectionError)


def no_bar() -> Any:
    """A class of progress bars that do not show."""
    from huggingface_hub.utils import tqdm

    def quiet(self: Any, *args: Any, **kwargs: Any) -> None:
        tqdm.__init__(self, *args, **{**kwargs, "disable": True})

    return type("NoBar", (tqdm,), {"__init__": quiet})


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """What huggingface_hub raises becomes an error that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    try:
        yield
    except errors.BigSmallError:
        raise
    except Exception as error:
        # An upload's failure is wrapped once more.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        at = f"{constants.ENDPOINT}/{repo}"
        log_in = "log in by `hf auth login`, set HF_TOKEN, or pass token="
        made: errors.BigSmallError
        if isinstance(cause, hub.HFValidationError):
            made = errors.InvalidArgument(str(cause))
        elif isinstance(cause, hub.LocalTokenNotFoundError):
            made = errors.NotPermitted(errno.EACCES, f"{at}: there is no token: {log_in}")
        elif isinstance(cause, hub.GatedRepoError):
            made = errors.NotPermitted(
                errno.EACCES, f"{at}: access is gated: accept its conditions there, then {log_in} of that account"
            )
        elif isinstance(cause, hub.RepositoryNotFoundError):
            made = errors.FileMissing(errno.ENOENT, f"{at}: no such repo, or a private one; for that, {log_in}")
        elif isinstance(cause, hub.RevisionNotFoundError):
            made = errors.FileMissing(errno.ENOENT, f"{at} has no revision {revision!r}")
        elif isinstance(cause, hub.LocalEntryNotFoundError):
            made = errors.FileMissing(errno.ENOENT, f"{at}: {' '.join(str(cause).split())}")
        elif isinstance(cause, hub.HfHubHTTPError) and cause.response.status_code == 401:
            made = errors.NotPermitted(errno.EACCES, f"{at}: the Hub knows no such token, or none was given: {log_in}")
        elif isinstance(cause, hub.HfHubHTTPError) and cause.response.status_code == 403:
            made = errors.NotPermitted(
                errno.EACCES,
                f"{at}: the token may not do this: it needs the right to write there ({cause.server_message})",
            )
        elif isinstance(cause, hub.HfHubHTTPError):
            text = f"the Hub answered {cause.response.status_code}: {cause.server_message or cause}"
            made = errors.IOFailure(errno.EIO, f"{at}: {text}")
        elif is_network_failure(cause):
            made = errors.IOFailure(
                errno.EIO, f"{at}: the Hub was not reached: {cause}; try again, done parts are kept"
            )
        else:
            raise
        raise made from error


# ---- into the Hub's cache ------------------------------------------------------------------------------------------


def local_path(
    path_or_repo: Path,
    *,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    progress: bool = False,
) -> str:
    """Where the model is on this machine: a local path as it is (with `subfolder`, that folder in it). Of a repository
    the `.bs` files and their index are downloaded into the Hub's cache, and the result is their folder there.

    revision         : branch, tag or commit; None for the main branch
    token            : of the Hub; None for the stored one, False for none
    cache_dir        : None for the Hub's own
    local_files_only : no network, as with HF_HUB_OFFLINE=1

    Raises FileMissing where there is no such path, repository or revision, or no `.bs` file in it; NotPermitted where
    the token is missing or does not suffice; IOFailure where the Hub cannot be reached.
    """
    folder = _folder(subfolder)
    if not is_repo_id(path_or_repo):
        path = os.fsdecode(path_or_repo)
        return os.path.join(path, folder.rstrip("/")) if folder else path
    repo = repo_id(path_or_repo)
    inside = glob.escape(folder)
    with hub_errors(repo, revision):
        at = snapshot(
            repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[f"{inside}*.bs", inside + INDEX_NAME],
            ignore_patterns=[f"{inside}*/*"],
            tqdm_class=None if progress else no_bar(),
            **who(),
        )
    found = os.path.join(at, folder.rstrip("/")) if folder else at
    if not os.path.isdir(found) or not any(name.endswith(".bs") for name in os.listdir(found)):
        where = "in the cache" if local_files_only else f"at revision {revision or 'main'}"
        raise _not_found(f"{_PREFIX}{repo}/{folder}", f"this holds no .bs file {where}")
    return found


# ---- without a `.bs` file on disk ----------------------------------------------------------------------------------


def open_reader(
    path_or_repo: Path,
    *,
    base: Path | None = None,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
) -> Reader:
    """Opens a model: a local `.bs` file or directory, or a repository, of which only headers are read now, and the
    compressed bytes of a tensor when it is decoded. Files that the Hub's cache holds are read there.

    base : of a delta, a local path or a repository; `revision` is not its

    The other arguments and errors are those of `local_path`, and Corrupt, Truncated, Unsupported and WrongBase.
    """
    hub_options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    base_path = None if base is None else base_of(base, **hub_options)
    if local_files_only or not is_repo_id(path_or_repo):
        path = local_path(path_or_repo, subfolder=subfolder, revision=revision, **hub_options)
        return Reader(path, base_path)
    repo, folder = repo_id(path_or_repo), _folder(subfolder)
    label = f"{_PREFIX}{repo}/{folder}"
    hub = library()
    with hub_errors(repo, revision):
        try:
            info = hub.HfApi(token=token, **who()).model_info(repo, revision=revision)
        except Exception as error:
            if not is_network_failure(error):
                raise
            info = None
    if info is None:  # what the cache has serves as it does offline
        try:
            path = local_path(
                path_or_repo, subfolder=subfolder, revision=revision, **{**hub_options, "local_files_only": True}
            )
        except errors.FileMissing:
            raise errors.IOFailure(
                errno.EHOSTUNREACH, f"{label}: the Hub was not reached, and its cache has no .bs file of this model"
            ) from None
        return Reader(path, base_path)
    names = {file.rfilename[len(folder) :] for file in info.siblings or () if file.rfilename.startswith(folder)}
    shards = sorted(name for name in names if name.endswith(".bs") and "/" not in name)
    index: dict[str, Any] | None = None
    with hub_errors(repo, revision):
        if INDEX_NAME in names:
            file = folder + INDEX_NAME
            options: dict[str, Any] = {"cache_dir": cache_dir, **who()}
            if "tqdm_class" in inspect.signature(hub.hf_hub_download).parameters:  # since 1.0
                options["tqdm_class"] = no_bar()
            index = read_index(hub.hf_hub_download(repo, file, revision=info.sha, token=token, **options))
            shards = shards_of(index, label + INDEX_NAME) or shards
            for shard in shards:
                if shard not in names:
                    raise _not_found(
                        label + shard, f"{INDEX_NAME} lists this shard, which the repository does not have"
                    )
        if not shards:
            raise _not_found(label, f"this holds no .bs file at revision {info.sha}")
        cached = [
            hub.try_to_load_from_cache(repo, folder + shard, cache_dir=cache_dir, revision=info.sha) for shard in shards
        ]
        if all(isinstance(path, str) for path in cached):
            return Reader(os.path.dirname(cached[0]), base_path)
        urls = [(shard, hub.hf_hub_url(repo, folder + shard, revision=info.sha)) for shard in shards]
        ranges = _Ranges(label, repo, urls, hub.utils.build_hf_headers(token=token, **who()))
    reader = Reader.from_parts(ranges, base_path)
    if index is not None:
        check_index(index, label + INDEX_NAME, {t["name"]: t["file"] for t in reader.info()["tensors"]})
    return reader


def base_of(base: Path, **hub_options: Any) -> str:
    """A local path of the base of a delta; a repository's weights are downloaded into the Hub's cache, `.bs` files
    where it has them, else `.safetensors`."""
    if not is_repo_id(base):
        return os.fsdecode(base)
    with contextlib.suppress(errors.FileMissing):
        return local_path(base, **hub_options)
    with hub_errors(repo_id(base), None):
        return snapshot(
            repo_id(base), allow_patterns=["*.safetensors"], ignore_patterns=["*/*"], **hub_options, **who()
        )


# ---- the index of shards -------------------------------------------------------------------------------------------


def read_index(path: str) -> dict[str, Any]:
    """A bigsmall.index.json. Corrupt where it is no index."""
    try:
        with open(path, encoding="utf-8") as file:
            return parse_index(file.read(), path)
    except UnicodeDecodeError as error:
        raise errors.Corrupt(f"{path} is no index: {error}") from error


def parse_index(text: str, path: str) -> dict[str, Any]:
    """The same from its text; `path` is for messages."""
    try:
        index: Any = json.loads(text)
    except ValueError as error:
        raise errors.Corrupt(f"{path} is no index: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise errors.Corrupt(f"{path} is no index: it has no weight_map of names to names")
    metadata = index.setdefault("metadata", {})
    sources = metadata.get("source_indexes") if isinstance(metadata, dict) else 0
    if sources is not None and not (
        isinstance(sources, list)
        and all(
            isinstance(source, dict) and isinstance(source.get("name"), str) and isinstance(source.get("text"), str)
            for source in sources
        )
    ):
        raise errors.Corrupt(f"{path}: its metadata is damaged")
    made: dict[str, Any] = index
    return made


def shards_of(index: dict[str, Any], path: str) -> list[str]:
    """The shards that the index lists, in their order. Corrupt where one is no plain file name."""
    listed = index.get("metadata", {}).get("shards") or sorted(set(index["weight_map"].values()))
    for shard in listed:
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise errors.Corrupt(f"{path}: shard {shard!r} is no plain file name")
    return list(listed)


def check_index(index: dict[str, Any], path: str, file_of: dict[str, str]) -> None:
    """Corrupt where a tensor is not in the shard in which the index has it. `file_of` maps tensors to their files."""
    for name, shard in index["weight_map"].items():
        if file_of.get(name) != shard:
            raise errors.Corrupt(
                f"{path}: tensor {name!r} should be in {shard} and is not: the shard is of another model or version"
            )


# ---- ranges --------------------------------------------------------------------------------------------------------

# Of one request. Each is held twice for a moment, once by the HTTP library.
_PIECE_BYTES = 4 << 20
_CONNECTIONS = 8
# What is read of a file to begin with: most headers fit, and the trailer with the section before it.
_FIRST_BYTES = 256 << 10
_LAST_BYTES = 64 << 10
# Compressed bytes that stay when no call needs them, for slices of one tensor that follow each other.
_KEPT_BYTES = 32 << 20
_TIMEOUT_SECONDS = 30
_TRIES = 5

_PREAMBLE_BYTES = 10
_MOST_HEADER_BYTES = 100_000_000


class _Abandoned(Exception):
    """Nobody waits for these bytes any more."""


class _Wanted:
    """Bytes that at least one call needs."""

    def __init__(self) -> None:
        self.users = 0
        self.ready = threading.Event()
        self.failure: BaseException | None = None


class _Ranges:
    """`.bs` files behind URLs, as Parts of a Reader. The memory of each is a private mapping as long as the file, of
    which only pages that are written to exist; those of payloads that nobody needs are given back."""

    def __init__(self, label: str, repo: str, urls: Sequence[tuple[str, str]], headers: dict[str, str]) -> None:
        self.label = label
        self._repo = repo
        self._headers = headers
        self._urls = [url for _, url in urls]
        self._pid = os.getpid()
        self._reset()
        opened: list[Any] = [None] * len(urls)
        self._opening = [(0, 0)] * len(urls)  # of each file, where what was read first ends, and what was last begins

        def open_one(number: int) -> None:
            opened[number], *ends = self._open(*urls[number])
            self._opening[number] = (ends[0], ends[1])

        _in_parallel(open_one, range(len(urls)), None)
        self.files = [(name, memory) for (name, _), memory in zip(urls, opened)]

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._wanted: dict[Span, _Wanted] = {}
        self._idle: OrderedDict[Span, None] = OrderedDict()

    def _open(self, name: str, url: str) -> tuple[mmap.mmap, int, int]:
        """The memory of one file with all but its payloads in it, and perhaps some of them: all before one offset and
        from another one on. What is wrong with the file the library says."""
        where = self.label + name
        first, size = self._get(url, where, 0, _FIRST_BYTES)
        memory = _reserve(max(size, 1), where)
        memory[: len(first)] = first
        header_end = len(first)
        if size >= _PREAMBLE_BYTES:
            length = int.from_bytes(first[6:_PREAMBLE_BYTES], "little")
            header_end = min(size, _PREAMBLE_BYTES + min(length, _MOST_HEADER_BYTES))
        self._bring(url, where, memory, len(first), header_end, None)
        try:
            header = json.loads(bytes(memory[_PREAMBLE_BYTES:header_end]))
            sections = min(header_end + int(section["offset"]) for section in header["sections"])
        except (ValueError, LookupError, TypeError):
            sections = size
        begin = max(header_end, len(first))
        tail = max(begin, min(sections, size - _LAST_BYTES), size - _MOST_HEADER_BYTES)
        self._bring(url, where, memory, tail, size, None)
        return memory, begin, tail

    @contextlib.contextmanager
    def hold(self, spans: Sequence[Span], stop: threading.Event | None = None) -> Iterator[None]:
        """Parts.hold."""
        if self._pid != os.getpid():  # a child of fork(): its locks may be taken for ever, and threads are gone
            self._pid = os.getpid()
            self._reset()
        held: list[Span] = []
        try:
            todo = [span for span in dict.fromkeys(spans) if span.n_bytes and not self._came_with_opening(span)]
            while todo:
                mine: list[Span] = []
                others: list[tuple[Span, _Wanted]] = []
                with self._lock:
                    for span in todo:
                        wanted = self._wanted.get(span)
                        if wanted is None:
                            wanted = self._wanted[span] = _Wanted()
                            if span in self._idle:
                                del self._idle[span]
                                wanted.ready.set()
                            else:
                                mine.append(span)
                        wanted.users += 1
                        held.append(span)
                        if span not in mine:
                            others.append((span, wanted))
                if mine:
                    self._fetch(mine, stop)
                todo = []
                for span, wanted in others:
                    while not wanted.ready.wait(0.1):
                        if stop is not None and stop.is_set():
                            raise _Abandoned
                    if isinstance(wanted.failure, Exception) and not isinstance(wanted.failure, _Abandoned):
                        raise wanted.failure
                    if wanted.failure is not None:  # another thread gave up: this one does not
                        self._release([span])
                        held.remove(span)
                        todo.append(span)
            yield
        finally:
            self._release(held)

    def _came_with_opening(self, span: Span) -> bool:
        begin, end = self._opening[span.file]
        return span.offset + span.n_bytes <= begin or span.offset >= end

    def _release(self, spans: Iterable[Span]) -> None:
        with self._lock:
            for span in spans:
                wanted = self._wanted.get(span)
                if wanted is None:
                    continue
                wanted.users -= 1
                if wanted.users == 0:
                    del self._wanted[span]
                    if wanted.ready.is_set() and wanted.failure is None:
                        self._idle[span] = None
                    else:
                        self._drop(span)
            while sum(span.n_bytes for span in self._idle) > _KEPT_BYTES:
                self._drop(self._idle.popitem(last=False)[0])

    def _drop(self, span: Span) -> None:
        """Gives memory back: whole pages only, since neighbours may be needed."""
        first = -(-span.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (span.offset + span.n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first and hasattr(mmap, "MADV_DONTNEED"):
            self.files[span.file][1].madvise(mmap.MADV_DONTNEED, first, end - first)

    def _fetch(self, spans: Sequence[Span], stop: threading.Event | None) -> None:
        failure: BaseException | None = None
        try:
            runs: list[list[int]] = []  # file, offset, end: neighbours come together
            for span in sorted(spans):
                if runs and runs[-1][0] == span.file and runs[-1][2] == span.offset:
                    runs[-1][2] += span.n_bytes
                else:
                    runs.append([span.file, span.offset, span.offset + span.n_bytes])
            pieces = [
                (file, at, min(at + _PIECE_BYTES, end))
                for file, offset, end in runs
                for at in range(offset, end, _PIECE_BYTES)
            ]

            def bring(piece: tuple[int, int, int]) -> None:
                file, first, end = piece
                name, memory = self.files[file]
                self._bring(self._urls[file], self.label + name, memory, first, end, stop)

            _in_parallel(bring, pieces, stop)
        except BaseException as error:
            failure = error
            raise
        finally:
            with self._lock:
                for span in spans:
                    wanted = self._wanted[span]
                    wanted.failure = failure
                    wanted.ready.set()

    def _bring(
        self, url: str, where: str, memory: mmap.mmap, first: int, end: int, stop: threading.Event | None
    ) -> None:
        while first < end:
            if stop is not None and stop.is_set():
                raise _Abandoned
            data, size = self._get(url, where, first, min(end, first + _PIECE_BYTES))
            if size != len(memory):
                raise errors.Corrupt(f"{where}: the file had {len(memory)} bytes when it was opened and has {size} now")
            memory[first : first + len(data)] = data
            first += len(data)

    def _get(self, url: str, where: str, first: int, end: int) -> tuple[bytes, int]:
        """Bytes first .. end-1, fewer where the file ends before, and the size of the file."""
        hub = library()
        headers = {**self._headers, "Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
        problem: object = "no answer"
        for _ in range(_TRIES):
            try:
                with hub_errors(self._repo, None):
                    response = hub.utils.http_backoff("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS)
                    if response.status_code != 416:  # a file of 0 bytes has no first one
                        hub.utils.hf_raise_for_status(response)
            except errors.IOFailure as error:
                if not is_network_failure(error.__cause__):
                    raise
                problem = error.__cause__
                continue
            if response.status_code == 416:
                raise errors.Truncated(f"{where}: the file ends before byte {first}")
            said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code != 206 or said is None or int(said.group(1)) != first:
                raise errors.IOFailure(
                    errno.EPROTO,
                    f"{where}: the server does not serve parts of files; download the model first "
                    "(bigsmall.from_pretrained without stream=True)",
                )
            data, size = bytes(response.content), int(said.group(3))
            if len(data) == min(end, size) - first:
                return data, size
            problem = f"{len(data)} of {min(end, size) - first} bytes came"
        raise errors.IOFailure(
            errno.EIO, f"{where}: bytes {first} to {end} cannot be read, after {_TRIES} tries: {problem}"
        )


def _reserve(size: int, where: str) -> mmap.mmap:
    """Memory of that size, of which nothing is used until it is written to."""
    try:
        if hasattr(mmap, "MAP_ANONYMOUS"):
            no_reserve = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        return mmap.mmap(-1, size)
    except OSError as error:
        raise errors.IOFailure(
            error.errno or errno.ENOMEM,
            f"{where}: no address space for its {size} bytes ({error.strerror}): download the model first",
        ) from error


def _in_parallel(work: Any, items: Sequence[Any] | range, stop: threading.Event | None) -> None:
    """work(item) for every item, several at a time; the first failure ends it. The threads are daemons: an interrupted
    program does not wait for the network."""
    if len(items) <= 1:
        for item in items:
            work(item)
        return
    lock, rest, failures = threading.Lock(), iter(items), list[BaseException]()
    idle = threading.Semaphore(0)

    def run() -> None:
        try:
            while not failures and not (stop is not None and stop.is_set()):
                with lock:
                    item = next(rest, rest)
                if item is rest:
                    break
                work(item)
        except BaseException as error:
            failures.append(error)
        finally:
            idle.release()

    count = min(_CONNECTIONS, len(items))
    for _ in range(count):
        threading.Thread(target=run, name="bigsmall-range", daemon=True).start()
    try:
        for _ in range(count):
            idle.acquire()
    except BaseException as interrupted:
        failures.append(interrupted)  # the threads end after the request they are at
        raise
    if failures:
        raise failures[0]
    if stop is not None and stop.is_set():
        raise _Abandoned


# ---- whole models --------------------------------------------------------------------------------------------------


def from_pretrained(
    path_or_repo: Path,
    device: str | int | torch.device = "cpu",
    *,
    base: Path | None = None,
    subfolder: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    stream: bool = False,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """The weights of a model as torch tensors: name to tensor, as `load_state_dict(strict=True)` takes them.

    path_or_repo : `.bs` file, directory (one file, or shards with bigsmall.index.json), or "owner/name" of a repository
                   on the Hub. A local path that does not exist is not looked for there: see `bigsmall.hub.is_repo_id`
    subfolder, revision, token, cache_dir, local_files_only : as in transformers
    stream       : of a repository, decode as the bytes come, and keep no `.bs` file on disk
    base, device, workers, verify, progress : as in `bigsmall.load`

    Where a checkpoint's metadata says that a parameter is another one under a second name, as
    safetensors.torch.save_model writes it, that name is there too, with the same tensor. Weights that transformers ties
    when it builds a model are not in its checkpoints: for them use `bigsmall.integrations.huggingface.from_pretrained`.

    Raises what `bigsmall.hub.local_path` and `bigsmall.load` raise.
    """
    from bigsmall.torch import as_device, read

    target = as_device(device)
    options: dict[str, Any] = {
        "subfolder": subfolder, "revision": revision, "token": token, "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }  # fmt: skip
    if stream:
        reader = open_reader(path_or_repo, base=base, **options)
    else:
        base_path = (
            None if base is None else base_of(base, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        )
        reader = Reader(local_path(path_or_repo, progress=progress, **options), base_path)
    with reader:
        loaded = read(reader, reader.tensors, target, workers=workers, verify=verify, progress=progress)
        for alias, name in (reader.metadata() or {}).items():
            if alias not in loaded and name in loaded:
                loaded[alias] = loaded[name]
    return loaded
