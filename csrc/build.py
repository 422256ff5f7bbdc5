"""How the kernels are compiled: the one place for it, which setup.py and the tests share. Standard library only."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ROOT = CSRC.parent
# Compilers run in ROOT on relative paths, so that the objects of a checkout that is moved or copied stay valid.
OBJECTS = ROOT / "build" / f"kernels-{sysconfig.get_platform()}"

# No -ffast-math, whose linker part changes denormals for the whole process: NaN, inf and denormals follow IEEE.
CPU_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
# Instruction sets in ascending order, as entry.cpp numbers them.
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "baseline": ("-DMLITE_LANES=4",),
    "avx2": ("-DMLITE_LANES=8", "-mavx2", "-mfma"),
    "avx512": ("-DMLITE_LANES=16", *AVX512),
    "avx512bf16": ("-DMLITE_LANES=16", *AVX512, "-mavx512bf16"),
}
# A100 and Hopper, and PTX for what came between and after.
CUDA_ARCHITECTURES = ("sm_80", "sm_90a")
CUDA_FLAGS = (
    *("-std=c++17", "-O3", "-Xcompiler", "-fPIC"),
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
)
NO_CUDA = "The kernels are built without CUDA"


class BuildError(RuntimeError):
    """A compiler failed; the message holds its command and what it said."""


@dataclass(frozen=True)
class Unit:
    """One object file: NAME.o of a source (absolute, or relative to ROOT), by `command`.

    Attributes:
        system: folders of headers that do not belong to this repository. Where they lie (a build's own, passing
            environment, for one) is no reason to compile anew.
    """

    name: str
    source: Path
    command: tuple[str, ...]
    system: tuple[str, ...] = ()


def cxx() -> tuple[str, ...]:
    """The C++ compiler: CXX, or the first there is, in the order of tools/setup_environment.sh."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = (path for name in ("c++", "g++", "clang++") if (path := shutil.which(name)))
    return tuple(named) or (next(found, "c++"),)


def find_nvcc() -> str | None:
    """nvcc on the path, in CUDA_HOME, or where NVIDIA's packages put it."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def isas() -> list[str]:
    """The instruction sets that this machine's compiler builds for, in ascending order."""
    return list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]


def cpu_units(*flags: str) -> list[Unit]:
    """Every source of csrc/cpu for every instruction set, and once the entry points; `flags` come last."""
    command, sources = (*cxx(), *CPU_FLAGS), _sources("cpu/*.cpp")
    units = [Unit("entry", Path("csrc/cpu/entry.cpp"), (*command, *flags))]
    for isa in isas():
        own = (*command, f"-DMLITE_ISA={isa}", *ISA_FLAGS[isa], *flags)
        units += [Unit(f"{s.stem}_{isa}", s, own) for s in sources if s.name != "entry.cpp"]
    return units


def cuda_units(nvcc: str) -> list[Unit]:
    """Every source of csrc/cuda, those that take longest first."""
    sources = sorted(_sources("cuda/*.cu"), key=lambda file: -(ROOT / file).stat().st_size)
    return [Unit(f"cuda_{source.stem}", source, _nvcc_command(nvcc)) for source in sources]


def binding_unit(system: Sequence[str], version: str, cuda: bool) -> Unit:
    """The Python module's own part.

    Args:
        system: the folders of pybind11's and Python's headers.
        version: of both.
    """
    command = (
        *cxx(),
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-fopenmp",
        "-fvisibility=hidden",
        f"-DVERSION={version}",
    )
    if cuda:
        names = ",".join(f'"{name}"' for name in CUDA_ARCHITECTURES)
        command += (f"-DMLITE_CUDA_ARCHITECTURES={names}",)
    return Unit(f"bindings-{version}", Path("csrc/bindings.cpp"), command, tuple(system))


def build_module(library: Path, headers: Sequence[str], version: str) -> bool:
    """Builds the Python module, with CUDA where nvcc serves; returns whether it does.

    Args:
        headers, version: as for `binding_unit`.

    Raises:
        BuildError: a compiler failed.
    """
    nvcc = usable_nvcc(OBJECTS)
    cuda = cuda_units(nvcc) if nvcc else []
    units = [*cuda, binding_unit(headers, version, nvcc is not None), *cpu_units()]  # the slowest first
    link(compile_units(units, OBJECTS, jobs=len(os.sched_getaffinity(0))), library, nvcc)
    return nvcc is not None


def usable_nvcc(folder: Path) -> str | None:
    """nvcc, if there is one that knows our architectures and accepts the C++ compiler; says so if it does not."""
    nvcc = find_nvcc()
    if nvcc is None:
        print(f"{NO_CUDA}: no nvcc on the path, in CUDA_HOME or in /usr/local/cuda.")
        return None
    probe = folder / "probe.cu"
    if not probe.exists():
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("__global__ void probe() {}\n", encoding="utf-8")
    try:
        compile_units([Unit("probe", probe, _nvcc_command(nvcc))], folder)
    except BuildError as error:
        print(f"{NO_CUDA}: {nvcc} cannot compile an empty kernel.\n{error}", file=sys.stderr)
        return None
    return nvcc


def compile_units(units: Sequence[Unit], folder: Path, jobs: int = 1) -> list[Path]:
    """The object files of `units` in `folder`; only those are made anew whose command or sources changed.

    One process at a time; another one waits, and finds them made.

    Raises:
        BuildError: a compiler failed.
    """
    import fcntl  # not on Windows, where nothing of this is called

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(jobs) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return list(pool.map(lambda unit: _compile(unit, folder), units))


def link(objects: Sequence[Path], library: Path, nvcc: str | None = None) -> None:
    """One shared library; with nvcc, the CUDA runtime is a part of it, so that it loads where there is none."""
    static = ("-cudart", "static", "-Xcompiler", "-fopenmp")
    command = [*_nvcc_command(nvcc), *static] if nvcc else [*cxx(), "-fopenmp"]
    library.parent.mkdir(parents=True, exist_ok=True)
    _run([*command, "-shared", *map(str, objects), "-o", str(library)])


def _sources(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in CSRC.glob(pattern))


def _nvcc(nvcc: str) -> tuple[str, ...]:
    host = cxx()
    return (nvcc, "-ccbin", host[0]) if len(host) == 1 else (nvcc,)


def _nvcc_command(nvcc: str) -> tuple[str, ...]:
    return (*_nvcc(nvcc), *CUDA_FLAGS)


def _compile(unit: Unit, folder: Path) -> Path:
    made, record = folder / f"{unit.name}.o", folder / f"{unit.name}.d"
    command = shlex.join([*unit.command, "-c", str(unit.source)])
    if _is_current(made, record, command):
        return made
    print(f"compiling {unit.source} ({unit.name})", flush=True)
    record.unlink(missing_ok=True)  # and written last: no record, no object
    start, system = time.time(), [word for path in unit.system for word in ("-isystem", path)]
    _run([*unit.command, *system, "-c", str(unit.source), "-o", str(made), "-MMD", "-MF", f"{record}.new"])
    rule = Path(f"{record}.new").read_text(encoding="utf-8")
    os.utime(made, (start, start))  # when its sources were read
    Path(f"{record}.new").write_text(f"{command}\n{rule}", encoding="utf-8")
    os.replace(f"{record}.new", record)
    return made


def _is_current(made: Path, record: Path, command: str) -> bool:
    """Whether an object is newer than all that it was made of, and by the same command."""
    if not made.exists() or not record.exists():
        return False
    last, _, rule = record.read_text(encoding="utf-8").partition("\n")
    # A rule of make: "object: file file \\\n file"; spaces in names are escaped.
    files = [ROOT / file for file in shlex.split(rule.replace("\\\n", " ").partition(": ")[2])]
    age = made.stat().st_mtime
    return last == command and all(file.exists() and file.stat().st_mtime < age for file in files)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
