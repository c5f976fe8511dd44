"""Tests that the planner lists exactly the layouts that training accepts and that fit."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mot_megatron.cli.plan import main
from mot_megatron.config_files import load_config
from mot_megatron.errors import ConfigError
from mot_megatron.planning.layouts import legal_layouts, plan
from mot_megatron.planning.memory import state_bytes
from mot_megatron.rules import check, check_world_size
from tests.cli.console import only_error
from tests.columns import widest
from tests.small_runs import CONFIG, write_corpus

VOCABULARY = "model.vocab_size=1024"
EVEN = (1, 1, 1)
EXPERTS = "model.towers.text.experts={num_moe_experts=4}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("plan") / "corpus", without="speech")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.format(corpus=tmp_path / "nowhere"))
    return path


def arguments(config_file: Path, gpus: int, memory_gb: float, *overrides: str) -> list[str]:
    settings = [part for override in overrides for part in ("--set", override)]
    where = ["--config", str(config_file), "--world-size", str(gpus), "--memory-gb", str(memory_gb)]
    return where + settings


def planned(
    capsys: pytest.CaptureFixture[str], config_file: Path, gpus: int, memory_gb: float, *extra: str
) -> dict[str, Any]:
    assert main([*arguments(config_file, gpus, memory_gb, *extra), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_layouts_are_those_that_training_accepts(config_file: Path) -> None:
    config = load_config(config_file, [VOCABULARY])
    layouts = legal_layouts(config, 8, gpus_per_node=8, tower_tokens=EVEN)
    for layout in layouts:
        check(layout, "layout")
        check_world_size(layout, 8)
    axes = {
        (
            layout.parallel.tensor_model_parallel_size,
            layout.parallel.pipeline_model_parallel_size,
            layout.parallel.modality_parallel_size,
        )
        for layout in layouts
    }
    # Two key-value heads allow tp 2 and two layers pp 2; the remaining factor of 8 is dp.
    expected = {
        (tp, pp, mp)
        for tp in (1, 2)
        for pp in (1, 2)
        for mp in (1, 2, 4, 8)
        if 8 % (tp * pp * mp) == 0
    }
    assert axes == expected
    apart = [layout.parallel for layout in layouts if layout.parallel.modality_parallel_size > 1]
    stages = {parallel.zero_stage for parallel in apart}
    assert stages == {1, 2}
    # Tensor and modality parallelism stay within a node.
    for layout in legal_layouts(config, 8, gpus_per_node=2, tower_tokens=EVEN):
        parallel = layout.parallel
        assert parallel.tensor_model_parallel_size * parallel.modality_parallel_size <= 2


def test_expert_parallel_sizes(config_file: Path) -> None:
    config = load_config(config_file, [VOCABULARY, EXPERTS])
    layouts = legal_layouts(config, 4, gpus_per_node=4, tower_tokens=EVEN)
    spread = {
        (
            layout.parallel.tensor_model_parallel_size,
            layout.parallel.pipeline_model_parallel_size,
            layout.parallel.modality_parallel_size,
            layout.parallel.expert_model_parallel_size,
        )
        for layout in layouts
        if layout.parallel.expert_model_parallel_size > 1
    }
    # The ranks that hold the text tower can share its experts: 4 / (tp pp) ranks without modality
    # parallelism, half of that with groups of two, and two of a group of four.
    assert spread == {
        (1, 1, 1, 2),
        (1, 1, 1, 4),
        (2, 1, 1, 2),
        (1, 2, 1, 2),
        (1, 1, 2, 2),
        (1, 1, 4, 2),
    }
    alone, four = (
        plan(load_config(config_file, [VOCABULARY, EXPERTS, *extra]), 4, EVEN)
        for extra in ([], ["parallel.expert_model_parallel_size=4"])
    )
    # Three experts fewer, with 3 * 32 * 48 elements in each of two layers.
    assert alone.state.weights - four.state.weights == 4 * 2 * 3 * (3 * 32 * 48)
    # The optimizer state is the same: without expert parallelism, ZeRO shards that of all four
    # experts over four ranks; with it, each rank has all of one expert's.
    assert alone.state.optimizer == four.state.optimizer
    assert alone.activations == four.activations


def test_memory_is_that_of_the_fullest_rank(config_file: Path) -> None:
    config = load_config(config_file, [VOCABULARY, "parallel.modality_parallel_size=2"])
    layout = plan(config, 2, [5, 3, 2])
    assert layout.placement is not None
    assert [layout.placement.towers(rank) for rank in (0, 1)] == [(0,), (1, 2)]
    # Rank 1 holds two of three towers; each rank has half of the tokens.
    assert layout.state == state_bytes(config, layout.mesh, layout.placement, 1)
    assert layout.state.total > state_bytes(config, layout.mesh, layout.placement, 0).total
    assert layout.tokens == 64 * 4  # half of 2 * 64 positions in each of 4 micro-batches
    needed = [layout.needed[mode] for mode in ("none", "selective", "full")]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] == layout.state.total + layout.activations["none"]


def test_exchange_of_heads_halves_activations(config_file: Path) -> None:
    """With an exchange of heads, the ranks of a group share one micro-batch."""
    base = [VOCABULARY, "parallel.modality_parallel_size=2"]
    by_sequence, by_heads = (
        plan(load_config(config_file, [*base, *extra]), 2, [5, 3, 2])
        for extra in ([], ["parallel.attention_exchange=heads"])
    )
    assert (by_sequence.accumulation, by_heads.accumulation) == (4, 8)
    assert by_heads.tokens == by_sequence.tokens
    assert by_heads.state == by_sequence.state
    # All activations are halved except the rotary angles, which have 64 positions in both, and the
    # fp32 gradient of the head's weight.
    model = by_heads.config.model
    gradient = 4 * model.num_vocabulary_rows * model.hidden_size
    of_heads, of_sequence = (
        each.activations["none"] - gradient for each in (by_heads, by_sequence)
    )
    assert 0.5 < of_heads / of_sequence < 0.52


def test_only_layouts_that_fit_are_listed(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plenty = planned(capsys, config_file, 4, 1.0, VOCABULARY)
    assert plenty["not_fitting"] == 0
    assert {layout["recompute"] for layout in plenty["fitting"]} == {"none"}
    least = min(layout["needed"]["full"] for layout in plenty["fitting"])
    some = planned(capsys, config_file, 4, 1.3 * least / 1e9, VOCABULARY)
    assert len(some["fitting"]) + some["not_fitting"] == len(plenty["fitting"])
    assert 0 < some["not_fitting"] < len(plenty["fitting"])
    for layout in some["fitting"]:
        assert layout["needed"][layout["recompute"]] <= 1.3 * least
    # One byte less than the smallest layout needs.
    assert main(arguments(config_file, 4, (least - 1) / 1e9, VOCABULARY)) == 1
    printed = capsys.readouterr().out
    assert "0 layouts fit" in printed
    assert f"{len(plenty['fitting'])} legal layouts do not fit" in printed
    assert "the closest lacks 0.000 GB" in printed


def test_layouts_are_sorted_by_recomputation_then_communication(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plenty = planned(capsys, config_file, 4, 1.0, VOCABULARY)
    needs = sorted(layout["needed"]["none"] for layout in plenty["fitting"])
    found = planned(capsys, config_file, 4, needs[len(needs) // 2] / 1e9, VOCABULARY)["fitting"]
    modes = ["none", "selective", "full"]
    keys = []
    for layout in found:
        parallel = layout["parallel"]
        tensor = parallel["tensor_model_parallel_size"]
        ranks = tensor * parallel["pipeline_model_parallel_size"]
        keys.append((modes.index(layout["recompute"]), ranks, tensor))
    assert keys == sorted(keys)
    assert len({key[0] for key in keys}) > 1


def test_token_shares_are_read_from_the_corpus(
    corpus: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(config_file, 2, 1.0, f"data.corpus={corpus}")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert widest(lines) <= 120
    assert lines[0].startswith("tokens of towers: text ")
    assert "speech 0%" in lines[0]
    report = planned(capsys, config_file, 2, 1.0, f"data.corpus={corpus}")
    assert sum(report["token_shares"]) == pytest.approx(1.0)
    assert report["token_shares"][2] == 0


def test_table_without_a_corpus(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(config_file, 8, 1.0, VOCABULARY)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert widest(lines) <= 120
    assert lines[0].startswith("tokens divided equally among towers: ")
    # The first layout has the least communication: plain data parallelism.
    assert lines[4] == "without recomputation:"
    assert lines[6].split()[:7] == ["1", "1", "-", "1", "1", "-", "0"]
    assert lines[-1] == "all legal layouts fit"


@pytest.mark.parametrize(
    ("gpus", "memory_gb", "overrides", "message"),
    [
        (0, 1.0, [VOCABULARY], "error: --world-size 0: must be above 0"),
        (8, -1.0, [VOCABULARY], "error: --memory-gb -1.0: must be above 0"),
        (7, 1.0, [VOCABULARY], "error: no layout of 7 GPUs is legal"),
        (8, 1.0, [], "error: model.vocab_size is absent"),
        (8, 1.0, ["model.num_layers=none"], "error: "),
    ],
)
def test_bad_input_is_one_line(
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    gpus: int,
    memory_gb: float,
    overrides: list[str],
    message: str,
) -> None:
    assert main(arguments(config_file, gpus, memory_gb, *overrides)) == 2
    assert only_error(capsys.readouterr().err).startswith(message)


def test_layouts_that_training_rejects_are_not_listed(config_file: Path) -> None:
    """The planner has no rules of its own: training raises an error for the same layouts."""
    config = load_config(config_file, [VOCABULARY])
    layouts = legal_layouts(config, 16, gpus_per_node=8, tower_tokens=EVEN)
    assert layouts
    assert all(
        layout.parallel.pipeline_model_parallel_size > 1
        for layout in layouts
        if layout.parallel.tensor_model_parallel_size == 1
        and layout.parallel.attention_exchange == "sequence"
    )
    with pytest.raises(ConfigError, match="global_batch_size = 8 is not divisible"):
        check_world_size(config, 16)


def test_samples_during_training_exclude_no_layout(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = "logging.sample_interval_steps=5"
    plain = legal_layouts(
        load_config(config_file, [VOCABULARY]), 4, gpus_per_node=4, tower_tokens=EVEN
    )
    sampling = legal_layouts(
        load_config(config_file, [VOCABULARY, samples]), 4, gpus_per_node=4, tower_tokens=EVEN
    )
    assert [layout.parallel for layout in sampling] == [layout.parallel for layout in plain]
    assert main(arguments(config_file, 4, 1.0, VOCABULARY, samples)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert widest(lines) <= 120
    assert lines[1].startswith("ignoring logging.sample_interval_steps = 5: ")


def test_explicit_layers_and_placement_are_kept_for_their_sizes(config_file: Path) -> None:
    listed = ["parallel.pipeline_layers=[1, 3]", "model.num_layers=4",
              "parallel.pipeline_model_parallel_size=2"]  # fmt: skip
    config = load_config(config_file, [VOCABULARY, *listed])
    layers = {
        layout.parallel.pipeline_model_parallel_size: layout.parallel.pipeline_layers
        for layout in legal_layouts(config, 4, gpus_per_node=4, tower_tokens=EVEN)
        if layout.parallel.virtual_pipeline_model_parallel_size is None
    }
    assert layers == {1: None, 2: (1, 3), 4: None}

    placement = "[{text = 1.0, image = 0.5}, {image = 0.5, speech = 1.0}]"
    overrides = [f"parallel.placement={placement}", "parallel.modality_parallel_size=2"]
    config = load_config(config_file, [VOCABULARY, *overrides])
    placed = {
        layout.parallel.modality_parallel_size: plan(layout, 4, [5, 3, 2]).placement
        for layout in legal_layouts(config, 4, gpus_per_node=4, tower_tokens=EVEN)
    }
    assert placed[1] is None
    assert placed[2] is not None
    assert placed[2].shares == ((1.0, 0.5, 0.0), (0.0, 0.5, 1.0))
    assert placed[4] is not None  # "auto", because the two entries do not apply to four ranks
    assert placed[4].num_copies == 4  # balanced: one tower per rank


@pytest.mark.slow
def test_the_best_layouts_are_ranked_by_time(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config", str(config_file), "--world-size=8", "--best", "--machine=h100-sxm"]
    command += ["--set", VOCABULARY]
    assert main(command) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert widest(lines) <= 120
    rows = [line.split() for line in lines if " none " in line]
    seconds = [float(row[9]) for row in rows]
    assert seconds == sorted(seconds)
    assert len(seconds) == 10
    layouts = tomllib.loads(output[output.index("[scaling.") :])["scaling"]["layouts"]
    assert set(layouts["8"]) == {"parallel", "training"}


def test_the_best_layouts_need_a_machine(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config", str(config_file), "--world-size=8", "--set", VOCABULARY]
    assert main([*command, "--best"]) == 2
    assert "--best needs --machine" in only_error(capsys.readouterr().err)
    assert main(command) == 2
    assert "--memory-gb is needed without --best" in only_error(capsys.readouterr().err)
