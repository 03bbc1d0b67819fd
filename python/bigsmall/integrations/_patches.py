"""Replacing names of other libraries, and putting them back: the tool of install_hook().

A module that is not imported yet is changed when it is, so that nothing heavy is imported before the user does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from bigsmall import errors


class Change(NamedTuple):
    """One name of a module. `attribute` may be dotted, for a method. `wrap` is given the function (or class) that
    stands there, without its staticmethod or classmethod, and returns what stands there instead."""

    attribute: str
    wrap: Callable[[Any], Any]


class Target(NamedTuple):
    """A module, and what to change in it once it is imported: `plan` looks at the module, and raises where it does not
    know its layout."""

    module: str
    plan: Callable[[ModuleType], Sequence[Change]]


class _Done(NamedTuple):
    owner: Any
    name: str
    original: Any  # as it stood in the owner's __dict__
    replacement: Any


class Patches:
    """Changes that are made together and undone together. Each replacement passes on to the original while they are
    undone, since other code may have taken hold of it. May be used from several threads."""

    def __init__(self, targets: Callable[[], Sequence[Target]]) -> None:
        self._targets = targets
        self._installing = threading.RLock()
        # Of what follows. Never held while a module is imported, which may wait for a thread that imports another one.
        self._lock = threading.RLock()
        self._done: list[_Done] = []
        self._finder: _Finder | None = None
        self.active = False

    def install(self) -> None:
        """Makes all changes; does nothing where they are made. Where one fails none is made."""
        with self._installing:
            targets = self._targets()
            with self._lock:
                if self.active:
                    return
                self.active = True
                self._finder = _Finder({target.module: target for target in targets}, self._apply)
                sys.meta_path.insert(0, self._finder)
            try:
                for target in targets:
                    module = sys.modules.get(target.module)
                    if module is None:
                        continue
                    if _is_being_imported(module):
                        # By another thread: this waits for it. By this one: a module that it imports called us.
                        module = importlib.import_module(target.module)
                        if _is_being_imported(module):
                            raise errors.InvalidArgument(
                                f"bigsmall.install_hook() was called while {target.module} is being imported: call it "
                                "before or after that"
                            )
                    self._apply(target, module)
            except BaseException:
                self.uninstall()
                raise

    def uninstall(self) -> None:
        """Puts back what stood there before, but for names that somebody else has replaced since."""
        with self._lock:
            self.active = False
            if self._finder is not None:
                if self._finder in sys.meta_path:
                    sys.meta_path.remove(self._finder)
                self._finder = None
            for done in reversed(self._done):
                if vars(done.owner).get(done.name) is done.replacement:
                    setattr(done.owner, done.name, done.original)
            self._done.clear()

    def _apply(self, target: Target, module: ModuleType) -> None:
        with self._lock:
            if not self.active:
                return
            for attribute, wrap in target.plan(module):
                owner: Any = module
                *path, name = attribute.split(".")
                for step in path:
                    owner = getattr(owner, step)
                raw = inspect.getattr_static(owner, name)
                known = next((done for done in self._done if done.replacement is raw), None)
                if known is not None:  # changed already, or imported by name from a module that was
                    if known.owner is not owner:
                        self._done.append(_Done(owner, name, known.original, raw))
                    continue
                replacement = self._replacement(raw, wrap)
                setattr(owner, name, replacement)
                self._done.append(_Done(owner, name, raw, replacement))

    def _replacement(self, raw: Any, wrap: Callable[[Any], Any]) -> Any:
        if isinstance(raw, (staticmethod, classmethod)):
            return type(raw)(self._replacement(raw.__func__, wrap))
        changed = wrap(raw)
        if isinstance(raw, type):
            return changed

        @functools.wraps(raw)
        def either(*args: Any, **kwargs: Any) -> Any:
            return (changed if self.active else raw)(*args, **kwargs)

        return either


def _is_being_imported(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as the other finders do, and has those of `targets` changed right after they are executed."""

    def __init__(self, targets: dict[str, Target], apply: Callable[[Target, ModuleType], None]) -> None:
        self._targets = targets
        self._apply = apply
        self._busy = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        wanted = self._targets.get(fullname)
        if wanted is None or getattr(self._busy, "name", None) == fullname:
            return None
        self._busy.name = fullname
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy.name = None
        loader = spec.loader if spec is not None else None
        if loader is None or not hasattr(loader, "exec_module"):
            return spec
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            self._apply(wanted, module)

        # On this one loader, rather than a loader around it: its class tells others where sources and resources are.
        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
