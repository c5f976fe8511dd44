"""Step matching of curves with known slopes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mot_megatron.compare.curves import Axis, Curve, RunCurves, Split, read_run
from mot_megatron.compare.step_matching import (
    Falling,
    Match,
    default_window,
    falling,
    match_arms,
    match_curves,
    smooth,
    smoothed_mean,
    steps_to_match,
)
from mot_megatron.errors import DataError
from tests.compare.synthetic_runs import (
    curves,
    losses,
    points_of,
    power_law,
    seeing_the_future,
    write_run,
)


def match(
    baseline: RunCurves | list[RunCurves],
    candidate: RunCurves | list[RunCurves],
    axis: Axis = "steps",
    split: Split = "train",
) -> Match:
    arms = [runs if isinstance(runs, list) else [runs] for runs in (baseline, candidate)]
    (found,) = [
        match
        for match in match_arms(arms[0], arms[1], name="candidate")
        if (match.axis, match.split) == (axis, split)
    ]
    return found


def seeds_of(slope: float, noise: float, first_seed: int, runs: int) -> list[RunCurves]:
    seeds = range(first_seed, first_seed + runs)
    return [curves(losses(slope, noise, seed), seed=seed, points=1200) for seed in seeds]


def test_smoothing_is_centered_and_ends_on_a_line() -> None:
    values = np.array([9.0, 1.0, 2.0, 6.0, 4.0])
    # 9, (9+1+2)/3, (9+1+2+6+4)/5 = 4.4; then the line fitted to all five, with the slope
    # (-2*9 - 1*1 + 1*6 + 2*4)/(4+1+1+4) = -0.5.
    np.testing.assert_allclose(smooth(values, 5), [9, 4, 4.4, 3.9, 3.4])
    np.testing.assert_array_equal(smooth(values, 1), values)
    # A straight line is unchanged: there is no lag.
    np.testing.assert_allclose(smooth(np.arange(50.0), 7), np.arange(50.0))


def test_default_windows_are_odd_and_small() -> None:
    assert [default_window(points) for points in (5, 40, 300, 1200)] == [1, 1, 13, 49]


def test_monotone_up_to_the_lowest_value() -> None:
    # 4 and 6 rise, so both become 5; the values after the minimum become 2 and are not matched.
    curve = falling(np.arange(7.0), np.array([8.0, 4, 6, 3, 2, 5, 9]))
    np.testing.assert_array_equal(curve.loss, [8, 5, 5, 3, 2, 2, 2])
    assert curve.matched == 5
    np.testing.assert_array_equal(falling(np.arange(2.0), np.array([1.0, 2])).loss, [1, 1])
    assert falling(np.arange(4.0), np.array([3.0, 2, 1, 1])).matched == 4


def test_a_curve_that_overfits_is_distinguished_from_a_noisy_fall() -> None:
    steps = np.arange(1, 301) / 300
    noise = np.random.default_rng(0).normal(0, 0.05, (40, 300))
    # A falling curve with a flat end has its lowest value anywhere in that end, by chance.
    falls = 5 + steps**-0.3 + noise
    assert np.mean([np.argmin(curve) for curve in falls]) < 285
    for curve in falls:
        fitted, matched = falling(steps, curve)[1:]
        # The fit averages over the flat end, unless the last value is the lowest.
        assert (fitted[-1] > curve.min()) == (np.argmin(curve) < len(curve) - 1)
        assert fitted[200] > fitted[-1]
        assert matched == 300
    for curve in 5 + (steps - 0.6) ** 2 * 4 + noise / 5:
        fitted, matched = falling(steps, curve)[1:]
        assert fitted[-1] == curve.min()
        assert matched == np.argmin(curve) + 1
        assert 0.5 < steps[np.argmin(curve)] < 0.7


def test_steps_to_match_by_hand() -> None:
    x, candidate = np.array([10.0, 20, 30, 40]), np.array([5.0, 3, 3, 1])
    loss = np.array([6.0, 5, 4, 3, 2, 1, 0.5])
    # NaN above the first loss; on the plateau, its first point; inf below the last loss.
    expected = [np.nan, 10, 15, 20, 35, 40, np.inf]
    np.testing.assert_array_equal(steps_to_match(loss, x, candidate), expected)


def test_slope_and_counts_by_hand() -> None:
    t, loss = np.array([1.0, 40, 60, 80, 100]), np.array([9.0, 4, 3, 2, 1])
    candidate = Falling(np.array([0.5, 10, 40]), np.array([9.0, 4, 2]), 3)
    fit = match_curves(Falling(t, loss, 5), candidate)
    # t = 1 is in the first 5%; tau(40) = 10, tau(60) = 25, tau(80) = 40; the loss at 100 is never
    # reached.
    np.testing.assert_array_equal(fit.t, [40, 60, 80])
    np.testing.assert_array_equal(fit.tau, [10, 25, 40])
    assert fit.slope == pytest.approx((400 + 1500 + 3200) / (1600 + 3600 + 6400))
    assert fit.end_point_ratio == 0.5
    assert (fit.range_reached, fit.dropped, fit.unreached) == (0.8, 2, 1)


@pytest.mark.parametrize("slope", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("points", [40, 300, 1200])
def test_known_slope(slope: float, points: int) -> None:
    found = match(curves(losses(1.0), points=points), curves(losses(slope), points=points))
    assert found.slope == pytest.approx(slope, abs=0.02)
    assert found.end_point_ratio == pytest.approx(slope, abs=0.02)
    # A slope of 2 reaches half the range.
    assert found.range_reached == pytest.approx(min(1, 1 / slope), abs=0.03)
    assert found.points + found.dropped == points
    assert found.interval is None


@pytest.mark.parametrize("slope", [0.25, 0.5, 1.0, 2.0])
def test_known_slope_under_noise(slope: float) -> None:
    # The slopes of single runs have a standard deviation of about 2% here.
    found = match(seeds_of(1.0, 0.02, 0, 3), seeds_of(slope, 0.02, 10, 3))
    assert found.slope == pytest.approx(slope, abs=0.02)
    assert found.slope is not None
    assert found.interval is not None
    low, high = found.interval
    assert low < found.slope < high
    assert high - low < 0.1 * slope


def test_no_systematic_error_under_noise_of_few_points() -> None:
    found = [
        match(
            curves(losses(1.0, 0.02, 2 * seed), points=60),
            curves(losses(0.5, 0.02, 2 * seed + 1), points=60),
        ).slope
        for seed in range(30)
    ]
    assert np.mean(np.array(found, dtype=float)) == pytest.approx(0.5, abs=0.01)


def test_the_end_of_noisy_curves_does_not_depend_on_a_single_value() -> None:
    """Training losses of small models are so noisy that the last value may be the lowest."""
    found = [
        match(
            curves(losses(1.0, 0.06, 2 * seed), points=200),
            curves(losses(0.8, 0.06, 2 * seed + 1), points=200),
        )
        for seed in range(30)
    ]
    assert np.mean(np.array([one.slope for one in found], dtype=float)) == pytest.approx(0.8, 0.025)
    ratios = np.array([one.end_point_ratio for one in found], dtype=float)
    assert np.median(ratios) == pytest.approx(0.8, abs=0.05)
    assert np.mean(ratios) == pytest.approx(0.8, abs=0.05)
    assert np.mean([one.range_reached for one in found]) > 0.97
    assert not any(one.baseline_overfits for one in found)


def test_axes_have_their_own_slope() -> None:
    dense = curves(losses(1.0), seconds_per_step=0.5)
    candidate = curves(losses(0.5), seconds_per_step=0.75)
    assert match(dense, candidate, "flops").slope == pytest.approx(0.5, abs=0.01)
    # Half the steps, each taking 1.5 times as long.
    assert match(dense, candidate, "seconds").slope == pytest.approx(0.75, abs=0.01)
    assert match(dense, candidate, "seconds").baseline_end == 750


def test_candidate_that_reaches_nothing() -> None:
    found = match(curves(power_law), curves(lambda steps: power_law(steps) + 9))
    assert (found.slope, found.end_point_ratio, found.interval) == (None, None, None)
    assert (found.points, found.dropped, found.unreached) == (0, 300, 300)
    assert found.range_reached == 0
    assert json.loads(json.dumps(found.to_json()))["slope"] is None


def test_candidate_that_reaches_only_the_beginning() -> None:
    # It stays at the baseline's loss at step 600 of 1500.
    floor = float(power_law(np.array([600.0]))[0])
    dense = curves(power_law)
    found = match(dense, curves(lambda steps: np.maximum(power_law(steps / 0.5), floor)))
    assert found.slope == pytest.approx(0.5, abs=0.02)
    assert found.range_reached == pytest.approx(0.4, abs=0.01)
    # Of 300 points, 5 steps apart, 14 are before step 75 and 180 after step 600.
    assert found.unreached == pytest.approx(180, abs=2)
    assert found.dropped == found.unreached + 14


def test_baseline_that_overfits() -> None:
    def overfitted(steps: np.ndarray) -> np.ndarray:
        return power_law(steps) + np.maximum(0, steps - 900) / 2000

    found = match(curves(overfitted), curves(losses(0.5)))
    assert found.baseline_lowest == pytest.approx(0.6, abs=0.02)
    assert found.baseline_overfits
    # Nothing after step 900 counts, however early its losses are reached.
    assert found.t[-1] == pytest.approx(900, abs=20)
    assert found.slope == pytest.approx(0.5, abs=0.01)
    assert (found.range_reached, found.unreached) == (1, 0)
    assert found.dropped + found.points == 300
    assert found.dropped == pytest.approx(120 + 9, abs=5)
    assert found.baseline_end == 1500
    # With the roles swapped, the overfitted curve reaches the losses up to its minimum, at 0.6.
    other = match(curves(power_law), curves(overfitted))
    assert other.range_reached == pytest.approx(0.6, abs=0.02)
    assert other.slope == pytest.approx(1, abs=0.02)
    assert other.baseline_lowest == 1
    assert not other.baseline_overfits
    same = match(curves(overfitted), curves(overfitted))
    assert (same.slope, same.end_point_ratio, same.range_reached) == (1, 1, 1)
    # A candidate that stalls at the loss of step 450 reaches half of the 900 steps matched.
    stalled = match(curves(overfitted), curves(lambda steps: overfitted(np.minimum(steps, 450))))
    assert stalled.range_reached == pytest.approx(0.5, abs=0.02)
    assert stalled.slope == pytest.approx(1, abs=0.01)


def test_losses_from_before_the_candidates_first_point_do_not_count() -> None:
    dense = curves(power_law, points=100)
    late = curves(losses(0.5), points=5)  # first at step 300: the baseline's loss at step 600
    found = match(dense, late)
    assert found.t[0] >= 600
    assert found.unreached == 0
    assert found.dropped == 100 - found.points
    assert found.slope == pytest.approx(0.5, abs=0.02)


def test_interval_needs_several_seeds_of_both_arms() -> None:
    one, three = seeds_of(1.0, 0.01, 0, 1), seeds_of(0.5, 0.01, 10, 3)
    assert match(one, three).interval is None
    found = match(seeds_of(1.0, 0.01, 0, 2), three)
    assert found.interval is not None
    assert (found.baseline_seeds, found.seeds) == (2, 3)
    # The draws are the same every time.
    assert match(seeds_of(1.0, 0.01, 0, 2), three).interval == found.interval


def test_interval_shows_how_much_runs_differ() -> None:
    def width(spread: float) -> float:
        candidates = [curves(losses(0.5 + d), seed=i) for i, d in enumerate((-spread, 0, spread))]
        dense = [curves(losses(1.0), seed=i) for i in range(3)]
        interval = match(dense, candidates).interval
        assert interval is not None
        return interval[1] - interval[0]

    # 1 of 27 draws has the lowest seed three times, so the 95% interval spans lowest to highest.
    assert width(0.1) == pytest.approx(0.2, abs=0.03)
    assert width(0.0) == pytest.approx(0, abs=1e-9)


def test_the_effect_of_a_seed_on_both_arms_does_not_widen_the_interval() -> None:
    spread = (0.94, 1.0, 1.06)

    def arm(slope: float, first_seed: int) -> list[RunCurves]:
        return [curves(losses(slope * d), seed=first_seed + i) for i, d in enumerate(spread)]

    paired, unpaired = (match(arm(1.0, 0), arm(0.5, seed)) for seed in (0, 10))
    assert (paired.paired, unpaired.paired) == (True, False)
    assert paired.slope == unpaired.slope == pytest.approx(0.5, abs=0.01)
    # Drawn together, 0.94 * 0.5 is only matched against 0.94; drawn apart, also against 1.06.
    assert paired.interval == pytest.approx((0.5, 0.5), abs=0.005)
    assert unpaired.interval is not None
    assert unpaired.interval[1] - unpaired.interval[0] > 0.05
    # The order in which runs are given does not matter.
    assert match(arm(1.0, 0), arm(0.5, 0)[::-1]).interval == paired.interval


@pytest.mark.slow
def test_intervals_of_three_seeds_contain_the_true_slope_in_75_percent_of_cases() -> None:
    rng = np.random.default_rng(0)
    few = {"points": 40, "splits": ("train",)}
    dense = [curves(losses(1.0), **few, seed=seed) for seed in range(3)]
    held = []
    for _ in range(150):
        runs = [curves(losses(0.5 + rng.normal(0, 0.02)), **few, seed=seed) for seed in range(3)]
        interval = match(dense, runs).interval
        assert interval is not None
        held.append(interval[0] <= 0.5 <= interval[1])
    # Between the lowest and the highest of three: 1 - 2 * (1/2)^3 = 75%; standard error 3.5%.
    assert np.mean(held) == pytest.approx(0.75, abs=0.11)


def test_a_model_that_sees_no_later_tokens_is_matched_by_its_held_out_loss() -> None:
    dense = curves(power_law)
    experts = seeing_the_future(curves(losses(0.25)))
    causal = curves(losses(0.5), splits=("held_out_causal",))
    experts = RunCurves(
        experts.source,
        experts.identity,
        {**experts.curves, **causal.curves},
        experts.steps,
        experts.tokens,
        experts.flops,
        experts.seconds,
    )
    assert match(dense, experts, split="held_out").slope == pytest.approx(0.25, abs=0.01)
    assert match(dense, experts, split="held_out_causal").slope == pytest.approx(0.5, abs=0.01)
    # Also if it is the baseline.
    assert match(experts, dense, split="held_out_causal").range_reached == pytest.approx(0.5, 0.02)


def test_a_loss_that_saw_later_tokens_is_not_used_as_causally_routed() -> None:
    routed = seeing_the_future(curves(losses(0.5), splits=("train", "held_out", "held_out_causal")))
    blind = seeing_the_future(curves(losses(0.25)))
    for pair in ((routed, blind), (blind, routed)):
        found = match_arms([pair[0]], [pair[1]], name="candidate")
        assert [match.split for match in found if match.axis == "steps"] == ["train", "held_out"]


def test_the_mean_of_runs_covers_their_common_steps() -> None:
    early = Curve(np.array([10, 20, 30]), np.array([3.0, 2.0, 1.0]))
    late = Curve(np.array([20, 30, 40]), np.array([4.0, 2.0, 0.0]))
    mean = smoothed_mean([early, late])
    np.testing.assert_array_equal(mean.steps, [20, 30])
    np.testing.assert_array_equal(mean.losses, [3.0, 1.5])


def test_every_modality_split_and_axis_is_matched() -> None:
    runs = [curves(power_law, modalities=("text", "image"))]
    found = match_arms(runs, runs, name="same")
    keys = [(match.split, match.modality, match.axis) for match in found]
    assert keys == [
        (split, modality, axis)
        for split in ("train", "held_out")
        for modality in ("text", "image")
        for axis in ("steps", "flops", "seconds")
    ]
    assert [match.slope for match in found] == pytest.approx([1.0] * len(found))


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ([curves(power_law, name="b", modalities=("image",))], ["b: no points", "train/text"]),
        ([curves(power_law, name="b", points=4)], ["b: ", "4 points", "at least 5"]),
        (
            [curves(power_law, name="b"), curves(power_law, name="c", last=600)],
            ["c: ", "step 600", "b at step 1500"],
        ),
    ],
)
def test_curves_that_cannot_be_matched(candidates: list[RunCurves], words: list[str]) -> None:
    with pytest.raises(DataError) as raised:
        match_arms([curves(power_law, name="a")], candidates, name="candidate")
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_the_logging_interval_does_not_bias_slopes(tmp_path: Path, slope: float) -> None:
    runs = {}
    for name, points, loss in (
        ("baseline", 75, power_law),  # every 20 of 1,500 steps
        ("candidate", 15, losses(slope)),  # every 100
    ):
        tags = {
            "loss_train/text": points_of(loss, points, averaged=True),
            "loss_held_out/text": points_of(loss, points),
        }
        runs[name] = read_run(write_run(tmp_path, name, tags))
    for baseline, candidate, expected in (
        (runs["baseline"], runs["candidate"], slope),
        (runs["candidate"], runs["baseline"], 1 / slope),
    ):
        found = match_arms([baseline], [candidate], name="candidate")
        slopes = [one.slope for one in found if (one.split, one.axis) == ("train", "steps")]
        # Few points, and a mean of a curve is not the curve at the mean: under 1%.
        assert slopes == [pytest.approx(expected, rel=0.01)]
