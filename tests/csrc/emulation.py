"""The CUDA sources built for the host under csrc/emulator, called through ctypes on guarded copies of tensors.

Every call runs under the plain schedule and two adversarial ones and must give the same bits under each. Around each
tensor's storage lie bytes 0xff (NaN in every float type): what reads beyond a tensor meets NaN, what writes is found.
The same calls go to the built module's kernels on a GPU, where there is one.
"""

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SCHEDULES = (0, 1, 2)
GUARD = 512  # bytes on either side of a storage; a multiple of the widest access
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
C_TYPES: dict[str, Any] = {
    "int": ctypes.c_int,
    "bool": ctypes.c_bool,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_folder = tempfile.TemporaryDirectory(prefix="mlite_emulator_")


def new_folder() -> Path:
    """An empty folder that goes when the process does."""
    return Path(tempfile.mkdtemp(dir=_folder.name))


class EmulatorError(AssertionError):
    """A kernel did what the emulator forbids: a barrier that cannot complete, a misaligned access, …"""


@cache
def compiled(*sources: str, edits: tuple[tuple[str, str, str], ...] = ()) -> "Library":
    """The library of csrc/cuda/SOURCE…, compiled once per process.

    Args:
        edits: (file in csrc/cuda, text that occurs there exactly once, replacement): planted bugs.
    """
    folder = new_folder()
    for part in ("cuda", "emulator", "include"):
        (folder / part).mkdir()
        for file in (CSRC / part).iterdir():
            (folder / part / file.name).write_bytes(file.read_bytes())
    for name, old, new in edits:
        text = (folder / "cuda" / name).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{name} has {text.count(old)} times, not once: {old}")
        (folder / "cuda" / name).write_text(text.replace(old, new), encoding="utf-8")
    library = folder / "library.so"
    # What is compiled to be run once is compiled fast, and may leave things unused.
    flags = ["-O0"] if edits else ["-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    files = ["-x", "c++", *(str(folder / "cuda" / source) for source in sources), "-x", "none", _fibres()]
    _compile(*flags, "-DMLITE_EMULATOR", "-shared", *files, "-o", str(library))
    return Library(library)


@cache
def _fibres() -> str:
    made = Path(_folder.name) / "fibres.o"
    _compile(
        "-O1", "-Wall", "-Wextra", "-Werror", "-c", str(CSRC / "emulator" / "fibres.cpp"), "-o", str(made)
    )
    return str(made)


def _compile(*arguments: str) -> None:
    command = ["g++", "-std=c++17", "-fno-strict-aliasing", "-fPIC", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@cache
def signatures() -> dict[str, list[Any]]:
    """The C types of every function's parameters, read off the headers of csrc/include."""
    found = {}
    for header in sorted((CSRC / "include").glob("*.h")):
        text = re.sub(r"//.*", "", header.read_text(encoding="utf-8"))
        for name, parameters in re.findall(r"MLITE_BOTH\(\s*(\w+)\s*,([^)]*)\)\s*;", text):
            types = [parameter.split() for parameter in parameters.split(",")]
            found[name] = [
                ctypes.c_void_p if "*" in " ".join(words) else C_TYPES[words[0]] for words in types
            ]
    return found


class Library:
    """The kernels as the emulator has them; device: where tensors must lie."""

    device = "cpu"

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.mlite_emulator_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any, schedules: Sequence[int] = SCHEDULES) -> None:
        """mlite_cuda_NAME(*arguments, stream) in place; tensors go as pointers (views with their offset), None as null,
        tuples as arrays of int64 in host memory.

        Raises:
            EmulatorError: the launch failed, a guard was overwritten, or schedules differ in their result.
        """
        results: list[dict[int, Tensor]] = []
        originals = {a.untyped_storage().data_ptr(): a for a in arguments if isinstance(a, Tensor)}
        for schedule in schedules:
            guarded = {key: _guarded(tensor, self.device) for key, tensor in originals.items()}
            words = self._run(name, [_argument(a, guarded) for a in arguments], schedule)
            if words:
                raise EmulatorError(f"{name}, schedule {schedule}: {words}")
            for buffer in guarded.values():
                if not (buffer[:GUARD] == 255).all() or not (buffer[-GUARD:] == 255).all():
                    raise EmulatorError(f"{name}, schedule {schedule}: wrote beyond a tensor")
            results.append({key: buffer[GUARD:-GUARD] for key, buffer in guarded.items()})
        for schedule, result in zip(schedules, results, strict=True):
            if any(not torch.equal(result[key], results[0][key]) for key in result):
                raise EmulatorError(f"{name}: schedule {schedule} gives another result than {schedules[0]}")
        for key, tensor in originals.items():
            _bytes(tensor).copy_(results[0][key])

    def number(self, name: str, *sizes: int) -> int:
        """What mlite_cuda_NAME makes of some sizes."""
        function = getattr(self._library, f"mlite_cuda_{name}")
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * len(sizes)
        return int(function(*sizes))

    def _run(self, name: str, arguments: list[Any], schedule: int) -> str:
        """Runs it; what went wrong, if anything."""
        function = getattr(self._library, f"mlite_cuda_{name}")
        function.argtypes = [*signatures()[name], ctypes.c_void_p]
        self._library.mlite_emulator_schedule(schedule)
        code = function(*arguments, None)
        return f"error {code}: {self._library.mlite_emulator_error().decode()}" if code else ""


class OnGpu(Library):
    """The kernels of the built module on a GPU; every call runs once for each schedule."""

    device = "cuda"

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def number(self, name: str, *sizes: int) -> int:
        return int(getattr(self._module, f"cuda_{name}")(*sizes))

    def _run(self, name: str, arguments: list[Any], schedule: int) -> str:
        given = [tuple(a) if isinstance(a, ctypes.Array) else 0 if a is None else a for a in arguments]
        try:
            getattr(self._module, f"cuda_{name}")(*given, torch.cuda.current_stream().cuda_stream)
        except RuntimeError as error:
            return str(error)
        torch.cuda.synchronize()
        return ""


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _guarded(tensor: Tensor, device: str) -> Tensor:
    content = _bytes(tensor)
    spare = torch.full((content.numel() + 2 * GUARD + 64,), 255, dtype=torch.uint8, device=device)
    start = -spare.data_ptr() % 64  # torch aligns to 64 bytes itself; stated, since the kernels choose by it
    buffer = spare[start : start + content.numel() + 2 * GUARD]
    buffer[GUARD:-GUARD] = content
    return buffer


def _argument(argument: Any, guarded: dict[int, Tensor]) -> Any:
    if isinstance(argument, Tensor):
        buffer = guarded[argument.untyped_storage().data_ptr()]
        return buffer.data_ptr() + GUARD + argument.storage_offset() * argument.element_size()
    if isinstance(argument, tuple):
        return (ctypes.c_int64 * len(argument))(*argument)
    return DTYPES.get(argument, argument) if isinstance(argument, torch.dtype) else argument


def same_or_better(ours: Tensor, plain: Tensor, exact: Tensor, magnitude: float = 0.0) -> None:
    """Our error is at most twice that of plain torch, against float64; NaN and inf stand where float64 has them.

    Args:
        plain: the result of plain torch in the precision of `ours`, or below where torch knows only that.
        magnitude: of the terms that cancel in `exact`; one unit in the last place of it, or of the largest
            exact number, is allowed in any case.
    """
    assert ours.shape == exact.shape == plain.shape
    assert torch.equal(ours.isnan(), exact.isnan()), "NaN elsewhere"
    finite = exact.isfinite()
    if ours.dtype != torch.float16:  # whose range float64's results may leave
        infinite = exact.isinf()
        assert torch.equal(ours.double()[infinite], exact[infinite]), "inf elsewhere"
    if not finite.any():
        return
    off = (ours.double() - exact)[finite].abs().max().item()
    allowed = torch.nan_to_num((plain.double() - exact)[finite].abs(), nan=0.0, posinf=0.0).max().item()
    largest = max(exact[finite].abs().max().item(), magnitude)
    bound = 2 * allowed + torch.finfo(ours.dtype).eps * largest
    assert off <= bound, f"off by {off:.3g}, where plain torch is by {allowed:.3g}; at most {bound:.3g}"
