"""Runs the shell samples of a page as a reader pastes them, and compares their output with what the page shows."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.docs import Sample

# What differs from run to run: ids, times, long numbers and those with a fraction.
CHANGING = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|\b(?:evt|toolu)_\w+"
    r"|\d{4}-\d\d-\d\dT[\d:.]+Z|\b\d+\.\d+\b|\b\d{5,}\b"
)
ANYTHING = "..."
# `serve` stands for `.venv/bin/python app.py`, which a reader leaves running in another terminal.
PRELUDE = """
set -eo pipefail
SERVICE=
stop() { [ -z "$SERVICE" ] || { kill "$SERVICE"; wait "$SERVICE" || true; }; SERVICE=; }
trap 'stop; kill $(jobs -p) 2> /dev/null || true' EXIT
serve() {
  stop
  : > log  # here, because the service before it has left "listening on" in it
  "$PYTHON" "$APP" 2>> log > /dev/null &
  SERVICE=$!
  until grep -q 'listening on' log; do kill -0 "$SERVICE" || { cat log >&2; exit 1; }; sleep 0.05; done
  cat log
}
"""


def run(samples: list[str], environ: Mapping[str, str], folder: Path) -> list[str]:
    """Run samples one after another in one shell, and return the output of each.

    A service is running unless a sample starts one.

    Args:
        environ: has PYTHON and APP for the service, beside its settings.

    Raises:
        AssertionError: a command failed; the message has the sample and stderr.
    """
    starts = any("serve\n" in sample for sample in samples)
    script = PRELUDE + ("" if starts else "serve > /dev/null\n")
    script += "".join(f"{sample}\nprintf '\\0'\n" for sample in samples)
    done = subprocess.run(
        ["bash", "-c", script], env=environ, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    *outputs, rest = done.stdout.split("\0")
    if done.returncode != 0 or len(outputs) < len(samples):
        raise AssertionError(f"exit code {done.returncode} in:\n{samples[len(outputs) :][:1]}\n{rest}\n{done.stderr}")
    return outputs


def documents(text: str) -> Iterator[Any]:
    """Yield the JSON documents in a text that has nothing else; stop at anything else."""
    at, decoder = 0, json.JSONDecoder()
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        yield value


def check_output(shown: Sample, output: str) -> None:
    """Compare what a page shows with the output of the sample before it.

    Raises:
        AssertionError: they differ in more than ids, times and numbers, and what `...` stands for.
    """
    if shown.language == "json":
        printed = list(documents(output))
        agree = bool(printed) and same(json.loads(shown.text), printed[-1])
    else:
        agree = same_lines(shown.text.splitlines(), output.rstrip().splitlines())
    assert agree, f"shown:\n{shown.text}\nprinted:\n{output}"


def same(shown: Any, printed: Any) -> bool:
    """Whether JSON has the keys, types and texts that are shown; numbers may differ, and lists may be longer."""
    if isinstance(shown, dict):
        return (
            isinstance(printed, dict)
            and (shown.keys() - {ANYTHING} <= printed.keys() if ANYTHING in shown else shown.keys() == printed.keys())
            and all(same(value, printed[key]) for key, value in shown.items() if key != ANYTHING)
        )
    if isinstance(shown, list):
        longer = isinstance(printed, list) and len(printed) >= len(shown)
        return longer and all(map(same, shown, printed))
    if isinstance(shown, str):
        return isinstance(printed, str) and same_text(shown, printed)
    if isinstance(shown, bool) or shown is None:
        return shown is printed
    return isinstance(printed, int | float) and not isinstance(printed, bool)


def same_text(shown: str, printed: str) -> bool:
    parts = [re.escape(part) for part in CHANGING.sub("#", shown).split(ANYTHING)]
    return re.fullmatch(".*".join(parts), CHANGING.sub("#", printed), re.DOTALL) is not None


def same_line(shown: str, printed: str) -> bool:
    """Whether two lines are the same; a JSON object at the end of both is compared by its keys and values."""
    if same_text(shown, printed):
        return True
    (shown_words, brace, shown_json), (words, _, printed_json) = shown.partition("{"), printed.partition("{")
    if not brace or not same_text(shown_words, words):
        return False
    found = list(documents(brace + printed_json))
    return len(found) == 1 and same(json.loads(brace + shown_json), found[0])


def same_lines(shown: list[str], printed: list[str]) -> bool:
    """Whether lines are the same; a line `...` stands for any number of lines."""
    if not shown:
        return not printed
    if shown[0] == ANYTHING:
        return any(same_lines(shown[1:], printed[count:]) for count in range(len(printed) + 1))
    return bool(printed) and same_line(shown[0], printed[0]) and same_lines(shown[1:], printed[1:])
