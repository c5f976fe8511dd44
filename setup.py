"""Packages and the C++ packing and grouping extension; everything else is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

setup(
    # The configuration files are at the top of a checkout, and inside the package once installed.
    packages=[*find_packages(include=["mot_megatron*"]), "mot_megatron.configs"],
    package_dir={"mot_megatron.configs": "configs"},
    package_data={
        "mot_megatron.configs": ["**/*.toml", "**/*.md", "**/*.csv"],
        "mot_megatron.data": ["*.pyi"],
        "mot_megatron.machine_check": ["*.toml", "*.json"],
    },
    include_package_data=False,
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
