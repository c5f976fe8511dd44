"""Reading curves from a run's folder or a CSV file, and errors if they cannot be read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter, masked_crc32c

from mot_megatron.compare.curves import (
    RunCurves,
    Split,
    check_comparable,
    group_seeds,
    read_csv,
    read_run,
    token_digests,
    warnings,
    write_csv,
)
from mot_megatron.config_model import BITS_PER_TOKEN
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import DataError, UserError
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.run.loop import train
from mot_megatron.run.metrics import TensorBoardLog
from mot_megatron.train.session import resolve_config
from mot_megatron.train.state import Progress
from tests.compare.synthetic_runs import (
    FLOPS_PER_STEP,
    MODALITIES,
    TOKENS_PER_STEP,
    curves,
    identity,
    power_law,
    write_description,
    write_run,
)
from tests.ranks import run_ranks
from tests.small_runs import small_config, write_corpus

POINTS = {
    "loss_train/text": {5: 7.1, 10: 6.3, 15: 6.1},
    "loss_train/image": {5: 5.5, 15: 4.7},
    "loss_held_out/text": {7: 7.3, 14: 6.5},
    "loss_held_out_causal/text": {7: 7.9, 14: 6.9},
}


def event_file(run: Path) -> Path:
    (path,) = (run / "tensorboard").glob("events.*")
    return path


def assert_same(one: RunCurves, other: RunCurves) -> None:
    assert one.identity == other.identity
    assert one.curves.keys() == other.curves.keys()
    for key, curve in one.curves.items():
        np.testing.assert_array_equal(curve.steps, other.curves[key].steps)
        np.testing.assert_array_equal(curve.losses, other.curves[key].losses)
    for name in ("steps", "tokens", "flops", "seconds"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_curves_of_a_folder(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, "mine", POINTS, "run.seed=9"))
    assert set(run.curves) == {
        ("train", "text"),
        ("train", "image"),
        ("held_out", "text"),
        ("held_out_causal", "text"),
    }
    text = run.curves["train", "text"]
    assert text.steps.tolist() == [5, 10, 15]
    np.testing.assert_allclose(text.losses, [7.1, 6.3, 6.1], rtol=1e-6)
    held_out = run.curves["held_out", "text"]
    np.testing.assert_allclose(run.along(held_out, "flops"), np.array([7, 14]) * FLOPS_PER_STEP)
    np.testing.assert_allclose(run.along(held_out, "seconds"), [3.5, 7])
    np.testing.assert_array_equal(run.along(held_out, "steps"), [7, 14])
    assert run.steps.tolist() == [5, 7, 10, 14, 15]
    np.testing.assert_array_equal(run.tokens, run.steps * TOKENS_PER_STEP)
    assert (run.identity.name, run.identity.seed, run.identity.corpus) == ("mine", 9, "synthetic")
    assert run.identity.towers == ("text", "image", "speech")
    assert run.identity.vocabulary == ("text 100 none", "image 60 none", "speech 32 none")
    assert set(run.identity.splits) == {"train", "validation"}


def test_csv_keeps_everything(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, "mine", POINTS))
    write_csv(run, tmp_path / "mine.csv")
    lines = (tmp_path / "mine.csv").read_text().splitlines()
    assert lines[0] == (
        "step,tokens,flops,seconds,loss_train/text,loss_train/image,loss_held_out/text,"
        "loss_held_out_causal/text"
    )
    assert lines[1] == "5,20480,9.99999983e+12,2.5,7.0999999,5.5,,"
    assert len(lines) == 1 + 5
    assert_same(read_csv(tmp_path / "mine.csv"), run)


def test_repeated_steps_count_with_their_last_values(tmp_path: Path) -> None:
    run = write_run(tmp_path, "resumed", POINTS)
    log = TensorBoardLog(
        run / "tensorboard", dict.fromkeys(MODALITIES, BITS_PER_TOKEN), ("only",), start_step=8
    )
    for step, bits in ((10, 1.0), (20, 0.5)):
        log.log_progress(Progress(step, 100.0 + step, step, 1.0 * step))
        log.log_scalars({"loss_train/text": bits}, step)
    log.log_scalars({"loss_train/text": 0.75}, 20)
    log.close()
    found = read_run(run)
    text = found.curves["train", "text"]
    # Of the first part, only points before step 8 remain.
    assert text.steps.tolist() == [5, 10, 20]
    np.testing.assert_allclose(text.losses, [7.1, 1.0, 0.75], rtol=1e-6)
    assert found.curves["held_out", "text"].steps.tolist() == [7]
    np.testing.assert_allclose(found.seconds, [2.5, 3.5, 110, 120])


def test_a_truncated_last_record_is_not_damage(tmp_path: Path) -> None:
    run = write_run(tmp_path, "killed", POINTS)
    path = event_file(run)
    path.write_bytes(path.read_bytes()[:-3])
    # The last scalar written is that of the last tag at step 15.
    assert read_run(run).curves["train", "image"].steps.tolist() == [5]


def test_which_loss_is_used_as_causally_routed(tmp_path: Path) -> None:
    causal = {tag: points for tag, points in POINTS.items() if "causal" in tag}
    rest = {tag: points for tag, points in POINTS.items() if "causal" not in tag}
    experts = "model.towers.text.experts={num_moe_experts=4}"
    dense = read_run(write_run(tmp_path, "dense", rest))
    assert not dense.identity.sees_the_future
    assert not dense.without_honest_loss
    assert dense.curve("held_out_causal", "text") is dense.curves["held_out", "text"]
    routed = read_run(write_run(tmp_path, "routed", rest | causal, experts))
    assert routed.identity.sees_the_future
    assert not routed.without_honest_loss
    assert routed.curve("held_out_causal", "text") is routed.curves["held_out_causal", "text"]
    blind = read_run(write_run(tmp_path, "blind", rest, experts))
    assert blind.curve("held_out_causal", "text") is None
    write_csv(blind, tmp_path / "blind.csv")
    kept = read_csv(tmp_path / "blind.csv")
    assert kept.without_honest_loss
    assert kept.curve("held_out_causal", "text") is None


def train_one(corpus_directory: Path, runs: Path, *more: str) -> None:
    overrides = [f"run.directory={runs}", "evaluation.interval_steps=3", *more]
    config = small_config(corpus_directory, overrides)
    corpus = Corpus.open(corpus_directory)
    train(resolve_config(config, corpus), corpus, build_process_groups(1, torch.device("cpu")))


def test_a_real_run(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    run_ranks(train_one, 1, corpus, tmp_path / "runs", "training.train_steps=6")
    run = read_run(tmp_path / "runs" / "small")
    # Reports every 5 steps and at the end, evaluations every 3.
    assert run.curves["train", "text"].steps.tolist() == [5, 6]
    assert run.curves["held_out", "speech"].steps.tolist() == [3, 6]
    assert run.steps.tolist() == [3, 5, 6]
    for values in (run.tokens, run.flops, run.seconds):
        assert values[0] > 0
        assert (np.diff(values) > 0).all()
    # About 6 N per token, apart from attention, embedding and unfilled positions.
    parameters_met = run.flops[-1] / run.tokens[-1] / 6
    assert 0.5 < parameters_met / (run.identity.parameters / 2) < 1.5
    assert run.identity.splits == token_digests(Corpus.open(corpus).description)


def train_and_extend(corpus_directory: Path, runs: Path) -> None:
    corpus = Corpus.open(corpus_directory)
    groups = build_process_groups(1, torch.device("cpu"))
    fixed = [f"run.directory={runs}", "evaluation.interval_steps=2", "evaluation.max_sequences=1"]
    mixture = "model.towers.text.experts={num_moe_experts=2,causal_router=true}"
    for steps in (4, 6, 7):
        overrides = [*fixed, mixture, f"training.train_steps={steps}"]
        train(resolve_config(small_config(corpus_directory, overrides), corpus), corpus, groups)


def test_evaluations_of_the_whole_split_are_not_points_of_the_curves(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    run_ranks(train_and_extend, 1, corpus, tmp_path / "runs")
    directory = tmp_path / "runs" / "small"
    run = read_run(directory)
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    summary = json.loads((directory / "summary.json").read_text())["modalities"]["text"]
    keys: dict[Split, str] = {"held_out": "", "held_out_causal": "_causal"}
    for split, key in keys.items():
        assert run.curves[split, "text"].steps.tolist() == [2, 4, 6]
        whole = {
            point.step: point.value for point in events.Scalars(f"loss_held_out_whole{key}/text")
        }
        assert list(whole) == [4, 6, 7]
        assert whole[7] == pytest.approx(summary[f"held_out_bits_per_token{key}"], abs=1e-4)
        # The split is longer than one sequence.
        assert abs(whole[6] - run.curves[split, "text"].losses[2]) > 1e-4


def remove_logs(run: Path) -> None:
    event_file(run).unlink()


def damage_a_value(run: Path) -> None:
    content = bytearray(event_file(run).read_bytes())
    content[len(content) // 2] ^= 0xFF
    event_file(run).write_bytes(content)


def damage_a_length(run: Path) -> None:
    content = bytearray(event_file(run).read_bytes())
    content[3] ^= 0xFF
    event_file(run).write_bytes(content)


def zero_the_end(run: Path) -> None:
    event_file(run).write_bytes(event_file(run).read_bytes() + bytes(12))


def claim_an_endless_record(run: Path) -> None:
    head = struct.pack("<Q", 2**62)
    record = head + struct.pack("<I", masked_crc32c(head)) + bytes(64)
    event_file(run).write_bytes(event_file(run).read_bytes() + record)


def add_a_record_that_is_no_event(run: Path) -> None:
    with event_file(run).open("ab") as file:
        RecordWriter(file).write(b"\xff" * 40)


def replace_by_a_pipe(run: Path) -> None:
    path = event_file(run)
    path.unlink()
    os.mkfifo(path)


def remove_description(run: Path) -> None:
    (run / "corpus.toml").unlink()


def remove_config(run: Path) -> None:
    (run / "config.toml").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove_logs, "tensorboard: no TensorBoard event files"),
        (damage_a_value, "damaged after byte"),
        (damage_a_length, "damaged after byte 0"),
        (zero_the_end, "damaged after byte"),
        (claim_an_endless_record, "damaged after byte"),
        (add_a_record_that_is_no_event, "an event file holds a damaged event"),
        (replace_by_a_pipe, "not a regular file"),
        (remove_description, "corpus.toml: cannot be read: No such file"),
        (remove_config, "config.toml: cannot be read"),
    ],
)
def test_missing_and_damaged_files(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    run = write_run(tmp_path, "mine", POINTS)
    spoil(run)
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        read_run(run)
    assert str(run) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ({"loss_train/text": {5: 7.1}}, "no points of loss_held_out"),
        ({"loss_held_out/text": {5: 7.1}}, "no points of loss_train"),
    ],
)
def test_missing_curves(tmp_path: Path, points: dict[str, dict[int, float]], words: str) -> None:
    run = write_run(tmp_path, "mine", points)
    with pytest.raises(DataError, match=words) as raised:
        read_run(run)
    assert str(run) in str(raised.value)


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        ({}, "no progress/tokens at step 5"),
        ({5: Progress(5, 1.0, 1, 1.0), 7: Progress(7, 2.0, 2, math.nan)}, "no progress/flops"),
    ],
)
def test_missing_progress(tmp_path: Path, progress: dict[int, Progress], words: str) -> None:
    points = {"loss_train/text": {5: 7.1}, "loss_held_out/text": {7: 7.1}}
    run = write_run(tmp_path, "mine", points, progress=progress)
    with pytest.raises(DataError, match=words) as raised:
        read_run(run)
    assert str(run) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not a table of curves"),
        ("step,tokens\n", "columns"),
        ("step,tokens,flops,seconds,loss_train/text\n5,1,1,1\n", "columns"),
        ("step,tokens,flops,seconds,loss_train/text\n5,1,1,x,1\n", "could not convert"),
        ("step,tokens,flops,seconds,loss/text\n5,1,1,1,1\n", "column 'loss/text'"),
        ("step,tokens,flops,seconds,loss_train/text\n5,,1,1,1\n", "no progress/tokens at step 5"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "kept.csv"
    write_csv(curves(power_law), path)
    path.write_text(content)
    with pytest.raises(DataError, match=words) as raised:
        read_csv(path)
    assert str(path) in str(raised.value)


def test_bad_identity(tmp_path: Path) -> None:
    path = tmp_path / "kept.csv"
    write_csv(curves(power_law), path)
    path.with_suffix(".json").write_text('{"name": "a"}')
    with pytest.raises(
        DataError, match=r"kept\.json: not a run's identity: seed: required, but absent"
    ):
        read_csv(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(DataError, match=r"kept\.json: No such file"):
        read_csv(path)


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, name, POINTS) for name in "abc"]
    write_description(runs[1], digest="9" * 64)
    write_description(runs[2], text_size=90)
    read = [read_run(run) for run in runs]
    check_comparable([read[0], read[0]])
    with pytest.raises(DataError) as raised:
        check_comparable(read[:2])
    assert f"{runs[1]}: trained on corpus synthetic (train " in str(raised.value)
    assert str(runs[0]) in str(raised.value)
    with pytest.raises(DataError) as raised:
        check_comparable([read[0], read[2]])
    assert f"{runs[2]}: tokenized as (text 90 none, image 70 none" in str(raised.value)


def test_other_documents_of_the_same_tokens_are_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, name, POINTS) for name in "ab"]
    path = runs[1] / "corpus.toml"
    path.write_text(path.read_text().replace('idx = "1"', 'idx = "8"'))
    with pytest.raises(DataError, match="trained on corpus synthetic"):
        check_comparable([read_run(run) for run in runs])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluation.max_sequences=3", "evaluation.max_sequences = 3, but {} has all"),
        ("data.seq_length=128", "data.seq_length = 128, but {} has 64"),
    ],
)
def test_losses_of_other_labels_are_refused(tmp_path: Path, setting: str, message: str) -> None:
    one = read_run(write_run(tmp_path, "one", POINTS))
    other = read_run(write_run(tmp_path, "other", POINTS, setting))
    with pytest.raises(DataError) as raised:
        check_comparable([one, other])
    assert str(raised.value).startswith(f"{other.source}: {message.format(one.source)}; only")


def test_warnings() -> None:
    whole, short = curves(power_law, name="whole"), curves(power_law, name="short", last=900)
    wide = dataclasses.replace(
        curves(power_law, name="wide"),
        identity=identity(name="wide", step_sequences=32, train_steps=1503),
    )
    assert warnings([whole, whole]) == []
    # 1503: the last three steps do not fill an interval of five.
    assert warnings([whole, wide]) == [
        "wide: training.global_batch_size = 32, but whole has 8",
        "wide: training.train_steps = 1,503, but whole has 1,500",
    ]
    pools = [
        dataclasses.replace(whole, identity=identity(pool_sequences=number)) for number in (8, 2, 8)
    ]
    assert warnings([whole, *pools]) == [
        "experts choose among the tokens of 2 or 8 sequences, depending on the run, which affects"
        " the losses"
    ]
    stops = "short: stops at step 900 of 1,500; it may still reach losses that count as not reached"
    smoothing = (
        "training losses are means over 3 or 5 steps, depending on the run, which smooths them"
    )
    assert warnings([whole, short]) == [stops, f"{smoothing} differently"]


def test_runs_that_differ_only_in_their_seed_are_one_arm(tmp_path: Path) -> None:
    def run(name: str, *overrides: str) -> RunCurves:
        return read_run(write_run(tmp_path, name, POINTS, *overrides))

    runs = [
        run("dense-seed1", "run.seed=1", "run.directory=elsewhere"),
        run("mot-1", "run.seed=1", "model.num_layers=3"),
        run("dense-seed12", "run.seed=12"),
        run("mot-again", "run.seed=2", "model.num_layers=3"),
        run("alone-3", "run.seed=4", "optimizer.lr=0.5"),
        run("dense", "run.seed=4", "optimizer.lr=0.25"),
    ]
    arms = group_seeds(runs)
    assert {name: [run.identity.name for run in arm] for name, arm in arms.items()} == {
        "dense": ["dense-seed1", "dense-seed12"],
        # Without their seeds, the names differ, so the first run names the arm.
        "mot-1": ["mot-1", "mot-again"],
        # The number in its name is not its seed.
        "alone-3": ["alone-3"],
        # Another arm already has the name dense.
        str(tmp_path / "dense"): ["dense"],
    }


def test_a_run_given_twice_is_refused() -> None:
    runs = [curves(power_law, name=name, seed=3) for name in ("a", "b")]
    with pytest.raises(DataError, match=r"b: has the same configuration and run\.seed = 3 as a"):
        group_seeds(runs)
    assert list(group_seeds([runs[0]])) == ["a"]
