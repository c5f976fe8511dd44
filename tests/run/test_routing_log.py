"""Logged routing statistics equal counts made by hand and are the same in every layout."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mot_megatron.config_model import ExpertsConfig
from mot_megatron.data.corpus import Corpus
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.routing import Router, RoutingPool, RoutingStatistics
from mot_megatron.run.loop import train
from mot_megatron.run.routing_heat_map import draw_heat_map
from mot_megatron.run.routing_log import RoutingLog, expert_charts, layer_scalars, layer_tag
from mot_megatron.train.session import build_groups, resolve_config
from tests import small_runs
from tests.model.small_models import random_tokens, single_rank_model, small_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

TOWERS = {"text": "text", "image": "other", "speech": "other"}
TEXT = "model.towers.text.experts={num_moe_experts=4,causal_router=true,capacity_factor=1.0}"
IMAGE = (
    'model.towers.image.experts={num_moe_experts=2,routing="topk",gate="softmax",'
    "aux_loss_coefficient=0.01,z_loss_coefficient=0.001}"
)


class Points:
    """In place of a log: keeps what would be written."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}
        self.figures: list[str] = []

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        assert step == 3
        self.scalars |= scalars

    def log_figure(self, tag: str, _figure: object, step: int) -> None:
        assert step == 3
        self.figures.append(tag)


def test_counts_of_two_micro_batches_made_by_hand() -> None:
    experts = "{num_moe_experts=3,causal_router=true,capacity_factor=1.5}"
    config = small_config(TOWERS, f"model.towers.other.experts={experts}")
    model = single_rank_model(config)
    log, points, batches = RoutingLog(model), Points(), []
    seen = _record(model)
    for seed in (1, 2):
        batches.append(random_tokens(seed, list(TOWERS), (1, 1, 1)).micro_batch(config))
        model(batches[-1])[0].backward()
    with torch.no_grad():
        model(batches[0])  # evaluation leaves no trace
    log.report(points, 3)  # type: ignore[arg-type]
    tokens = sum(batch.tower_filled[1] for batch in batches)
    for layer in range(2):
        calls = [call for call in seen if call[0] is model.layers[str(layer)]]
        wanted = _by_hand(model.layers[str(layer)], [call[1:] for call in calls[:2]], tokens)
        prefix = f"routing/other/layer_{layer:02}/"
        found = {
            tag.removeprefix(prefix): value
            for tag, value in points.scalars.items()
            if tag.startswith(prefix)
        }
        assert found == pytest.approx(wanted, rel=1e-5)
        assert 0 < found["untaken_percent"] < 100
        assert 0 < found["causal_agreement_percent"] < 100
    # What has been reported is not reported again, but drawn: once.
    points.scalars.clear()
    log.report(points, 3)  # type: ignore[arg-type]
    assert points.scalars == {}
    log.draw(points, 3)  # type: ignore[arg-type]
    log.draw(points, 3)  # type: ignore[arg-type]
    assert points.figures == ["routing/other/heat_map"]


def _record(
    model: MixtureOfTransformers,
) -> list[tuple[torch.nn.Module, torch.Tensor, RoutingPool]]:
    """Return a list to which every router call appends its layer, rows and pool."""
    seen = []
    for layer in model.layers.values():
        for module in layer.modules():
            if isinstance(module, Router):
                module.register_forward_pre_hook(
                    lambda _, inputs, layer=layer: seen.append((layer, *inputs))
                )
    return seen


def _by_hand(
    layer: torch.nn.Module, calls: list[tuple[torch.Tensor, RoutingPool]], tokens: int
) -> dict[str, float]:
    """Compute the scalars token by token from the inputs of the router."""
    (router,) = (module for module in layer.modules() if isinstance(module, Router))
    counts, untaken, entropy, loss, agreed = [0, 0, 0], 0, 0.0, 0.0, 0
    for x, pool in calls:
        rows = x.detach()[pool.filled]
        logits = rows @ router.weight.detach().T
        takes = math.ceil(1.5 * len(rows) / 3 - 1e-6)
        takers: list[set[int]] = [set() for _ in rows]
        for expert in range(3):
            for row in logits[:, expert].argsort(descending=True)[:takes].tolist():
                takers[row].add(expert)
                counts[expert] += 1
        predicted = router.causal(rows).detach()  # type: ignore[operator]
        for row, taken_by in enumerate(takers):
            untaken += not taken_by
            p = torch.softmax(logits[row], 0).tolist()
            entropy -= sum(value * math.log(value) for value in p)
            for expert in range(3):
                logit = predicted[row, expert].item()
                correct = logit if expert in taken_by else -logit
                loss += math.log1p(math.exp(-correct)) / 3
                agreed += correct > 0
    return {
        "untaken_percent": 100 * untaken / tokens,
        "entropy_nats": entropy / tokens,
        "causal_loss": loss / tokens,
        "causal_agreement_percent": 100 * agreed / (3 * tokens),
        **{f"tokens_percent_expert_{e:02}": 100 * counts[e] / tokens for e in range(3)},
    }


def test_only_applicable_scalars_are_logged() -> None:
    sums = torch.tensor([10.0, 2, 5, 20, 30, 40, 16, 4, 6, 0])
    assert len(sums) == len(RoutingStatistics.NAMES) + 3  # a wider tower's table
    dropless = ExpertsConfig(num_moe_experts=2, routing="topk")
    assert layer_scalars(dropless, sums) == {
        "entropy_nats": 0.5,
        "tokens_percent_expert_00": 40.0,
        "tokens_percent_expert_01": 60.0,
    }
    capped = ExpertsConfig(
        num_moe_experts=2,
        routing="topk",
        capacity_factor=1.0,
        aux_loss_coefficient=0.1,
        z_loss_coefficient=0.1,
    )
    found = layer_scalars(capped, sums)
    assert (found["untaken_percent"], found["aux_loss"], found["z_loss"]) == (20.0, 2.0, 3.0)
    choice = layer_scalars(ExpertsConfig(num_moe_experts=2, causal_router=True), sums)
    assert choice["causal_agreement_percent"] == 80.0  # 16 of 10 tokens x 2 experts
    assert layer_scalars(dropless, torch.zeros(9)) == {}


def test_charts_show_a_line_per_layer() -> None:
    charts = expert_charts(small_config(TOWERS, TEXT).model)
    assert len(charts) == 4
    for kind, (pattern,) in charts.values():
        assert kind == "Multiline"
        scalar = str(pattern).rpartition("/")[2].removesuffix("$")
        assert re.match(str(pattern), f"{layer_tag('text', 1)}/{scalar}")
    assert expert_charts(small_config(TOWERS).model) == {}


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (4, 8), (50, 64)])
def test_larger_shares_are_darker_in_the_heat_map(layers: int, experts: int) -> None:
    taken = np.full((layers, experts), 100 / experts)
    taken[0, 0] *= 1.9
    figure = draw_heat_map("title", taken, np.full(layers, 10.0), 100 / experts)
    figure.canvas.draw()
    cells, beside, _ = figure.axes
    numbers = [text.get_text() for text in cells.texts]
    if layers < 50:
        assert numbers == [f"{value:.1f}" for value in taken.flatten()]
        assert [text.get_text() for text in beside.texts] == ["10.0"] * layers
    picture = cells.images[0]
    rgb = np.asarray(picture.cmap(picture.norm(taken)))[..., :3].sum(-1)
    assert (rgb[0, 0] < rgb.flatten()[1:]).all()


def train_in_layouts(
    corpus_directory: Path, runs: Path, layouts: dict[str, list[str]], model: list[str]
) -> None:
    """Train six steps in each layout, one after the other on the same ranks."""
    corpus = Corpus.open(corpus_directory)
    for name, layout in layouts.items():
        overrides = [
            f"run.directory={runs}",
            f"run.name={name}",
            "training.train_steps=6",
            "training.global_batch_size=4",
            "logging.interval_steps=2",
            "evaluation.interval_steps=3",
            *layout,
            *model,
        ]
        config = resolve_config(small_runs.small_config(corpus_directory, overrides), corpus)
        train(config, corpus, build_groups(config, corpus, torch.device("cpu")))
        parallel_state.destroy_model_parallel()


def scalars_of(run: Path) -> dict[tuple[str, int], float]:
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    images = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert images == {f"routing/{tower}/heat_map": [3, 6] for tower in ("text", "image")}
    return {
        (tag, point.step): point.value
        for tag in events.Tags()["scalars"]
        if tag.startswith(("routing/", "loss_held_out"))
        for point in events.Scalars(tag)
    }


TWO_RANKS = {
    "expert": ["parallel.expert_model_parallel_size=2"],
    "pipeline": ["parallel.pipeline_model_parallel_size=2", "training.recompute=full"],
    "sequence": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
}


def test_every_layout_logs_and_evaluates_as_one_rank(tmp_path: Path) -> None:
    corpus = small_runs.write_corpus(tmp_path / "corpus")
    model = [TEXT, IMAGE]
    run_ranks(train_in_layouts, 1, corpus, tmp_path, {"one": []}, model)
    run_ranks(train_in_layouts, 2, corpus, tmp_path, TWO_RANKS, model)
    expected = scalars_of(tmp_path / "one")
    experts = {key for key in expected if key[0].startswith("routing/")}
    # (4 kinds + 4 experts of text, 3 kinds + 2 experts of images) x 2 layers x steps 2, 4 and 6
    assert len(experts) == (8 + 5) * 2 * 3
    losses = {(f"loss_held_out{kind}/text", step) for kind in ("", "_causal") for step in (3, 6)}
    assert losses <= set(expected)
    assert expected["loss_held_out/text", 6] != expected["loss_held_out_causal/text", 6]
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())["modalities"]["text"]
    for key, tag in (("", "loss_held_out/text"), ("_causal", "loss_held_out_causal/text")):
        bits = summary[f"held_out_bits_per_token{key}"]
        assert bits == pytest.approx(expected[tag, 6], abs=1e-4)
    for layout in TWO_RANKS:
        found = scalars_of(tmp_path / layout)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # Far smaller than the effect of a single token routed differently.
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-4), (layout, key)
