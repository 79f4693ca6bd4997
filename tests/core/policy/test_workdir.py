"""The rules for a working directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ccm.core.policy.workdir import canonical, resolve
from ccm.errors import Forbidden, ValidationError


def test_a_directory_is_stored_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")

    assert resolve(f"{tmp_path}/link/../link/", ()) == str(tmp_path / "real")


def test_unusable_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for cwd, says in {
        "relative": "absolute",
        f"{tmp_path}/none": "does not exist",
        f"{tmp_path}/file": "not a directory",
        f"{tmp_path}/file/below": "cannot be used",
        f"{tmp_path}/loop": "cannot be used",
        "/" + "x" * 300: "cannot be used",
    }.items():
        with pytest.raises(ValidationError, match=says) as refusal:
            resolve(cwd, ())
        assert refusal.value.field == "cwd"


def test_a_symbolic_link_out_of_the_roots_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    (root / "out").symlink_to("/")
    (tmp_path / "root-like").mkdir()

    assert resolve(f"{root}/below", (root,)) == f"{root}/below"
    assert resolve(str(root), (root,)) == str(root)
    for cwd in (f"{root}/out", f"{root}/..", f"{tmp_path}/root-like"):
        with pytest.raises(Forbidden, match="CCM_ALLOWED_ROOTS") as refusal:
            resolve(cwd, (root,))
        assert refusal.value.code == "CWD_FORBIDDEN"


def test_a_symbolic_link_to_a_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(odd)
    os.symlink(odd, tmp_path / "link")

    with pytest.raises(ValidationError, match="not UTF-8"):
        resolve(f"{tmp_path}/link", ())
    canonical(f"{tmp_path}/link").encode("utf-8")


def test_a_path_too_long_for_an_index_is_refused(tmp_path: Path) -> None:
    deep = tmp_path
    while len(str(deep)) < 2_000:
        deep = deep / ("x" * 200)
    deep.mkdir(parents=True)

    with pytest.raises(ValidationError, match="at most 2000 bytes"):
        resolve(str(deep), ())
