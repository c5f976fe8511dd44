"""Lines of the console: what they say, and that they fit."""

from __future__ import annotations

import math

import pytest

from mot_megatron.config_model import BITS_PER_TOKEN, LossUnit
from mot_megatron.optim.norms import StepNorms
from mot_megatron.run.console import WIDTH, Console, duration
from mot_megatron.train.interval import Interval
from mot_megatron.train.step import HeldOut, StepSeconds

UNITS: dict[str, LossUnit] = dict.fromkeys(("text", "image", "speech"), BITS_PER_TOKEN)


def interval_of(
    bits: tuple[float, ...], rate: float, norm: float, imbalance: float = 1.0
) -> Interval:
    return Interval(
        modality_losses=bits,
        total_loss=7.0,
        modality_rates=(rate, 0.0, 0.0),
        norms=StepNorms(total=norm, per_tower=(1.0,), shared=1.0),
        learning_rate=3e-4,
        seconds=StepSeconds(0.1, 0.2, 0.3),
        flops_per_second=1e9,
        imbalance=imbalance,
    )


def printed(capsys: pytest.CaptureFixture[str], on: bool = True) -> list[str]:
    bits = (7.25, math.nan, 6.5)
    with Console(UNITS, 0, 200, on) as console:
        console.interval(
            20, interval_of(bits, 12_345.0, 1.5), 0.42, seconds_left=75, memory_bytes=3 * 2**29
        )
        console.held_out(20, HeldOut(bits), sees_the_future=False)
    return capsys.readouterr().out.splitlines()


def test_interval_and_evaluation_lines(capsys: pytest.CaptureFixture[str]) -> None:
    interval, memory, held_out = printed(capsys)
    assert interval == (
        "step  20/200  text 7.250 image - speech 6.500  grad norm 1.50  lr 3.0e-04  600 ms"
        "  12.3k tok/s  mfu 42%  left 1:15"
    )
    assert memory == "  peak memory of the fullest rank: 1.50 GiB"
    assert held_out == "held out, step  20: text 7.250 image - speech 6.500 bits per token"


def test_losses_in_several_units_name_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    units = {"text": BITS_PER_TOKEN, "image": LossUnit("squared error", 1.0)}
    with Console(units, 0, 200, on=True) as console:
        console.held_out(20, HeldOut((7.25, 0.5), (7.5, math.nan)), sees_the_future=False)
    assert capsys.readouterr().out.splitlines() == [
        "held out, step  20: text 7.250 bits per token, image 0.500 squared error",
        "   routed causally: text 7.500 bits per token, image - squared error, as in generation",
    ]


def test_lines_of_long_runs_fit_the_width(capsys: pytest.CaptureFixture[str]) -> None:
    interval = interval_of((12.25, 12.25, 12.25), rate=987_654.0, norm=12.34, imbalance=1.25)
    with Console(UNITS, 0, 200_000, on=True) as console:
        console.interval(100_000, interval, 0.42, seconds_left=359_999, memory_bytes=0)
        console.held_out(100_000, HeldOut((12.25,) * 3, (12.5,) * 3), sees_the_future=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].endswith("|mfu 42%|left 99:59:59")
    # (1 - 1 / 1.25) * 0.2 s / 0.6 s = 7%
    assert lines[1].endswith("has 1.25 times the mean FLOPs, which costs about 7% of the step")


def test_evaluation_lines_name_the_routing(capsys: pytest.CaptureFixture[str]) -> None:
    bits, causal = (7.25, math.nan, 6.5), (7.5, math.nan, 6.75)
    with Console(UNITS, 0, 200, on=True) as console:
        console.held_out(20, HeldOut(bits, causal), sees_the_future=True)
        console.held_out(40, HeldOut(bits), sees_the_future=True)
    assert capsys.readouterr().out.splitlines() == [
        "held out, step  20: text 7.250 image - speech 6.500 bits per token,"
        " routed with later tokens",
        "   routed causally: text 7.500 image - speech 6.750 bits per token, as in generation",
        "held out, step  40: text 7.250 image - speech 6.500 bits per token,"
        " routed with later tokens",
    ]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, on=False) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (75, "1:15"), (3600, "1:00:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
