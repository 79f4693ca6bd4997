"""Adding a field to a resource takes a line in its model and a column in migrations.sql.

(A field that clients set also needs a line in the request body.)
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from ccm import models
from ccm.core.archive.exporting import archived
from ccm.core.archive.fields import Line, columns
from ccm.db import approvals, deliveries, runs, sessions
from ccm.db.driver.database import Database
from ccm.db.select import Select
from ccm.models.json_field import JsonText
from ccm.models.stored import StoredModel
from tests.models.test_stored import GOLDEN, from_columns

CCM = Path(__file__).parents[2] / "ccm"
# For each model: its table, its computed columns, and the columns of the table that it lacks.
TABLES: list[tuple[type[StoredModel], str, set[str], set[str]]] = [
    (models.Run, "ccr_runs", {"queuePosition", "pendingApprovals"}, {"owner"}),
    (models.Session, "ccr_sessions", {"status"}, {"createdBy", "firstRunSeq"}),
    (models.Approval, "ccr_approvals", set(), set()),
    (models.Delivery, "ccr_deliveries", {"eventType"}, {"again"}),
]


class Painted(models.Run):
    paint_colour: str | None = Field(description="The colour.")
    paint_layers: JsonText[list[dict[str, Any]]] = Field(description="The layers.")


ROW = {**GOLDEN[0]["row"], "paintColour": "red", "paintLayersJson": '[{"thin": true}]'}


def test_an_added_field_is_read_and_shown() -> None:
    run = from_columns(Painted, ROW)

    assert (run.paint_colour, run.paint_layers.value) == ("red", [{"thin": True}])
    shown = run.to_json()
    assert shown | {"paintColour": "red", "paintLayers": [{"thin": True}]} == shown
    described = Painted.model_json_schema(mode="serialization")
    assert described["properties"]["paintColour"]["description"] == "The colour."
    assert described["properties"]["paintLayers"]["type"] == "array"


def test_an_added_field_is_selected_and_written() -> None:
    assert 'r."paintColour"' in Select(Painted, "ccr_runs r").sql
    assert 'r."paintLayersJson"' in Select(Painted, "ccr_runs r").sql
    written = Painted.to_columns(from_columns(Painted, ROW).to_json())
    assert (written["paintColour"], json.loads(written["paintLayersJson"])) == ("red", [{"thin": True}])


def test_an_added_field_is_exported_and_imported() -> None:
    exported = archived(from_columns(Painted, ROW))
    assert (exported["paintColour"], exported["paintLayers"]) == ("red", [{"thin": True}])

    read = columns(Line(1, exported), Painted)

    assert (read["paintColour"], json.loads(read["paintLayersJson"])) == ("red", [{"thin": True}])


@pytest.mark.parametrize(("model", "table", "computed", "unread"), TABLES, ids=[table for _, table, *_ in TABLES])
def test_a_table_has_the_columns_of_its_model(
    writable: Database, model: type[StoredModel], table: str, computed: set[str], unread: set[str]
) -> None:
    sql = "SELECT name FROM pragma_table_info(:name)"
    if not writable.is_sqlite:
        sql = "SELECT column_name AS name FROM information_schema.columns WHERE table_name = :name"
    existing = {row["name"] for row in writable.rows(sql, name=table)}
    assert existing == (set(model.shape.columns) - computed) | unread


def test_every_select_reads_all_columns_of_its_model() -> None:
    for statement, model in (
        (runs.SELECT.sql, models.Run),
        (sessions.SELECT.sql, models.Session),
        (approvals.SELECT.sql, models.Approval),
        (deliveries.SELECT.sql, models.Delivery),
    ):
        assert all(f'"{column}"' in statement for column in model.shape.columns)


def test_a_field_without_logic_appears_only_in_its_model_and_body() -> None:
    # It used to appear in nine files.
    assert files_with("approvalTimeoutMs", "approval_timeout_ms") == {
        "api/http/bodies.py",
        "models/run.py",
        "core/approvals/requests.py",  # uses it as a timeout
        "api/openapi/policy.py",  # names the setting of its default
        "client.py",  # imports nothing of ours, so that it can be copied; a test compares its types
    }
    assert files_with("decisionReason", "decision_reason") == {
        "models/approval.py",
        "core/claude/sdk.py",  # the SDK has a field of this name
        "core/approvals/transitions.py",  # makes it storable
        "client.py",  # imports nothing of ours
    }


def files_with(*names: str) -> set[str]:
    """Return the files whose code contains one of the names."""
    return {str(path.relative_to(CCM)) for path in CCM.rglob("*.py") if set(names) & words(path)}


def words(path: Path) -> set[str]:
    """Return every name and every string in the code of a file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.keyword | ast.arg) and node.arg:
            names.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names
