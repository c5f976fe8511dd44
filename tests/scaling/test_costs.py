"""Costs of work and traffic, pipeline schedules and forecasts, against closed forms."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from mot_megatron.errors import ConfigError
from mot_megatron.scaling.calibrate_links import fit_line
from mot_megatron.scaling.costs import (
    Constants,
    adapted,
    collective_seconds,
    exposed,
    work_seconds,
)
from mot_megatron.scaling.forecast import BUBBLE, IMBALANCE, LAUNCHES, MATRICES, forecast
from mot_megatron.scaling.ledger import (
    BACKWARD,
    FORWARD,
    OPTIMIZER,
    PARTS,
    REDUCTION,
    Collective,
    Ledger,
    Memory,
    Product,
    Tally,
    Work,
)
from mot_megatron.scaling.machine import GroupShape, Line, Machine, MeasuredGroup, group_shape
from mot_megatron.scaling.pipeline import pipeline_seconds
from mot_megatron.scaling.roles import Rehearsed, Role
from tests.model.small_models import small_config

MACHINE = Machine(
    "synthetic",
    matrix_tflops=100,
    memory_gb=80,
    memory_tb_per_s=2,
    devices_per_node=8,
    link_gb_per_s=200,
    network_gb_per_s=80,
)
IDEAL = Constants(1, 1, 1, 1, latency_us=0, overlap=1)
GB = 10**9


def test_a_matrix_product_takes_its_flops_or_its_bytes() -> None:
    large, thin = Product(1, 4096, 4096, 4096, 2), Product(1, 1, 4096, 4096, 2)
    assert large.flops / 100e12 > large.num_bytes / 2e12
    assert thin.flops / 100e12 < thin.num_bytes / 2e12
    work = Work(products=Counter({large: 2, thin: 3}), attention_flops=10**12, memory_bytes=4 * GB)
    half = replace(IDEAL, matrix_efficiency=0.5, attention_efficiency=0.25, memory_efficiency=0.8)
    found = work_seconds(work, MACHINE, half)
    expected = 2 * large.flops / 50e12 + 3 * thin.num_bytes / 1.6e12
    assert found.matrices == pytest.approx(expected, rel=1e-9)
    assert found.attention == pytest.approx(0.04, rel=1e-9)
    assert found.memory == pytest.approx(0.0025, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "group", "seconds"),
    [
        ("all-gather", GroupShape(8, 8), 7 / 8 / 200),
        ("reduce-scatter", GroupShape(8, 8), 7 / 8 / 200),
        ("all-reduce", GroupShape(8, 8), 2 * 7 / 8 / 200),
        # All eight ranks of a node use its network together: 80 GB/s.
        ("all-gather", GroupShape(64, 8), 63 / 64 / 80),
        # One rank per node has an eighth of it.
        ("all-reduce", GroupShape(8, 1), 2 * 7 / 8 / 10),
        ("all-to-all", GroupShape(16, 8), 8 / 16 / 10),
        ("all-to-all", GroupShape(4, 4), 3 / 4 / 200),
        ("broadcast", GroupShape(16, 8), 1 / 80),
        ("send", GroupShape(2, 2), 1 / 200),
        ("send", GroupShape(2, 1), 1 / 10),
    ],
)
def test_collectives_take_their_bytes_over_the_slowest_link(
    kind: str, group: GroupShape, seconds: float
) -> None:
    assert collective_seconds(kind, GB, group, MACHINE, IDEAL) == pytest.approx(seconds, rel=1e-9)


def test_measured_rates_are_reached_in_full() -> None:
    constants = Constants(0.5, 0.25, 0.8, 0.6, latency_us=20, overlap=0.5)
    assert adapted(constants, MACHINE) == constants
    measured = replace(
        MACHINE,
        attention_tflops=30,
        latency_us=7,
        measured=frozenset({"matrix_tflops", "memory_tb_per_s", "link_gb_per_s"}),
    )
    assert adapted(constants, measured) == Constants(1, 0.3, 1, 1, latency_us=7, overlap=0.5)
    assert measured.stamps == ("DATA SHEET", "MEASURED")


def test_measured_groups_give_the_cost_of_groups_like_them() -> None:
    """Within a node and between nodes, in their own shape and in others."""
    lines = {"all-gather": Line(30e-6, 50e9), "send": Line(9e-6, 20e9)}
    known = (
        MeasuredGroup("tensor", GroupShape(2, 2), {"all-gather": Line(1e-6, 400e9)}),
        MeasuredGroup("node", GroupShape(8, 8), {"all-gather": Line(5e-6, 100e9)}),
        MeasuredGroup("world", GroupShape(16, 8), lines),
    )
    machine = replace(MACHINE, groups=known)

    def seconds(kind: str, size: int, per_node: int) -> float:
        return collective_seconds(kind, GB, GroupShape(size, per_node), machine, IDEAL)

    # Their own shapes.
    assert seconds("all-gather", 2, 2) == pytest.approx(1e-6 + 1 / 400, rel=1e-9)
    assert seconds("all-gather", 16, 8) == pytest.approx(30e-6 + 1 / 50, rel=1e-9)
    # 4 is as far from 2 as from 8; the first counts. A rank receives 3/4 instead of 1/2.
    assert seconds("all-gather", 4, 4) == pytest.approx(1e-6 + (3 / 4) / (1 / 2) / 400, rel=1e-9)
    # Eight nodes instead of two: four instead of two latencies.
    expected = 2 * 30e-6 + (63 / 64) / (15 / 16) / 50
    assert seconds("all-gather", 64, 8) == pytest.approx(expected, rel=1e-9)
    # A message between nodes was measured, one within a node was not.
    assert seconds("receive", 4, 1) == pytest.approx(1.5 * 9e-6 + 1 / 20, rel=1e-9)
    assert seconds("send", 2, 2) == pytest.approx(1 / 200, rel=1e-9)
    assert seconds("all-reduce", 8, 8) == pytest.approx(2 * 7 / 8 / 200, rel=1e-9)


def test_groups_that_span_nodes_need_a_network() -> None:
    alone = replace(MACHINE, network_gb_per_s=None)
    assert collective_seconds("all-gather", GB, GroupShape(8, 8), alone, IDEAL) > 0
    with pytest.raises(ConfigError, match=r"network\.gb_per_s: absent, but 16 ranks need several"):
        collective_seconds("all-gather", GB, GroupShape(16, 8), alone, IDEAL)


def test_a_line_is_fitted_to_noisy_times() -> None:
    sizes = [4**power for power in range(6, 16)]
    noise = [1.01, 0.99] * 5
    times = {size: (30e-6 + size / 5e9) * n for size, n in zip(sizes, noise, strict=True)}
    line = fit_line(times)
    assert line.latency == pytest.approx(30e-6, rel=0.02)
    assert line.bandwidth == pytest.approx(5e9, rel=0.02)


def test_latency_grows_with_the_logarithm_of_nodes() -> None:
    constants = replace(IDEAL, latency_us=10)
    for nodes, factor in ((1, 1), (2, 2), (32, 6)):
        found = collective_seconds("all-gather", 0, GroupShape(8 * nodes, 8), MACHINE, constants)
        assert found == pytest.approx(factor * 10e-6, rel=1e-9)


def test_traffic_is_hidden_fully_in_part_or_not() -> None:
    assert exposed(3.0, 2.0, overlap=1) == 0.0
    assert exposed(2.0, 3.0, overlap=1) == 1.0
    assert exposed(3.0, 2.0, overlap=0) == 2.0
    assert exposed(3.0, 2.0, overlap=0.5) == 1.0


def test_groups_are_seen_by_node() -> None:
    assert group_shape(range(64), 8) == GroupShape(64, 8)
    assert group_shape(range(0, 64, 2), 8) == GroupShape(32, 4)
    assert group_shape([0, 8, 16, 24], 8) == GroupShape(4, 1)
    assert group_shape([0, 1], 8) == GroupShape(2, 2)
    assert group_shape(range(64), 8).nodes == 8


@pytest.mark.parametrize(("stages", "batches"), [(1, 5), (2, 2), (4, 4), (4, 16), (3, 7)])
def test_bubble_of_1f1b(stages: int, batches: int) -> None:
    found = pipeline_seconds([1.0] * stages, [2.0] * stages, batches)
    assert found == pytest.approx(3 * batches * (1 + (stages - 1) / batches), rel=1e-6)


@pytest.mark.parametrize(
    ("stages", "batches", "pieces"), [(2, 4, 2), (4, 8, 2), (4, 16, 4), (4, 4, 2)]
)
def test_bubble_of_the_interleaved_schedule(stages: int, batches: int, pieces: int) -> None:
    found = pipeline_seconds([1.0] * stages, [2.0] * stages, batches, pieces=pieces)
    expected = 3 * batches * (1 + (stages - 1) / batches / pieces)
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_slowest_stage_sets_the_pace() -> None:
    # In the long run, every micro-batch takes the slowest stage's time.
    times = [pipeline_seconds([1, 3, 1], [2, 6, 2], batches) for batches in (20, 21)]
    assert times[1] - times[0] == pytest.approx(9, rel=1e-6)


def test_messages_delay_the_first_and_the_last_micro_batch() -> None:
    with_messages = pipeline_seconds([1.0] * 3, [2.0] * 3, 1, message=0.5)
    assert with_messages == pytest.approx(3 * 3 + 4 * 0.5, rel=1e-6)


CONFIG = small_config({"text": "text"})


def rehearsed(stage: int, place: int, forward: Work, **traffic: Collective) -> Rehearsed:
    """A role with the same work in backward as in forward, over four micro-batches."""
    work = {part: Work() for part in PARTS}
    work[FORWARD] = work[BACKWARD] = forward
    tally = Tally(work, Counter(dict.fromkeys(traffic.values(), 4)))
    members = {each.axis: tuple(range(each.group_size)) for each in traffic.values()}
    ledger = Ledger(4, tally, [], 4, Memory(1, 2), members)
    return Rehearsed(Role(stage, place, stage), ledger, 0.0, 0)


def test_forecast_of_one_layer_and_one_collective() -> None:
    product = Product(1, 4096, 4096, 4096, 2)
    gather = Collective(FORWARD, "all-gather", "data", 16, GB)
    reduce = Collective(REDUCTION, "all-reduce", "data", 16, GB)
    update = Collective(OPTIMIZER, "all-gather", "data", 16, GB // 2)
    role = rehearsed(0, 0, Work(Counter({product: 4})), a=gather, b=reduce, c=update)
    found = forecast(CONFIG, 16, [role], MACHINE, IDEAL)
    matrices = 8 * product.flops / 100e12
    traffic = 4 * 15 / 16 / 80 * (1 + 2 + 0.5)
    assert found.seconds == pytest.approx(matrices + traffic, rel=1e-6)
    assert sum(found.split.values()) == pytest.approx(found.seconds, rel=1e-9)
    assert found.split[MATRICES] == pytest.approx(matrices, rel=1e-6)
    assert found.split["traffic: data"] == pytest.approx(4 * 15 / 16 / 80, rel=1e-6)
    expected = 16 * 8 * product.flops / found.seconds / (16 * 100e12)
    assert found.utilization(MACHINE) == pytest.approx(expected, rel=1e-9)


def test_forecast_of_stages_and_of_unequal_towers() -> None:
    product = Product(1, 4096, 4096, 4096, 2)
    unit = product.flops / 100e12
    small, large = Work(Counter({product: 4})), Work(Counter({product: 12}))
    message = Collective(FORWARD, "send", "pipeline", 2, 0)
    roles = [
        rehearsed(stage, place, work, m=message)
        for stage in (0, 1)
        for place, work in enumerate((small, large))
    ]
    found = forecast(CONFIG, 4, roles, MACHINE, IDEAL)
    # Each of four micro-batches takes 3 units forward and backward on the slower place.
    assert found.seconds == pytest.approx(6 * unit * (4 + 1), rel=1e-6)
    assert found.split[MATRICES] == pytest.approx(2 * 8 * unit, rel=1e-6)
    assert found.split[IMBALANCE] == pytest.approx(2 * 4 * unit, rel=1e-6)
    assert found.split[BUBBLE] == pytest.approx(6 * unit, rel=1e-6)


def test_many_small_kernels_wait_for_the_host() -> None:
    role = rehearsed(0, 0, Work(launches=10**6))
    found = forecast(CONFIG, 1, [role], MACHINE, IDEAL)
    assert found.split == pytest.approx({LAUNCHES: 10.0})
