"""nvcc takes every kernel for the architectures we ship, without spilling registers. Needs the compiler, no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.emulation import CSRC

NVCC = shutil.which("nvcc")
# test_attention.py compiles attention's own.
SOURCES = sorted(file.name for file in (CSRC / "cuda").glob("*.cu") if not file.name.startswith("attention"))


@pytest.mark.skipif(NVCC is None, reason="no nvcc on the path")
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source: str, tmp_path: Path) -> None:
    architectures = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    command = [str(NVCC), "-std=c++17", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Werror", *architectures]
    command += ["-c", str(CSRC / "cuda" / source), "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        done.stderr,
        re.DOTALL,
    )
    assert {arch for _, arch, *_ in kernels} == {"sm_80", "sm_90a"}
    in_memory = [kernel for kernel in kernels if any(int(count) for count in kernel[2:])]
    assert not in_memory, f"registers or local arrays in memory: {in_memory}"
