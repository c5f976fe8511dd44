"""Tests of step matching from folders of runs to tables, slopes.json and plots."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mot_megatron.cli.match import main
from mot_megatron.compare.curves import read_run, write_csv
from tests.cli.console import only_error
from tests.columns import widest
from tests.compare.synthetic_runs import losses, points_of, write_description, write_run

ARMS = {"dense": 1.0, "mot": 0.5, "moe": 0.8}
LAYERS = {"dense": 2, "mot": 3, "moe": 4}


def write_arm(runs: Path, arm: str, seeds: int) -> list[str]:
    folders = []
    for seed in range(1, seeds + 1):
        noise = 100 * LAYERS[arm] + seed
        points = {
            f"loss_{split}/{modality}": points_of(losses(ARMS[arm], 0.003, noise), number)
            for split, number in (("train", 150), ("held_out", 30))
            for modality in ("text", "image")
        }
        overrides = [f"run.seed={seed}", f"model.num_layers={LAYERS[arm]}"]
        if arm == "moe":
            causal = points_of(losses(1.6, 0.003, noise), 30)
            points |= {f"loss_held_out_causal/{name}": causal for name in ("text", "image")}
            overrides.append("model.towers.text.experts={num_moe_experts=4,causal_router=true}")
        folders.append(str(write_run(runs, f"{arm}-seed{seed}", points, *overrides)))
    return folders


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("runs")
    return {arm: write_arm(folder, arm, 1 if arm == "moe" else 2) for arm in ARMS}


def test_everything_is_written(
    runs: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "matched"
    # After the first run, seeds may be in any order.
    order = [runs["dense"][0], *runs["mot"], *runs["moe"], runs["dense"][1]]
    assert main([*order, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert widest(printed.splitlines()) <= 120
    of_mot = [line.split() for line in printed.splitlines() if line.startswith("mot  ")]
    assert [line[1:3] for line in of_mot[:4]] == [
        ["text", "steps"], ["text", "FLOPs"], ["text", "seconds"], ["image", "steps"],
    ]  # fmt: skip
    for line in of_mot[:3]:
        low, high = float(line[4]), float(line[6])
        assert low <= float(line[3]) <= high
        assert float(line[3]) == pytest.approx(0.5, abs=0.02)
        assert float(line[7]) == pytest.approx(0.5, abs=0.02)
    assert "training loss: steps of dense (2 seeds) matched, and its FLOPs" in printed
    assert "warnings:" not in printed
    flattered = {part.split(": steps")[0]: "moe: its routing" in part for part in parts(printed)}
    assert flattered == {
        "training loss": True,
        "held-out loss, routed as in training": True,
        "held-out loss, routed causally": False,
    }
    assert "mot: its routing" not in printed

    slopes = json.loads((output / "slopes.json").read_text())
    keys = {(row["arm"], row["split"], row["modality"], row["axis"]) for row in slopes}
    # Two modalities and three axes: two arms on two splits, and one arm on the causal split.
    assert len(keys) == len(slopes) == 2 * 3 * (2 * 2 + 1)
    for row in slopes:
        slope = 1.6 if row["split"] == "held_out_causal" else ARMS[row["arm"]]
        # There are few held-out points, and a slope of 1.6 covers little of the range.
        assert row["slope"] == pytest.approx(slope, rel=0.05)
        assert (row["interval"] is None) == (row["arm"] == "moe")
        assert (row["seeds"], row["baseline_seeds"]) == (1 if row["arm"] == "moe" else 2, 2)
        assert row["points"] + row["dropped"] == (150 if row["split"] == "train" else 30)

    splits = ("train", "held_out", "held_out_causal")
    names = {f"{kind}_{split}" for kind in ("matched_steps", "losses") for split in splits}
    assert {path.stem for path in output.glob("*.png")} == names
    events = EventAccumulator(str(output / "tensorboard"), {"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {f"step_matching/{name}" for name in names}
    for path in output.glob("*.png"):
        assert path.name in printed
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[0] > 600
        # Every plot with the first candidate contains its blue.
        blue = (pixels == (0x00, 0x72, 0xB2)).all(axis=-1).sum()
        assert (blue > 100) == (path.stem != "matched_steps_held_out_causal")


def parts(printed: str) -> list[str]:
    """Return the tables."""
    return [part for part in printed.split("\n\n") if not part.startswith("wrote")]


def test_csv_files_give_the_same_output(
    runs: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [runs["dense"][0], runs["mot"][0]]
    kept = [tmp_path / f"{number}.csv" for number in range(2)]
    for folder, path in zip(folders, kept, strict=True):
        write_csv(read_run(Path(folder)), path)
    assert main(folders) == 0
    of_folders = capsys.readouterr().out
    assert main([str(path) for path in kept]) == 0
    assert capsys.readouterr().out == of_folders


def test_json_output_equals_slopes_json(
    runs: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mot_megatron.compare.match_files.draw_all", lambda *_: {})
    assert main([runs["dense"][0], runs["mot"][0], "--json", "--output", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["matches"] == json.loads((tmp_path / "slopes.json").read_text())
    assert document["warnings"] == []
    assert str(tmp_path / "slopes.json") in document["written"]


def test_plots_along_another_axis(runs: dict[str, list[str]], tmp_path: Path) -> None:
    arguments = [runs["dense"][0], runs["mot"][0], "--axis", "seconds", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert (tmp_path / "matched_seconds_held_out.png").is_file()


def test_candidate_that_reaches_no_baseline_loss(
    runs: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = {
        f"loss_{split}/{modality}": dict.fromkeys(range(100, 1600, 100), 20.0)
        for split in ("train", "held_out")
        for modality in ("text", "image")
    }
    worse = write_run(tmp_path, "worse", points, "model.num_layers=5")
    assert main([runs["dense"][0], str(worse), "--output", str(tmp_path / "matched")]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("worse"))
    assert line.split()[2:] == ["steps", "-", "-", "-", "0.0%", "0", "150", "150", "1"]
    slopes = json.loads((tmp_path / "matched" / "slopes.json").read_text())
    assert {row["slope"] for row in slopes} == {None}


def test_a_baseline_that_overfits_is_reported(
    runs: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = {f"loss_train/{name}": points_of(losses(1), 30) for name in ("text", "image")}
    rising = {step: 5 + abs(step - 500) / 100 for step in range(100, 1600, 100)}
    points |= {"loss_held_out/text": rising, "loss_held_out/image": points["loss_train/image"]}
    overfitted = write_run(tmp_path, "wide", points, "model.num_layers=5")
    assert main([str(overfitted), runs["mot"][0]]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Step 500 of 1500.
    said = "text: wide's loss is lowest after 33% of its steps and then rises; later steps are not"
    assert [line.startswith(said) for line in lines].count(True) == 1
    assert not any(line.startswith("image: ") for line in lines)
    assert widest(lines) <= 120


def test_an_unfinished_run_is_reported(
    runs: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = {
        f"loss_{split}/{modality}": points_of(losses(0.5), 30)
        for split in ("train", "held_out")
        for modality in ("text", "image")
    }
    running = write_run(
        tmp_path, "young", points, "model.num_layers=3", "training.train_steps=9000"
    )
    assert main([runs["dense"][0], str(running)]) == 0
    lines = capsys.readouterr().out.splitlines()
    warnings = lines[lines.index("warnings:") + 1 :]
    assert warnings[0].startswith(f"{running}: stops at step 1,500 of 9,000; ")
    assert len(warnings) == 3
    assert warnings[1].startswith("training losses are means over 10 or 50 steps")
    assert warnings[2].startswith(f"{running}: training.train_steps = 9,000, but ")


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    return only_error(capsys.readouterr().err)


def test_bad_input_is_one_line(
    runs: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = runs["dense"][0]
    assert str(tmp_path / "none") in error_of([dense, str(tmp_path / "none")], capsys)
    assert "expected another arm" in error_of(runs["dense"], capsys)
    (other,) = write_arm(tmp_path, "mot", 1)
    write_description(Path(other), digest="other")
    assert "trained on corpus synthetic" in error_of([dense, other], capsys)
    (tmp_path / "file").write_text("")
    error = error_of([dense, runs["mot"][0], "--output", str(tmp_path / "file")], capsys)
    assert str(tmp_path / "file") in error
