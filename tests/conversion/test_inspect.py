"""What mot checkpoint inspect says about one checkpoint, and about two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mot_megatron.checkpoint import NamedTensor, save_checkpoint
from mot_megatron.cli.checkpoint_inspect import main
from mot_megatron.conversion.inspection import TensorName
from mot_megatron.model.sharding import ParameterSharding
from tests.columns import widest
from tests.conversion.states import (
    EXPERTS,
    FOUR_LAYERS,
    METADATA,
    PP2,
    SP,
    TP2,
    config_of,
    error_of,
    resharded,
    shapes_of,
    values_of,
    write_source,
)

CONFIG = config_of(*EXPERTS, FOUR_LAYERS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    write_source(folder / "a", CONFIG)
    return resharded(
        folder / "a", folder / "b", 4, config_of(*EXPERTS, FOUR_LAYERS, TP2, SP, PP2)
    ).path


def document(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "training state, step 7; verified: 7 files" in out
    assert "layout: tensor 2, pipeline 2, ZeRO-1; files of 4 ranks" in out
    assert "progress: 4,321 tokens, 4 s of training" in out
    assert "optimizer: 7 steps" in out
    assert "data position: epoch 1, next_sequence 5" in out
    assert widest(out.splitlines()) <= 120
    total = sum(value.nbytes for value in values_of(CONFIG).values())
    assert any(
        line.startswith("total") and line.endswith(f"{total:,}") for line in out.splitlines()
    )
    assert "  layers 0-3, each: shared" not in out
    assert "  layers 0-3, each: text" in out
    assert "  outside the layers: shared" in out


def test_parameters_by_tower_add_up(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint)]) == 0
    out = capsys.readouterr().out
    total = 0
    for line in out[out.index("parameters by layer") :].splitlines()[1:]:
        layers, _, towers = line.partition(": ")
        factor = 4 if "0-3" in layers else 1
        total += factor * sum(
            int(each.split(" ")[1].replace(",", "")) for each in towers.split(", ")
        )
    assert total == sum(torch.Size(shape).numel() for shape in shapes_of(CONFIG).values())


def test_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, str(checkpoint), "--statistics", "weight/*final_norm*")
    assert found["contents"] == "training state"
    assert found["verified"] is True
    assert found["data"] == METADATA["data"]
    assert found["config"]["model"]["num_layers"] == 4
    values = values_of(CONFIG)
    assert {n: tuple(t["shape"]) for n, t in found["tensors"].items()} == {
        name: tuple(value.shape) for name, value in values.items()
    }
    assert len(found["statistics"]) == 3
    for name, statistics in found["statistics"].items():
        value = values[name].double()
        assert statistics["elements"] == value.numel()
        assert statistics["min"] == float(value.min())
        assert statistics["max"] == float(value.max())
        assert statistics["mean"] == pytest.approx(float(value.mean()), abs=1e-12)
        assert statistics["std"] == pytest.approx(float(value.std(unbiased=False)), rel=1e-9)
        assert (statistics["zeros"], statistics["not_finite"]) == (0, 0)


def test_configurations_are_compared(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.toml"
    path.write_text(CONFIG.to_toml())
    command = [str(checkpoint), "--config", str(path), "--set", "optimizer.lr=0.5"]
    differences = document(capsys, *command)["config_differences"]
    assert differences["optimizer.lr"] == {"first": 3e-4, "second": 0.5}
    assert set(differences) == {
        "optimizer.lr",
        "parallel.tensor_model_parallel_size",
        "parallel.pipeline_model_parallel_size",
        "parallel.sequence_parallel",
    }
    assert main(command) == 0
    assert "  optimizer.lr: 0.0003, 0.5" in capsys.readouterr().out


def test_a_resharded_checkpoint_is_equal(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = checkpoint.parent.parent / "a"
    assert main([str(first), str(checkpoint)]) == 0
    out = capsys.readouterr().out
    number = len(values_of(CONFIG))
    assert f"{number} tensors in both, of which 0 differ in values, 0 in shape, 0 in dtype" in out
    assert "progress and data position: equal" in out
    assert "parallel.tensor_model_parallel_size: 1, 2" in out


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> str:
    named = [NamedTensor(n, t, ParameterSharding(tuple(t.shape))) for n, t in tensors.items()]
    save_checkpoint(
        directory,
        1,
        named,
        metadata={"progress": "nonsense", "data": 3},
        config_text=CONFIG.to_toml(),
        groups=None,
        keep=1,
    )
    return str(directory)


def test_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ones = torch.ones(4, 4)
    changed = ones.clone()
    changed[1, 2] = 1.5
    first = save(
        tmp_path / "a",
        {"w/same": ones, "w/changed": ones, "w/gone": ones, "w/shape": ones, "w/dtype": ones},
    )
    second = save(
        tmp_path / "b",
        {
            "w/same": ones,
            "w/changed": changed,
            "w/new": ones,
            "w/shape": ones[:2].contiguous(),
            "w/dtype": ones.bfloat16(),
        },
    )
    found = document(capsys, first, second)
    assert found["values_differ"] == {
        "w/changed": {"elements": 1, "largest": 0.5, "relative": 0.125}
    }
    assert found["only_in_first"] == ["w/gone"]
    assert found["only_in_second"] == ["w/new"]
    assert found["shapes_differ"] == {"w/shape": "[4, 4] and [2, 4]"}
    assert found["dtypes_differ"] == {"w/dtype": "float32 and bfloat16"}
    assert main([first, second]) == 0
    out = capsys.readouterr().out
    assert "     0.125        0.5             1  w/changed" in out
    # Metadata of other programs is no obstacle.
    assert main([first, "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "tensors of another program" in out
    assert "w/same  4 x 4 float32" in out


def test_values_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), 0.0])
    path = save(tmp_path / "a", {"w/odd": values, "w/none": torch.full((2,), float("nan"))})
    found = document(capsys, path, "--statistics", "w/*")["statistics"]
    assert found["w/odd"]["not_finite"] == 2
    assert (found["w/odd"]["mean"], found["w/odd"]["zeros"]) == (0.5, 1)
    assert found["w/none"]["mean"] is None
    assert not document(capsys, path, path)["values_differ"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--statistics", "nothing*"], "has no tensor named like nothing*"),
        (["--set", "optimizer.lr=1"], "--set and --unset need --config"),
        (["x", "y"], "3 checkpoints given; allowed: one, or two"),
    ],
)
def test_errors(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main([str(checkpoint), *more]) == 2
    assert message in error_of(capsys)


def test_a_damaged_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_source(tmp_path / "a", CONFIG).path
    (path / "config.toml").write_text("")
    assert main([str(path)]) == 2
    assert "config.toml has 0 bytes, not " in error_of(capsys)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("weight/head.linear.weight", ("weight", "head.linear.weight", None, None, None)),
        (
            "exp_avg/layers.12.attention.qkv.shared.linear.weight",
            ("exp_avg", "attention.qkv.linear.weight", 12, None, None),
        ),
        (
            "weight/layers.0.feed_forward.towers.2.experts.31.down",
            ("weight", "feed_forward.experts.down", 0, 2, 31),
        ),
    ],
)
def test_names(name: str, parts: tuple[Any, ...]) -> None:
    assert TensorName.parse(name) == TensorName(*parts)
