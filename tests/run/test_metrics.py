"""What the event files hold, read back as TensorBoard reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from mot_megatron.config_model import BITS_PER_TOKEN, LossUnit
from mot_megatron.optim.norms import StepNorms
from mot_megatron.parallel.groups import build_process_groups
from mot_megatron.run.loop import train
from mot_megatron.run.metrics import DASHBOARD_FILE, TensorBoardLog
from mot_megatron.train.interval import Interval
from mot_megatron.train.state import Progress
from mot_megatron.train.step import HeldOut, StepSeconds
from tests.ranks import run_ranks
from tests.small_corpus import make_config, make_corpus

pytestmark = pytest.mark.slow

MODALITIES, TOWERS = ("text", "image"), ("only",)
EVERYTHING = {"scalars": 0, "images": 0, "audio": 0, "tensors": 0}


def interval_with(bits: tuple[float, ...], imbalance: float = 1.0) -> Interval:
    return Interval(
        modality_losses=bits,
        total_loss=7.0,
        modality_rates=(30.0, 12.0),
        norms=StepNorms(total=5.0, per_tower=(4.0,), shared=3.0),
        learning_rate=1e-3,
        seconds=StepSeconds(data=0.1, forward_backward=0.2, optimizer=0.3),
        flops_per_second=1e9,
        imbalance=imbalance,
    )


def read(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), EVERYTHING).Reload()


def value(events: EventAccumulator, tag: str) -> float:
    (point,) = events.Scalars(tag)
    return point.value


def test_interval_scalars(tmp_path: Path) -> None:
    log = TensorBoardLog(
        tmp_path,
        dict.fromkeys(MODALITIES, BITS_PER_TOKEN),
        TOWERS,
        start_step=1,
        modality_parallel=True,
    )
    log.log_interval(
        10, interval_with((7.5, 6.5), imbalance=1.25), mfu=0.25, memory_bytes=3 * 2**29
    )
    log.log_held_out(10, HeldOut((8.5, 9.5), causal=(8.75, 9.75)))
    log.close()
    events = read(tmp_path)
    expected = {
        "loss_total/train": 7.0,
        "step_seconds/total": 0.6,  # 0.1 + 0.2 + 0.3
        "loss_train/text": 7.5,
        "loss_train/image": 6.5,
        "loss_held_out/image": 9.5,
        "loss_held_out_causal/image": 9.75,
        "gradient_norm/tower_only": 4.0,
        "gradient_norm/shared": 3.0,
        "gradient_norm/total": 5.0,
        "modality_parallel/imbalance": 1.25,
        "modality_parallel/waiting_percent": 100 / 15,  # (1 - 1 / 1.25) * 0.2 s / 0.6 s
        "tokens_per_second/total": 42.0,  # 30 + 12
        "tokens_per_second/image": 12.0,
        "step_seconds/optimizer": 0.3,
        "utilization/mfu_percent": 25.0,
        "memory/peak_gib": 1.5,  # 3 * 2**29 / 2**30
        "learning_rate": 1e-3,
    }
    for tag, wanted in expected.items():
        assert value(events, tag) == pytest.approx(wanted), tag


def test_modality_without_labels_has_no_point(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, dict.fromkeys(MODALITIES, BITS_PER_TOKEN), TOWERS, start_step=1)
    log.log_interval(5, interval_with((7.5, math.nan)), mfu=0.2, memory_bytes=1)
    log.log_held_out(5, HeldOut((math.nan, 9.5)))
    log.close()
    tags = read(tmp_path).Tags()["scalars"]
    assert {"loss_train/text", "loss_held_out/image"} <= set(tags)
    assert not {"loss_train/image", "loss_held_out/text"} & set(tags)
    assert not any(tag.startswith("loss_held_out_causal") for tag in tags)


def test_charts_name_the_unit_of_each_modality(tmp_path: Path) -> None:
    units = {"text": BITS_PER_TOKEN, "image": LossUnit("squared error", 1.0)}
    TensorBoardLog(tmp_path, units, TOWERS, start_step=1).close()
    charts = json.loads((tmp_path / DASHBOARD_FILE).read_text())["1 Loss"]
    assert list(charts) == [
        "all modalities: in training, each in its unit",
        "all modalities: held out, each in its unit",
        "text: in training, bits per token",
        "text: held out, bits per token",
        "image: in training, squared error",
        "image: held out, squared error",
    ]


def test_repeated_steps_are_shown_once(tmp_path: Path) -> None:
    for start in (1, 8):
        log = TensorBoardLog(
            tmp_path, dict.fromkeys(MODALITIES, BITS_PER_TOKEN), TOWERS, start_step=start
        )
        for step in range(start, 12):
            bits = (100.0 * start + step, 1.0)
            log.log_interval(step, interval_with(bits), mfu=0.2, memory_bytes=1)
        log.close()
    points = [(point.step, point.value) for point in read(tmp_path).Scalars("loss_train/text")]
    before = [(step, 100.0 + step) for step in range(1, 8)]
    assert points == before + [(step, 800.0 + step) for step in range(8, 12)]


def test_media(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, dict.fromkeys(MODALITIES, BITS_PER_TOKEN), TOWERS, start_step=1)
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    log.log_media("a_text", "two\nlines", 3)
    log.log_media("a_picture", picture, 3, "red\nheart")
    log.log_media("a_sound", np.zeros(1600, dtype=np.float32), 3, "bell")
    log.close()
    titles = {
        value.tag: (value.metadata.display_name, value.metadata.summary_description)
        for path in tmp_path.glob("*tfevents*")
        for event in LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    assert titles["a_picture"] == ("a_picture: red", "red\nheart")
    assert titles["a_sound"] == ("a_sound: bell", "bell")
    events = read(tmp_path)
    (image,) = events.Images("a_picture")
    assert (image.width, image.height) == (128, 128)
    (sound,) = events.Audio("a_sound")
    assert sound.length_frames == 1600
    (text,) = events.Tensors("a_text/text_summary")
    assert b"two\nlines" in text.tensor_proto.string_val[0]


def prompt_text(events: EventAccumulator, tag: str) -> bytes:
    return events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0]


def train_on_every_codec(directory: Path, *overrides: str) -> None:
    corpus = make_corpus(directory / "corpus")
    config = make_config(
        corpus,
        f"run.directory={directory / 'runs'}",
        "training.train_steps=2",
        "logging.sample_interval_steps=1",
        "logging.peak_flops=1e9",
        *overrides,
    )
    groups = build_process_groups(1, torch.device("cpu"))
    train(config, corpus, groups)


def test_training_logs_samples_and_real_segments(tmp_path: Path) -> None:
    run_ranks(train_on_every_codec, 1, tmp_path)
    events = read(tmp_path / "runs" / "small" / "tensorboard")
    numbers = range(3)
    kinds = ("generated", "truth")
    images = {f"samples_image/{number}_{kind}" for number in numbers for kind in kinds}
    sounds = {f"samples_speech/{number}_{kind}" for number in numbers for kind in kinds}
    assert set(events.Tags()["images"]) == images
    assert set(events.Tags()["audio"]) == sounds
    texts = set(events.Tags()["tensors"])
    for number in numbers:
        assert f"samples_text/{number}_generated/text_summary" in texts
        for name in ("text", "image", "speech"):
            assert f"samples_{name}/{number}_prompt/text_summary" in texts
    assert b"causally" not in prompt_text(events, "samples_text/0_prompt")
    for tag in images:
        assert [image.step for image in events.Images(tag)] == [1, 2]


def test_samples_state_that_routing_is_causal(tmp_path: Path) -> None:
    experts = "model.towers.text.experts={ num_moe_experts = 2, causal_router = true }"
    run_ranks(train_on_every_codec, 1, tmp_path, experts, "training.train_steps=1")
    events = read(tmp_path / "runs" / "small" / "tensorboard")
    for name in ("text", "image", "speech"):
        text = prompt_text(events, f"samples_{name}/0_prompt")
        assert b"routed causally: in training a token's experts depend on later tokens" in text


def test_progress_is_logged_once_per_step(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, dict.fromkeys(MODALITIES, BITS_PER_TOKEN), TOWERS, start_step=1)
    log.log_progress(Progress(steps=5, seconds=2.5, tokens=640, flops=3e9))
    log.log_progress(Progress(steps=5, seconds=2.5, tokens=640, flops=3e9))
    log.log_progress(Progress(steps=6, seconds=3.0, tokens=768, flops=math.nan))
    log.close()
    events = read(tmp_path)
    points = {
        name: [(point.step, point.value) for point in events.Scalars(f"progress/{name}")]
        for name in ("tokens", "seconds", "flops")
    }
    assert points["tokens"] == [(5, 640.0), (6, 768.0)]
    assert points["seconds"] == [(5, 2.5), (6, 3.0)]
    # Unknown FLOPs have no point.
    assert points["flops"] == [(5, 3e9)]
