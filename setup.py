"""Compiled extensions; everything else about the package stands in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# The level of optimisation is stated, because the default is whatever Python itself was built with.
extensions = [
    Pybind11Extension("megatron_lite.data._index", ["csrc/index.cpp"], cxx_std=17, extra_compile_args=["-O3"])
]

setup(ext_modules=extensions)
