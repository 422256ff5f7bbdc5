"""`make setup` on machines that lack something: it says what to install, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "setup_environment.sh"


def run(venv: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    variables = {**os.environ, "PYTHON": sys.executable, **environ}
    return subprocess.run([SCRIPT, venv], env=variables, capture_output=True, text=True, timeout=120)


def stand_in(folder: Path, name: str, body: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def outdated(folder: Path) -> str:
    return stand_in(
        folder, "python", f'exec {sys.executable} -c "import sys; sys.version_info = (3, 10, 14); $2"'
    )


def headerless(folder: Path) -> str:
    """An interpreter without the C headers, as Debian's python3 is without python3-dev."""
    return stand_in(
        folder,
        "python",
        f'case "$2" in *Python.h*) echo /nowhere/Python.h ;; *) exec {sys.executable} "$@" ;; esac',
    )


def bare(folder: Path) -> str:
    """An interpreter with neither ensurepip nor pip, as Debian's python3 is without python3-venv."""
    return stand_in(folder, "python", f'case "$*" in *pip*) exit 1 ;; *) exec {sys.executable} "$@" ;; esac')


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PYTHON": "/nowhere/python3"}, "needs Python 3.11 or newer"),
        ({"PYTHON": "false"}, "needs Python 3.11 or newer"),
        ({"CXX": "/nowhere/g++"}, "needs a C++ compiler"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, environ: dict[str, str], message: str) -> None:
    result = run(tmp_path / "venv", **environ)
    assert result.returncode == 1
    assert message in result.stderr
    assert "apt install" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path / "venv", PYTHON=outdated(tmp_path))
    assert result.returncode == 1
    assert "needs Python 3.11 or newer" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_missing_headers_are_named(tmp_path: Path) -> None:
    result = run(tmp_path / "venv", PYTHON=headerless(tmp_path))
    assert result.returncode == 1
    assert "apt install python3-dev" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_missing_ensurepip_is_named(tmp_path: Path) -> None:
    result = run(tmp_path / "venv", PYTHON=bare(tmp_path))
    assert result.returncode == 1
    assert "apt install python3-venv" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    result = run(tmp_path)
    assert result.returncode == 1
    assert "is no virtual environment" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_environment_without_its_interpreter_is_reported(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").touch()
    result = run(tmp_path)
    assert result.returncode == 1
    assert "remove that directory" in result.stderr
