"""Probes at every call that a run's code makes beyond its own module, and the fault that one of them raises.

`Probes.install` puts an import hook in front of the modules of `ccm.core`: it compiles each with every call in a
function's body rewritten from `f(x)` to `__probe__(N, f)(x)`. So a boundary that is added to the code later is found
without being named anywhere. To be installed before `ccm.core` is imported, in a process of its own.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import importlib.abc
import importlib.machinery
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from pydantic import BaseModel

PACKAGE = "ccm.core"
# Not on a run's way: the archive, and what sends webhooks. What stores them is.
EXCLUDED = ("ccm.core.archive", "ccm.core.webhooks")
INCLUDED = ("ccm.core.webhooks.outbox",)

# Threads that share code with runs, and are not on their way: what sends webhooks.
OTHER_THREADS = "webhook"
# Modules whose functions compute and do nothing else, or log.
PURE_MODULES = frozenset(
    (
        "ccm.core.run_log",
        *("builtins", "logging", "typing", "types", "dataclasses", "enum", "copy", "math", "string", "unicodedata"),
        *("re", "_sre", "functools", "_functools", "itertools", "collections", "_collections", "_collections_abc"),
        *("operator", "_operator", "struct", "_struct", "contextlib", "_contextvars", "datetime", "_datetime"),
    )
)
# Functions of other modules that do the same.
PURE_NAMES = frozenset(("posixpath.join", "posixpath.basename", "posixpath.dirname", "posixpath.splitext"))
# Methods of events, futures and threads that read a flag.
FLAGS = frozenset(("is_set", "done", "is_alive", "is_closed", "cancelled", "locked"))


class Injected(Exception):
    """The fault. A class that no code can know, so that only what handles every exception handles it."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A call in the code: where it stands, and the text of what is called."""

    module: str
    line: int
    column: int
    text: str

    @property
    def key(self) -> str:
        return f"{self.module}:{self.line}:{self.column}"

    def __str__(self) -> str:
        return f"{self.module.replace('.', '/')}.py:{self.line}: {self.text}(...)"


class Probes:
    """What the rewritten calls go through. By default they only go through.

    While it records, it notes the boundaries that are reached. Armed with one of them, it raises there instead of
    calling: the first time only, or each time.
    """

    def __init__(self) -> None:
        self.sites: list[Site] = []
        # The boundaries that were reached while recording: the key of each with the callee's qualified name.
        self.reached: dict[str, str] = {}
        # How often the fault was raised, and where first.
        self.fired = 0
        self.fired_in = ""
        self._recording = False
        self._left_out: str | None = None
        self._armed: str | None = None
        self._armed_callee: str | None = None
        self._for_ever = False
        self._last_call = time.monotonic()
        self._lock = threading.Lock()
        self._own = threading.local()

    def install(self) -> None:
        """
        Raises:
            RuntimeError: it is too late.
        """
        if PACKAGE in sys.modules:
            raise RuntimeError(f"{PACKAGE} is imported already")
        sys.meta_path.insert(0, _Finder(self))

    def __call__(self, number: int, callee: Any) -> Any:
        if not self._recording and self._armed is None and self._armed_callee is None:
            return callee
        if getattr(self._own, "hidden", False) or threading.current_thread().name.startswith(OTHER_THREADS):
            return callee
        site = self.sites[number]
        if self._recording:
            self._last_call = time.monotonic()
            if self._left_out and threading.current_thread().name.startswith(self._left_out):
                return callee
            if site.key not in self.reached and (name := boundary(callee, site.module)):
                self.reached[site.key] = name
        if self._is_armed(site, callee):
            with self._lock:
                if self.fired and not self._for_ever:
                    return callee
                self.fired += 1
                self.fired_in = self.fired_in or threading.current_thread().name
            raise Injected(f"injected at {site}")
        return callee

    def _is_armed(self, site: Site, callee: Any) -> bool:
        if self._armed_callee is not None:
            return f".{boundary(callee, site.module)}".endswith(f".{self._armed_callee}")
        return site.key == self._armed and boundary(callee, site.module) is not None

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """What this thread calls within is the test's own business: neither noted nor made to fail."""
        before = getattr(self._own, "hidden", False)
        self._own.hidden = True
        try:
            yield
        finally:
            self._own.hidden = before

    def record(self, left_out: str | None = None) -> None:
        """
        Args:
            left_out: the beginning of the names of threads that are not looked at.
        """
        self._recording, self._left_out = True, left_out

    def arm(self, key: str, *, for_ever: bool) -> None:
        self._armed, self._for_ever = key, for_ever

    def arm_callee(self, name: str, *, for_ever: bool) -> None:
        """Arm every call of one callee.

        Args:
            name: the end of its qualified name.
        """
        self._armed_callee, self._for_ever = name, for_ever

    def disarm(self) -> None:
        self._armed, self._recording = None, False

    def is_quiet(self, seconds: float) -> bool:
        """Whether no probe was passed for some time, while recording."""
        return time.monotonic() - self._last_call > seconds


def boundary(callee: Any, module: str) -> str | None:
    """The qualified name of what is called, if it belongs to another module and does something; else None."""
    while isinstance(callee, functools.partial):
        callee = callee.func
    home, name = _origin(callee)
    if home == module:
        return None  # its own calls are looked at
    if isinstance(callee, type) and (
        issubclass(callee, BaseException | tuple | enum.Enum | PurePath | BaseModel) or dataclasses.is_dataclass(callee)
    ):
        return None
    full = f"{home}.{name}"
    if home in PURE_MODULES or full in PURE_NAMES or name.startswith("PurePath."):
        return None
    if not home.startswith("ccm.") and name.rpartition(".")[2] in FLAGS:
        return None
    return full


def _origin(callee: Any) -> tuple[str, str]:
    """The module and the qualified name of what is called."""
    if isinstance(callee, types.MethodType):
        callee = callee.__func__
    if isinstance(callee, type | types.FunctionType):
        return str(callee.__module__), callee.__qualname__
    owner = getattr(callee, "__self__", None)
    if owner is None or isinstance(owner, types.ModuleType):
        kind = callee if hasattr(callee, "__qualname__") else type(callee)
        return str(kind.__module__ or "builtins"), kind.__qualname__
    kind = owner if isinstance(owner, type) else type(owner)
    return str(kind.__module__), f"{kind.__qualname__}.{getattr(callee, '__name__', '__call__')}"


class _Rewriter(ast.NodeTransformer):
    """Rewrites the calls in the bodies of functions, and leaves decorators, annotations and default values alone."""

    def __init__(self, module: str, sites: list[Site]) -> None:
        self._module = module
        self._sites = sites
        self._depth = 0

    def _function(self, node: Any) -> Any:
        self._depth += 1
        node.body = [self.visit(statement) for statement in node.body]
        self._depth -= 1
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        # Where the callee ends: two calls of a chain begin at the same place.
        line, column = node.func.end_lineno or node.lineno, node.func.end_col_offset or 0
        text = ast.unparse(node.func)
        self.generic_visit(node)
        if not self._depth or text == "super":
            return node
        number = len(self._sites)
        self._sites.append(Site(self._module, line, column, text))
        called = ast.Call(ast.Name("__probe__", ast.Load()), [ast.Constant(number), node.func], [])
        node.func = ast.fix_missing_locations(ast.copy_location(called, node.func))
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, probes: Probes) -> None:
        super().__init__(name, path)
        self._probes = probes

    def get_code(self, fullname: str) -> types.CodeType:
        # Not the cached one, and not to be cached.
        tree = ast.parse(Path(self.path).read_text(encoding="utf-8"), self.path)
        tree = _Rewriter(fullname, self._probes.sites).visit(tree)
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)["__probe__"] = self._probes
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, probes: Probes) -> None:
        self._probes = probes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _within(fullname, (PACKAGE,)) or (_within(fullname, EXCLUDED) and not _within(fullname, INCLUDED)):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path, self._probes)
        return spec


def _within(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)
