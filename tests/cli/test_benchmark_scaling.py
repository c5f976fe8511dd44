"""``mot benchmark scaling``: its output and its one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mot_megatron.cli.benchmark_scaling import main
from mot_megatron.cli.scaling_rehearse import world_sizes
from mot_megatron.config_files import parse_config
from mot_megatron.errors import ConfigError
from mot_megatron.scaling.roles import Role, roles_of
from tests.cli.console import only_error
from tests.columns import widest
from tests.small_runs import CONFIG

VOCABULARY = "model.vocab_size=256"
MP2 = "parallel.modality_parallel_size=2"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.format(corpus="none"))
    return path


def arguments(config_file: Path, sizes: str, *overrides: str) -> list[str]:
    settings = [part for override in (VOCABULARY, *overrides) for part in ("--set", override)]
    return ["rehearse", "--config", str(config_file), "--world-size", sizes, *settings]


@pytest.mark.slow
def test_ledgers_of_every_role_are_printed(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(config_file, "4", MP2)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert widest(lines) <= 120
    assert sum("place 1 in the modality group (rank 1)" in line for line in lines) == 1
    assert any("all-to-all" in line and "modality" in line for line in lines)
    assert main([*arguments(config_file, "4,8", MP2), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    # All ranks of a group together do the same work on half as many replicas.
    four, eight = (
        sum(role["flops"]["matrix products"] for role in document[size]) for size in ("4", "8")
    )
    assert four == 2 * eight


def test_one_role_per_stage_and_place() -> None:
    layout = [
        MP2,
        "parallel.pipeline_model_parallel_size=2",
        "parallel.tensor_model_parallel_size=2",
    ]
    config = parse_config(CONFIG.format(corpus="none"), "small", layout)
    assert roles_of(config, 16) == [Role(0, 0, 0), Role(0, 1, 2), Role(1, 0, 8), Role(1, 1, 10)]


@pytest.mark.parametrize(
    ("sizes", "overrides", "message"),
    [
        ("8,x", [], "--world-size 8,x: expected numbers of ranks, as in 16,64,256"),
        ("7", ["parallel.tensor_model_parallel_size=2"], "the world size 7 is not divisible by"),
        ("4", ["scaling.layouts.4={parallel={zero=1}}"], "scaling.layouts.4: parallel.zero"),
        ("4", ["scaling.layouts.4={parallel={zero_stage=4}}"], "zero_stage = 4: input should be"),
        ("4", ["scaling.layouts.four={}"], "scaling.layouts.four"),
        ("4", ["-model.vocab_size"], "model.vocab_size is absent"),
    ],
)
def test_bad_input_is_one_line(
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    sizes: str,
    overrides: list[str],
    message: str,
) -> None:
    command = arguments(config_file, sizes)
    for override in overrides:
        command += [f"--unset={override[1:]}"] if override[0] == "-" else [f"--set={override}"]
    assert main(command) == 2
    assert message in only_error(capsys.readouterr().err)


@pytest.mark.parametrize("given", ["", "0", "16,", "-4", "1e3", "9" * 20])
def test_numbers_of_ranks_are_checked(given: str) -> None:
    with pytest.raises(ConfigError, match="expected numbers of ranks"):
        world_sizes(given)
    assert world_sizes("16,64") == [16, 64]


@pytest.mark.slow
def test_a_forecast_and_its_dense_twin(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "report"
    options = ["--micro-batches=2", "--machine=h100-sxm", "--machine=a100-40gb-roce"]
    command = ["forecast", *arguments(config_file, "2")[1:], "--arms=dense", *options]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert widest(lines) <= 120
    assert "all times FORECAST" in lines[0]
    assert any(line.startswith("step over the dense twin's") for line in lines)
    command = ["forecast", *arguments(config_file, "2,4")[1:], "--arms=dense,moe-4x,hybrid"]
    command += [*options, "--slopes=paper", "--arm=mot-443m", f"--output={folder}"]
    assert main([*command, "--json"]) == 0
    assert all((folder / f"forecast-{number}.png").stat().st_size > 10_000 for number in (1, 2))
    assert "all times FORECAST" in (folder / "report.md").read_text()
    first, second = json.loads(capsys.readouterr().out)["machines"]
    assert first["machine_stamps"] == ["DATA SHEET"]
    image = first["time_to_dense_loss"][0]
    step = [first["forecasts"][arm][0]["step_seconds"] for arm in ("model", "dense twin")]
    assert (image["modality"], image["stamp"], image["slope"]) == ("image", "PAPER", 0.271)
    assert image["ratio"] == pytest.approx(0.271 * step[0] / step[1])
    for arm in ("model", "dense twin"):
        found = first["forecasts"][arm]
        assert [one["world_size"] for one in found] == [2, 4]
        assert found[1]["tokens"] == 2 * found[0]["tokens"]
        for one, slower in zip(found, second["forecasts"][arm], strict=True):
            assert sum(one["split_seconds"].values()) == pytest.approx(one["step_seconds"])
            assert one["step_seconds"] <= slower["step_seconds"]


def test_an_unknown_machine_is_one_line(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forecast", *arguments(config_file, "2")[1:], "--machine=abacus"]) == 2
    message = only_error(capsys.readouterr().err)
    assert "machines/abacus.toml: No such file or directory; profiles in" in message
    assert "h100-sxm" in message
