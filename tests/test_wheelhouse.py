"""The folder of wheels: which packages it gets, and how; pip itself does not run."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.launch.entry_points import ROOT


def load() -> ModuleType:
    path = ROOT / "tools" / "make_wheelhouse.py"
    spec = importlib.util.spec_from_file_location("make_wheelhouse", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load()


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    path = tmp_path / "wanted.txt"
    path.write_text("# comment\ntorch==2.13.0\ntomli_w==1.2.0  # why\n\nsource-only==1\n")
    return path


def test_the_commands_are_those_of_the_other_machine(
    requirements: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--requirements", str(requirements), "--output", "wheels", "--dry-run"]
    arguments += ["--python-version", "3.12", "--machine", "aarch64", "--skip", "Tomli-W"]
    assert SCRIPT.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["torch==2.13.0", "source-only==1"]
    for words in (
        "download --no-deps --only-binary=:all: --dest wheels --python-version 3.12",
        "--abi cp312 --abi abi3 --abi none",
        "--platform manylinux_2_28_aarch64",
        "--platform manylinux2014_aarch64",
    ):
        assert words in lines[0]
    assert "x86_64" not in lines[0]


def test_all_of_the_repository_is_wanted() -> None:
    wanted = SCRIPT.read_requirements(ROOT / "requirements.txt", ["torch"])
    names = {SCRIPT.normalized(line) for line in wanted}
    assert {"deepspeed", "megatron-core", "tomli-w", "soundfile", "pydantic"} <= names
    assert "torch" not in names


@pytest.mark.parametrize(
    ("wheel", "python", "words"),
    [
        ("source_only-1-py3-none-any.whl", "3.12", None),
        ("source_only-1-cp311-cp311-linux_x86_64.whl", "3.99", "has compiled code; build its"),
        (None, "3.12", "has no wheel, and cannot be built: no compiler"),
    ],
)
def test_packages_without_a_wheel_are_built(
    requirements: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wheel: str | None,
    python: str,
    words: str | None,
) -> None:
    output = requirements.parent / "wheels"
    built = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        del options
        name = command[-1]
        if "download" in command:
            found = not name.startswith("source-only")
            if found:
                (output / f"{name.replace('==', '-')}-py3-none-any.whl").touch()
            return subprocess.CompletedProcess(command, int(not found))
        built.append(name)
        if wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "much\nno compiler\n")
        (output / wheel).touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(SCRIPT.subprocess, "run", run)
    arguments = ["--requirements", str(requirements), "--output", str(output)]
    status = SCRIPT.main([*arguments, "--python-version", python])
    printed = capsys.readouterr()
    assert built == ["source-only==1"]
    assert status == int(words is not None)
    if words is None:
        assert "wheels: 3 wheels; install them" in printed.out
        assert (output / "requirements.txt").read_text().count("\n") == 3
    else:
        assert words in printed.err
        assert not list(output.glob("source_only*"))
