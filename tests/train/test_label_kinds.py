"""Losses by kind of label, against a loop over positions."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mot_megatron.cli.evaluate import main
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.loader import DataShard, evaluation_batches
from mot_megatron.train.label_kinds import KINDS, held_out_by_kind, kind_of_id
from mot_megatron.train.session import grouping_plan
from mot_megatron.train.trained import TrainedModel, load_trained_model
from tests.cli.console import only_error
from tests.columns import widest
from tests.small_corpus import make_corpus
from tests.train.test_trained import save_step


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("kinds") / "corpus")


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kinds") / "run"
    save_step(directory, corpus, 1)
    return directory


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedModel:
    return load_trained_model(run, torch.device("cpu"))


def test_kinds_of_ids(corpus: Corpus) -> None:
    description = corpus.description
    counts = np.zeros(description.vocab_size, dtype=int)
    for document in corpus.split("train"):
        np.add.at(counts, document, 1)
    special = set(description.special_tokens.values())
    kinds = kind_of_id(corpus)
    for place, modality in enumerate(description.modalities):
        ids = range(modality.first_id, modality.first_id + modality.size)
        ordinary = [each for each in ids if each not in special]
        best = max(ordinary, key=lambda each: counts[each])
        for each in ids:
            kind = "others"
            if each in special:
                kind = "special tokens"
            elif each == best:
                kind = "most common"
            assert kinds[each] == place * 3 + KINDS.index(kind), each


def test_losses_by_kind_equal_a_loop_over_positions(trained: TrainedModel) -> None:
    losses = held_out_by_kind(trained)
    config, corpus = trained.config, trained.corpus
    kinds = kind_of_id(corpus)
    nats: dict[int, list[float]] = {}
    for batch in evaluation_batches(
        corpus,
        "validation",
        seq_length=config.data.seq_length,
        micro_batch_size=1,
        grouping=grouping_plan(config),
        shard=DataShard(0, 1),
    ):
        with torch.no_grad():
            logits = trained.model.logits(batch)
        for slot, label in enumerate(batch.labels.tolist()):
            if label >= 0:
                loss = torch.logsumexp(logits[slot].double(), 0) - logits[slot, label]
                nats.setdefault(int(kinds[label]), []).append(float(loss))
    assert sum(loss.labels for loss in losses) > 100
    for at, loss in enumerate(losses):
        expected = nats.get(at, [])
        assert loss.labels == len(expected)
        if expected:
            mean = sum(expected) / len(expected) / math.log(2)
            assert loss.bits == pytest.approx(mean, abs=1e-4)  # fp32 logits
        else:
            assert math.isnan(loss.bits)


def test_command_prints_a_line_per_modality(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(run), "--sequences", "1"]) == 0
    printed = capsys.readouterr().out
    for modality in ("text", "image", "speech"):
        assert f"\n{modality}" in printed
    assert widest(printed.splitlines()[1:]) <= 120


def test_json_equals_the_table(
    run: Path, trained: TrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(run), "--checkpoint", str(run), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["checkpoints"]
    assert first == second
    assert (first["step"], first["sees_later_tokens"]) == (1, False)
    modalities = first["as_trained"]["modalities"]
    for loss in held_out_by_kind(trained):
        kind = modalities[loss.modality]["kinds"][loss.kind]
        assert kind["labels"] == loss.labels
        assert kind["bits_per_token"] == (pytest.approx(loss.bits) if loss.labels else None)


@pytest.mark.parametrize(("causal", "tables"), [("true", 2), ("false", 1)])
def test_both_routings_of_expert_choice_are_shown(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], causal: str, tables: int
) -> None:
    experts = f"model.towers.text.experts={{num_moe_experts=4,causal_router={causal}}}"
    save_step(tmp_path, corpus, 1, experts)
    assert main(["--checkpoint", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    texts = [line for line in printed.splitlines() if line.startswith("text")]
    assert len(set(texts)) == len(texts) == tables  # another routing, other losses
    assert "routed as in training, where a token's experts depend on later tokens" in printed
    said = "routed causally, as in generation" if tables == 2 else "no causal router was trained"
    assert said in printed
    assert printed.count("\ntower text: ") == tables
    # Each expert takes a quarter of a pool, rounded up; pools are of a few tokens here.
    assert re.search(r"tower text: 1\.\d\d experts per token and layer, none for \d+\.\d%", printed)


def test_missing_checkpoint_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(tmp_path)]) == 2
    only_error(capsys.readouterr().err)
