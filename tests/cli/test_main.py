"""Tests that every command starts quickly, has help, and has an equivalent script."""

from __future__ import annotations

import ast
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mot_megatron.cli.benchmark import BENCHMARKS
from mot_megatron.cli.benchmark_scaling import COMMANDS as SCALING
from mot_megatron.cli.checkpoint import CONVERSIONS
from mot_megatron.cli.main import COMMANDS, TRAINING, main
from tests.launch.entry_points import ROOT

HELP_SECONDS = 0.5
FIRST_LINE_SECONDS = 3.0
TRIES = 5
"""A busy machine may be slow once, but rarely every time."""
HEAVY = {"torch", "numpy", "pydantic", "megatron", "deepspeed", "scipy", "matplotlib"}
SCRIPTS = {
    "benchmark_data": "benchmark data",
    "benchmark_documents": "benchmark documents",
    "benchmark_layer": "benchmark layer",
    "benchmark_scaling": "benchmark scaling",
    "benchmark_step": "benchmark step",
    "check_machine": "check-machine",
    "compare": "compare",
    "convert_checkpoint": "checkpoint",
    "drill": "drill",
    "evaluate": "evaluate",
    "generate": "generate",
    "inspect_corpus": "inspect",
    "match_steps": "match",
    "measure_memory": "memory",
    "plan_layout": "plan",
    "prepare_corpus": "prepare",
    "show_run": "summary",
    "supervise": "supervise",
    "upcycle": "upcycle",
}
MAINTENANCE_SCRIPTS = {"draw_samples", "make_wheelhouse", "write_config_reference"}
"""They are no commands: they write files of the documentation, or collect the package's wheels."""
SINGLE = [name for name in COMMANDS if name not in ("benchmark", "checkpoint")]
WITH_SCRIPT = [*SINGLE, "checkpoint", *(f"benchmark {name}" for name in BENCHMARKS)]
ALL = [
    *WITH_SCRIPT,
    *(f"benchmark scaling {name}" for name in SCALING),
    *(f"checkpoint {name}" for name in CONVERSIONS),
]


def printed_by(*command: str) -> str:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def best_seconds(action: Callable[[], object], enough: float) -> float:
    """Return the shortest duration of several tries; stop at the first that is short enough."""
    best = float("inf")
    for _ in range(TRIES):
        began = time.monotonic()
        action()
        best = min(best, time.monotonic() - began)
        if best < enough:
            break
    return best


@pytest.mark.parametrize("command", ["", *ALL])
def test_help_is_fast(command: str) -> None:
    line = ["-m", "mot_megatron", *command.split(), "--help"]
    assert best_seconds(lambda: printed_by(*line), HELP_SECONDS) < HELP_SECONDS


@pytest.mark.parametrize(
    "arguments",
    [
        "generate --checkpoint nowhere --prompt a --output nowhere",
        "evaluate --checkpoint nowhere",
        "upcycle --checkpoint nowhere --config nowhere",
        "inspect nowhere",
        "checkpoint inspect nowhere",
        "checkpoint reshard nowhere nowhere --world-size 1",
        "checkpoint weights nowhere nowhere",
        "checkpoint from-deepspeed nowhere --config nowhere",
        "checkpoint to-megatron nowhere nowhere",
        "checkpoint from-megatron nowhere --config nowhere",
        "plan --config nowhere --world-size 1 --memory-gb 1",
        "memory --config nowhere --world-size 1",
        "match nowhere elsewhere",
        "compare nowhere --output nowhere --report-only",
        "benchmark layer --tokens 1",
        "check-machine --only nothing",
        "benchmark data --corpus nowhere",
    ],
)
def test_work_is_announced_before_slow_imports(arguments: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mot_megatron", *arguments.split()]

    def wait_for_first_line() -> None:
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path
        ) as process:
            assert process.stderr is not None
            line = process.stderr.readline().decode()
            process.kill()
        assert line.startswith(f"mot {arguments.split()[0]}"), line

    assert best_seconds(wait_for_first_line, FIRST_LINE_SECONDS) < FIRST_LINE_SECONDS


def test_nothing_heavy_is_imported_for_help() -> None:
    """This applies to all commands and to the trainer."""
    program = (
        "import contextlib, io, sys\n"
        "from mot_megatron.cli import main, train\n"
        f"for command in {ALL!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            main.main([*command.split(), '--help'])\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            train.main(['--help'])\n"
        f"print(*sorted({HEAVY!r} & sys.modules.keys()))\n"
    )
    assert printed_by("-c", program).split() == []


def test_scripts_are_equivalent_to_their_commands(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert scripts - MAINTENANCE_SCRIPTS == SCRIPTS.keys()
    assert set(SCRIPTS.values()) | {"configs"} == set(WITH_SCRIPT)
    for script, command in SCRIPTS.items():
        usage = printed_by(f"tools/{script}.py", "--help")
        assert usage.startswith(f"usage: mot {command} "), usage
        with contextlib.suppress(SystemExit):
            main([*command.split(), "--help"])
        assert usage == capsys.readouterr().out


def test_overview_and_how_training_is_launched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert TRAINING in printed.splitlines()
    assert main(["train", "--config", "x.toml"]) == 2
    assert capsys.readouterr().err == f"mot: {TRAINING}\n"
    assert main(["benchmark"]) == 0
    assert "\n  layer " in capsys.readouterr().out


def test_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paint"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: mot paint: no such command; allowed: prepare, inspect, ")
    assert error.count("\n") == 1
    assert main(["benchmark", "speed"]) == 2
    assert capsys.readouterr().err.endswith("allowed: layer, step, data, documents, scaling\n")


def test_only_the_command_line_uses_environment_variables() -> None:
    """All other modules receive such values as arguments."""
    package = ROOT / "mot_megatron"
    users = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")
    }
    assert users == {"cli"}
