"""Models for the Hugging Face Hub: a directory ready to be published, and its upload.

    compress_for_hub("owner/name", "name-bs")       # or a directory; writes weights, other files and a model card
    upload_to_hub("name-bs", "owner/name-bs")

Reading from the Hub is in `hub`.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, Union

from bigsmall import api, errors, hub
from bigsmall.integrations import _checkpoint
from bigsmall.reader import Reader
from bigsmall.writer import mode_number

AnyPath = Union[str, "os.PathLike[str]"]

_WEIGHTS = ".safetensors"
_OURS = ".bs"
_INDEX = hub.INDEX_NAME
_CARD = "README.md"
_ATTRIBUTES = ".gitattributes"

# Additions to a model, of peft and of diffusers, which read nothing but safetensors.
_ADAPTERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")

# Exports for other programs: each is the whole model again.
_EXPORTS = re.compile(
    r"\.(gguf|ggml|llamafile|h5|keras|msgpack|ot|pb|tflite|mlmodel|nemo|pdparams|ort|onnx\w*(\.data)?)$"
)
_EXPORT_FOLDERS = {"coreml", "gguf", "metal", "onnx", "openvino", "original"}
_BUNDLES = (".mlpackage", ".mlmodelc")
# Pickles: a second copy beside safetensors, but in a folder without them perhaps the only weights of a component.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# What belongs to git and to the downloader, not to the model.
_NOT_OF_THE_MODEL = (".git", ".cache/huggingface")

# The Hub stores larger files only where .gitattributes gives them to LFS.
_PLAIN_GIT_BYTES = 10_000_000


@dataclass(frozen=True)
class CompressedFile:
    """One weight file: `name` relative to the directory, sizes in bytes, `sha256` of the source in hexadecimal."""

    name: str
    source_bytes: int
    compressed_bytes: int
    sha256: str

    @property
    def ratio_pct(self) -> float:
        """compressed / source in percent."""
        return 100 * self.compressed_bytes / self.source_bytes


@dataclass(frozen=True)
class HubDirectory:
    """What compress_for_hub wrote. `left_out` names the source's files that are not in it, sorted."""

    path: str
    files: list[CompressedFile]
    left_out: list[str] = field(default_factory=list)

    @property
    def source_bytes(self) -> int:
        return sum(file.source_bytes for file in self.files)

    @property
    def compressed_bytes(self) -> int:
        return sum(file.compressed_bytes for file in self.files)

    @property
    def ratio_pct(self) -> float:
        """compressed / source in percent."""
        return 100 * self.compressed_bytes / self.source_bytes


def compress_for_hub(
    repo_or_dir: AnyPath,
    output_dir: AnyPath,
    mode: str = "balanced",
    workers: int | None = None,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    keep: str | Sequence[str] = (),
    force: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: AnyPath | None = None,
    local_files_only: bool = False,
    progress: bool = False,
) -> HubDirectory:
    """Compresses a model to a directory that is ready for the Hub.

    repo_or_dir      : model directory, taken as it is, or Hub repo id, whose files are then downloaded to the Hub cache
    output_dir       : the directory to write; what an earlier call wrote for the same weights is replaced
    mode, workers    : as in `compress`
    repo_id          : where it will be published, for the example in the model card
    base_model       : repo id of the source where `repo_or_dir` is a directory, for the model card
    keep             : patterns (fnmatch, on paths such as "sub/x.bin") of files not to leave out
    force            : replace an existing, non-empty target directory, whatever it holds
    revision         : branch, tag or commit of the repo
    token            : as in huggingface_hub: None for the stored one, False for none
    cache_dir        : of the Hub's downloads, None for the usual one
    local_files_only : use only what the cache has, as with HF_HUB_OFFLINE=1: the whole repo, by the list of its files
                       that snapshot_download leaves there
    progress         : show bars on standard error, where that is a terminal

    Every `X.safetensors` becomes `X.bs`, indexes become bigsmall.index.json, and every other file is copied, links
    followed, but for weights in other formats (PyTorch's pickles beside safetensors, ONNX, GGUF, Keras, ...) and second
    copies (`original/`, `consolidated*.safetensors`). Those are left out, and listed on standard error and in the
    result. README.md gets the metadata, the sizes and SHA-256 of the weights, and the original card below.
    Adapters beside a model (`adapter_model.safetensors`, `pytorch_lora_weights.safetensors`) stay as they are, since
    peft and diffusers read nothing else.

    The same source gives the same bytes. The source is only read; the directory appears whole or not at all.
    Raises InvalidArgument where there are no safetensors files or only an adapter, where one directory lies within the
    other, or where the source is compressed already; FileMissing for what does not exist, and offline where a file of
    the repo is not in the cache or the cache lacks the list of them; NotPermitted where the token does not suffice;
    FilePresent where `output_dir` is a file, or without `force` holds anything but an earlier result for the same
    weights, by their SHA-256, or where files appear in it meanwhile; and what `compress` raises.
    """
    hub.library()  # which brings yaml too; better missed now than after the work
    mode_number(mode)
    source = os.fsdecode(repo_or_dir)
    keep = [keep] if isinstance(keep, str) else keep
    left_out: set[str] = set()
    if hub.is_repo_id(repo_or_dir):
        base_model = hub.repo_id(source)
        root, left_out = _download(base_model, keep, revision, token, cache_dir, local_files_only, progress)
    elif os.path.isdir(source):
        root = source
    else:
        raise errors.NoDirectory(errno.ENOTDIR, f"{source} is no directory: give the one that holds the model", source)
    output = os.path.realpath(output_dir)
    _apart(root, output)
    _sweep(output)
    with _own_errors():
        found = _walk(root, _NOT_OF_THE_MODEL)
        _not_through(found, output)
        split = _split(source, found, keep)
        left_out.update(split.left_out)
        replaces = _replaceable(output, split, force, lambda name: _sha256(split.files[split.source_of[name]]))
        card = _card(split, root, base_model, repo_id or f"OWNER/{os.path.basename(output)}")
        if left_out:
            print(
                f"left out, weights of other formats or second copies: {', '.join(sorted(left_out))}", file=sys.stderr
            )
        with _beside(output) as work:
            stage, made = os.path.join(work, "source"), os.path.join(work, _MADE)
            _stage(split, root, stage)
            try:
                api.compress(stage, made, mode, workers, sha256=True, progress=progress)
            except errors.BigSmallError as error:
                raise _with_paths(error, {stage: root, made: output}) from None
            result = HubDirectory(output, [_described(split, name, made) for name in split.weights], sorted(left_out))
            for name in split.adapters:
                _copy(split.files[name], os.path.join(made, *name.split("/")))
            _write(os.path.join(made, _CARD), card.text(result))
            _write(os.path.join(made, _ATTRIBUTES), _attributes(split.files.get(_ATTRIBUTES), made))
            sums = {file.name: file.sha256 for file in result.files}
            # Once more: hours may have passed.
            _take_place(work, output, replaces and _replaceable(output, split, force, sums.__getitem__))
    return result


def upload_to_hub(
    directory: AnyPath,
    repo_id: str,
    *,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a directory of `.bs` files in one commit; returns the commit's address, or the pull request's.

    directory      : as compress_for_hub or `compress` wrote it
    repo_id        : "owner/name"; made where it does not exist
    private        : the repo must be private: made so, or so already; False for what is usual there (public, or as the
                     organization has it)
    token          : as in huggingface_hub: None for the stored one
    revision       : branch to commit to, made where it does not exist; None for main
    commit_message : None for a plain one
    create_pr      : open a pull request to an existing repo instead

    First every `.bs` file is opened, and every index must find its tensors: nothing is sent where that fails. `.bs`
    files and indexes that the repo has and the directory has not are deleted in the same commit, since a reader would
    mix them; all other files of the repo stay.

    Raises Corrupt, Truncated, Unsupported or FileMissing for the files; NotPermitted where the token is missing or has
    not the rights; InvalidArgument for an impossible repo id and for a public repo where `private` is asked for.
    """
    folder = os.fsdecode(directory)
    with _own_errors():
        _check(folder)
    with hub.hub_errors(repo_id, revision, right="the right to write there"):
        client = hub.library().HfApi(token=token, **hub.who())
        if not create_pr:
            client.create_repo(repo_id, private=private or None, exist_ok=True)
            if revision is not None and not revision.startswith("refs/"):
                client.create_branch(repo_id, branch=revision, exist_ok=True)
        if private and not client.repo_info(repo_id).private:
            raise errors.InvalidArgument(
                f"{repo_id} exists and is public: make it private first, or choose another name"
            )
        commit = client.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload weights compressed by BigSmall",
            create_pr=create_pr,
            delete_patterns=[f"*{_OURS}", f"*{_INDEX}"],
        )
    return str(commit.pr_url if create_pr else commit.commit_url)


# ---- what of the source is used --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """`files` are all that is used, by name; `weights` those of them to be compressed, `adapters` those that no program
    could read then."""

    files: dict[str, str]
    weights: list[str]
    adapters: list[str]
    left_out: list[str]

    @property
    def source_of(self) -> dict[str, str]:
        """The names of the compressed files, and of what they are made."""
        return {_compressed_name(name): name for name in self.weights}

    def targets(self) -> set[str]:
        """Every name that the output may have."""
        names = {name for name in self.files if name not in self.weights}
        names.update(self.source_of)
        names.update(str(PurePosixPath(name).parent / _INDEX) for name in self.weights)
        return names | {_CARD, _ATTRIBUTES}


def _compressed_name(name: str) -> str:
    return name[: -len(_WEIGHTS)] + _OURS


def _split(source: str, files: dict[str, str], keep: Sequence[str]) -> _Split:
    """Decides about every file. `files` maps names, relative and with "/", to whatever the caller wants back."""
    for name in files:
        if name.endswith(_OURS) or PurePosixPath(name).name == _INDEX:
            raise errors.InvalidArgument(f"{source} holds {name}: it is compressed already")
    adapters = {name for name in files if PurePosixPath(name).name in _ADAPTERS}
    weights = {name for name in files if name.endswith(_WEIGHTS)} - adapters
    kept = {name for name in files if any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)}
    left_out = _second_copies(weights) - kept
    if adapters and not weights:
        raise errors.InvalidArgument(
            f"{source} holds no model, only an adapter ({', '.join(sorted(adapters)[:5])}), which its library reads "
            f"only as {_WEIGHTS}: publish it as it is"
        )
    if not weights:
        other = sorted(name for name in files if _is_export(name) or name.endswith(_PICKLES))
        found = f"; its weights ({', '.join(other[:5])}) have to be converted first" if other else ""
        raise errors.InvalidArgument(f"{source} holds no {_WEIGHTS} file{found}")
    with_weights = {PurePosixPath(name).parent for name in weights - left_out}
    copies = {_family(name) for name in left_out}
    for name in files.keys() - weights - adapters - kept:
        of = name[: -len(".index.json")] if name.endswith(".index.json") else name
        stem, suffix = os.path.splitext(of)
        in_export = bool(_EXPORT_FOLDERS.intersection(PurePosixPath(name).parts[:-1]))
        openvino = suffix in (".bin", ".xml") and f"{stem}.bin" in files and f"{stem}.xml" in files
        if (
            _is_export(of)
            or openvino
            or (suffix in _PICKLES and (in_export or PurePosixPath(name).parent in with_weights))
            or (suffix in _PICKLES and stem + _WEIGHTS in adapters)
            or (suffix == _WEIGHTS and _family(of) in copies)
        ):
            left_out.add(name)
    used = {name: files[name] for name in sorted(files) if name not in left_out}
    return _Split(used, [name for name in used if name in weights], sorted(adapters), sorted(left_out))


def _is_export(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(_EXPORTS.search(parts[-1])) or any(part.endswith(_BUNDLES) for part in parts[:-1])


def _family(name: str) -> tuple[PurePosixPath, bool]:
    """Files of one folder, those under the name of Mistral's format apart."""
    path = PurePosixPath(name)
    return path.parent, path.name.startswith("consolidated")


def _second_copies(weights: set[str]) -> set[str]:
    """Safetensors files that hold again, in the names of the model's first release, what others hold."""
    original = {name for name in weights if name.startswith("original/")}
    copies = original if original != weights else set()
    families = {_family(name) for name in weights - copies}
    return copies | {name for name in weights if _family(name)[1] and (PurePosixPath(name).parent, False) in families}


def _walk(root: str, skip: Sequence[str] = ()) -> dict[str, str]:
    """Every file below `root`, links followed: its name, relative and with "/", to its path. `skip` are names."""
    files: dict[str, str] = {}

    def walk(at: str, prefix: str, above: tuple[os.stat_result, ...]) -> None:
        here = os.stat(at)
        if any(os.path.samestat(here, folder) for folder in above):
            raise errors.InvalidArgument(f"{at} links to a directory above it")
        for entry in os.scandir(at):
            name = prefix + entry.name
            if name in skip:
                continue
            if entry.is_dir():
                walk(entry.path, f"{name}/", (*above, here))
            elif entry.is_file():
                files[name] = entry.path
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise errors.FileMissing(errno.ENOENT, f"{entry.path} links to what does not exist", entry.path)
            else:
                raise errors.InvalidArgument(f"{entry.path} is neither file nor directory")

    walk(root, "", ())
    return files


# ---- the directory ---------------------------------------------------------------------------------------------------


@contextmanager
def _own_errors() -> Iterator[None]:
    """An OSError of Python's own file functions becomes one of this package."""
    try:
        yield
    except errors.BigSmallError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        path = "" if error.filename is None else os.fsdecode(error.filename)
        text = f"{path}: {error.strerror}" if path else str(error.strerror)
        raise errors.from_status(errors.IO, text, error.errno, [path]) from error


def _apart(root: str, output: str) -> None:
    source = os.path.realpath(root)
    if os.path.commonpath([source, output]) in (source, output):
        raise errors.InvalidArgument(
            f"{output} and the source {source} lie within each other: choose a target elsewhere"
        )


def _not_through(files: dict[str, str], output: str) -> None:
    """Refuses an output that links in the source lead into: what they lead to would be replaced."""
    for path in files.values():
        if os.path.commonpath([os.path.realpath(path), output]) == output:
            raise errors.InvalidArgument(f"{path} links into {output}: choose a target elsewhere")


def _replaceable(output: str, split: _Split, force: bool, sha256: Callable[[str], str]) -> bool:
    """Whether the output is there and holds something, which may be replaced: FilePresent where it may not. `sha256`
    tells that of the source of a compressed file."""
    if not os.path.lexists(output):
        return False
    if not os.path.isdir(output):
        raise errors.FilePresent(errno.EEXIST, f"{output} exists and is no directory", output)
    if not os.listdir(output):
        return False
    reason = None if force else _only_copy(output, split, sha256)
    if reason is not None:
        raise errors.FilePresent(
            errno.EEXIST,
            f"{output} {reason}: remove it, choose another directory, or replace it by force=True",
            output,
        )
    return True


def _only_copy(output: str, split: _Split, sha256: Callable[[str], str]) -> str | None:
    """Why a directory may hold what is nowhere else; None where it is an earlier result for the same weights."""
    there = _walk(output)
    foreign = sorted(there.keys() - split.targets())
    if foreign:
        return f"holds other files ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''})"
    compressed = sorted(there.keys() & split.source_of.keys())
    if not compressed or _CARD not in there or _CARD_BEGIN.encode() not in Path(there[_CARD]).read_bytes():
        return f"holds other files, not those of compress_for_hub: there is no {_OURS} file or no {_CARD} of its own"
    for name in compressed:
        try:
            known = api.info(there[name])["sha256"] == sha256(name)
        except errors.IOFailure:
            raise
        except errors.BigSmallError as error:
            return f"is no result of compress_for_hub, or a damaged one ({error})"
        if not known:
            return f"holds other weights than the source: the SHA-256 behind {name} differs"
    for name in there.keys() & set(split.adapters):
        if _sha256(there[name]) != _sha256(split.files[name]):
            return f"holds other weights than the source: {name} differs"
    return None


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# Within the directory beside the output: what is made, and meanwhile what it replaces.
_MADE, _OLD = "made", "old"


@contextmanager
def _beside(output: str) -> Iterator[str]:
    """A directory beside `output`, removed in the end, but never with the user's own files."""
    parent, name = os.path.split(output)
    if not os.path.isdir(parent):
        raise errors.FileMissing(errno.ENOENT, f"{parent}, where {name} is to be written, is no directory", parent)
    while True:
        work = tempfile.mkdtemp(prefix=f".{name}.hub-", dir=parent)
        lock = _lock(work)
        if os.path.isdir(work):
            break
        if lock is not None:  # another process took it for a leftover before it was locked
            os.close(lock)
    try:
        yield work
    except BaseException as error:
        if _half_replaced(work):
            _say_where(os.path.join(work, _OLD), output, error)
        raise
    finally:
        if not _half_replaced(work):
            shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: str) -> int | None:
    """A descriptor that holds the folder's lock until it is closed, or None where someone else holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(number)
        return None
    return number


def _sweep(output: str) -> None:
    """Removes what processes that were killed left beside the output, and puts back what one was about to replace."""
    parent, name = os.path.split(output)
    for work in glob.glob(os.path.join(glob.escape(parent), glob.escape(f".{name}.hub-") + "?" * 8)):
        lock = _lock(work)
        if lock is None:
            continue
        try:
            if _half_replaced(work) and not os.path.lexists(output):
                os.rename(os.path.join(work, _OLD), output)
            if not _half_replaced(work):
                shutil.rmtree(work, ignore_errors=True)
        finally:
            os.close(lock)


def _half_replaced(work: str) -> bool:
    """Whether the old directory was moved here, and the new one has not taken its place."""
    return all(os.path.lexists(os.path.join(work, name)) for name in (_MADE, _OLD))


def _say_where(old: str, output: str, error: BaseException) -> NoReturn:
    text = f"{output} was not replaced, and what it held could not be put back: it is in {old}, move it back from there"
    if isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt(text) from error
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    raise errors.IOFailure(number, f"{text} ({error!r})", old) from error


def _stage(split: _Split, root: str, stage: str) -> None:
    """Makes a directory of links to the files that are used; the others are written later."""
    os.mkdir(stage)
    os.chmod(stage, os.stat(root).st_mode & 0o777 | 0o700)  # which the output inherits
    for name, path in split.files.items():
        if name in split.weights or name in split.adapters:
            with open(path, "rb") as file:
                if file.read(64).startswith(b"version https://git-lfs.github.com/spec/"):
                    raise errors.InvalidArgument(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull`")
        if name in (_CARD, _ATTRIBUTES, *split.adapters):
            continue
        link = os.path.join(stage, *name.split("/"))
        os.makedirs(os.path.dirname(link), exist_ok=True)
        os.symlink(os.path.realpath(path), link)


def _with_paths(error: errors.BigSmallError, paths: dict[str, str]) -> errors.BigSmallError:
    """The same error, which names files by the user's paths."""

    def named(text: Any) -> Any:
        for ours, theirs in paths.items():
            text = text.replace(ours, theirs) if isinstance(text, str) else text
        return text

    if isinstance(error, errors.IOFailure):
        where = [] if error.filename is None else [named(error.filename)]
        return type(error)(error.errno, named(error.strerror), *where)
    return type(error)(*map(named, error.args), status=error.status)


def _described(split: _Split, name: str, made: str) -> CompressedFile:
    target = _compressed_name(name)
    said = api.info(os.path.join(made, target))
    return CompressedFile(target, os.stat(split.files[name]).st_size, said["file_size"], said["sha256"])


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy(path: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copy(path, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def _check(folder: str) -> None:
    """Opens every `.bs` file below the folder, and every index with the shards that it lists of all variants."""
    if not os.path.isdir(folder):
        raise errors.FileMissing(errno.ENOENT, f"{folder} is no directory", folder)
    files = _walk(folder, _NOT_OF_THE_MODEL)
    if not any(name.endswith(_OURS) for name in files):
        raise errors.InvalidArgument(f"{folder} holds no {_OURS} file: compress_for_hub makes such a directory")
    for name, path in sorted(files.items()):
        is_index = PurePosixPath(name).name == _INDEX
        if not is_index and not name.endswith(_OURS):
            continue
        # A delta's base is not needed: that it misses shows only once the rest was found right.
        with suppress(errors.WrongBase):
            Reader(os.path.dirname(path) if is_index else path).close()
        if is_index:
            with suppress(errors.WrongBase):
                _checkpoint.check_folder(os.path.dirname(path))


def _take_place(work: str, output: str, replaces: bool) -> None:
    made, old = os.path.join(work, _MADE), os.path.join(work, _OLD)
    if not replaces:
        try:
            os.rename(made, output)  # which replaces an empty directory and nothing else
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise errors.FilePresent(
                errno.EEXIST, f"{output}: files appeared there while the model was compressed; they were kept", output
            ) from None
        return
    try:
        os.rename(output, old)
        os.rename(made, output)
    except BaseException:
        if _half_replaced(work):
            os.rename(old, output)
        raise


def _attributes(existing: str | None, made: str) -> bytes:
    """.gitattributes: the source's, and LFS for the `.bs` files and for what is too large without it."""
    text = Path(existing).read_bytes() if existing else b""
    lines = text.decode("utf-8", "replace").splitlines()
    patterns = [line.split()[0] for line in lines if "filter=lfs" in line.split()[1:]]
    wanted = [f"*{_OURS}"] if f"*{_OURS}" not in patterns else []
    for name, path in sorted(_walk(made).items()):
        known = any(
            fnmatch.fnmatchcase(name if "/" in pattern else PurePosixPath(name).name, pattern.lstrip("/"))
            for pattern in [*patterns, f"*{_OURS}"]
        )
        if os.stat(path).st_size > _PLAIN_GIT_BYTES and not known:
            wanted.append(name.replace(" ", "[[:space:]]"))
    added = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in wanted)
    return text + (b"\n" if text and not text.endswith(b"\n") and added else b"") + added.encode()


# ---- the model card --------------------------------------------------------------------------------------------------

_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_CARD_BEGIN, _CARD_END = "<!-- bigsmall: sizes -->", "<!-- bigsmall: end -->"
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})\Z")
_TAGS = ("bigsmall", "lossless", "compression")


@dataclass(frozen=True)
class _Card:
    """What of the model card is known before the work: the metadata as YAML, how the source is called, the link to it,
    the lines of the example, and the original's text."""

    metadata: str
    title: str
    source: str
    example: list[str]
    body: str

    def text(self, result: HubDirectory) -> bytes:
        """README.md: the metadata, what was done, and the original card, whose bytes stay as they are."""
        lines = [
            _CARD_BEGIN,
            f"# {self.title}, compressed without loss",
            "",
            f"The weights of {self.source}, compressed by BigSmall to {result.ratio_pct:.2f} % of their size.",
            "Decompressed, they are the original files, byte for byte.",
            "",
            "```python",
            *self.example,
            "```",
            "",
            "`bigsmall.decompress(directory, target)` writes the original files and checks them against the SHA-256 "
            "below.",
            "",
            "| file | original bytes | compressed bytes | percent | SHA-256 of the original |",
            "|---|---:|---:|---:|---|",
        ]
        for file in result.files:
            sizes = f"{file.source_bytes:,} | {file.compressed_bytes:,} | {file.ratio_pct:.2f}"
            lines.append(f"| `{file.name}` | {sizes} | `{file.sha256}` |")
        lines.append(f"| total | {result.source_bytes:,} | {result.compressed_bytes:,} | {result.ratio_pct:.2f} | |")
        lines += [_CARD_END, ""]
        body = "\n" + self.body.lstrip("\r\n") if self.body.strip() else ""
        return ("\n".join([f"---\n{self.metadata}---", "", *lines]) + body).encode("utf-8", "surrogateescape")


def _card(split: _Split, root: str, base_model: str | None, target: str) -> _Card:
    """The card of a model that will be published as the repo `target`."""
    existing = split.files.get(_CARD)
    original = "" if existing is None else Path(existing).read_bytes().decode("utf-8", "surrogateescape")
    original = original.removeprefix("\ufeff")
    data, body = _front_matter(original)
    body = re.sub(f"{_CARD_BEGIN}.*?{_CARD_END}\\s*", "", body, flags=re.DOTALL)  # of a model compressed before
    snapshot = _SNAPSHOT.search(os.path.abspath(root))
    if base_model is None and snapshot:
        base_model = snapshot[1].replace("--", "/", 1)
    title = base_model or os.path.basename(os.path.realpath(root))
    of = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else title
    at = f" at commit `{snapshot[2]}`" if snapshot else ""
    return _Card(_metadata(data, base_model), title, of + at, _example(split, target), body)


def _front_matter(text: str) -> tuple[dict[str, Any], str]:
    """The metadata of a model card and the text after it. What cannot be read as metadata counts as text."""
    import yaml

    # Scalars as in YAML 1.2, which the Hub reads: 1.1 takes the language `no` for false and 12:30 for a number.
    loader: Any = type("Loader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": {}})
    for tag, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ):
        loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"), first)
    match = _FRONT_MATTER.match(text)
    try:
        data = yaml.load(match[1], loader) if match else None
    except Exception:  # of many kinds: a KeyError for "!!bool x", a RecursionError for too many brackets
        data = None
    if match is None or not isinstance(data, dict):
        return {}, text
    return data, text[match.end() :]


def _metadata(original: dict[str, Any], base_model: str | None) -> str:
    """The YAML of the new card: the original's but for results, which are the source's, and what names the library."""
    import yaml

    data: dict[str, Any] = {"library_name": "bigsmall"}
    if base_model is not None:
        data["base_model"] = base_model
        data["base_model_relation"] = "quantized"  # the Hub's word for the same model in other bytes
    skip = (*data, "model-index", "tags")
    data.update({key: value for key, value in original.items() if isinstance(key, str) and key not in skip})
    tags = original.get("tags")
    said = [*(tags if isinstance(tags, list) else [tags]), original.get("library_name")]
    data["tags"] = list(dict.fromkeys([*(tag for tag in said if isinstance(tag, str) and tag), *_TAGS]))
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    return text


def _example(split: _Split, target: str) -> list[str]:
    """How to load the model, in three lines."""
    if "model_index.json" in split.files:
        return [
            "from bigsmall.integrations.diffusion import load_pipeline",
            "",
            f'pipeline = load_pipeline("{target}")',
        ]
    if "modules.json" in split.files:
        model = [
            "import bigsmall, sentence_transformers",
            f'model = sentence_transformers.SentenceTransformer("{target}")',
        ]
    elif (architecture := _architecture(split.files.get("config.json"))) is not None:
        name, options = architecture
        model = ["import bigsmall, transformers", f'model = transformers.{name}.from_pretrained("{target}"{options})']
    else:
        return ["import bigsmall", "", f'tensors = bigsmall.from_pretrained("{target}")  # name -> torch tensor']
    return [model[0], "bigsmall.install_hook()", model[1]]


def _architecture(config: str | None) -> tuple[str, str] | None:
    """The class of transformers that a config.json names, and further arguments."""
    try:
        said = json.loads(Path(config).read_bytes()) if config else None
    except ValueError:
        return None
    if not isinstance(said, dict) or "model_type" not in said:
        return None
    if "auto_map" in said:
        return "AutoModel", ", trust_remote_code=True"
    names = said.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return (name if isinstance(name, str) and name.isidentifier() else "AutoModel"), ""


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def _download(
    repo_id: str,
    keep: Sequence[str],
    revision: str | None,
    token: str | bool | None,
    cache_dir: AnyPath | None,
    local_files_only: bool,
    progress: bool,
) -> tuple[str, set[str]]:
    """Downloads what is used of a repo to the Hub's cache: where that is, and what was left out."""
    from huggingface_hub import constants

    offline = local_files_only or constants.HF_HUB_OFFLINE
    with hub.hub_errors(repo_id, revision):
        if offline:
            names = _cached_names(repo_id, revision, cache_dir)
        else:
            found = hub.library().HfApi(token=token, **hub.who()).repo_info(repo_id, revision=revision)
            names = [file.rfilename for file in found.siblings]
        left_out = set(_split(repo_id, {name: name for name in names}, keep).left_out)
        root = hub.snapshot(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=offline,
            ignore_patterns=[glob.escape(name) for name in sorted(left_out)],
            tqdm_class=None if progress else hub.no_bar(),
            **hub.who(),
        )
    # Where the network fails, older huggingface_hub is content with what the cache has.
    missing = [name for name in names if name not in left_out and not os.path.isfile(os.path.join(root, name))]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise errors.FileMissing(
            errno.ENOENT,
            f"{repo_id}: the cache lacks {len(missing)} of its files ({some}): download it once more",
            root,
        )
    return root, left_out


def _cached_names(repo_id: str, revision: str | None, cache_dir: AnyPath | None) -> list[str]:
    """The repo's files, by the list that snapshot_download leaves in the cache. FileMissing where there is none: what
    the cache has may be half a repo then, such as the weights that a program loaded, without a tokenizer."""
    import huggingface_hub

    if not hasattr(huggingface_hub, "get_cached_repo_tree"):
        known = f"huggingface_hub {huggingface_hub.__version__} keeps none (a newer one does)"
    else:
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        with suppress(CachedRepoTreeNotFoundError):
            tree = huggingface_hub.get_cached_repo_tree(repo_id, revision=revision, cache_dir=cache_dir)
            return [file.path for file in tree]
        known = "the cache has none"
    at = "" if revision is None else f", revision={revision!r}"
    raise errors.FileMissing(
        errno.ENOENT,
        f"{repo_id}: no network, and no list of the repo's files, without which missing ones would not be noticed: "
        f"{known}; call huggingface_hub.snapshot_download({repo_id!r}{at}) once with network, or give the directory of "
        "a complete download instead of the repo's name",
    )
