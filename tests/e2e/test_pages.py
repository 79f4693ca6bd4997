"""The shell samples of the README and of ccm/docs run as they are pasted, and print what the pages show."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ccm.core.claude.locations import bundled_cli
from ccm.testing.service_process import APP
from tests.conftest import ProgramFunction
from tests.docs import PAGES, ROOT, Sample, blocks, page, samples
from tests.postgresql import drop_database, new_database
from tests.programs import free_port
from tests.receiver import Receiver, Reply
from tests.shell import check_output, documents, run

FLASK = f"{sys.executable} -m flask"
RECEIVER = "https://hooks.example.com/agents"
SESSION = "5b028fe1-4bc7-4f82-83a0-f672fa106ad4"
START = """curl -s 'localhost:3000/api/runs/start?wait=60' -H 'Content-Type: application/json' \\
  -d '{"cwd": "/tmp", "prompt": "Say hello."}'"""
ATTEMPTED = "localhost:3000/api/runs/$RUN/deliveries | jq -e '.[0].attempts[0]'"
EVENTS = "curl -sN localhost:3000/api/events"
SETTINGS = samples(page("systemd"), "ini")[1]
IN_ROOT = {".venv/bin/": f"cd {ROOT}; .venv/bin/"}


@dataclass(frozen=True)
class Plan:
    """How a test runs a page.

    Attributes:
        before: commands before the samples.
        places: what the test runs instead of parts of the samples.
        unrun: beginnings of samples that it does not run, with the reason.
    """

    before: str = ""
    places: Mapping[str, str] = field(default_factory=dict)
    unrun: Mapping[str, str] = field(default_factory=dict)


INSTALLS_CLIENTS = "installs packages; clients/test_generated.py runs the generators"
INSTALLS = "installs packages, as .ci/run does"
PLANS = {
    "README": Plan(unrun={"python3 -m venv": INSTALLS}),
    "approvals": Plan(unrun={"NEXT=": "never ends; test_approvals.py runs it"}),
    "backup": Plan(
        before=START,
        places={"rm -f": "stop; rm -f"},
        unrun={
            "umask 077\npg_dump": "needs PostgreSQL; has a test below",
            "pg_restore": "needs PostgreSQL; has a test below",
        },
    ),
    "benchmarks": Plan(places=IN_ROOT),
    "clients": Plan(
        unrun={
            "npm install": INSTALLS_CLIENTS,
            "pip install": INSTALLS_CLIENTS,
            "npx tsc": "needs the installed packages; clients/test_generated.py runs it",
            "python main.py": "needs the installed packages; clients/test_generated.py runs it",
        }
    ),
    "configuration": Plan(places={"PORT=3000 ": ""}),
    "how-it-works": Plan(places=IN_ROOT),
    "import-export-prune": Plan(
        before=f"SESSION=$({START} | jq -r .sessionId)",
        places={SESSION: "$SESSION", ".venv/bin/flask prune --session": "stop; .venv/bin/flask prune --session"},
    ),
    "lists": Plan(before=f"{START}; {START}"),
    "login": Plan(places={".venv/lib/python3*/site-packages/claude_agent_sdk/_bundled/claude": str(bundled_cli())}),
    "python-client": Plan(
        places={"cp ccm/client.py my_project/": f"mkdir my_project; cp {ROOT}/ccm/client.py my_project/"}
    ),
    "reverse-proxy": Plan(places={"/run/cc-manager/": "$PWD/"}),
    "search": Plan(before=START.replace("Say hello.", "Mend the flaky login test.")),
    "stand-in": Plan(
        places={
            ".venv/bin/flask stand-in                          #": (
                ".venv/bin/flask stand-in --port $STAND_IN > /dev/null 2> listens &\n"
                "until grep -q listens listens; do sleep 0.1; done #"
            ),
            "stand-in --print shell": "stand-in --port $STAND_IN --print shell",
        },
    ),
    "streams": Plan(
        places={"curl -sN localhost:3000/api/events": "curl -sN localhost:3000/api/events | head -n 12 || true"}
    ),
    "systemd": Plan(
        before=f"cat > settings.env <<END\n{SETTINGS.replace('/var/lib/cc-manager', '$PWD/state')}END",
        places={
            "/etc/cc-manager.env": "settings.env",
            "-o ccm -g ccm ": "",
            "runuser -u ccm -- ": "",
            "/var/lib/cc-manager": "$PWD/state",
            "/opt/cc-manager/.venv": ".venv",
            "/opt/cc-manager/app.py": str(APP),
        },
        unrun={"useradd": "changes the users of the machine"},
    ),
    "tests": Plan(places=IN_ROOT),
    "upgrade": Plan(
        before=(
            "(umask 077; echo me:0123456789abcdef > tokens)\n"
            "export CCM_API_TOKEN_FILE=$PWD/tokens CCM_UNIX_SOCKET=$PWD/socket"
        ),
        places={
            "git pull\n.venv/bin/pip install -q -r requirements.txt\n": "",
            "/var/lib/cc-manager/tokens": "tokens",
            "/run/cc-manager/socket": "socket",
        },
    ),
    "webhooks": Plan(
        places={
            "curl -s localhost:3000/api/runs/$RUN/deliveries": (
                f"until curl -s {ATTEMPTED} > /dev/null; do sleep 0.05; done\n"
                "curl -s localhost:3000/api/runs/$RUN/deliveries"
            )
        }
    ),
}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver(reply=lambda _: Reply(502)) as receiver:
        yield receiver


@pytest.fixture
def own(environ: dict[str, str], program: ProgramFunction) -> dict[str, str]:
    """Return the environment of the shell."""
    for name in ("curl", "jq", "openssl"):
        program(name, name)
    ports = {"PORT": str(free_port()), "STAND_IN": str(free_port())}
    return environ | ports | {"PYTHON": sys.executable, "APP": str(APP), "FLASK_APP": str(APP)}


@pytest.mark.parametrize("path", [path for path in PAGES if "```sh" in path.read_text()], ids=lambda path: path.stem)
def test_page(path: Path, own: dict[str, str], project: Path, receiver: Receiver) -> None:
    plan = PLANS.get(path.stem, Plan())
    places = {
        RECEIVER: f"{receiver.url}/agents",
        "hooks.example.com:443": f"127.0.0.1:{receiver.port}",
        "/tmp/project": str(project),
        '"/tmp"': json.dumps(str(project)),
        "localhost:3000": f"localhost:{own['PORT']}",
        "127.0.0.1:3000": f"127.0.0.1:{own['PORT']}",
        "/srv/cc-manager": str(project.parent),
        ".venv/bin/python app.py": "serve",
        ".venv/bin/python": sys.executable,
        ".venv/bin/pytest": f"{sys.executable} -m pytest -p no:cacheprovider",
        ".venv/bin/flask": FLASK,
    }
    shown = blocks(path)
    pasted = [block for block in shown if block.language == "sh" and not block.text.startswith(tuple(plan.unrun))]
    commands = [plan.before, *(put(block.text, plan.places) for block in pasted)]
    _, *outputs = run([put(command, places) for command in commands], own, project.parent)

    for sample, output in zip(pasted, outputs, strict=True):
        after = shown[shown.index(sample) + 1 :][:1]
        if after and after[0].follows and after[0].language in ("json", "text"):
            check_output(Sample(after[0].language, put(after[0].text, places), follows=True), output)
        else:
            refused = [d for d in documents(output) if isinstance(d, dict) and set(d) == {"error"}]
            assert refused == [], f"{sample.text}\n{output}"


def test_a_backup_on_postgresql_can_be_restored(own: dict[str, str], postgresql: str, project: Path) -> None:
    dump, restore = [text for text in samples(page("backup"), "sh") if "pg_" in text]
    url = new_database(postgresql)
    places = {"localhost:3000": f"localhost:{own['PORT']}", '"/tmp"': json.dumps(str(project))}
    sessions = "curl -s localhost:3000/api/sessions | jq length"
    lost = f"stop; {FLASK} prune --session $(jq -r .sessionId run); serve; {sessions}"
    back = f"stop; {restore}\nserve\n{sessions}"
    commands = ["serve\n", put(START, places) + " > run", dump, put(lost, places), put(back, places)]
    try:
        *_, without, restored = run(commands, own | {"DATABASE_URL": url}, project.parent)
    finally:
        drop_database(url)

    assert [without.split()[-1], restored.split()[-1]] == ["0", "1"]


def put(text: str, places: Mapping[str, str]) -> str:
    for place, own in places.items():
        text = text.replace(place, own)
    return text


def test_no_plan_is_stale() -> None:
    by_name = {path.stem: path.read_text() for path in PAGES}

    assert set(PLANS) - set(by_name) == set()
    for name, plan in PLANS.items():
        assert [part for part in (*plan.places, *plan.unrun) if part not in by_name[name]] == []
