"""What can go wrong, and so what to do: one exception class per kind of failure.

Every error of this package is a `BigSmallError`; `.status` is the number of `bs_status` in bigsmall.h. The classes also
derive from the builtin exception that fits, so that `except ValueError` or `except FileNotFoundError` work as expected.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

# The numbers of bs_status; they never change.
INVALID_ARGUMENT = 10
DST_TOO_SMALL = 12
NOT_FOUND = 14
UNSUPPORTED_VERSION = 20
UNSUPPORTED_CODEC = 22
UNSUPPORTED_FEATURE = 24
CORRUPT = 30
TRUNCATED = 32
CHECKSUM = 34
WRONG_BASE = 36
IO = 40
CANCELLED = 50
NO_DEVICE = 60
DEVICE = 62
POISONED = 90
INTERNAL = 91
FORKED = 92


class BigSmallError(Exception):
    """Base of all errors of this package."""

    status: int = INTERNAL

    def __init__(self, *args: object, status: int | None = None) -> None:
        super().__init__(*args)
        if status is not None:
            self.status = status


class InvalidArgument(BigSmallError, ValueError):
    """The call is wrong: an impossible option, a source that is no safetensors file, a closed reader."""

    status = INVALID_ARGUMENT


class NotFound(BigSmallError, KeyError):
    """No tensor of that name or index."""

    status = NOT_FOUND

    # KeyError shows the repr of its argument, which makes a sentence hard to read.
    __str__ = Exception.__str__


class Unsupported(BigSmallError, ValueError):
    """The file is valid but needs a version, codec, feature or dtype that is not known here: a newer bigsmall or torch
    may read it. Or a device that this machine or torch lacks, or a version of a library that is not known here."""

    status = UNSUPPORTED_FEATURE


class Corrupt(BigSmallError, ValueError):
    """The bytes contradict the format."""

    status = CORRUPT


class Truncated(Corrupt):
    """The file ends too early."""

    status = TRUNCATED


class ChecksumMismatch(Corrupt):
    """Stored and computed checksums differ."""

    status = CHECKSUM


class WrongBase(BigSmallError, ValueError):
    """A delta needs a base model, or another one than was given."""

    status = WRONG_BASE


class Cancelled(BigSmallError):
    """The cancel flag was set. Ctrl-C shows as KeyboardInterrupt, not as this."""

    status = CANCELLED


class DeviceError(BigSmallError, RuntimeError):
    """A CUDA device or its driver failed, as where the device has no memory left; the text has the driver's own name of
    it."""

    status = DEVICE


class NoDevice(DeviceError):
    """No CUDA device here decodes: there is no driver or device, or none that is new enough, or it has no memory to
    work with. Loading decodes on the CPU then, and copies."""

    status = NO_DEVICE


class InternalError(BigSmallError, RuntimeError):
    """A fault of the library, or a handle that an earlier fault made unusable. Please report it."""

    status = INTERNAL


class IOFailure(BigSmallError, OSError):
    """The operating system said no; `errno` and, where known, `filename` are set as in any OSError."""

    status = IO

    def __str__(self) -> str:
        # The library's text names the file already, so the filename is not appended as OSError does.
        return str(self.strerror) if self.strerror is not None else super().__str__()


class FileMissing(IOFailure, FileNotFoundError):
    """A FileNotFoundError."""


class FilePresent(IOFailure, FileExistsError):
    """A FileExistsError."""


class NotPermitted(IOFailure, PermissionError):
    """A PermissionError."""


class DirectoryGiven(IOFailure, IsADirectoryError):
    """An IsADirectoryError."""


class NoDirectory(IOFailure, NotADirectoryError):
    """A NotADirectoryError."""


_BY_ERRNO: dict[int, type[IOFailure]] = {
    errno.ENOENT: FileMissing,
    errno.EEXIST: FilePresent,
    errno.EACCES: NotPermitted,
    errno.EPERM: NotPermitted,
    errno.EISDIR: DirectoryGiven,
    errno.ENOTDIR: NoDirectory,
}

_BY_STATUS: dict[int, type[BigSmallError]] = {
    INVALID_ARGUMENT: InvalidArgument,
    DST_TOO_SMALL: InvalidArgument,
    NOT_FOUND: NotFound,
    UNSUPPORTED_VERSION: Unsupported,
    UNSUPPORTED_CODEC: Unsupported,
    UNSUPPORTED_FEATURE: Unsupported,
    CORRUPT: Corrupt,
    TRUNCATED: Truncated,
    CHECKSUM: ChecksumMismatch,
    WRONG_BASE: WrongBase,
    CANCELLED: Cancelled,
    NO_DEVICE: NoDevice,
    DEVICE: DeviceError,
    POISONED: InternalError,
    INTERNAL: InternalError,
    FORKED: InternalError,
}


def from_status(status: int, text: str, os_error: int = 0, paths: Sequence[str] = ()) -> BigSmallError:
    """The exception for a bs_status other than 0. `paths` are the paths of the call: the one that `text` names becomes
    the `filename` of an IOFailure."""
    if status == IO:
        cls = _BY_ERRNO.get(os_error, IOFailure)
        number = os_error or errno.EIO
        named = max((path for path in paths if path and path in text), key=len, default=None)
        if named is None and len(paths) == 1:
            named = paths[0]
        text = text or os.strerror(number)
        return cls(number, text) if named is None else cls(number, text, named)
    return _BY_STATUS.get(status, InternalError)(text, status=status)


# ---- errors of safe_open ---------------------------------------------------------------------------------------------

_safetensors_classes: dict[type[BaseException], type[BaseException]] = {}


def _safetensors_class(cls: type[BaseException]) -> type[BaseException]:
    """`cls` that is a safetensors.SafetensorError too. Made on demand, since it needs safetensors imported."""
    made = _safetensors_classes.get(cls)
    if made is None:
        try:
            from safetensors import SafetensorError
        except ImportError:
            return cls
        made = type(cls.__name__, (cls, SafetensorError), {"__module__": cls.__module__, "__reduce__": _reduce})
        _safetensors_classes[cls] = made
    return made


def _reduce(self: BaseException) -> tuple[Any, ...]:
    # The class has no importable name; so that worker processes can send it, pickle names the class it was made from.
    args = self.args
    if isinstance(self, OSError) and self.filename is not None:
        args = (self.errno, self.strerror, self.filename)
    return _restore, (type(self).__bases__[0], args, dict(self.__dict__))


def _restore(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = _safetensors_class(cls)(*args)
    error.__dict__.update(state)
    return error


def as_safetensors(error: Exception) -> BaseException:
    """The same error, which code written for safetensors catches as safetensors.SafetensorError."""
    args = error.args
    if isinstance(error, OSError) and error.filename is not None:
        args = (error.errno, error.strerror, error.filename)
    return _restore(type(error), args, dict(error.__dict__))
