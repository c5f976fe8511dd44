"""Builds the C++ packing and grouping extension; everything else is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "mot_megatron.data._native",
            ["mot_megatron/csrc/native.cpp", "mot_megatron/csrc/budget.cpp"],
            depends=["mot_megatron/csrc/budget.h"],
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
