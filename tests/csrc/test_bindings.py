"""The Python module of the kernels: all that the headers declare is there, typed, and does what C does."""

import ast
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc import build
from megatron_lite.ops import _kernels
from tests.csrc import attention_check, checks
from tests.csrc.emulation import DTYPES, Library

MODULE = Path(_kernels.__file__)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def declared() -> dict[str, list[tuple[str, str]]]:
    """Of each function of the headers, as the module has it: names and types of its parameters, then its result."""
    found = {}
    for header in sorted((build.CSRC / "include").glob("*.h")):
        text = re.sub(r"//.*|#define(.*\\\n)*.*", "", header.read_text(encoding="utf-8"))
        for result, name, parameters in re.findall(r"(MLITE_BOTH\(|int64_t )(\w+)[,(]([^)]*)\);", text):
            types = [parameter.split()[-1:] + parameter.split()[:-1] for parameter in parameters.split(",")]
            given = [(name.lstrip("*"), _python(header.name, " ".join([name, *c]))) for name, *c in types]
            if result == "int64_t ":
                found[name.removeprefix("mlite_")] = [*given, ("return", "int")]
            else:
                found[f"cpu_{name}"] = [*given, ("return", "None")]
                found[f"cuda_{name}"] = [*given, ("stream", "_Address"), ("return", "None")]
    return found


def _python(header: str, words: str) -> str:
    if "*" in words:
        return "_Strides" if header == "attention.h" and "int64_t" in words else "_Address"
    for c, python in (("bool", "bool"), ("float", "float"), ("double", "float"), ("int", "int")):
        if c in words.split()[1]:
            return python
    raise AssertionError(words)


def test_the_types_are_those_of_the_headers() -> None:
    stub = ast.parse(MODULE.with_name("_kernels.pyi").read_text(encoding="utf-8"))
    typed = {}
    for node in stub.body:
        if isinstance(node, ast.FunctionDef):
            assert not node.args.args or node.name == "", f"{node.name}: names of C are no keywords"
            parameters = [(a.arg, ast.unparse(a.annotation)) for a in node.args.posonlyargs if a.annotation]
            typed[node.name] = [*parameters, ("return", ast.unparse(node.returns or node))]
    own = {"cpu_instruction_set", "cpu_num_threads"}
    assert {name: typed[name] for name in typed.keys() - own} == declared()


def test_every_function_is_there() -> None:
    present = {name for name in dir(_kernels) if name.startswith(("cpu_", "cuda_"))}
    present -= {"cpu_instruction_set", "cpu_num_threads", "cuda_compiled", "cuda_architectures"}
    assert present == {name for name in declared() if name.startswith("cpu_") or _kernels.cuda_compiled}


class Module(Library):
    """The module's kernels, called as the checks call those of the emulator."""

    def __init__(self) -> None:
        pass

    def call(self, name: str, *arguments: Any, schedules: Any = ()) -> None:
        getattr(_kernels, f"cpu_{name}")(*map(_given, arguments))

    def number(self, name: str, *sizes: int) -> int:
        return int(getattr(_kernels, f"cpu_{name}")(*sizes))


def _given(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return (
        0
        if argument is None
        else DTYPES.get(argument, argument)
        if isinstance(argument, torch.dtype)
        else argument
    )


@DTYPE
def test_rows(dtype: torch.dtype) -> None:
    for rms in (False, True):
        checks.check_norm(Module(), 5, 77, dtype, rms=rms)
    for kind in ("gelu", "gelu_tanh", "swiglu"):
        checks.check_activation(Module(), kind, 5, 77, dtype)
    checks.check_rotary(Module(), (2, 5, 3, 1), 16, 8, dtype, tables=True)
    checks.check_softmax(Module(), (2, 3, 5, 9), dtype, causal=True, mask_heads=3, segments=True)
    checks.check_cross_entropy(Module(), 5, 77, dtype, slices=2, padding=3, z_loss=0.1)
    checks.check_dropout(Module(), 5, 77, dtype, start=2**63 + 5, row_stride=100, dropout_seed=2**64 - 3)


@DTYPE
def test_attention(dtype: torch.dtype) -> None:
    attention_check.check(
        Module(), (2, 4, 2, 5, 9, 24), dtype, segments="documents", drop=(0.3, 2**64 - 3, 1, 7)
    )


def test_workspaces_have_a_size() -> None:
    assert _kernels.cpu_workspace_rows(100, 8) == 4
    if _kernels.cuda_compiled:
        assert _kernels.cuda_workspace_rows(10**6, 1024) > 1


def test_what_the_cpu_does_not_serve_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"cpu_dropout: error 1: it does not serve this dtype"):
        _kernels.cpu_dropout(DTYPES[torch.float16], 1, 1, 1, 0, 0.5, 1, 0, 0)


@pytest.mark.parametrize("strides", [5, (1, 2), (1, 2, 3, 4), (1, 2, 0.5), (1, 2, 2**63)], ids=str)
@pytest.mark.skipif(not _kernels.cuda_compiled, reason="built without CUDA")
def test_strides_are_three(strides: Any) -> None:
    with pytest.raises(TypeError):
        _attention_on_cuda(0, strides)


@pytest.mark.skipif(not _kernels.cuda_compiled, reason="built without CUDA")
def test_errors_of_cuda_are_told_in_words() -> None:
    # Found before anything is launched, so that it needs no GPU.
    with pytest.raises(RuntimeError, match=r"cuda_attention_forward: error 716, misaligned address"):
        _attention_on_cuda(2, (8, 8, 8))


def _attention_on_cuda(q: int, strides: Any) -> None:
    other = (8, 8, 8)
    _kernels.cuda_attention_forward(
        1, 1, 1, 1, 1, 1, 8, 1.0, True, q, strides, 0, other, 0, other, 0, 0, 0.0, 0, 0, 1, 0, other, 0, 0
    )  # fmt: skip


ALONE = """
import importlib.util, os, sys
def kernels():
    spec = importlib.util.spec_from_file_location("megatron_lite.ops._kernels", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
THREADS = """
before = len(os.listdir("/proc/self/task"))
x = torch.ones(1 << 20)
kernels.cpu_dropout(0, 1024, 1024, 1024, 0, 0.5, 1, x.data_ptr(), x.data_ptr())
started = len(os.listdir("/proc/self/task")) - before
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in os.path.basename(line)}
print(kernels.cpu_num_threads(), started, len(runtimes), (torch.tensor(1e-40) * 1).item() > 0)
"""


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "start",
    ["import torch\nkernels = kernels()", "kernels = kernels()\nimport torch"],
    ids=["torch first", "kernels first"],
)
def test_torch_sets_the_number_of_threads(start: str) -> None:
    """Both use one OpenMP runtime, whichever comes first; denormals stay what they are."""
    told = python("-c", f"{ALONE}{start}\ntorch.set_num_threads(3)\n{THREADS}", str(MODULE))
    assert told.split() == ["3", "2", "1", "True"]


def test_loads_without_torch_and_without_a_driver() -> None:
    told = python(
        "-I", "-S", "-c", f"{ALONE}\nprint(kernels().cuda_compiled, 'torch' in sys.modules)", str(MODULE)
    )
    assert told.split() == [str(_kernels.cuda_compiled), "False"]
    needed = subprocess.run(["readelf", "-d", str(MODULE)], capture_output=True, text=True, check=True).stdout
    assert "libgomp" in needed and "libcuda" not in needed


def test_other_threads_run_meanwhile() -> None:
    """Python's lock is not held: this thread's clock ticks in the midst of a kernel that another one runs."""
    heads, span, ticks = 10**5, [], []
    x, table = torch.zeros(64), torch.zeros(64)  # with strides of 0, every head of every entry

    def run() -> None:
        q, cos = x.data_ptr(), table.data_ptr()
        span.append(time.monotonic())
        _kernels.cpu_rotary(
            0, 100, 1, heads, 0, 64, 64, q, 0, 0, 0, 0, 0, 0, 0, q, 0, 0, 0, 0, 0, 0, 0, cos, cos, 0, False
        )
        span.append(time.monotonic())

    interval = sys.getswitchinterval()
    other = threading.Thread(target=run)
    try:
        sys.setswitchinterval(1000)  # threads change where the lock is given away, and nowhere else
        other.start()
        while other.is_alive():
            ticks.append(time.monotonic())
            time.sleep(0.001)
    finally:
        sys.setswitchinterval(interval)
    assert any(span[0] < tick < span[1] for tick in ticks)
