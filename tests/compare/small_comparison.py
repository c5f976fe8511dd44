"""The configurations of a small comparison, and folders that its runs would have left."""

from __future__ import annotations

import json
from pathlib import Path

from mot_megatron.compare.experiment import Circumstances, PlannedRun, plan_runs, record_run
from tests.compare.synthetic_runs import CORPUS, LAST_STEP, Loss, points_of, write_run
from tests.small_runs import CONFIG

MACHINE = {"cpu": "abacus", "cores": 2, "gpu": None, "torch": "2", "python": "3"}
MODALITIES = ("text", "image", "speech")
ARMS = {
    "dense": "".join(f"{name} = {{ tower = 'all' }}\n" for name in MODALITIES),
    "mot": "",
    "pair": "image = { tower = 'text' }\n[model.towers.text.experts]\nnum_moe_experts = 4\n"
    "causal_router = true\n",
}
EXPERIMENT = """
baseline = "dense"
[arms.pair]
files = ["pair.toml"]
seeds = [1]
[arms.dense]
files = ["dense.toml"]
seeds = [1, 2]
[arms.mot]
files = ["mot.toml"]
seeds = [1, 2]
[arms.mot.paper]
text = { "37M" = 0.546, "7B (3)" = 0.558 }
[arms.pair.paper]
text = { "443M (3)" = 0.875 }
"""


def write_configs(folder: Path, corpus: Path, steps: int = LAST_STEP) -> Path:
    """Write base.toml, arms and experiment.toml to a folder, and return it."""
    folder.mkdir(parents=True)
    base = CONFIG.format(corpus=corpus).replace("train_steps = 20", f"train_steps = {steps}")
    (folder / "base.toml").write_text(base)
    for name, modalities in ARMS.items():
        (folder / f"{name}.toml").write_text(f"[model.modalities]\n{modalities}")
    (folder / "experiment.toml").write_text(EXPERIMENT)
    return folder


def write_description(corpus: Path) -> Path:
    """Write a corpus.toml, the only file of a corpus that planning reads; return its folder."""
    corpus.mkdir()
    (corpus / "corpus.toml").write_text(CORPUS.format(text_size=100, image_size=60, digest="0"))
    return corpus


def save_ended_run(
    run: PlannedRun, output: Path, losses: dict[str, Loss], causal: bool = False
) -> None:
    """Write the folder that a run would have left, and record the run.

    Args:
        run: A run of the experiment that ``write_configs`` writes.
        output: Output folder of the comparison.
        losses: Modality -> loss.
        causal: Whether to add a causally routed held-out loss, two bits above the other.
    """
    points = {
        f"loss_{split}/{name}": points_of(loss, number, averaged=split == "train")
        for name, loss in losses.items()
        for split, number in (("train", 150), ("held_out", 30))
    }
    if causal:
        points |= {
            tag.replace("held_out", "held_out_causal"): {s: b + 2 for s, b in values.items()}
            for tag, values in points.items()
            if "held_out" in tag
        }
    directory = run.config.run_directory
    write_run(directory.parent, run.name, points, f"run.seed={run.seed}")
    (directory / "config.toml").write_text(run.config.to_toml())
    write_summary(run, causal)
    circumstances = Circumstances("mot compare x", 2, MACHINE)
    record_run(
        run, output, circumstances, ended="2026-01-02T03:04:05+00:00", command="python train"
    )


def write_summary(run: PlannedRun, causal: bool) -> None:
    """Write the summary of a run that has ended."""
    bits = 2.0 + 0.1 * run.seed
    modalities = {
        name: {
            "held_out_bits_per_token": bits,
            **({"held_out_bits_per_token_causal": bits + 0.5} if causal else {}),
            "unigram_entropy": 7.5,
            "two_token_context_entropy": None,
        }
        for name in MODALITIES
    }
    steps = run.config.training.train_steps
    summary = {"steps": steps, "tokens": 500 * steps, "seconds": 750, "modalities": modalities}
    (run.config.run_directory / "summary.json").write_text(json.dumps(summary))


def plan(tmp_path: Path, **choice: object) -> list[PlannedRun]:
    """Plan the runs of a small comparison with the output folder tmp_path / "out"."""
    configs = tmp_path / "configs"
    if not configs.exists():
        write_configs(configs, write_description(tmp_path / "corpus"))
    return plan_runs(configs, tmp_path / "out", **choice)  # type: ignore[arg-type]
