"""Probes at the calls that run code makes into other modules, each of which can raise an injected fault.

`Probes.install` adds an import hook for the modules of `ccm.core`, which rewrites every call in a function's body from
`f(x)` to `__probe__(N, f)(x)`. So the probes cover boundaries that are added later without a list of them. Install them
before `ccm.core` is imported, in a separate process.
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
# Not part of a run: the archive, and sending webhooks. Storing webhooks is.
EXCLUDED = ("ccm.core.archive", "ccm.core.webhooks")
INCLUDED = ("ccm.core.webhooks.outbox",)

# The beginning of the names of threads that share code with runs but are not part of one: they send webhooks.
OTHER_THREADS = "webhook"
# Modules whose functions only compute, or log.
PURE_MODULES = frozenset(
    (
        "ccm.core.run_log",
        *("builtins", "logging", "typing", "types", "dataclasses", "enum", "copy", "math", "string", "unicodedata"),
        *("re", "_sre", "functools", "_functools", "itertools", "collections", "_collections", "_collections_abc"),
        *("operator", "_operator", "struct", "_struct", "contextlib", "_contextvars", "datetime", "_datetime"),
    )
)
# Functions of other modules that only compute.
PURE_NAMES = frozenset(("posixpath.join", "posixpath.basename", "posixpath.dirname", "posixpath.splitext"))
# Methods of events, futures and threads that read a flag.
FLAGS = frozenset(("is_set", "done", "is_alive", "is_closed", "cancelled", "locked"))


class Injected(Exception):
    """The injected fault. No code knows this class, so only handlers of all exceptions catch it."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A call in the code: its location, and its callee as written."""

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
    """The probe behind every rewritten call; by default it returns the callee.

    While recording, it collects the boundaries that are reached. Armed with one of them, it raises there instead, the
    first time only or each time.
    """

    def __init__(self) -> None:
        self.sites: list[Site] = []
        # The boundaries reached while recording: for each key the callee's qualified name.
        self.reached: dict[str, str] = {}
        # How often the fault was raised, and in which thread first.
        self.fired = 0
        self.fired_in = ""
        self._recording = False
        self._excluded: str | None = None
        self._armed: str | None = None
        self._armed_callee: str | None = None
        self._always = False
        self._last_call = time.monotonic()
        self._lock = threading.Lock()
        self._own = threading.local()

    def install(self) -> None:
        """Add the import hook.

        Raises:
            RuntimeError: `ccm.core` is already imported.
        """
        if PACKAGE in sys.modules:
            raise RuntimeError(f"{PACKAGE} is imported already")
        sys.meta_path.insert(0, _Finder(self))

    def __call__(self, number: int, callee: Any) -> Any:
        if getattr(self._own, "hidden", False) or threading.current_thread().name.startswith(OTHER_THREADS):
            return callee
        self._last_call = time.monotonic()
        if not self._recording and self._armed is None and self._armed_callee is None:
            return callee
        site = self.sites[number]
        if self._recording:
            if self._excluded and threading.current_thread().name.startswith(self._excluded):
                return callee
            if site.key not in self.reached and (name := boundary(callee, site.module)):
                self.reached[site.key] = name
        if self._is_armed(site, callee):
            with self._lock:
                if self.fired and not self._always:
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
        """Neither record nor fail the calls of this thread in the block: they are the test's own."""
        before = getattr(self._own, "hidden", False)
        self._own.hidden = True
        try:
            yield
        finally:
            self._own.hidden = before

    def record(self, excluded: str | None = None) -> None:
        """Start recording.

        Args:
            excluded: the beginning of the names of threads to ignore.
        """
        self._recording, self._excluded = True, excluded

    def arm(self, key: str, *, always: bool) -> None:
        self._armed, self._always = key, always

    def arm_callee(self, name: str, *, always: bool) -> None:
        """Arm every call of one callee.

        Args:
            name: the end of the callee's qualified name.
        """
        self._armed_callee, self._always = name, always

    def disarm(self) -> None:
        self._armed, self._recording = None, False

    def is_quiet(self, seconds: float) -> bool:
        """Return whether no probe was reached for `seconds`."""
        return time.monotonic() - self._last_call > seconds


def boundary(callee: Any, module: str) -> str | None:
    """Return the callee's qualified name if it belongs to another module and has an effect, else None."""
    while isinstance(callee, functools.partial):
        callee = callee.func
    home, name = _origin(callee)
    if home == module:
        return None  # the calls within it have probes
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
    """Return the callee's module and qualified name."""
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
    """Rewrites the calls in function bodies, but not in decorators, annotations and default values."""

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
        # The callee's end identifies the call, because the calls of a chain begin at the same position.
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
        # Bypasses the bytecode cache in both directions.
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
