"""What runs on a machine that has torch and little else: no GPU is needed to see that it starts and what it skips."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tools import build_in_place

ROOT = Path(__file__).resolve().parents[2]
MISSING = (
    "pydantic",
    "numpy",
    "deepspeed",
    "pytest",
    "_pytest",
    "hypothesis",
    "pybind11",
    "safetensors",
    "__editable__",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This environment's packages without those that `MISSING` begins the names of."""
    folder = tmp_path_factory.mktemp("site")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.startswith(MISSING):
            (folder / path.name).symlink_to(path)
    return folder


def run(site: Path, *arguments: str) -> str:
    """What `python ARGUMENTS` prints with those packages alone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_gpu_tests_start(site: Path) -> None:
    said = run(site, "-m", "tests.gpu")
    assert "pytest: missing, pydantic: missing" in said and " 0 failed" in said
    assert "tests.gpu.test_ops_gpu.test_norms:" in said


@pytest.mark.slow
def test_benchmarks_start(site: Path) -> None:
    said = run(site, "benchmarks/ops.py", "--sizes", "tiny", "--rounds", "1", "--only", "rms", "--no-compile")
    assert "| add_rms_norm |" in said and "pydantic not being installed" in said
    small = ("--set", "model.num_layers=1", "--set", "model.hidden_size=16", "--set", "model.seq_length=8")
    options = ("--rounds", "1", "--steps", "1", "--precision", "bf16", "--no-compile")
    said = run(site, "benchmarks/step.py", "--config", "configs/tiny.json", *small, *options)
    assert "| megatron_lite, bf16 (no DeepSpeed: plain loop) | " in said
    assert "1 layers, hidden 16," in said and "vocabulary 128" in said


def test_headers_are_found_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    find = build_in_place.importlib.util.find_spec
    monkeypatch.setattr(
        build_in_place.importlib.util, "find_spec", lambda name: None if name == "pybind11" else find(name)
    )
    folder, version = build_in_place.pybind11()
    assert version.startswith("torch") and Path(folder, "pybind11/pybind11.h").is_file()


@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_targets_set_nothing_up(target: str) -> None:
    said = subprocess.run(
        ["make", "-n", target, "PYTHON=/some/python"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "/some/python tools/build_in_place.py" in said and "setup_environment" not in said


# ---------------------------------------------------------------------------------- without pytest

SAMPLE = """
import pytest
pytestmark = pytest.mark.gpu
@pytest.fixture(scope="module")
def three(tmp_path_factory):
    assert tmp_path_factory.mktemp("x").is_dir()
    yield 3
    print("closed")
@pytest.mark.parametrize("a", [1, pytest.param(2, marks=pytest.mark.skipif(True, reason="not two"))])
@pytest.mark.parametrize(("b", "c"), [(1, 2), (3, 4)], ids=str)
def test_product(a, b, c, three):
    assert three == 3 and a + b + c != {planted}
def test_raises(tmp_path):
    with pytest.raises(ValueError, match="ill"):
        raise ValueError("ill")
    assert [0.1 + 0.2] == pytest.approx([0.3]) and 1 != pytest.approx(1.1)
def test_asks():
    pytest.importorskip("no_such_module")
def test_needs_more(monkeypatch):
    raise AssertionError
"""


@pytest.mark.parametrize(("planted", "failed"), [(99, 0), (4, 1)])
def test_the_runner(tmp_path: Path, planted: int, failed: int) -> None:
    (tmp_path / "sample.py").write_text(SAMPLE.replace("{planted}", str(planted)))
    (tmp_path / "unmarked.py").write_text("def test_not_for_a_gpu():\n    raise AssertionError\n")
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    code = "import sys; from tests.gpu import runner; sys.exit(runner.run(['sample', 'unmarked', 'broken'], 'gpu'))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == failed, done.stdout + done.stderr
    assert f"{3 - failed} passed, {failed} failed, 5 skipped" in done.stdout
    assert "closed" in done.stdout and "test_not_for_a_gpu" not in done.stdout
    assert ("assert three == 3" in done.stdout) == bool(failed)
