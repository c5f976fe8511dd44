"""The report: tables have the right numbers, and sentences claim no more than these support."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mot_megatron.compare.experiment import load_experiment
from mot_megatron.compare.report import honest_matches, write_report
from mot_megatron.compare.step_matching import Match
from mot_megatron.compare.words import sentence, tally, verdict
from mot_megatron.errors import DataError
from tests.compare.small_comparison import plan, save_ended_run
from tests.compare.synthetic_runs import losses, power_law

# Slopes of text and image; dense's speech gets worse from half of its steps on.
SLOPES = {"dense": (1.0, 1.0), "mot": (0.5, 1.0), "pair": (2.0, 0.8)}


def overfitting(steps: np.ndarray) -> np.ndarray:
    return power_law(steps) + 0.001 * np.maximum(steps - 750, 0)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    output = folder / "out"
    for number, run in enumerate(plan(folder)):
        text, image = SLOPES[run.arm]
        curves = {
            "text": losses(text, 0.003, number),
            "image": losses(image, 0.003, 50 + number),
            "speech": overfitting if run.arm == "dense" else losses(1.0),
        }
        save_ended_run(run, output, curves, causal=run.arm == "pair")
    write_report(load_experiment(folder / "configs"), output)
    return output


def section(output: Path, heading: str) -> str:
    text = (output / "report.md").read_text()
    (found,) = re.findall(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return found


def row(table: str, *start: str) -> list[str]:
    """Cells after those of ``start``."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    (found,) = (cells for cells in rows if cells[: len(start)] == list(start))
    return found[len(start) :]


def test_slopes_of_every_split_and_axis(compared: Path) -> None:
    train = section(compared, "Training loss")
    slope, flops, seconds, ending, reached, *counts = row(train, "mot", "text")
    value, low, high = map(float, re.findall(r"\d\.\d+", slope))
    assert value == pytest.approx(0.5, abs=0.02)
    assert low <= value <= high
    # Synthetic steps all take as many FLOPs and seconds.
    assert [text.split()[0] for text in (flops, seconds)] == [slope.split()[0]] * 2
    assert float(ending) == pytest.approx(0.5, abs=0.05)
    assert reached == "100%"
    points, dropped, unreached = map(int, counts)
    assert (points + dropped, unreached) == (150, 0)
    slope, _, _, _, reached, *counts = row(train, "pair †", "text")
    assert float(slope) == pytest.approx(2.0, abs=0.06)  # one seed: no interval
    assert float(reached[:-1]) == pytest.approx(50, abs=6)
    points, dropped, unreached = map(int, counts)
    assert points + dropped == 150
    assert dropped > unreached == pytest.approx(75, abs=9)
    causal = section(compared, "Held-out loss, routed causally")
    assert "| mot |" not in causal
    assert row(causal, "pair", "image")[0] == "-"  # above all of dense's losses
    slopes = json.loads((compared / "slopes.json").read_text())
    assert len(slopes) == 3 * 3 * (2 + 3)  # modalities, axes, splits of mot and of pair


def test_losses_that_saw_later_tokens_are_marked(compared: Path) -> None:
    note = "† Routing saw later tokens, which may flatter this loss.\n"
    headings = (
        "Training loss",
        "Held-out loss, routed as in training",
        "Memorization",
        "Comparison with the paper",
    )
    for heading in headings:
        text = section(compared, heading)
        assert text.count("| pair † |") == text.count("| pair") > 0, heading
        assert "mot †" not in text
        assert note in text
    causal = section(compared, "Held-out loss, routed causally")
    assert "†" not in causal


def test_sentences_use_the_causally_routed_loss(compared: Path) -> None:
    text = section(compared, "Results")
    assert "The baseline, dense, has 2 seeds; routing does not see later tokens.\n" in text
    mot, pair = text.index("**mot** (2 seeds)"), text.index("**pair** (1 seed)")
    of_pair, of_mot = text[pair:mot], text[mot:]
    assert re.search(r"- text: reaches dense's best loss in (4\d|5\d)% of the steps", of_mot)
    assert "): fewer steps than dense." in of_mot
    assert "image: no slope, because it reaches none of the losses that dense has" in of_pair
    assert re.search(r"dense's loss is lowest after (4|5)\d% of its steps and then", of_mot)


def test_arms_losses_paper_and_memorization(compared: Path) -> None:
    arms = section(compared, "The arms")
    towers, parameters, flops, seconds, seeds = row(arms, "mot")
    assert (towers, seeds) == ("text, image, speech", "1, 2")
    assert int(parameters.replace(",", "")) > 30_000
    assert len(set(flops.split(" / "))) == 1
    assert seconds == "0.500 (1.00)"
    assert 'mot: `model.modalities.text.tower = "text"`' in arms
    final = section(compared, "Final held-out loss")
    # Seeds 1 and 2 end at 2.1 and 2.2 bits.
    assert row(final, "mot", "as in training") == ["2", "2.150 ± 0.071", *["2.150 ± 0.071"] * 2]
    assert row(final, "pair", "as in training") == ["1", "2.100", "2.100", "2.100"]
    assert row(final, "pair", "causally") == ["1", "2.600", "2.600", "2.600"]
    assert row(final, "n-gram table: unigram") == ["", "", "7.500", "7.500", "7.500"]
    paper = section(compared, "Comparison with the paper")
    ours, reached, theirs = row(paper, "mot", "text")
    assert float(ours.split()[0]) == pytest.approx(0.5, abs=0.02)
    assert (reached, theirs) == ("100%", "37M 0.546, 7B (3) 0.558")
    assert float(row(paper, "pair †", "text")[1][:-1]) == pytest.approx(50, abs=6)
    of_dense = row(arms, "dense")[1]
    assert f"Here dense has {of_dense} parameters and is trained on 500 tokens per step" in paper
    memorization = section(compared, "Memorization")
    *_, step, risen = row(memorization, "dense", "speech")
    assert (int(step.replace(",", "")), float(risen)) == (
        pytest.approx(750, abs=151),
        pytest.approx(0.5, abs=0.2),
    )
    assert float(row(memorization, "mot", "text")[-1]) < 0.02


def test_single_runs_against_each_other(compared: Path) -> None:
    table = section(compared, "Seed by seed")
    rows = [line.split("|")[1:3] for line in table.splitlines() if ", seed " in line]
    assert [tuple(cell.strip() for cell in cells) for cells in rows] == [
        ("dense, seed 2", "dense, seed 1"),
        ("pair, seed 1", "dense, seed 1"),
        ("mot, seed 1", "dense, seed 1"),
        ("mot, seed 2", "dense, seed 2"),
    ]
    for seed in (1, 2):
        text, image, _ = row(table, f"mot, seed {seed}", f"dense, seed {seed}")
        assert float(text) == pytest.approx(0.5, abs=0.03)
        assert float(image) == pytest.approx(1, abs=0.05)
    assert float(row(table, "dense, seed 2", "dense, seed 1")[0]) == pytest.approx(1, abs=0.05)
    # The causal loss is two bits higher and reaches nothing; the slope of 2 is of the other loss.
    assert row(table, "pair, seed 1", "dense, seed 1")[0] == "-"


def test_setting_commands_and_plots(compared: Path) -> None:
    text = (compared / "report.md").read_text()
    assert "- Machine: abacus, 2 cores, torch 2, Python 3; at most 2 runs side by side" in text
    assert "1,500 steps of 8 x 64 = 512 token slots" in text
    assert "Corpus synthetic (tests 1): train 20 tokens (text 10, image 5, speech 5)" in text
    assert "- Hidden size 32, 2 layers, 4 heads, feed-forward width 48, post-norm." in text
    # 2 * 32 * 256 = 16,384; of a layer 2 * (32 * 8 * (4 + 4) + 32 * 32 + 3 * 32 * 48) = 15,360.
    assert "the head takes 35% of its matrix FLOPs" in text
    assert "AdamW, learning rate 0.01 to " in text
    assert "- Held-out losses use the whole validation split" in text
    assert "- Caution: " not in text
    assert "2026-01-02T03:04:05+00:00" in text
    assert "mot compare x" in section(compared, "Commands")
    plots = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(plots) == 2 * 3
    for plot in plots:
        assert Image.open(compared / plot).size[0] > 800


def test_a_report_needs_only_curves_and_records(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawing takes seconds.
    monkeypatch.setattr("mot_megatron.compare.match_files.write_figures", lambda *_: [])
    for folder in ("curves", "records"):
        (tmp_path / folder).mkdir()
        for file in (compared / folder).iterdir():
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    experiment = load_experiment(compared.parent / "configs")
    write_report(experiment, tmp_path)
    assert (tmp_path / "report.md").read_text() == (compared / "report.md").read_text()
    (tmp_path / "curves" / "mot-s1.csv").unlink()
    with pytest.raises(DataError, match=r"mot-s1\.csv"):
        write_report(experiment, tmp_path)


def test_an_arm_without_a_causally_routed_loss_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mot_megatron.compare.report.draw_all", lambda *_: {})
    output = tmp_path / "out"
    for run in plan(tmp_path, seeds=[1]):
        save_ended_run(run, output, {"text": losses(SLOPES[run.arm][0])})
    write_report(load_experiment(tmp_path / "configs"), output)
    text = section(output, "Results")
    assert "routing does not see later tokens, except in pair." in text
    assert "No causally routed loss is known for pair: " in text
    assert "routed causally" not in section(output, "Step matching")


MATCH = Match(
    arm="mot",
    modality="text",
    split="held_out",
    axis="steps",
    slope=0.8,
    end_point_ratio=0.75,
    interval=(0.7, 0.9),
    range_reached=1.0,
    points=10,
    dropped=1,
    unreached=0,
    seeds=3,
    baseline_seeds=3,
    paired=False,
    baseline_lowest=1.0,
    t=np.ones(1),
    tau=np.ones(1),
    baseline_end=1.0,
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            "text: reaches dense's best loss in 75% of the steps that dense needs. Over the whole"
            " range, the slope is 0.80 (95% interval 0.70 to 0.90): fewer steps than dense.",
        ),
        (
            {"interval": (0.7, 1.0)},
            "text: reaches dense's best loss in 75% of the steps that dense needs. Over the whole"
            " range, the slope is 0.80 (95% interval 0.70 to 1.00): no significant difference,"
            " because the interval includes 1.",
        ),
        (
            {"interval": (0.95, 0.99)},
            "text: reaches dense's best loss in 75% of the steps that dense needs. Over the whole"
            " range, the slope is 0.80 (95% interval 0.95 to 0.99): no significant difference,"
            " because the interval comes within 0.02 of 1.",
        ),
        (
            {"interval": (0.95, 1.05), "unreached": 4, "range_reached": 0.62},
            "text: never reaches dense's best loss, only the loss that dense has after 62% of its"
            " steps. Up to there, the slope is 0.80 (95% interval 0.95 to 1.05): no significant"
            " difference, because the interval includes 1.",
        ),
        (
            {"unreached": 4, "range_reached": 0.5, "baseline_lowest": 0.6},
            "text: never reaches dense's best loss, only the loss that dense has after 30% of its"
            " steps. Up to there, the slope is 0.80 (95% interval 0.70 to 0.90): fewer steps than"
            " dense. dense's loss is lowest after 60% of its steps and then rises; later steps are"
            " not matched.",
        ),
        (
            {"interval": (1.1, 1.3), "slope": 1.2, "unreached": 4, "range_reached": 0.62},
            "text: never reaches dense's best loss, only the loss that dense has after 62% of its"
            " steps. Up to there, the slope is 1.20 (95% interval 1.10 to 1.30): more steps than"
            " dense.",
        ),
        (
            {"points": 4, "unreached": 9, "range_reached": 0.3},
            "text: never reaches dense's best loss, only the loss that dense has after 30% of its"
            " steps. Up to there, the slope is 0.80 (from only 4 points of the curve, too few for a"
            " conclusion).",
        ),
        (
            {"interval": None, "seeds": 1},
            "text: reaches dense's best loss in 75% of the steps that dense needs. Over the whole"
            " range, the slope is 0.80 (one seed: the difference from 1 may be due to chance).",
        ),
        (
            {"interval": None, "unreached": 9, "range_reached": 0.1},
            "text: never reaches dense's best loss, only the loss that dense has after 10% of its"
            " steps. Up to there, the slope is 0.80 (no interval: some bootstrap draws of the seeds"
            " have no slope).",
        ),
        (
            {"slope": None, "end_point_ratio": None, "interval": None, "unreached": 10},
            "text: no slope, because it reaches none of the losses that dense has after its first"
            " steps.",
        ),
        (
            {"slope": None, "end_point_ratio": None, "interval": None},
            "text: no slope, because its first logged loss is below all of the losses that dense"
            " has after its first steps.",
        ),
    ],
)
def test_sentences(changes: dict[str, object], expected: str) -> None:
    assert sentence(dataclasses.replace(MATCH, **changes), "dense") == expected  # type: ignore[arg-type]


def test_a_tally_counts_verdicts() -> None:
    intervals = [(0.7, 0.9), (0.7, 1.1), (1.1, 1.2), None, (0.5, 0.6), (1.01, 1.05)]
    matches = [dataclasses.replace(MATCH, interval=interval) for interval in intervals]
    matches += [
        dataclasses.replace(match, unreached=3, range_reached=reached)
        for match in matches[:4]
        for reached in (0.9, 0.96)
    ]
    matches.append(dataclasses.replace(MATCH, slope=None, interval=None, unreached=10))
    matches.append(dataclasses.replace(MATCH, points=4))
    assert [verdict(match) for match in matches] == [
        "fewer",
        "same",
        "more",
        "untold",
        "fewer",
        "same",
        *("fewer at first", "fewer"),
        *("same at first", "same"),
        *("more", "more"),
        *("untold", "untold"),
        "none",
        "untold",
    ]
    assert tally(matches) == (
        "fewer steps than the baseline: 3;"
        " fewer steps at first, but the baseline's best loss is never reached: 1;"
        " more steps than the baseline: 3; no significant difference: 3;"
        " no significant difference at first, but the baseline's best loss is never reached: 1;"
        " none of the baseline's losses reached: 1;"
        " inconclusive (no interval or too few points): 4"
    )


def test_an_arm_with_a_causal_router_is_judged_by_its_causal_loss() -> None:
    blind = dataclasses.replace(MATCH, arm="moe")
    causal = dataclasses.replace(MATCH, arm="moe", split="held_out_causal")
    seconds, train = (
        dataclasses.replace(MATCH, **change) for change in ({"axis": "seconds"}, {"split": "train"})
    )
    assert honest_matches([MATCH, blind, causal, seconds, train]) == [MATCH, causal]
