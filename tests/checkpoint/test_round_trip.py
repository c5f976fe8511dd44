"""Tests that every layout loads checkpoints of every other layout, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mot_megatron.checkpoint import (
    NamedTensor,
    find_checkpoint,
    load_checkpoint,
    open_checkpoint,
    read_config_text,
    read_metadata,
    save_checkpoint,
)
from mot_megatron.checkpoint.find import step_name
from mot_megatron.errors import CheckpointError
from mot_megatron.model.sharding import ParameterSharding
from mot_megatron.parallel.groups import build_process_groups
from tests.checkpoint.states import SHARDINGS, differing_after_load, save, state
from tests.ranks import run_ranks

METADATA = {"loss": 0.1 + 0.2, "data": {"epoch": 3, "next": 2**60}, "names": ["ä", "b"]}


def _load_then_save(directory: Path, tensor_size: int, load_step: int, save_step: int) -> list[str]:
    groups = build_process_groups(tensor_size, torch.device("cpu"))
    found = open_checkpoint(directory / step_name(load_step)).checkpoint
    assert found is not None
    differing = differing_after_load(found, load_step, groups)
    save_checkpoint(
        directory,
        save_step,
        state(save_step, groups),
        metadata=METADATA,
        config_text="[run]\nname = 'x'\n",
        groups=groups,
        keep=10,
    )
    newest = find_checkpoint(directory).checkpoint
    assert newest is not None
    assert newest.step == save_step
    return differing


def test_layouts_read_each_other(tmp_path: Path) -> None:
    save(tmp_path, 1)
    # One process -> TP 2 x DP 2 -> TP 1 x DP 2 -> TP 2 -> one process.
    assert run_ranks(_load_then_save, 4, tmp_path, 2, 1, 2) == [[]] * 4
    assert run_ranks(_load_then_save, 2, tmp_path, 1, 2, 3) == [[]] * 2
    assert run_ranks(_load_then_save, 2, tmp_path, 2, 3, 4) == [[]] * 2
    for step in (2, 3, 4):
        checkpoint = open_checkpoint(tmp_path / step_name(step)).checkpoint
        assert checkpoint is not None
        assert checkpoint.num_tensors == len(SHARDINGS)
        assert differing_after_load(checkpoint, step) == []
        assert read_metadata(checkpoint) == METADATA
        assert read_config_text(checkpoint) == "[run]\nname = 'x'\n"


def _save_large(directory: Path) -> int:
    groups = build_process_groups(1, torch.device("cpu"))
    sharding = ParameterSharding((1000, 25))
    tensors = [NamedTensor(str(index), torch.zeros(1000, 25), sharding) for index in range(4)]
    info = save_checkpoint(
        directory, 1, tensors, metadata={}, config_text="", groups=groups, keep=1
    )
    return info.num_bytes


def test_data_parallel_copies_are_written_once_and_by_all_ranks(tmp_path: Path) -> None:
    num_bytes = run_ranks(_save_large, 2, tmp_path)[0]
    # 4 tensors * 1000 * 25 * 4 bytes = 400 kB, not 800 kB
    assert 400_000 < num_bytes < 420_000
    shares = [path.stat().st_size for path in (tmp_path / step_name(1)).glob("*.distcp")]
    assert len(shares) == 2
    assert min(shares) > 190_000


def test_same_state_same_bytes(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, 3).path for name in ("a", "b")]
    for file in paths[0].iterdir():
        assert file.read_bytes() == (paths[1] / file.name).read_bytes(), file.name


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    sharding = ParameterSharding((10,))
    view = torch.arange(100_000.0)[10:20]
    info = save_checkpoint(
        tmp_path,
        1,
        [NamedTensor("view", view, sharding)],
        metadata={},
        config_text="",
        groups=None,
        keep=1,
    )
    assert info.num_bytes < 10_000  # the whole storage is 400 kB
    loaded = torch.zeros(10)
    load_checkpoint(info, [NamedTensor("view", loaded, sharding)], None)
    assert torch.equal(loaded, view)


def test_prefix_ignores_other_tensors(tmp_path: Path) -> None:
    info = save(tmp_path, 1)
    tensors = [named for named in state(2) if named.name.startswith("model/")]
    load_checkpoint(info, tensors, None, prefix="model/")
    wanted = {named.name: named.tensor for named in state(1)}
    for named in tensors:
        assert torch.equal(named.tensor, wanted[named.name])


def _zeros(**shardings: ParameterSharding) -> list[NamedTensor]:
    return [
        NamedTensor(name, torch.zeros(sharding.global_shape), sharding)
        for name, sharding in shardings.items()
    ]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            _zeros(a=ParameterSharding((2, 3)), c=ParameterSharding((1,))),
            "checkpoint of another model: it lacks c",
        ),
        (
            _zeros(a=ParameterSharding((2, 3))),
            "checkpoint of another model: this model has no b",
        ),
        (
            _zeros(a=ParameterSharding((3, 2)), b=ParameterSharding((4,))),
            r"model: a is \[2, 3\] float32 in the checkpoint and \[3, 2\] float32 in this model",
        ),
        (
            [
                NamedTensor("a", torch.zeros(2, 3).double(), ParameterSharding((2, 3))),
                *_zeros(b=ParameterSharding((4,))),
            ],
            r"a is \[2, 3\] float32 in the checkpoint and \[2, 3\] float64 in this model",
        ),
        (
            _zeros(**{f"x{index}": ParameterSharding((1,)) for index in range(9)}),
            "it lacks x0, x1, x2 and 6 more",
        ),
    ],
)
def test_checkpoint_of_another_model(
    tmp_path: Path, tensors: list[NamedTensor], message: str
) -> None:
    saved = _zeros(a=ParameterSharding((2, 3)), b=ParameterSharding((4,)))
    for named in saved:
        named.tensor.fill_(7)
    info = save_checkpoint(tmp_path, 1, saved, metadata={}, config_text="", groups=None, keep=1)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(info, tensors, None)
    assert str(info.path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(not named.tensor.any() for named in tensors)


def _load_with_one_rank_wrong(directory: Path) -> str:
    groups = build_process_groups(1, torch.device("cpu"))
    tensors = state(5, groups)
    if groups.rank == 1:
        tensors[0] = NamedTensor("other", tensors[0].tensor, tensors[0].sharding)
    found = find_checkpoint(directory).checkpoint
    assert found is not None
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(found, tensors, groups)
    return str(caught.value)


def test_a_mismatch_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    save(tmp_path, 1)
    messages = run_ranks(_load_with_one_rank_wrong, 2, tmp_path)
    assert messages[0] == messages[1]
    assert "it lacks other (rank 1)" in messages[0]


def _load_halves(directory: Path, forgotten: str | None) -> str | None:
    groups = build_process_groups(1, torch.device("cpu"))
    wanted = state(1, groups)
    tensors = [named for named in state(2, groups)[groups.rank :: 2] if named.name != forgotten]
    found = find_checkpoint(directory).checkpoint
    assert found is not None
    try:
        load_checkpoint(found, tensors, groups)
    except CheckpointError as error:
        return str(error)
    values = {named.name: named.tensor for named in wanted}
    assert all(torch.equal(named.tensor, values[named.name]) for named in tensors)
    return None


def test_each_tensor_must_be_requested_by_some_rank(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert run_ranks(_load_halves, 2, tmp_path, None) == [None, None]
    first, second = run_ranks(_load_halves, 2, tmp_path, "model/row")
    assert first == second
    assert first is not None
    assert first.endswith("a checkpoint of another model: this model has no model/row")
