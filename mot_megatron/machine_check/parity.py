"""Losses of training steps against recorded ones.

The reference was computed in fp32 on one CPU process, in the plainest layout. Layouts, ZeRO stages
and recomputation change no number but for rounding, so all of them must have the same losses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mot_megatron.config import Config
from mot_megatron.config_files import parse_config
from mot_megatron.machine_check.checks import Context
from mot_megatron.machine_check.corpus import digest_of, make_corpus
from mot_megatron.machine_check.jobs import JobError, timed_job
from mot_megatron.machine_check.outcome import Outcome

_FOLDER = Path(__file__).parent
REFERENCE_FILE = _FOLDER / "reference.json"
MODELS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "budget": ('data.packing="budget"',),
    "expert choice": (
        "model.towers.image.experts.num_moe_experts=4",
        'model.towers.image.experts.routing="expert_choice"',
    ),
    "top-2": (
        "model.towers.image.experts.num_moe_experts=4",
        'model.towers.image.experts.routing="topk"',
        "model.towers.image.experts.topk=2",
        "model.towers.image.experts.aux_loss_coefficient=0.01",
    ),
}
"""Overrides by the name of what changes the numbers of training; each has a reference."""
TOLERANCES = {"fp32": 1e-3, "bf16": 0.05}
"""Largest difference from the reference, in bits per token.

Measured on a CPU: 1e-7 in fp32 with two tensor-parallel ranks; in bf16 5e-3, and 8e-3 with experts,
whose choice of tokens rounding may change. GPUs sum in other orders.
"""


def parity(
    context: Context,
    *,
    model: str = "plain",
    overrides: Sequence[str] = (),
    steps: int,
    world_size: int = 1,
) -> Outcome:
    """Train some steps and compare the loss of each with the reference.

    Args:
        context: The machine.
        model: Name in ``MODELS``.
        overrides: Further overrides of the configuration, which do not change the numbers.
        steps: Number of steps.
        world_size: Number of ranks.
    """
    corpus = make_corpus(context.directory / "corpus")
    reference = json.loads(REFERENCE_FILE.read_text())
    if digest_of(corpus) != reference["corpus"]:
        return Outcome(
            "FAIL",
            "the corpus that is made on the spot has other bytes than the one of the reference",
            "numpy draws other numbers in this version: record the reference anew with the version"
            " of requirements.txt, or install that one",
        )
    config = small_config(corpus.directory, model, [*overrides, f"training.train_steps={steps}"])
    name = "-".join(["parity", model, str(steps), *(word.rpartition(".")[2] for word in overrides)])
    try:
        record = timed_job(context, _file_name(name, world_size), config, world_size)
    except JobError as error:
        return Outcome("FAIL", str(error), "read the job's log in logs/")
    return judge(record["total_bits"], reference["bits"][model], config)


def steps_of(model: str) -> int:
    """Return the number of steps of a model's reference."""
    return 20 if model == "plain" else 5


def small_config(corpus: Path, model: str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of the small model."""
    text = (_FOLDER / "model.toml").read_text(encoding="utf-8")
    all_overrides = [f'data.corpus="{corpus}"', *MODELS[model], *overrides]
    return parse_config(text, "model.toml", all_overrides)


def judge(bits: Sequence[float], wanted: Sequence[float], config: Config) -> Outcome:
    """Compare losses with those of the reference."""
    precision = config.training.precision
    tolerance = TOLERANCES[precision]
    differences = [abs(a - b) for a, b in zip(bits, wanted, strict=False)]
    numbers: dict[str, Any] = {"bits": list(bits), "differences": differences}
    bad = [step for step, d in enumerate(differences, 1) if not d <= tolerance]
    largest = max(differences, key=lambda d: (d != d, d))
    seen = (
        f"{len(bits)} steps in {precision}, {bits[0]:.4f} to {bits[-1]:.4f} bits, largest"
        f" difference {largest:.1e} (allowed {tolerance:g})"
    )
    if not bad:
        return Outcome("PASS", seen, "", numbers)
    advice = (
        "the first loss is wrong: look at forward, first the attention and the initial weights"
        if bad[0] == 1
        else f"wrong from step {bad[0]} on: look at backward, the reduction of gradients and the"
        " optimizer"
    )
    return Outcome("FAIL", f"{seen}; wrong from step {bad[0]}", advice, numbers)


def record_reference(context: Context) -> dict[str, Any]:
    """Compute the reference on the CPU of this machine; return what its file contains."""
    corpus = make_corpus(context.directory / "corpus")
    bits = {}
    for model in MODELS:
        overrides = [f"training.train_steps={steps_of(model)}", "parallel.zero_stage=0"]
        config = small_config(corpus.directory, model, overrides)
        bits[model] = timed_job(context, _file_name(f"reference-{model}", 1), config, 1)[
            "total_bits"
        ]
    return {"torch": torch.__version__, "corpus": digest_of(corpus), "bits": bits}


def _file_name(name: str, world_size: int) -> str:
    return "".join(c if c.isalnum() else "-" for c in f"{name}-{world_size}")
