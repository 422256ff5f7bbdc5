"""Compiled extensions; everything else about the package stands in pyproject.toml."""

import platform
import sys
import sysconfig
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent))  # an isolated build has it nowhere

from csrc import build

KERNELS = "megatron_lite.ops._kernels"


class BuildKernels(build_ext):
    """Calls g++ and nvcc itself for the kernels: many flags for one module, and objects that outlive the build."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != KERNELS:
            return super().build_extension(ext)
        headers = (pybind11.get_include(), sysconfig.get_path("include"))
        version = f"{sys.implementation.cache_tag}-{pybind11.__version__}"
        try:
            build.build_module(Path(self.get_ext_fullpath(ext.name)).absolute(), headers, version)
        except build.BuildError as error:
            if ext.optional:
                print("The kernels of csrc are left out; the plain torch operations serve.")
            raise CompileError(str(error)) from error


headers = [str(path.relative_to(build.ROOT)) for path in sorted(build.CSRC.glob("*.h"))]
# The level of optimisation is stated, because the default is whatever Python itself was built with.
extensions: list[Extension] = [
    Pybind11Extension(module, [source], cxx_std=17, extra_compile_args=["-O3"], depends=headers)
    for module, source in (
        ("megatron_lite.data._index", "csrc/index.cpp"),
        ("megatron_lite.corpus._text", "csrc/text.cpp"),
    )
]
if sys.platform == "linux":
    # Where nobody has tried the kernels, what does not compile is left out: the plain torch operations serve.
    tried = platform.machine() == "x86_64"
    folders = (build.CSRC, build.CSRC / "include", build.CSRC / "cpu", build.CSRC / "cuda")
    files = [str(path.relative_to(build.ROOT)) for folder in folders for path in sorted(folder.glob("*.*"))]
    extensions.append(Extension(KERNELS, ["csrc/bindings.cpp"], depends=files, optional=not tried))
else:
    print("The kernels of csrc are for Linux and are left out here; the plain torch operations serve.")

setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
