"""What is refused or left out on the way to and from megatron-core, in one line each."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.torch import MCoreMetadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from mot_megatron.cli.checkpoint import main
from mot_megatron.conversion.megatron import export
from mot_megatron.conversion.megatron.names import check_dense
from mot_megatron.conversion.megatron.source import MegatronSource, open_megatron
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import CheckpointError
from tests.checkpoint.test_hostile import Poison
from tests.conversion.huggingface.exported import (
    CHOSEN,
    DENSE,
    NO_QK_NORM,
    PRE,
    random_model,
    save_run,
)
from tests.conversion.huggingface.test_commands import error_of
from tests.conversion.megatron.test_both_ways import HEADS, STATED, command
from tests.small_corpus import make_config, make_corpus

QKV = "decoder.layers.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    config = make_config(corpus, *DENSE, PRE, NO_QK_NORM, f'run.directory="{folder}"')
    return save_run(random_model(config), config, corpus)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    assert main(["to-megatron", str(run), str(folder)]) == 0
    return folder


def edited(exported: Path, folder: Path, edit: Callable[[Metadata], object]) -> Path:
    """Return a copy of an export whose index has been edited."""
    shutil.copytree(exported, folder / "edited")
    path = folder / "edited" / ".metadata"
    index = pickle.loads(path.read_bytes())
    edit(index)
    path.write_bytes(pickle.dumps(index))
    return path.parent


def rename(old: str, new: str) -> Callable[[Metadata], None]:
    def edit(index: Metadata) -> None:
        index.state_dict_metadata[new] = index.state_dict_metadata.pop(old)
        for at in [at for at in index.storage_data if at.fqn == old]:
            place = index.storage_data.pop(at)
            index.storage_data[MetadataIndex(new, at.offset)] = place

    return edit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([PRE], "the model has 3 towers"),
        ([*DENSE, PRE, CHOSEN.replace("towers.text", "towers.one")], "the model has experts"),
        ([*DENSE], "model.norm_placement = post; allowed: pre"),
    ],
)
def test_models_that_no_gpt_model_computes(
    corpus: Corpus, settings: list[str], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_dense(make_config(corpus, *settings).model)


def test_the_command_refuses_towers(
    tmp_path: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(corpus, f'run.directory="{tmp_path}"')
    other = save_run(random_model(config), config, corpus)
    assert "3 towers" in error_of(capsys, "to-megatron", other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dry_run_existing_folder_and_full_disk(
    tmp_path: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["to-megatron", str(run), str(tmp_path / "out"), "--dry-run"]) == 0
    assert not list(tmp_path.iterdir())
    assert "exists" in error_of(capsys, "to-megatron", run, tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export.os, "fsync", full)
    assert "No space left" in error_of(capsys, "to-megatron", run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_lower_precision(tmp_path: Path, run: Path, exported: Path) -> None:
    assert main(["to-megatron", str(run), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    before, after = MegatronSource(exported), MegatronSource(tmp_path / "out")
    assert before.infos.keys() == after.infos.keys()
    for name in before.infos:
        assert torch.equal(after.read(name), before.read(name).bfloat16())


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_pickles_are_not_executed(
    tmp_path: Path,
    exported: Path,
    corpus: Corpus,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = edited(exported, tmp_path, lambda _: None)
    (folder / name).write_bytes(pickle.dumps(Poison(tmp_path / "marker")))
    line = command(tmp_path, folder, corpus, *DENSE, *HEADS, *STATED)
    if name == ".metadata":
        error = error_of(capsys, *line)
        assert f"{folder}: .metadata is not an index of tensors: it refers to posix.mkdir" in error
    else:
        assert main(line) == 0  # it is never read
    assert not (tmp_path / "marker").exists()


def test_objects_are_not_executed(tmp_path: Path, exported: Path) -> None:
    poison = pickle.dumps(Poison(tmp_path / "marker"))

    def add(index: Metadata) -> None:
        (place,) = {
            at: p
            for at, p in index.storage_data.items()
            if "shard_0_2" in at.fqn and "linear_fc1" in at.fqn
        }.values()
        with (tmp_path / "edited" / place.relative_path).open("r+b") as file:
            file.seek(place.offset)
            file.write(poison)

    source = open_megatron(edited(exported, tmp_path, add))
    assert source.unread == {"objects named _extra_state, which are pickles": 8}
    for name in source.tensors.infos:
        source.tensors.read(name)
    assert not (tmp_path / "marker").exists()


def test_state_of_the_optimizer_is_counted(tmp_path: Path, exported: Path) -> None:
    def add(index: Metadata) -> None:
        listed = index.state_dict_metadata
        for kind in ("optimizer.state.exp_avg", "chained_0.optimizer.state.exp_avg_sq"):
            listed[f"{kind}.{QKV}"] = listed[QKV]
        listed["rng_state/shard_0.0_1.1"] = BytesStorageMetadata()

    source = open_megatron(edited(exported, tmp_path, add))
    assert source.unread == {
        "objects named _extra_state, which are pickles": 8,
        "objects named rng_state, which are pickles": 1,
        "state of the optimizer": 2,
    }
    assert source.tensors.infos.keys() == MegatronSource(exported).infos.keys()


def test_an_index_of_an_earlier_version(tmp_path: Path, exported: Path) -> None:
    """Version 0.15 of megatron-core wrote an index of another class."""
    folder = edited(exported, tmp_path, lambda _: None)
    old = MCoreMetadata()
    old.__dict__ = {**vars(pickle.loads((folder / ".metadata").read_bytes())), "mcore_data": {}}
    (folder / ".metadata").write_bytes(pickle.dumps(old))
    assert MegatronSource(folder).infos == MegatronSource(exported).infos


def _resize(index: Metadata) -> None:
    index.state_dict_metadata[QKV].size = torch.Size([10**12, 64, 32])  # type: ignore[union-attr]


def _leave_the_folder(index: Metadata) -> None:
    for place in index.storage_data.values():
        place.relative_path = "../" + place.relative_path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename(QKV, "decoder.layers.mlp.experts.linear_fc1.weight"), "belongs to an expert"),
        (rename(QKV, "decoder.layers.other"), "it lacks decoder.layers.0.self_attention.linear"),
        (
            rename("decoder.final_layernorm.weight", "decoder.final_layernorm.bias"),
            "it lacks decoder.final_layernorm.weight",
        ),
        (rename("decoder.final_layernorm.weight", "decoder.layers.0.other"), "it lacks"),
        (_resize, "only part of"),
        (_leave_the_folder, "which is not one of its tensor files"),
        (lambda index: index.storage_data.clear(), "is missing from the files"),
        (lambda index: index.state_dict_metadata.clear(), "so it is no GPTModel"),
    ],
)
def test_other_tensors(
    tmp_path: Path,
    exported: Path,
    corpus: Corpus,
    edit: Callable[[Metadata], object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = edited(exported, tmp_path, edit)
    line = command(tmp_path, folder, corpus, *DENSE, *HEADS, *STATED)
    assert message in error_of(capsys, *line)
    assert not (tmp_path / "runs").exists()


def test_unknown_tensors(
    tmp_path: Path, exported: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    def add(index: Metadata) -> None:
        rename("output_layer.weight", "position_embeddings.weight")(index)

    line = command(tmp_path, edited(exported, tmp_path, add), corpus, *DENSE, *HEADS, *STATED)
    assert "position_embeddings.weight is not a tensor of a torch_dist model" in error_of(
        capsys, *line
    )


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (HEADS, "model.norm_eps, model.rotary_base"),
        (STATED, "num_attention_heads"),
        ([*STATED, HEADS[0]], "model.num_query_groups"),
    ],
)
def test_what_the_files_do_not_tell_must_be_stated(
    tmp_path: Path,
    exported: Path,
    corpus: Corpus,
    settings: list[str],
    missing: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = error_of(capsys, *command(tmp_path, exported, corpus, *DENSE, *settings))
    assert missing in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no metadata.json"),
        ('{"sharded_backend": "zarr"}', "sharded_backend is 'zarr'; known: 'torch_dist'"),
        ("[", "not legal JSON"),
    ],
)
def test_other_formats(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_megatron(tmp_path)


def test_arguments_of_the_model_travel_along(exported: Path) -> None:
    written: dict[str, Any] = json.loads((exported / "gpt_model.json").read_text())
    assert written["TransformerConfig"]["num_query_groups"] == 2
    assert written["GPTModel"]["rotary_base"] == 10000.0
