"""The layout of ccm/: the tests read the imports and compare them with the allowed ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CCM = ROOT / "ccm"
MODULES = sorted(CCM.rglob("*.py"))
# Modules that every part may import. They import one another and none of the floors.
SHARED = {"errors", "file_limits", "json_text", "models", "search_words", "settings", "timestamps"}
# The floors and the packages beside them: each may import itself, SHARED, and the parts that its entry names.
# `cli` and app.py assemble the parts, so they may import anything.
FLOORS = {
    "api": {"core"},
    "core": {"db"},
    "db": set(),
    "server": {"core"},
    "testing": set(),
    "demo": {"testing"},
    "client": set(),
    "log": set(),
    **{name: set() for name in SHARED},
}
# The folders and files within core/, from the top down: each may import itself and those that its entry names.
CORE = {
    "service": {"*"},
    "runs": {
        "approvals",
        "transcripts",
        "claude",
        "policy",
        "webhooks",
        "storage",
        "lineage",
        "worker_pool",
        "problems",
        "run_log",
    },
    "archive": {"claude"},
    "approvals": {"webhooks", "storage", "run_log"},
    "transcripts": {"claude", "storage", "run_log"},
    "claude": {"policy", "run_log"},
    "policy": set(),
    "webhooks": {"storage", "worker_pool", "problems"},
    "streams": {"queries", "storage"},
    "queries": {"lineage", "search", "storage"},
    "search": set(),
    "lineage": set(),
    "storage": {"problems"},
    "worker_pool": {"problems"},
    "problems": set(),
    "run_log": set(),
}
# The only modules that may import a third-party package or sqlite3.
OWNERS = {
    "flask": {"api", "cli", "server/server.py"},
    "werkzeug": {"api", "testing"},
    "waitress": {"server"},
    "claude_agent_sdk": {"core/claude/sdk.py"},
    "dataset": {"db/driver/connection_pool.py"},
    "sqlalchemy": {"db/driver/connection_pool.py", "db/driver/errors.py"},
    "psycopg": {"db/driver", "db/trees.py"},
    # core/archive/bun reads another program's database, whose format `db` does not know.
    "sqlite3": {"db", "core/archive/bun"},
    "pydantic": {"api", "models", "core/runs/input.py"},
    "click": {"cli"},
}


def imports(module: Path) -> set[str]:
    """Return every module that a file imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parts(module: Path) -> tuple[str, ...]:
    """Return a module's path below ccm/ as its parts, without the suffix."""
    return module.relative_to(CCM).with_suffix("").parts


def relative(module: Path) -> str:
    return str(module.relative_to(CCM))


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_imports_only_go_down(module: Path) -> None:
    floor = parts(module)[0]
    if floor in ("cli", "__init__"):
        return
    allowed = {floor, *FLOORS[floor], *SHARED, "__version__"}
    if floor == "api":
        allowed.add("db")
    for name in imports(module):
        if name.startswith("ccm."):
            assert name.split(".")[1] in allowed, f"{relative(module)} imports {name}"


@pytest.mark.parametrize("module", [module for module in MODULES if parts(module)[0] == "core"], ids=relative)
def test_the_folders_of_core_import_one_way(module: Path) -> None:
    folder = parts(module)[1]
    if folder == "__init__":
        return
    allowed = CORE[folder]
    for name in imports(module):
        if name.startswith("ccm.core.") and "*" not in allowed:
            assert name.split(".")[2] in {folder, *allowed}, f"{relative(module)} imports {name}"


def test_the_order_of_core_has_no_cycle() -> None:
    order: list[str] = []
    rest = {folder: allowed - {"*"} for folder, allowed in CORE.items()}
    while rest:
        free = [folder for folder, allowed in rest.items() if allowed <= set(order)]
        assert free, f"an import cycle among {sorted(rest)}"
        order += free
        for folder in free:
            del rest[folder]


def test_every_part_of_the_layout_exists() -> None:
    assert {parts(module)[0] for module in MODULES} == {*FLOORS, "cli", "__init__"}
    assert {parts(module)[1] for module in MODULES if parts(module)[0] == "core"} == {*CORE, "__init__"}


@pytest.mark.parametrize("module", MODULES, ids=relative)
def test_only_its_owners_import_a_package(module: Path) -> None:
    place = relative(module)
    for name in imports(module):
        owners = OWNERS.get(name.partition(".")[0])
        if owners is not None:
            assert any(place == owner or place.startswith(f"{owner}/") for owner in owners), f"{place} imports {name}"


def test_only_archive_sources_imports_the_bun_package() -> None:
    package = "ccm.core.archive.bun"
    importers = {relative(module) for module in MODULES if any(name.startswith(package) for name in imports(module))}
    assert {place for place in importers if not place.startswith("core/archive/bun/")} == {"core/archive/sources.py"}


def test_dataset_is_never_used_as_a_context_manager() -> None:
    # `with db:` leaves a broken connection on the thread if COMMIT fails.
    source = (CCM / "db" / "driver" / "connection_pool.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.With):
            for item in node.items:
                assert ast.unparse(item.context_expr) not in ("dataset", "self._dataset", "db")


def test_only_settings_and_the_entry_points_read_the_environment() -> None:
    readers = {relative(module) for module in MODULES if "os.environ" in module.read_text(encoding="utf-8")}
    # The service reads the variables that agents inherit, the tour reads PORT, and a service process gets PATH.
    commands = {f"cli/{name}.py" for name in ("archive", "database", "token")}
    assert readers == {*commands, "core/service.py", "demo/tour.py", "testing/service_process.py"}
