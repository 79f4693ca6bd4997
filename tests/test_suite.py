"""The README, .pytest.ini and .ci/run agree on how the tests run."""

from __future__ import annotations

import configparser
import re

from tests.conftest import EXTRA
from tests.readme import README

ROOT = README.parent
SECTION = re.compile(r"^## Test it\n(.*?)^## ", re.DOTALL | re.MULTILINE)


def section() -> str:
    match = SECTION.search(README.read_text(encoding="utf-8"))
    assert match is not None
    return match[1]


def test_ci_runs_the_readmes_command_as_written() -> None:
    (command,) = re.findall(r"^```sh\n(.*?)\n```$", section(), re.MULTILINE)

    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_readme_names_every_marker() -> None:
    ini = configparser.ConfigParser()
    ini.read(ROOT / ".pytest.ini")
    markers = {line.partition(":")[0] for line in ini["pytest"]["markers"].strip().splitlines()}

    assert set(re.findall(r"^\| `(\w+)` \|", section(), re.MULTILINE)) == markers - {"main_job"} == EXTRA | {"extra"}
