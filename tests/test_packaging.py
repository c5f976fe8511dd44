"""The sdist builds a wheel, and the installed wheel works outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch.entry_points import ROOT

pytestmark = pytest.mark.slow

SOURCES = (
    "pyproject.toml", "setup.py", "MANIFEST.in", "requirements.txt", "README.md", "LICENSE",
    "configs", "launch", "mot_megatron", "tests", "tools",
)  # fmt: skip
SDIST = "from setuptools.build_meta import build_sdist; build_sdist('dist')"


def run(command: Sequence[str | Path], folder: Path, python_path: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    finished = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkout = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, checkout / name)
    run([sys.executable, "-c", SDIST], checkout)
    (path,) = (checkout / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    run([*pip, *offline, "--wheel-dir", folder, sdist], folder)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder, to be put before this interpreter's own packages."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-index", "--no-deps", "--target", target, wheel], target)
    return target


@pytest.mark.slow
def test_contents_of_sdist_and_wheel(sdist: Path, wheel: Path) -> None:
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"mot_megatron/csrc/native.cpp", "mot_megatron/csrc/budget.h", "requirements.txt",
            "configs/quickstart.toml", "launch/environment.sh", "tools/plan_layout.py",
            "tests/run.sh"} <= inside  # fmt: skip
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mot_megatron"}
    assert any(name.startswith("mot_megatron/data/_native.") for name in names)
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.toml")}
    assert {f"mot_megatron/{name}" for name in configs} <= set(names)
    of_check = {f"mot_megatron/machine_check/{name}" for name in ("model.toml", "reference.json")}
    assert of_check <= set(names)
    assert not any(name.endswith((".cpp", ".h")) for name in names)


@pytest.mark.slow
def test_installed_commands_work_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    mot = installed / "bin" / "mot"
    assert "generate" in run([mot, "--help"], tmp_path, installed)
    where, *_ = run([mot, "configs"], tmp_path, installed).splitlines()
    assert where == f"in {installed / 'mot_megatron' / 'configs'}:"
    run([mot, "configs", "--copy", "mine"], tmp_path, installed)
    planned = run(
        [mot, "plan", "--config", "mine/paper/37m-mot-3.toml", "--world-size", "32",
         "--memory-gb", "80"],
        tmp_path,
        installed,
    )  # fmt: skip
    assert "layouts fit in 80 GB" in planned
    program = "import mot_megatron.data._native as native; print(native.__file__)"
    extension = run([sys.executable, "-c", program], tmp_path, installed)
    assert extension.startswith(str(installed))
    trainer = [sys.executable, "-m", "mot_megatron.cli.train", "--help"]
    assert "--config" in run(trainer, tmp_path, installed)
