"""What this machine is, which backends it can use, and why not the rest: what tools/doctor.py prints."""

import importlib
import os
import platform
import shutil
from dataclasses import replace
from typing import Any

import torch

from megatron_lite.ops.backends import Needs, name_of
from megatron_lite.ops.registry import BACKENDS, GROUPS, preference

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def machine() -> dict[str, str]:
    """What decides on the backends, in words."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    compilers = {name: shutil.which(name) for name in ("g++", "nvcc")}
    return {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}",
        "GPUs": ", ".join(f"{gpu.name} (capability {gpu.major}.{gpu.minor})" for gpu in gpus) or "none",
        "CPU": f"{len(os.sched_getaffinity(0))} cores for this process, {torch.get_num_threads()} threads",
        "kernels": _kernels(),
        "compilers": ", ".join(f"{name} {path or 'not found'}" for name, path in compilers.items()),
    }


def _kernels() -> str:
    """What our compiled module was built for, and what it uses here."""
    try:
        module = importlib.import_module("megatron_lite.ops._kernels")
    except (ImportError, OSError) as error:
        return f"not built ({error})"
    cuda = ", ".join(module.cuda_architectures) if module.cuda_compiled else "not built (no nvcc)"
    return f"CPU {module.cpu_instruction_set()}; CUDA {cuda}"


def survey(needs: Needs) -> dict[str, Any]:
    """For every group of operations: what `auto` takes for each type, and why each backend cannot serve each type."""
    found: dict[str, Any] = {}
    for group in GROUPS:
        reasons: dict[str, dict[str, str | None]] = {}
        order = preference(group, needs)
        others = [name for name, backend in BACKENDS.items() if group in backend.groups and name not in order]
        for name in (*order, *others):
            reasons[name] = {
                name_of(dtype): BACKENDS[name].why_not(group, replace(needs, dtype=dtype)) for dtype in TYPES
            }
        auto = {
            name_of(dtype): next(name for name in order if not reasons[name][name_of(dtype)])
            for dtype in TYPES
        }
        found[group] = {"auto": auto, "why_not": reasons}
    return found
