"""Files and directories: compress, restore, look into, check, repair; and which instructions that uses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union, overload

from bigsmall import _native
from bigsmall.reader import Reader
from bigsmall.writer import FLAG_FORCE, FLAG_NO_REPLACE, FLAG_SHA256, MODES, compat_flag, compress_options

if TYPE_CHECKING:
    import numpy as np

Path = Union[str, "os.PathLike[str]"]

# Room for the list of bad tensors, some ten thousand of them; more are counted but not named.
_REPORT_BYTES = 4 << 20


def _run(
    function: Callable[[Any, Any, Any], int], workers: int | None, progress: str | None, paths: list[Path]
) -> dict[str, int]:
    """Runs a call on files, function(job, result, error), and gives its bs_result."""
    ffi, _ = _native.library()
    result = ffi.new("bs_result *")
    result.size = ffi.sizeof("bs_result")
    _native.call_long(
        lambda job, error: function(job, result, error),
        workers=workers,
        progress=progress,
        paths=[os.fsdecode(path) for path in paths],
    )
    return {name: getattr(result, name) for name in ("source_bytes", "output_bytes", "n_tensors", "n_files")}


def _compress(
    src: Path,
    base: Path | None,
    dst: Path,
    *,
    mode: str,
    workers: int | None,
    sha256: bool,
    overwrite: bool,
    force: bool,
    parity: int,
    compat: str | None,
    progress: bool,
) -> dict[str, int]:
    flags = FLAG_SHA256 * sha256 | FLAG_NO_REPLACE * (not overwrite) | FLAG_FORCE * force | compat_flag(compat)
    options = compress_options(mode, flags, parity)
    c_src, c_dst = _native.path_bytes(src), _native.path_bytes(dst)
    label = "compressing" if progress else None
    if base is None:
        lib = _native.library().lib
        return _run(
            lambda job, result, error: lib.bs_compress(c_src, c_dst, options, job, result, error),
            workers,
            label,
            [src, dst],
        )
    c_base = _native.path_bytes(base)
    lib = _native.library().lib
    return _run(
        lambda job, result, error: lib.bs_compress_delta(c_src, c_base, c_dst, options, job, result, error),
        workers,
        label,
        [src, base, dst],
    )


def _decompress(
    src: Path, dst: Path, *, base: Path | None, workers: int | None, overwrite: bool, force: bool, progress: bool
) -> dict[str, int]:
    ffi, lib = _native.library()
    options = ffi.new("bs_decompress_options *")
    options.size = ffi.sizeof("bs_decompress_options")
    options.flags = FLAG_NO_REPLACE * (not overwrite) | FLAG_FORCE * force
    c_base = ffi.NULL if base is None else ffi.new("char[]", _native.path_bytes(base))
    options.base = c_base  # a plain pointer: the local variable keeps the text alive until the call is over
    c_src, c_dst = _native.path_bytes(src), _native.path_bytes(dst)
    return _run(
        lambda job, result, error: lib.bs_decompress(c_src, c_dst, options, job, result, error),
        workers,
        "decompressing" if progress else None,
        [src, dst] if base is None else [src, dst, base],
    )


def compress(
    src: Path,
    dst: Path,
    mode: str = "balanced",
    workers: int | None = None,
    *,
    sha256: bool = False,
    overwrite: bool = True,
    force: bool = False,
    parity: int = 0,
    compat: str | None = None,
    progress: bool = False,
) -> str:
    """Compresses a `.safetensors` file to a `.bs` file, or a model directory to a new directory; returns `dst`.

    mode      : "balanced", "inference" (fastest decoding) or "storage" (smallest); any reader reads all three
    workers   : threads, None for all available
    sha256    : store the SHA-256 of the whole source, which decompress then checks
    overwrite : False refuses to replace an existing file (FileExistsError)
    force     : replace an existing, non-empty target directory
    parity    : percent of the file, 0 to 100, that is added so that `repair` can mend as much damage
    compat    : "1.0" writes what release 1.0.0 of the original bigsmall package reads; Unsupported names a tensor that
                it cannot hold. Scalars come back there with the shape [1]
    progress  : show a bar on standard error, where that is a terminal

    What is written is decoded again and compared before it takes the name `dst`; on any failure, and on Ctrl-C, nothing
    is left behind. Raises OSError, or InvalidArgument where `src` is no safetensors file.
    """
    _compress(
        src,
        None,
        dst,
        mode=mode,
        workers=workers,
        sha256=sha256,
        overwrite=overwrite,
        force=force,
        parity=parity,
        compat=compat,
        progress=progress,
    )
    return os.fsdecode(dst)


def compress_delta(
    finetune: Path,
    base: Path,
    dst: Path,
    mode: str = "balanced",
    workers: int | None = None,
    *,
    sha256: bool = False,
    overwrite: bool = True,
    force: bool = False,
    parity: int = 0,
    progress: bool = False,
) -> str:
    """Compresses a fine-tune as its difference to a base model; returns `dst`. To read it, the same base is needed.

    finetune : `.safetensors` file or model directory
    base     : `.safetensors` file, `.bs` file or directory of either

    The other arguments and the errors are those of `compress`.
    """
    _compress(
        finetune,
        base,
        dst,
        mode=mode,
        workers=workers,
        sha256=sha256,
        overwrite=overwrite,
        force=force,
        parity=parity,
        compat=None,
        progress=progress,
    )
    return os.fsdecode(dst)


@overload
def decompress(
    src: Path,
    dst: None = None,
    *,
    base: Path | None = None,
    workers: int | None = None,
    overwrite: bool = True,
    force: bool = False,
    progress: bool = False,
) -> dict[str, np.ndarray[Any, Any]]: ...
@overload
def decompress(
    src: Path,
    dst: Path,
    *,
    base: Path | None = None,
    workers: int | None = None,
    overwrite: bool = True,
    force: bool = False,
    progress: bool = False,
) -> str: ...
def decompress(
    src: Path,
    dst: Path | None = None,
    *,
    base: Path | None = None,
    workers: int | None = None,
    overwrite: bool = True,
    force: bool = False,
    progress: bool = False,
) -> dict[str, np.ndarray[Any, Any]] | str:
    """Gives back what was compressed: in memory without `dst`, as the original file with it.

    src       : `.bs` file or directory
    dst       : `.safetensors` file, or directory, to write: byte for byte the source, every tensor's MD5 checked
                before it appears
    base      : the base model where `src` is a delta
    workers   : threads, None for all available
    overwrite : False refuses to replace an existing file (FileExistsError)
    force     : replace an existing, non-empty target directory
    progress  : show a bar on standard error, where that is a terminal

    Without `dst` returns a dict of name to numpy array: fresh, writable memory for each, in the shapes of the source.
    bfloat16 and the float8 types have the dtypes of ml_dtypes. Types that share bytes come packed as uint8:
    float4_e2m1fn_x2 with its last dimension halved, as torch packs it, the float6 types as [bytes].
    With `dst` returns `dst`; nothing is decoded to memory, since a file may be larger than that.

    Raises OSError, Corrupt, Truncated, ChecksumMismatch, Unsupported or WrongBase.
    """
    if dst is not None:
        _decompress(src, dst, base=base, workers=workers, overwrite=overwrite, force=force, progress=progress)
        return os.fsdecode(dst)
    from bigsmall.numpy import read

    with Reader(src, base) as reader:
        return read(reader, reader.tensors, workers=workers, progress="decompressing" if progress else None)


def convert(
    src: Path,
    dst: Path,
    mode: str = "balanced",
    workers: int | None = None,
    *,
    base: Path | None = None,
    compat: str | None = None,
    parity: int = 0,
    overwrite: bool = True,
    force: bool = False,
    progress: bool = False,
) -> str:
    """Writes a `.bs` file or directory anew, such as one of the original bigsmall package (1.0.0 to 4.0.0), without
    restoring it in between; returns `dst`. Every tensor's MD5 is compared on the way.

    base : the base model where `src` is a delta; what is written is a difference to it again

    The other arguments are those of `compress`, the errors those of `compress` and `decompress`.
    """
    flags = FLAG_NO_REPLACE * (not overwrite) | FLAG_FORCE * force | compat_flag(compat)
    options = compress_options(mode, flags, parity)
    ffi, lib = _native.library()
    c_src, c_dst = _native.path_bytes(src), _native.path_bytes(dst)
    c_base = ffi.NULL if base is None else _native.path_bytes(base)
    _run(
        lambda job, result, error: lib.bs_convert(c_src, c_dst, c_base, options, job, result, error),
        workers,
        "converting" if progress else None,
        [src, dst] if base is None else [src, dst, base],
    )
    return os.fsdecode(dst)


@overload
def decompress_delta(
    delta: Path, base: Path, dst: None = None, workers: int | None = None
) -> dict[str, np.ndarray[Any, Any]]: ...
@overload
def decompress_delta(delta: Path, base: Path, dst: Path, workers: int | None = None) -> str: ...
def decompress_delta(
    delta: Path, base: Path, dst: Path | None = None, workers: int | None = None
) -> dict[str, np.ndarray[Any, Any]] | str:
    """Gives back a fine-tune from its difference to `base`: `decompress(delta, dst, base=base)`.

    WrongBase where `base` is not the model that the difference was made to.
    """
    if dst is None:
        return decompress(delta, base=base, workers=workers)
    return decompress(delta, dst, base=base, workers=workers)


def info(src: Path) -> dict[str, Any]:
    """What the headers of a `.bs` file or directory say; no tensor is decoded.

    Keys: path, file_size (bytes), format, mode, model_type, base_model, tensor_count, source_bytes, ratio_pct
    (file_size / source_bytes in percent, None where nothing was compressed), parity_bytes, writer, sha256, and tensors:
    a list of dicts with name, shape, dtype, source_dtype, source_shape, n_bytes, compressed_bytes, codec, special, md5,
    file.
    """
    with Reader(src) as reader:
        said = reader.info()
        size, source = said["file_bytes"], said["source_bytes"]
        return {
            "path": os.fsdecode(src),
            "file_size": size,
            "format": said.get("format"),
            "mode": said.get("mode"),
            "model_type": said.get("model_type"),
            "base_model": said.get("base_model"),
            "tensor_count": len(said["tensors"]),
            "source_bytes": source,
            "ratio_pct": round(100 * size / source, 2) if source else None,
            "parity_bytes": said["parity_bytes"],
            "writer": said.get("writer"),
            "sha256": said.get("sha256"),
            "tensors": said["tensors"],
        }


def breakdown(
    src: Path,
    *,
    base: Path | None = None,
    modes: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Where the bytes of a `.bs` file or directory go, and about what each mode would make of it.

    src      : .bs file or directory
    base     : the base model of a delta, needed with modes
    modes    : also estimate the size in every mode, within about one percent; decodes every tensor and looks at it as a
               compression does, which takes as long. Otherwise the files are read and nothing is decoded
    workers  : threads, default all that are available
    progress : show a bar where standard error is a terminal

    Keys: path, file_size and source_bytes (bytes); parts, a dict of bytes: sign, exponent and mantissa of floats (a
    symbol that holds bits of several counts for each by the entropies of its table: the exponent, the sign given that,
    the mantissa given both), values of other types, tables, stored (blocks as they are, or by zstd), overhead
    (checksums, lengths, padding), header, parity, original (payloads of the original package); dtypes, the first three
    with n_bytes and compressed_bytes by dtype; modes, a dict of bytes by mode, empty without them.

    Raises Corrupt, ChecksumMismatch and the other errors of reading.
    """
    with Reader(src, base=base) as reader:
        said = reader.info()
        found = reader.breakdown(modes, workers=workers, progress="looking" if progress else None)
    return {
        "path": os.fsdecode(src),
        "file_size": said["file_bytes"],
        "source_bytes": said["source_bytes"],
        "parts": {name: round(size) for name, size in found["parts"].items()},
        "dtypes": found["dtypes"],
        "modes": {mode: found["modes"][mode] for mode in MODES if mode in found["modes"]},
    }


@dataclass(frozen=True)
class BadTensor:
    """One tensor that is damaged or differs from the source."""

    file: str
    tensor: str
    problem: str
    blocks: tuple[int, ...] = ()  # numbers of the damaged blocks, of 65,536 words each, where that is known


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; true where all is well. `n_bad` counts also what `bad` has no room for."""

    ok: bool
    n_tensors: int
    n_bad: int
    bad: list[BadTensor] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.ok


def verify(
    src: Path,
    source: Path | None = None,
    *,
    base: Path | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> VerifyReport:
    """Decodes everything and checks every checksum and MD5; with `source`, a `.safetensors` file or directory, compares
    every tensor with it too. Of a directory every `.bs` file below it is checked. The report is false, and lists what
    is bad, where anything is damaged or different; a damaged header is a problem with an empty tensor name.

    Raises only where the file cannot be read at all (OSError), is none of ours (Corrupt, Truncated) or needs a newer
    release (Unsupported) or another base (WrongBase).
    """
    ffi, lib = _native.library()
    result = ffi.new("bs_verify_result *")
    result.size = ffi.sizeof("bs_verify_result")
    report = ffi.new("char[]", _REPORT_BYTES)
    length = ffi.new("size_t *")
    c_src = _native.path_bytes(src)
    c_source = ffi.NULL if source is None else _native.path_bytes(source)
    c_base = ffi.NULL if base is None else _native.path_bytes(base)
    _native.call_long(
        lambda job, error: lib.bs_verify(c_src, c_source, c_base, job, result, report, _REPORT_BYTES, length, error),
        workers=workers,
        progress="verifying" if progress else None,
        paths=[os.fsdecode(path) for path in (src, source, base) if path is not None],
    )
    lines = bytes(ffi.buffer(report, min(length[0], _REPORT_BYTES))).decode("utf-8").splitlines()
    bad = []
    for line in lines:
        entry = json.loads(line)
        bad.append(BadTensor(entry["file"], entry["tensor"], entry["problem"], tuple(entry.get("blocks", ()))))
    return VerifyReport(result.n_bad == 0, result.n_tensors, result.n_bad, bad)


@dataclass(frozen=True)
class RepairResult:
    """What `repair` did: files it looked at, those of them that it wrote anew, and how many pieces of 4096 bytes were
    damaged."""

    n_files: int
    n_repaired: int
    n_pieces: int


def repair(src: Path, dst: Path | None = None, *, workers: int | None = None, progress: bool = False) -> RepairResult:
    """Makes a damaged `.bs` file whole by the parity it was compressed with; what is whole stays as it is.

    src      : file, or directory, whose `.bs` files are all repaired in place
    dst      : file to write instead of replacing `src`
    workers  : threads, None for all available
    progress : show a bar on standard error, where that is a terminal

    The repaired file is written anew and takes its name once every checksum in it is right. Raises Corrupt where more
    is damaged than the parity makes good, Corrupt, Truncated or ChecksumMismatch where a damaged file has none (nothing
    changes then; the other files of a directory are repaired all the same), or OSError.
    """
    ffi, lib = _native.library()
    result = ffi.new("bs_repair_result *")
    result.size = ffi.sizeof("bs_repair_result")
    c_src = _native.path_bytes(src)
    c_dst = ffi.NULL if dst is None else _native.path_bytes(dst)
    _native.call_long(
        lambda job, error: lib.bs_repair(c_src, c_dst, job, result, error),
        workers=workers,
        progress="repairing" if progress else None,
        paths=[os.fsdecode(path) for path in (src, dst) if path is not None],
    )
    return RepairResult(result.n_files, result.n_repaired, result.n_pieces)


def cpu() -> str:
    """The instructions that decoding and encoding use: "generic", "avx2" or "avx512".

    That is the best that this machine has, or what the environment variable BIGSMALL_CPU names when bigsmall does its
    first work, or what `set_cpu` chose since.
    """
    return _native.cpu()


def set_cpu(name: str | None = None) -> None:
    """Chooses the instructions by name, None for the best. Files and tensors are the same with all; only speed differs.

    InvalidArgument where the name is unknown or this machine lacks them; nothing changes then.
    """
    _native.set_cpu(name)
