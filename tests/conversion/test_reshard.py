"""Resharding there and back is bitwise, and complete or not done at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mot_megatron.checkpoint import NamedTensor, load_checkpoint, open_checkpoint
from mot_megatron.cli.checkpoint_reshard import main
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.model.sharding import ParameterSharding
from tests.conversion.states import (
    EP2,
    EXPERTS,
    FOUR_LAYERS,
    METADATA,
    MP2,
    PP2,
    SP,
    TIED,
    TP2,
    VPP2,
    assert_equal_files,
    assert_values,
    config_of,
    error_of,
    names_in,
    resharded,
    values_of,
    write_source,
)

LISTED = "parallel.placement=[{text=1.0,image=0.4},{image=0.6,speech=1.0}]"
HEADS = "parallel.attention_exchange=heads"
LAYOUTS: list[tuple[int, list[str]]] = [
    (2, [TP2]),
    (2, [PP2, VPP2]),
    (2, [MP2, LISTED]),
    (4, [PP2, "parallel.pipeline_layers=[3,1]"]),
    (4, ["parallel.tensor_model_parallel_size=4", "parallel.zero_stage=3"]),
    (4, [MP2, LISTED, HEADS, TP2]),
    (1, []),
]


def test_a_chain_of_layouts_is_bitwise(tmp_path: Path) -> None:
    model = [TIED, "model.untied.qkv=false", "model.qk_norm=false", FOUR_LAYERS]
    original = config_of(*model)
    first = write_source(tmp_path / "start", original).path
    directory = tmp_path / "start"
    for number, (world_size, layout) in enumerate(LAYOUTS):
        target = tmp_path / str(number)
        info = resharded(directory, target, world_size, config_of(*model, *layout), workers=2)
        names = [path.name for path in info.path.glob("*.distcp")]
        assert sorted(names) == [f"__{rank}_0.distcp" for rank in range(world_size)]
        assert_values(target, values_of(original))
        directory = target
    # The last layout is the first one.
    assert_equal_files(directory / first.name, first)


def test_experts_move_between_layouts(tmp_path: Path) -> None:
    model = list(EXPERTS)
    write_source(tmp_path / "start", config_of(*model))
    layouts = [(4, [EP2, TP2, SP]), (4, [EP2, PP2]), (2, [PP2]), (2, [EP2])]
    directory = tmp_path / "start"
    for number, (world_size, layout) in enumerate(layouts):
        target = tmp_path / str(number)
        resharded(directory, target, world_size, config_of(*model, *layout))
        assert_values(target, values_of(config_of(*model)))
        directory = target


def test_everything_but_the_layout_stays(tmp_path: Path) -> None:
    write_source(tmp_path / "a", config_of("optimizer.lr=0.25"))
    info = resharded(tmp_path / "a", tmp_path / "b", 2, config_of(TP2))
    source = CheckpointSource(info.path)
    assert info.step == 7
    assert source.metadata == METADATA
    assert source.config == config_of("optimizer.lr=0.25", TP2)


def test_training_loads_it(tmp_path: Path) -> None:
    """The loader of training reads it as any other checkpoint."""
    config = config_of()
    write_source(tmp_path / "a", config)
    resharded(tmp_path / "a", tmp_path / "b", 4, config_of(TP2, PP2))
    checkpoint = open_checkpoint(tmp_path / "b").checkpoint
    assert checkpoint is not None
    values = values_of(config)
    loaded = [
        NamedTensor(name, torch.empty_like(value), ParameterSharding(tuple(value.shape)))
        for name, value in values.items()
    ]
    load_checkpoint(checkpoint, loaded, None)
    assert all(torch.equal(named.tensor, values[named.name]) for named in loaded)


def arguments(tmp_path: Path, *more: str) -> list[str]:
    return [str(tmp_path / "a"), str(tmp_path / "b"), "--world-size", "2", "--set", TP2, *more]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path / "a", config_of())
    assert main(arguments(tmp_path, "--dry-run")) == 0
    planned = capsys.readouterr().out
    assert not (tmp_path / "b").exists()
    assert planned.endswith("nothing was written (--dry-run)\n")
    assert "layout after:  tensor 2, ZeRO-1; 2 ranks" in planned
    assert f"{len(values_of(config_of()))} tensors in " in planned
    assert "; left out: none; " in planned
    assert main(arguments(tmp_path, "--verify", "--workers", "2")) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:4] == planned.splitlines()[:4]
    assert out.endswith("tensors, compared with the source\n")
    assert_values(tmp_path / "b", values_of(config_of()))


def test_a_configuration_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path / "a", config_of())
    path = tmp_path / "tp2.toml"
    path.write_text(config_of(TP2, "optimizer.lr=0.5").to_toml())
    command = [str(tmp_path / "a"), str(tmp_path / "b"), "--config", str(path), "--world-size", "2"]
    assert main(command) == 0
    assert "although --config differs: optimizer.lr" in capsys.readouterr().err
    assert CheckpointSource(tmp_path / "b").config == config_of(TP2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "model.num_layers=4"], "model.num_layers = 4 where the checkpoint has 2; a "),
        (["--set", "parallel.tensor_model_parallel_size=3"], "tensor_model_parallel_size = 3"),
        (["--world-size", "3"], "the world size 3 is not divisible by"),
        (["--set", MP2, "--world-size", "4"], "none"),
        (["--config", "nowhere.toml"], "nowhere.toml: cannot be read"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    write_source(tmp_path / "a", config_of())
    assert main(arguments(tmp_path, *more)) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path / "a", config_of())
    write_source(tmp_path / "b", config_of())
    assert main(arguments(tmp_path)) == 2
    assert "b/step_00000007 exists; give another folder" in error_of(capsys)


def test_too_little_space_is_noticed_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "a", config_of())
    from mot_megatron.conversion import write

    class Usage:
        free = 1000

    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: Usage)
    assert main(arguments(tmp_path, "--dry-run")) == 2
    assert "of which 1 kB are free" in error_of(capsys)


def test_damage_in_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_source(tmp_path / "a", config_of()).path / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(arguments(tmp_path)) == 2
    assert "__0_0.distcp does not match its SHA-256" in error_of(capsys)


def test_verification_notices_damage_while_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "a", config_of())
    from mot_megatron.conversion import write

    write_file = write.write_file

    def flip(path: Path, *rest: object):
        written = write_file(path, *rest)  # type: ignore[arg-type]
        content = bytearray(path.read_bytes())
        at = written.spans[0][0] + written.spans[0][1] // 2
        content[at] ^= 1
        path.write_bytes(content)
        return written

    monkeypatch.setattr(write, "write_file", flip)
    assert main(arguments(tmp_path, "--verify")) == 2
    assert "was not stored as it was written" in error_of(capsys)
    assert names_in(tmp_path / "b") == []
