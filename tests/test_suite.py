"""The README, ccm/docs/tests.md, .pytest.ini and .ci/run agree on how the tests run."""

from __future__ import annotations

import configparser
import re

from tests.conftest import EXTRA
from tests.docs import README, ROOT, page, section, text_of


def test_ci_runs_the_readmes_command_as_written() -> None:
    (command,) = re.findall(r"^```sh\n(.*?)\n```$", section(README, "Test it"), re.MULTILINE)

    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_page_names_every_marker() -> None:
    ini = configparser.ConfigParser()
    ini.read(ROOT / ".pytest.ini")
    markers = {line.partition(":")[0] for line in ini["pytest"]["markers"].strip().splitlines()}
    listed = set(re.findall(r"^\| `(\w+)` \|", text_of(page("tests")), re.MULTILINE))

    assert listed == markers - {"main_job"} == EXTRA | {"extra"}
