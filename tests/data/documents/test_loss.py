"""Segments that are context only, from JSON lines, tables and archives to training steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.documents.sources import Reading, list_shards, read_shard
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.train.session import build_session, resolve_config
from mot_megatron.train.step import train_step
from tests.data.documents.raw_files import Item, build, content, make_items, write_tar
from tests.ranks import run_ranks
from tests.small_runs import small_config

ASKED, ANSWERED = "what is shown?", "a square"


def segments_of(item: Item, number: int) -> list[dict[str, object]]:
    """Return a question about a picture, which is context, and its answer."""
    return [
        {"image": f"{number}.png", "loss": False},
        {"text": ASKED, "language": "en", "loss": False},
        {"text": f"{ANSWERED} {item.text}", "language": "en", "loss": number % 2 == 0 or None},
    ]


def write_lines(folder: Path, items: list[Item]) -> Path:
    lines = []
    for number, item in enumerate(items):
        (folder / f"{number}.png").write_bytes(item.png)
        segments = [
            {key: value for key, value in segment.items() if value is not None}
            for segment in segments_of(item, number)
        ]
        lines.append(json.dumps({"segments": segments}))
    path = folder / "documents.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_table(folder: Path, items: list[Item]) -> Path:
    """Columns of segments that have no value of their own are null, in Parquet as in Arrow."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = []
    for number, item in enumerate(items):
        (folder / f"{number}.png").write_bytes(item.png)
        rows.append(segments_of(item, number))
    parquet.write_table(arrow.table({"segments": rows}), folder / "data.parquet")
    return folder / "data.parquet"


def write_archive(folder: Path, items: list[Item]) -> Path:
    members = []
    for number, item in enumerate(items):
        described = {"segments": segments_of(item, number)}
        members += [
            (f"{number}.png", item.png),
            (f"{number}.json", json.dumps(described).encode()),
        ]
    return write_tar(folder / "data.tar", members)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return make_items()


@pytest.fixture(scope="module")
def built(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lines")
    assert build(write_lines(folder, items), folder / "corpus") == 0
    return folder / "corpus"


def test_the_answer_and_the_end_are_trained(built: Path) -> None:
    corpus = Corpus.open(built)
    special = corpus.description.special_tokens
    text = load_codec(built, corpus.description.modalities[0])
    assert isinstance(text, TextCodec)
    for split in corpus.splits.values():
        for number in range(len(split)):
            ids, context = split[number], split.context_of(number)
            assert context.any()
            assert ids[~context][0] == special["<bos>"]
            assert ids[~context][1] == special["<en>"]
            assert ids[~context][-1] == special["<eos>"]
            assert text.decode(ids[~context][2:-1]).startswith(ANSWERED)
            assert ids[context][0] == special["<boi>"]
            assert ids[context][65] == special["<eoi>"]
            assert ids[context][66] == special["<en>"]
            assert text.decode(ids[context][67:]) == ASKED


@pytest.mark.parametrize("write", [write_table, write_archive])
def test_formats_give_the_same_corpus(
    built: Path, items: list[Item], tmp_path: Path, write: Callable[[Path, list[Item]], Path]
) -> None:
    build(write(tmp_path, items), tmp_path / "corpus", reading=Reading(shard_documents=7))
    ours, theirs = Corpus.open(tmp_path / "corpus"), Corpus.open(built)
    for name, split in theirs.splits.items():
        assert np.array_equal(ours.split(name).context, split.context)
        assert np.array_equal(ours.split(name).tokens, split.tokens)


def test_documents_without_the_key_give_the_bytes_of_before(
    items: list[Item], tmp_path: Path
) -> None:
    """True is the default, and leaves no trace."""
    corpora = []
    for name, more in (("absent", {}), ("true", {"loss": True})):
        path = tmp_path / f"{name}.jsonl"
        lines = [json.dumps([{"text": item.text, **more}]) for item in items]
        path.write_text("\n".join(lines), encoding="utf-8")
        build(path, tmp_path / name / "corpus")
        corpora.append(content(tmp_path / name / "corpus"))
    assert corpora[0] == corpora[1]
    assert not [name for name in corpora[0] if name.endswith(".context")]


@pytest.mark.parametrize("value", ["false", 0, [], 1.0])
def test_other_values_are_refused(tmp_path: Path, value: object) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps([{"text": "a", "loss": value}]), encoding="utf-8")
    (shard,) = list_shards([path], Reading())
    (document,) = read_shard(shard, Reading())
    assert document.problem is not None
    assert document.problem.startswith("segment 1: loss ")
    assert document.problem.endswith("expected true or false")


def two_steps(directory: Path) -> list[tuple[tuple[int, ...], tuple[float, ...], int]]:
    """Train two steps of four sequences; return labels, losses and tokens of each."""
    corpus = Corpus.open(directory)
    overrides = ["data.seq_length=128", "training.global_batch_size=4", "-model.modalities.speech"]
    config = resolve_config(small_config(directory, overrides), corpus)
    session = build_session(config, corpus, build_process_groups(1, torch.device("cpu")))
    results = [train_step(session, step=step, learning_rate=1e-2) for step in (1, 2)]
    return [
        (r.counts.modality_labels, r.modality_losses, sum(r.counts.modality_tokens))
        for r in results
    ]


def test_training_counts_answers_only(built: Path) -> None:
    """A sequence has one document: its picture is no label, and its answer and <eos> are."""
    corpus = Corpus.open(built)
    split = corpus.split("train")
    assert split.lengths.min() > 64
    trained = sum(int((~split.context_of(number)).sum()) for number in range(len(split)))
    (steps,) = run_ranks(two_steps, 1, built)
    for labels, bits, tokens in steps:
        text, image = labels
        assert image == 0
        assert np.isnan(bits[1])
        assert np.isfinite(bits[0])
        assert 4 * 64 < tokens < 4 * 128
        # All but <bos> of the tokens that are not context.
        assert text == pytest.approx(4 * (trained / len(split) - 1), rel=0.1)
