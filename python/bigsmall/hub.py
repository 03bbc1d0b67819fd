"""Models by local path or by the name of a repository on the Hugging Face Hub, and reading `.bs` files there by ranges.

Needs huggingface_hub (`pip install bigsmall[hf]`) only where a repository is named.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import inspect
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Union

from bigsmall import errors
from bigsmall.reader import Reader

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
        raise not_found(os.fsdecode(path_or_repo), "there is no such file or directory")
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
        raise not_found(name, f"there is no such file or directory{hint}")
    if name.lower().endswith(_FILE_SUFFIXES) or os.path.isdir(owner):
        raise not_found(
            name, f"there is no such file or directory; if a repository on the Hub is meant, write {_PREFIX}{name}"
        )
    return True


def not_found(path: str, why: str) -> errors.FileMissing:
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
def hub_errors(
    repo: str, revision: str | None, *, file: str = "", right: str = "the right to read there"
) -> Iterator[None]:
    """What huggingface_hub raises becomes an error that says what to do, and names the `file` where it is about one."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    try:
        yield
    except errors.BigSmallError:
        raise
    except Exception as error:
        # An upload's failure is wrapped once more.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        at = file or f"{constants.ENDPOINT}/{repo}"
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
        elif isinstance(cause, hub.EntryNotFoundError) and not isinstance(cause, hub.LocalEntryNotFoundError):
            made = errors.FileMissing(errno.ENOENT, f"{at}: there is no such file in the repo")
        elif isinstance(cause, hub.LocalEntryNotFoundError):
            made = errors.FileMissing(errno.ENOENT, f"{at}: {' '.join(str(cause).split())}")
        elif isinstance(cause, hub.HfHubHTTPError) and cause.response.status_code == 401:
            made = errors.NotPermitted(errno.EACCES, f"{at}: the Hub knows no such token, or none was given: {log_in}")
        elif isinstance(cause, hub.HfHubHTTPError) and cause.response.status_code == 403:
            made = errors.NotPermitted(
                errno.EACCES,
                f"{at}: the token may not do this: it needs {right} ({cause.server_message})",
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


def commit_of(path_or_repo: Path, revision: str | None, token: str | bool | None) -> str | None:
    """The commit that a repository's branch or tag is at now; `revision` itself where the Hub is not reached, since the
    cache may serve."""
    repo = repo_id(path_or_repo)
    with hub_errors(repo, revision):
        try:
            sha: str | None = library().HfApi(token=token, **who()).model_info(repo, revision=revision).sha
        except Exception as error:
            if not is_network_failure(error):
                raise
            return revision
    return sha


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
        raise not_found(f"{_PREFIX}{repo}/{folder}", f"this holds no .bs file {where}")
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
    from bigsmall._ranges import Ranges

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
            plain = unlisted_of_variants(index, label + INDEX_NAME, shards)
            if plain:
                index, shards = None, plain
            else:
                shards = shards_of(index, label + INDEX_NAME) or shards
            for shard in shards:
                if shard not in names:
                    raise not_found(label + shard, f"{INDEX_NAME} lists this shard, which the repository does not have")
        if not shards:
            raise not_found(label, f"this holds no .bs file at revision {info.sha}")
        cached = [
            hub.try_to_load_from_cache(repo, folder + shard, cache_dir=cache_dir, revision=info.sha) for shard in shards
        ]
        if all(isinstance(path, str) for path in cached):
            return Reader(os.path.dirname(cached[0]), base_path)
        urls = [(shard, hub.hf_hub_url(repo, folder + shard, revision=info.sha)) for shard in shards]
        ranges = Ranges(label, repo, urls, hub.utils.build_hf_headers(token=token, **who()))
        if index is not None:
            ranges.files.append((label + INDEX_NAME, json.dumps(index).encode()))
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
    repo = repo_id(base)
    with hub_errors(repo, None):
        at = snapshot(
            repo,
            allow_patterns=["*.safetensors"],
            ignore_patterns=["*/*"],
            tqdm_class=no_bar(),
            **hub_options,
            **who(),
        )
    if not any(name.endswith(".safetensors") for name in os.listdir(at)):
        raise not_found(f"{_PREFIX}{repo}", "this holds neither .bs nor .safetensors files")
    return at


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
    except (ValueError, RecursionError) as error:
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
    listed = index["metadata"].get("shards") or sorted(set(index["weight_map"].values()))
    if not isinstance(listed, list):
        raise errors.Corrupt(f"{path}: its list of shards is damaged")
    check_names(listed, path)
    return list(listed)


def check_names(shards: Iterable[Any], path: str) -> None:
    """Corrupt where a shard that an index lists is no plain file name, and so may lead out of the folder."""
    for shard in shards:
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise errors.Corrupt(f"{path}: shard {shard!r} is no plain file name")


def unlisted_of_variants(index: dict[str, Any], path: str, files: Sequence[str]) -> list[str]:
    """The plain weights of a folder whose index is one of variants only: those of its `.bs` files that no index lists.
    A Reader of a directory finds them in the same way."""
    listed: set[str] = set()
    for source in index["metadata"].get("source_indexes") or ():
        if source["name"].endswith(".safetensors.index.json"):
            return []
        for file in parse_index(source["text"], f"{path}: {source['name']}")["weight_map"].values():
            listed.add(file.removesuffix(".safetensors") + ".bs")
    return [file for file in files if file not in listed] if listed else []


def check_index(index: dict[str, Any], path: str, file_of: dict[str, str]) -> None:
    """Corrupt where a tensor is not in the shard in which the index has it. `file_of` maps tensors to their files."""
    for name, shard in index["weight_map"].items():
        if file_of.get(name) != shard:
            raise errors.Corrupt(
                f"{path}: tensor {name!r} should be in {shard} and is not: the shard is of another model or version"
            )


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
    verify: bool | None = None,
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
        reader = Reader(
            local_path(path_or_repo, progress=progress, **options), base_path, check_md5=verify is not False
        )
    with reader:
        loaded = read(reader, reader.tensors, target, workers=workers, verify=bool(verify), progress=progress)
        for alias, name in (reader.metadata() or {}).items():
            # Of other metadata only what looks like two names of one parameter.
            same_kind = alias.rpartition(".")[2] == name.rpartition(".")[2]
            if alias not in loaded and name in loaded and same_kind:
                loaded[alias] = loaded[name]
    return loaded
