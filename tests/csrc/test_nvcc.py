"""nvcc takes every kernel for the architectures we ship, without spilling registers. Needs the compiler, no GPU."""

import re
import subprocess
from pathlib import Path

import pytest

from csrc import build

NVCC = build.find_nvcc()
# test_attention.py compiles attention's own.
SOURCES = sorted(
    file.name for file in (build.CSRC / "cuda").glob("*.cu") if not file.name.startswith("attention")
)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source: str, tmp_path: Path) -> None:
    command = [str(NVCC), *build.CUDA_FLAGS, "-Xptxas", "-v", "-Xcompiler", "-Wall,-Werror"]
    command += ["-c", str(build.CSRC / "cuda" / source), "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        done.stderr,
        re.DOTALL,
    )
    assert {arch for _, arch, *_ in kernels} == set(build.CUDA_ARCHITECTURES)
    in_memory = [kernel for kernel in kernels if any(int(count) for count in kernel[2:])]
    assert not in_memory, f"registers or local arrays in memory: {in_memory}"
