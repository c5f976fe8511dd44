"""Weights alone, in other dtypes and averaged: their values, and who takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mot_megatron.checkpoint import NamedTensor, save_checkpoint
from mot_megatron.cli.checkpoint_weights import main
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.conversion.weights import boxes, newest_sources, weight_outputs
from mot_megatron.errors import CheckpointError
from mot_megatron.model.sharding import ParameterSharding
from tests.conversion.states import (
    METADATA,
    TP2,
    assert_values,
    config_of,
    error_of,
    names_in,
    resharded,
    values_of,
    write_source,
)

CONFIG = config_of()


def weights_of(step: int = 7) -> dict[str, torch.Tensor]:
    return {n: v for n, v in values_of(CONFIG, step).items() if n.startswith("weight/")}


def test_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path / "a", CONFIG)
    command = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*command, "--dry-run"]) == 0
    assert not (tmp_path / "b").exists()
    assert main([*command, "--verify"]) == 0
    number = len(weights_of())
    out = capsys.readouterr().out
    assert f"{number} weights, " in out
    assert f"left out: {number} exp_avg, {number} exp_avg_sq\n" in out
    assert_values(tmp_path / "b", weights_of())
    source = CheckpointSource(tmp_path / "b")
    assert source.config == CONFIG
    assert source.metadata["data"] == METADATA["data"]
    assert "optimizer_steps" not in source.metadata


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    write_source(tmp_path / "a", CONFIG)
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--dtype", name]) == 0
    assert_values(tmp_path / "b", {n: value.to(dtype) for n, value in weights_of().items()})


def test_mean_of_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mot_megatron.conversion import weights

    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 1000)  # many blocks per tensor
    for step in (1, 2, 3, 4):
        write_source(tmp_path / "a", CONFIG, step)
    command = [str(tmp_path / "a"), str(tmp_path / "b"), "--average", "3", "--verify"]
    assert main(command) == 0
    expected = {
        name: (sum(weights_of(step)[name].double() for step in (4, 3, 2)) / 3).float()  # type: ignore[union-attr]
        for name in weights_of()
    }
    assert_values(tmp_path / "b", expected)
    source = CheckpointSource(tmp_path / "b")
    assert source.checkpoint.step == 4
    assert [each["step"] for each in source.metadata["made_from"]] == [4, 3, 2]


def test_the_sum_is_in_fp64(tmp_path: Path) -> None:
    """A sum in fp32 would lose the small values."""
    for step, value in enumerate((1e8, 1.0, -1e8, 1.0), start=1):
        tensor = NamedTensor("weight/w", torch.tensor([value]), ParameterSharding((1,)))
        save_checkpoint(
            tmp_path / "a",
            step,
            [tensor],
            metadata={},
            config_text=CONFIG.to_toml(),
            groups=None,
            keep=9,
        )
    (output,) = weight_outputs(newest_sources(tmp_path / "a", 4), None)
    assert output.produce().tolist() == [0.5]


def test_layouts_of_the_averaged_may_differ(tmp_path: Path) -> None:
    write_source(tmp_path / "x", CONFIG, 1)
    write_source(tmp_path / "a", CONFIG, 2)
    resharded(tmp_path / "x", tmp_path / "a", 2, config_of(TP2))
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--average", "2"]) == 0
    expected = {
        name: ((weights_of(1)[name].double() + weights_of(2)[name].double()) / 2).float()
        for name in weights_of()
    }
    assert_values(tmp_path / "b", expected)


def test_damaged_checkpoints_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write_source(tmp_path / "a", CONFIG, step).path for step in (1, 2, 3)]
    content = bytearray((paths[1] / "__0_0.distcp").read_bytes())
    content[999] ^= 1
    (paths[1] / "__0_0.distcp").write_bytes(content)
    steps = [source.checkpoint.step for source in newest_sources(tmp_path / "a", 2)]
    assert steps == [3, 1]
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--average", "3"]) == 2
    line = error_of(capsys)
    assert "has 2 usable checkpoints" in line
    assert "__0_0.distcp does not match its SHA-256" in line
    assert line.endswith("needed for the mean: 3")


def test_means_of_different_models_are_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "a", CONFIG, 1)
    write_source(tmp_path / "a", config_of("model.qk_norm=false"), 2)
    with pytest.raises(CheckpointError, match="is a checkpoint of another model than"):
        weight_outputs(newest_sources(tmp_path / "a", 2), None)


def test_weights_can_be_laid_out_anew(tmp_path: Path) -> None:
    write_source(tmp_path / "a", CONFIG)
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--dtype", "bf16"]) == 0
    resharded(tmp_path / "b", tmp_path / "c", 2, config_of(TP2))
    assert_values(tmp_path / "c", {n: v.bfloat16() for n, v in weights_of().items()})


@pytest.mark.parametrize(
    ("shape", "most"),
    [((), 4), ((0, 3), 4), ((5,), 2), ((3, 4), 4), ((3, 4), 7), ((2, 3, 5), 4), ((2, 3, 5), 99)],
)
def test_boxes_cover_a_tensor_once(shape: tuple[int, ...], most: int) -> None:
    seen = torch.zeros(shape)
    for offsets, sizes in boxes(shape, most):
        part = seen
        for dimension, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
            part = part.narrow(dimension, start, length)
        assert part.numel() <= most
        part += 1
    assert (seen == 1).all()


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path / "a", CONFIG)
    assert main([str(tmp_path / "a"), str(tmp_path / "a")]) == 2
    assert "step_00000007 exists" in error_of(capsys)
    assert names_in(tmp_path / "a") == ["step_00000007"]
