"""The command `bigsmall`.

Exit codes: 0 done, 1 failed (and for verify: something is bad), 2 wrong usage, 128 + N where signal N stopped it, such
as 130 on Ctrl-C. Results go to standard output, errors as one line to standard error; with --json a failure is an
object on standard output too: {"error": {"type": ..., "message": ...}}.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from bigsmall import errors

_RUNS = 3  # of each measurement of `benchmark`
_MOST_THREADS = 2**31 - 1


class _Stopped(KeyboardInterrupt):
    """A signal asked the process to end. To all else this is Ctrl-C: work under way stops and cleans up."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code. Wrong usage ends in SystemExit(2), as argparse does it."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a path need not be text; a message about it must come out all the same
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _signals_interrupt():
            code = _run(args)
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, _Stopped) else signal.SIGINT
        with contextlib.suppress(OSError):  # the terminal may be gone
            print("bigsmall: interrupted", file=sys.stderr)
        return 128 + number
    except OSError:
        # The reader of our output went away, such as `head`. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _run(args: argparse.Namespace) -> int:
    """Runs the subcommand and reports its failure. OSError where standard output takes no more."""
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (errors.BigSmallError, OSError, ImportError, MemoryError) as error:
        kind = type(error).__name__
        text = " ".join((str(error) or kind).split())
        print(f"bigsmall: {text}", file=sys.stderr)
        if _option(args, "json"):
            print(json.dumps({"error": {"type": kind, "message": text}}))
        return 1
    return code


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise _Stopped, which else would end the process and leave temporary files behind."""
    stopped = False

    def stop(number: int, _: Any) -> None:
        nonlocal stopped
        if not stopped:  # a second one must not disturb the cleaning up
            stopped = True
            raise _Stopped(number)

    changed = []
    if threading.current_thread() is threading.main_thread():  # Python lets no other one set handlers
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)):
            # One that is ignored, as by nohup, or handled by the caller of main() stays so.
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, stop)
                changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _parser() -> argparse.ArgumentParser:
    # SUPPRESS: the same options stand before and after the subcommand, and an absent one must not undo a present one.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--threads", type=_threads, metavar="N", help="threads to use (default: all available)")
    common.add_argument("--json", action="store_true", help="print the result as one JSON object")
    common.add_argument("--quiet", action="store_true", help="print errors only, and no progress bar")
    common.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")

    parser = argparse.ArgumentParser(
        prog="bigsmall", description="Lossless compression of neural-network weights.", parents=[common]
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, description=help_text, parents=[common])
        sub.set_defaults(run=run)
        return sub

    sub = command("compress", _compress, "Compress a .safetensors file, or a model directory.")
    sub.add_argument("src", metavar="SRC", help=".safetensors file or model directory")
    sub.add_argument("-o", "--output", metavar="OUT", help="file or directory to write (default: SRC.bs or SRC-bs)")
    _add_modes(sub)
    sub.add_argument("--base", metavar="BASE", help="store the difference to this base model")
    sub.add_argument("--sha256", action="store_true", help="store the SHA-256 of the source")
    sub.add_argument("--force", action="store_true", help="replace an existing target directory")
    sub.add_argument(
        "--parity", type=_percent, default=0, metavar="PERCENT", help="add so much that `repair` can mend damage"
    )

    _add_compat(sub)

    sub = command("convert", _convert, "Write a .bs file or directory anew, such as one of the original package.")
    sub.add_argument("src", metavar="SRC", help=".bs file or directory")
    sub.add_argument("output", metavar="OUT", help="file or directory to write")
    _add_modes(sub)
    sub.add_argument("--base", metavar="BASE", help="the base model of a delta")
    sub.add_argument("--force", action="store_true", help="replace an existing target directory")
    sub.add_argument("--parity", type=_percent, default=0, metavar="PERCENT", help="as for compress")
    _add_compat(sub)

    sub = command("decompress", _decompress, "Restore what was compressed, byte for byte.")
    sub.add_argument("src", metavar="SRC", help=".bs file or directory")
    sub.add_argument("-o", "--output", metavar="OUT", help="file or directory to write (default: SRC.safetensors)")
    sub.add_argument("--base", metavar="BASE", help="the base model of a delta")
    sub.add_argument("--force", action="store_true", help="replace an existing target directory")

    sub = command("info", _info, "Show what a .bs file or directory holds.")
    sub.add_argument("src", metavar="SRC", help=".bs file or directory")
    sub.add_argument("--tensors", action="store_true", help="list the tensors too")
    sub.add_argument("--report", action="store_true", help="where the bytes go, and what each mode would make of it")
    sub.add_argument("--picture", metavar="OUT", help="the report as a picture (.png, .svg, .pdf); needs matplotlib")
    sub.add_argument("--base", metavar="BASE", help="the base model of a delta, for a report")

    sub = command("verify", _verify, "Check every checksum; print OK, or FAIL and what is bad.")
    sub.add_argument("src", metavar="SRC", help=".bs file or directory")
    sub.add_argument("--source", metavar="ST", help="compare with this .safetensors file or directory too")
    sub.add_argument("--base", metavar="BASE", help="the base model of a delta")

    sub = command("repair", _repair, "Make a damaged file whole by its parity; a whole one stays as it is.")
    sub.add_argument("src", metavar="SRC", help=".bs file or directory compressed with --parity")
    sub.add_argument("-o", "--output", metavar="OUT", help="file to write (default: SRC itself is replaced)")

    sub = command("benchmark", _benchmark, "Measure ratio and speed on a file; nothing is left behind.")
    sub.add_argument("src", metavar="SRC", help=".safetensors file or model directory")
    _add_modes(sub)
    return parser


def _add_modes(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(mode="balanced")
    group = parser.add_mutually_exclusive_group()
    for mode, text in (
        ("storage", "smallest files"),
        ("balanced", "the default"),
        ("inference", "fastest decoding"),
    ):
        group.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=text)


def _add_compat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compat", choices=["1.0"], help="write what that release of the original package reads")


def _threads(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 1 <= (number := int(text)) <= _MOST_THREADS:
            return number
    raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {_MOST_THREADS}")


def _percent(text: str) -> int:
    from bigsmall.writer import MOST_PARITY

    with contextlib.suppress(ValueError):
        if 0 <= (number := int(text)) <= MOST_PARITY:
            return number
    raise argparse.ArgumentTypeError(f"must be a whole number of percent from 0 to {MOST_PARITY}")


class _Version(argparse.Action):
    """Like argparse's own, but finds the version only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import bigsmall

        print(f"bigsmall {bigsmall.__version__}")
        parser.exit()


def _option(args: argparse.Namespace, name: str) -> Any:
    return getattr(args, name, None)


def _progress(args: argparse.Namespace) -> bool:
    return not _option(args, "quiet") and not _option(args, "json")


def _say(args: argparse.Namespace, lines: Sequence[str], result: dict[str, Any]) -> None:
    """Prints the result: the lines, or the JSON object, or nothing."""
    if _option(args, "json"):
        print(json.dumps(result, ensure_ascii=False))
    elif not _option(args, "quiet"):
        for line in lines:
            print(line)


def _without_suffix(path: str, suffix: str) -> str:
    return path[: -len(suffix)] if path.endswith(suffix) and os.path.basename(path) != suffix else path


def _resolved(src: str) -> str:
    """The path that the name of a default output is made from: without slashes at its end, and with a name."""
    trimmed = src.rstrip("/" + os.sep) or src
    return os.path.realpath(trimmed) if os.path.basename(trimmed) in (".", "..") else trimmed


def _exists(error: FileExistsError, args: argparse.Namespace, dst: str) -> Exception:
    """The error that `dst` exists, in words of this command's options."""
    if os.path.isdir(args.src):
        before, path, after = str(error).rpartition(dst)
        text = before + path + re.sub(r"(?<!-)\bforce\b", "--force", after)
    elif args.output is None:
        text = f"{dst} exists; pass -o to replace it"
    else:
        return error
    return errors.from_status(errors.IO, text, errno.EEXIST, [dst])


# ---- subcommands -----------------------------------------------------------------------------------------------------


def _compress(args: argparse.Namespace) -> int:
    from bigsmall import api

    src = args.src
    dst = args.output
    if dst is None:
        trimmed = _resolved(src)
        dst = f"{trimmed}-bs" if os.path.isdir(src) else _without_suffix(trimmed, ".safetensors") + ".bs"
    start = time.perf_counter()
    try:
        result = api._compress(
            src,
            args.base,
            dst,
            mode=args.mode,
            workers=_option(args, "threads"),
            sha256=args.sha256,
            overwrite=args.output is not None,
            force=args.force,
            parity=args.parity,
            compat=args.compat,
            progress=_progress(args),
        )
    except FileExistsError as error:
        raise _exists(error, args, dst) from error
    elapsed = time.perf_counter() - start
    source, output = result["source_bytes"], result["output_bytes"]
    percent = 100 * output / source if source else 100.0
    _say(
        args,
        [
            f"compressed {src} -> {dst}",
            f"  source:     {source:,} bytes",
            f"  compressed: {output:,} bytes ({percent:.2f}%)",
            f"  saved:      {source - output:,} bytes",
            f"  elapsed:    {elapsed:.1f}s",
        ],
        {
            "source": src,
            "output": dst,
            "mode": args.mode,
            **result,
            "ratio_pct": round(percent, 2),
            "elapsed_s": elapsed,
        },
    )
    return 0


def _convert(args: argparse.Namespace) -> int:
    from bigsmall import api

    try:
        api.convert(
            args.src,
            args.output,
            args.mode,
            _option(args, "threads"),
            base=args.base,
            compat=args.compat,
            parity=args.parity,
            force=args.force,
            progress=_progress(args),
        )
    except FileExistsError as error:
        raise _exists(error, args, args.output) from error
    _say(
        args, [f"converted {args.src} -> {args.output}"], {"source": args.src, "output": args.output, "mode": args.mode}
    )
    return 0


def _decompress(args: argparse.Namespace) -> int:
    from bigsmall import api

    src = args.src
    dst = args.output
    if dst is None:
        trimmed = _resolved(src)
        if os.path.isdir(src):
            dst = _without_suffix(trimmed, "-bs") if trimmed.endswith("-bs") else f"{trimmed}-safetensors"
        else:
            dst = _without_suffix(trimmed, ".bs") + ".safetensors"
    start = time.perf_counter()
    try:
        result = api._decompress(
            src,
            dst,
            base=args.base,
            workers=_option(args, "threads"),
            overwrite=args.output is not None,
            force=args.force,
            progress=_progress(args),
        )
    except FileExistsError as error:
        raise _exists(error, args, dst) from error
    elapsed = time.perf_counter() - start
    _say(
        args,
        [f"decompressed {src} -> {dst}  ({elapsed:.1f}s)"],
        {"source": src, "output": dst, **result, "elapsed_s": elapsed},
    )
    return 0


def _info(args: argparse.Namespace) -> int:
    from bigsmall import api

    found = api.info(args.src)
    lines = [f"  {key:<24} {value}" for key, value in found.items() if key != "tensors"]
    if args.tensors:
        for tensor in found["tensors"]:
            shape = "x".join(str(size) for size in tensor["shape"]) or "scalar"
            lines.append(
                f"  {tensor['name']}  {tensor['dtype']} {shape}  {tensor['n_bytes']:,} -> "
                f"{tensor['compressed_bytes']:,} bytes  {tensor['codec']}"
            )
    if args.report or args.picture:
        from bigsmall import report

        parts = api.breakdown(
            args.src, base=args.base, modes=True, workers=_option(args, "threads"), progress=_progress(args)
        )
        found["report"] = {key: parts[key] for key in ("parts", "dtypes", "modes")}
        lines += report.lines(parts)
        if args.picture:
            report.picture(parts, args.picture)
            lines.append(f"  written to {args.picture}")
    _say(args, lines, found)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from bigsmall import api

    report = api.verify(
        args.src, args.source, base=args.base, workers=_option(args, "threads"), progress=_progress(args)
    )
    # What is wrong with a whole file has no tensor.
    lines = [": ".join(part for part in (bad.file, bad.tensor, bad.problem) if part) for bad in report.bad]
    if report.n_bad > len(report.bad):
        lines.append(f"and {report.n_bad - len(report.bad)} more")
    lines.append("OK" if report else "FAIL")
    _say(
        args,
        lines,
        {
            "path": args.src,
            "ok": report.ok,
            "n_tensors": report.n_tensors,
            "n_bad": report.n_bad,
            "bad": [dataclasses.asdict(bad) for bad in report.bad],
        },
    )
    if not report and _option(args, "quiet") and not _option(args, "json"):
        print(*lines, sep="\n", file=sys.stderr)
    return 0 if report else 1


def _repair(args: argparse.Namespace) -> int:
    from bigsmall import api

    result = api.repair(args.src, args.output, workers=_option(args, "threads"), progress=_progress(args))
    if result.n_repaired:
        text = f"repaired {args.src}: {result.n_pieces:,} damaged pieces of 4096 bytes"
        if os.path.isdir(args.src):
            text += f" in {result.n_repaired} of {result.n_files} files"
        if args.output is not None:
            text += f", written to {args.output}"
    else:
        text = f"{args.src} is whole"
    _say(args, [text], {"path": args.src, "output": args.output, **dataclasses.asdict(result)})
    return 0


def _benchmark(args: argparse.Namespace) -> int:
    import numpy as np

    from bigsmall import _native, api
    from bigsmall import numpy as frames
    from bigsmall.reader import Destination, Reader

    workers = _option(args, "threads")
    with tempfile.TemporaryDirectory(prefix="bigsmall-benchmark-") as scratch:
        _native.library()  # loading it is no part of what is measured
        dst = os.path.join(scratch, "model" if os.path.isdir(args.src) else "model.bs")
        start = time.perf_counter()
        result = api._compress(
            args.src,
            None,
            dst,
            mode=args.mode,
            workers=workers,
            sha256=False,
            overwrite=True,
            force=False,
            parity=0,
            compat=None,
            progress=_progress(args),
        )
        compress_s = time.perf_counter() - start
        with Reader(dst) as reader:
            arrays = frames.read(reader, reader.tensors, workers=workers)  # also warms up memory and page cache
            destinations = [Destination(tensor, frames.address(arrays[tensor.name])) for tensor in reader.tensors]
            decode_s = _median_time(lambda: reader.decode_many(destinations, workers=workers))
        # One copy of the same bytes by one thread: the measure of what this machine's memory can do.
        plain = [array.reshape(-1).view(np.uint8) for array in arrays.values() if array.size]
        room = [np.empty_like(array) for array in plain]

        def copy() -> None:
            for target, array in zip(room, plain):
                np.copyto(target, array)

        copy()
        copy_s = _median_time(copy)
    n_bytes = sum(array.nbytes for array in plain)
    source, output = result["source_bytes"], result["output_bytes"]
    percent = 100 * output / source if source else 100.0
    speeds = {
        "compress_gb_s": source / compress_s / 1e9,
        "decompress_gb_s": n_bytes / decode_s / 1e9 if n_bytes else 0.0,
        "memcpy_gb_s": n_bytes / copy_s / 1e9 if n_bytes else 0.0,
    }
    _say(
        args,
        [
            f"benchmark {args.src} ({args.mode}, {api.cpu()})",
            f"  source:     {source:,} bytes",
            f"  compressed: {output:,} bytes ({percent:.2f}%)",
            f"  compress:   {speeds['compress_gb_s']:.2f} GB/s  (file to file, with the check)",
            f"  decompress: {speeds['decompress_gb_s']:.2f} GB/s  (file in the page cache to memory)",
            f"  memcpy:     {speeds['memcpy_gb_s']:.2f} GB/s  (the same bytes, one thread)",
        ],
        {
            "source": args.src,
            "mode": args.mode,
            "cpu": api.cpu(),
            **result,
            "ratio_pct": round(percent, 2),
            **speeds,
        },
    )
    return 0


def _median_time(run: Any) -> float:
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(statistics.median(times), 1e-9)
