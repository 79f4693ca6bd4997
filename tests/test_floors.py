"""The house: which part may import what, held by reading the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "ccm").rglob("*.py"))
SHARED = {
    *("ccm", "ccm.access", "ccm.settings", "ccm.setting_values", "ccm.errors", "ccm.models", "ccm.token_file"),
    *("ccm.webhook_urls", "ccm.json_text", "ccm.timestamps"),
}
MAY_IMPORT = {
    "api": {"api", "core", "db"},
    "core": {"core", "db"},
    "db": {"db"},
    "demo": {"demo"},
    "models": set(),
    "shared": set(),
}
# Who alone may know a package.
OWNERS = {
    "flask": {"api", "cli/commands.py", "server/server.py"},
    "werkzeug": {"api"},
    "waitress": {"server/server.py", "server/connections.py"},
    "claude_agent_sdk": {"core/claude/sdk.py"},
    "dataset": {"db/driver/connection_pool.py"},
    "sqlalchemy": {"db/driver/connection_pool.py", "db/driver/errors.py"},
    "psycopg": {"db"},
    "sqlite3": {"db", "core/archive/bun"},  # bun/ reads another program's database, which `db` knows nothing of
    "pydantic": {"api", "models", "core/runs/input.py"},
    "click": {"cli/commands.py", "cli/archive.py"},
}


def imports(module: Path) -> set[str]:
    """Every module that a file imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor(module: Path) -> str:
    parts = module.relative_to(ROOT / "ccm").parts
    if len(parts) > 1:
        return parts[0]
    return (
        "top"
        if module.name in ("cli/commands.py", "cli/archive.py", "server/server.py", "server/connections.py", "log.py")
        else "shared"
    )


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(module: Path) -> None:
    allowed = MAY_IMPORT.get(floor(module))
    if allowed is None:
        return  # cli/commands.py, cli/archive.py and server/server.py put the parts together
    for name in imports(module):
        if name.startswith("ccm.") and not any(
            name == shared or name.startswith(shared + ".") for shared in SHARED - {"ccm"}
        ):
            assert name.split(".")[1] in allowed | {"__version__"}, f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_have_one_owner(module: Path) -> None:
    place = module.relative_to(ROOT / "ccm")
    for name in imports(module):
        owners = OWNERS.get(name.partition(".")[0])
        if owners is not None:
            assert owners & {str(place), *map(str, place.parents)}, f"{place} imports {name}"


def test_only_the_choice_of_a_source_knows_the_import_from_bun() -> None:
    package = "ccm.core.archive.bun"
    knowing = {
        str(module.relative_to(ROOT / "ccm"))
        for module in MODULES
        if any(name == package or name.startswith(package + ".") for name in imports(module))
    }
    assert {place for place in knowing if not place.startswith("core/archive/bun/")} == {"core/archive/sources.py"}


def test_dataset_is_never_used_as_a_context_manager() -> None:
    # `with db:` leaves the thread's connection broken when COMMIT fails.
    source = (ROOT / "ccm" / "db" / "connection_pool.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.With):
            for item in node.items:
                assert ast.unparse(item.context_expr) not in ("dataset", "self._dataset", "db")


def test_only_settings_and_the_entry_points_read_the_environment() -> None:
    readers = {
        str(module.relative_to(ROOT / "ccm"))
        for module in MODULES
        if "os.environ" in module.read_text(encoding="utf-8")
    }
    # The service takes what agents inherit; the demo takes PATH.
    assert readers == {"cli/commands.py", "cli/archive.py", "core/service.py", "demo/tour.py"}
