"""How csrc is compiled: what changed and no more, and a module wherever there is a C++ compiler."""

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from csrc import build
from megatron_lite.ops import _kernels

SOURCE = '#include "header.h"\nint answer() { return ANSWER; }\n'


def unit(folder: Path, *flags: str) -> build.Unit:
    return build.Unit("answer", folder / "source.cpp", (*build.cxx(), *flags))


def test_what_changed_is_compiled_and_no_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source.cpp").write_text(SOURCE)
    (tmp_path / "header.h").write_text("#define ANSWER 42\n")

    def made(*flags: str) -> bool:
        assert build.compile_units([unit(tmp_path, *flags)], tmp_path / "objects")[0].exists()
        return "compiling" in capfd.readouterr().out

    assert made() and not made()
    assert made("-O1") and not made("-O1")
    os.utime(tmp_path / "header.h")
    assert made("-O1") and not made("-O1")
    (tmp_path / "objects" / "answer.o").unlink()
    assert made("-O1") and not made("-O1")
    os.utime(tmp_path / "source.cpp")
    assert made("-O1") and not made("-O1")


def test_a_failure_is_told_and_does_not_count_as_made(tmp_path: Path) -> None:
    (tmp_path / "source.cpp").write_text(SOURCE)
    (tmp_path / "header.h").write_text("#define ANSWER 42\n")
    build.compile_units([unit(tmp_path)], tmp_path)
    (tmp_path / "header.h").write_text("#define ANSWER forty_two\n")
    for _ in range(2):
        with pytest.raises(build.BuildError, match=r"(?s)source\.cpp.*forty_two"):
            build.compile_units([unit(tmp_path)], tmp_path)


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    with pytest.raises(build.BuildError, match="/nowhere/g"):
        build.compile_units([unit(tmp_path)], tmp_path)


def broken_nvcc(folder: Path) -> Path:
    """A home of CUDA whose nvcc is too old for the C++ compiler."""
    program = folder / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho unsupported GNU version >&2\nexit 1\n")
    program.chmod(0o755)
    return folder


def test_cuda_is_left_out_where_nvcc_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join((str(broken_nvcc(tmp_path) / "bin"), os.environ["PATH"])))
    assert build.usable_nvcc(tmp_path / "objects") is None
    assert "unsupported GNU version" in capfd.readouterr().err


def test_nvcc_is_found_in_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(broken_nvcc(tmp_path)))
    assert build.find_nvcc() == str(tmp_path / "bin" / "nvcc")


def test_the_compiler_warns_of_nothing() -> None:
    for unit in build.cpu_units("-fsyntax-only", "-Wall", "-Wextra", "-Werror"):
        if unit.name.endswith(("entry", "_baseline", build.isas()[-1])):
            subprocess.run([*unit.command, str(unit.source)], cwd=build.ROOT, check=True)


def test_no_flag_trades_correctness_for_speed() -> None:
    for one in (*build.cpu_units(), *build.cuda_units("nvcc")):
        assert not re.search(r"fast-math|Ofast|march=native|use_fast_math", " ".join(one.command))


@pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc")
def test_the_module_holds_the_machine_code_of_every_cuda_source() -> None:
    """Each source is one `fatbin`: a header of 16 bytes, then entries that begin with kind, size and architecture."""
    assert _kernels.cuda_compiled and _kernels.cuda_architectures == ("sm_80", "sm_90a")
    data, sources = Path(_kernels.__file__).read_bytes(), 0
    for match in re.finditer(struct.pack("<IHH", 0xBA55ED50, 1, 16), data):
        at, entries = match.end() + 8, []
        end = at + struct.unpack_from("<Q", data, match.end())[0]
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
            entries.append(({1: "ptx", 2: "elf"}[kind], struct.unpack_from("<I", data, at + 28)[0]))
            at += header + size
        sources += sorted(entries) == [("elf", 80), ("elf", 90), ("ptx", 80)]
    assert sources == len(build.cuda_units("nvcc"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="the environment has no pip")
def test_a_wheel_without_cuda(tmp_path: Path) -> None:
    """An ordinary isolated build of a copy, in which there is neither torch nor a usable nvcc."""
    copy, wheels, site = tmp_path / "copy", tmp_path / "wheels", tmp_path / "site"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(build.ROOT / name, copy)
    for name in ("csrc", "megatron_lite"):
        shutil.copytree(build.ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # The CPU's objects as they were made for this checkout, for the sake of time.
    if build.OBJECTS.exists():
        shutil.copytree(build.OBJECTS, copy / build.OBJECTS.relative_to(build.ROOT))
    path = os.pathsep.join((str(broken_nvcc(tmp_path / "cuda") / "bin"), os.environ["PATH"]))
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(wheels), str(copy)]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and build.NO_CUDA in said and "unsupported GNU version" in said, said
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(site)
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"megatron_lite"}
    assert "megatron_lite/ops/_kernels.pyi" in names
    program = (
        "import importlib.util, sys; found = importlib.util.spec_from_file_location('_kernels', sys.argv[1]);"
        "kernels = importlib.util.module_from_spec(found); found.loader.exec_module(kernels);"
        "print(kernels.cuda_compiled, kernels.cuda_architectures, [n for n in dir(kernels) if n[:5] == 'cuda_'],"
        "kernels.cpu_workspace_rows(64, 1), 'torch' in sys.modules)"
    )
    module = next((site / "megatron_lite" / "ops").glob("_kernels.*.so"))
    told = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(module)], capture_output=True, text=True
    )
    assert told.stdout.strip() == "False () ['cuda_architectures', 'cuda_compiled'] 2 False", told.stderr
