#!/usr/bin/env python3
"""Builds the compiled modules into this checkout with what is here, and installs nothing.

For machines from which nothing can be fetched; elsewhere `make setup` does more. It needs a C++ compiler, Python's
headers and pybind11's (torch brings a copy); with nvcc the CUDA kernels are built as well.
"""

import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from csrc import build  # noqa: E402


def pybind11() -> tuple[str, str]:
    """The folder of its headers, and a word for its version."""
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        headers = Path(spec.origin).parent / folder if spec is not None and spec.origin else None
        if headers is not None and (headers / "pybind11" / "pybind11.h").is_file():
            version = importlib.metadata.version(package)
            return str(headers), version if package == "pybind11" else f"{package}{version}"
    raise build.BuildError("needs pybind11's headers: install pybind11, or torch, which has a copy")


def main() -> int:
    suffix, python = sysconfig.get_config_var("EXT_SUFFIX"), sysconfig.get_path("include")
    try:
        if not Path(python, "Python.h").is_file():
            raise build.BuildError(f"needs Python's headers, and {python}/Python.h is missing (python3-dev)")
        folder, version = pybind11()
        headers, version = (folder, python), f"{sys.implementation.cache_tag}-{version}"
        nvcc = build.usable_nvcc(build.OBJECTS)
        cuda = build.cuda_units(nvcc) if nvcc else []
        binding = build.binding_unit(headers, version, nvcc is not None)
        flags = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden")
        alone = {
            build.Unit(f"{name}-{version}", Path(f"csrc/{name}.cpp"), (*build.cxx(), *flags), headers): module
            for name, module in (("index", "data/_index"), ("text", "corpus/_text"))
        }
        units = [*cuda, binding, *alone, *build.cpu_units()]  # those that take longest first
        objects = build.compile_units(units, build.OBJECTS, jobs=len(os.sched_getaffinity(0)))
        made = dict(zip(units, objects, strict=True))
        kernels = [made[unit] for unit in units if unit not in alone]
        build.link(kernels, ROOT / f"megatron_lite/ops/_kernels{suffix}", nvcc)
        for unit, module in alone.items():
            build.link([made[unit]], ROOT / f"megatron_lite/{module}{suffix}")
    except build.BuildError as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    print(f"built for {sys.implementation.cache_tag}, {'with' if nvcc else 'without'} CUDA")
    return 0


if __name__ == "__main__":
    sys.exit(main())
