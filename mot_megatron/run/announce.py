"""What a run prints when it starts: the model, the layout, the corpus, and what has changed."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping

from mot_megatron.checkpoint.find import CheckpointInfo
from mot_megatron.config import Config
from mot_megatron.config_files import differing_keys
from mot_megatron.config_model import LossUnit, common_unit
from mot_megatron.data.blend import sources_of
from mot_megatron.data.budget import describe_budgets
from mot_megatron.data.corpus import HELD_OUT_SPLIT, TRAIN_SPLIT
from mot_megatron.data.loader import describe_long_documents
from mot_megatron.model.flops import count_parameters
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.run.console import Console
from mot_megatron.train.session import Session, build_schedule
from mot_megatron.train.trained import SavedRun


def announce(
    session: Session, console: Console, resumed: CheckpointInfo | None, origin: SavedRun | None
) -> None:
    """Print the model, the layout, the corpus, and where the weights come from.

    Args:
        session: The run.
        console: Prints it.
        resumed: The checkpoint that the run continues from.
        origin: The model whose weights a new run begins with.
    """
    config, groups = session.config, session.groups
    count = count_parameters(config.model)
    towers = ", ".join(
        f"{name} {tower / 1e6:.2f} M"
        for name, tower in zip(config.model.tower_names, count.towers, strict=True)
    )
    names = zip(config.model.tower_names, config.model.frozen_towers, strict=True)
    held = ", ".join(name for name, is_frozen in names if is_frozen)
    frozen = f", of which {held} frozen: {count.frozen / 1e6:.2f} M" if held else ""
    console.say(
        f"{config.run.name}: {count.total / 1e6:.2f} M parameters"
        f" (shared {count.shared / 1e6:.2f} M, {towers}){frozen}"
    )
    console.say(
        f"{groups.mesh.world_size} x {groups.device.type}: {_describe_axes(config, groups)},"
        f" ZeRO-{config.parallel.zero_stage};"
        f" {config.accumulation_steps(groups.data_size)} micro-batches of"
        f" {config.training.micro_batch_size} x {config.data.seq_length} tokens per step and"
        f" {'rank' if config.parallel.attention_exchange == 'sequence' else 'modality group'}"
    )
    console.say(
        f"corpus {session.corpus.description.name}: {100 * session.loader.fill:.1f}% of the token"
        f" slots filled; losses are in {_units(config.model.loss_units)}"
    )
    if session.is_first_rank:  # the others print nothing
        for split in (TRAIN_SPLIT, HELD_OUT_SPLIT):
            for line in describe_long_documents(session.corpus, split, config.data.seq_length):
                console.say(line)
    blend = sources_of(session.corpus)
    if len(blend) > 1:
        shares = ", ".join(f"{each.name} {float(each.share):.1%}" for each in blend)
        console.say(f"shares of the tokens: {shares}")
    if session.loader.budgets is not None:
        towers, fill = config.model.tower_names, session.loader.fill
        console.say(describe_budgets(session.loader.budgets, towers, fill))
    if resumed:
        console.say(f"continuing from {resumed.path}")
    for line in session.loader.changes:
        console.say(f"  {line}")
    if origin:
        console.say(
            f"beginning with the weights of {origin.config.run.name}: {origin.checkpoint.path}"
        )


def changed_model(saved: Config, config: Config) -> str:
    """Return a suffix for the error of a failed restore: the changed keys of the model, if any."""
    changes = differing_keys(saved.model_dump(mode="json"), config.model_dump(mode="json"))
    model = [
        f"{key} was {_or_absent(old)} and is {_or_absent(new)}"
        for key, (old, new) in changes.items()
        if key.startswith("model.")
    ]
    return f" ({'; '.join(model)})" if model else ""


def announce_changes(config: Config, saved: Config, done: int, console: Console) -> None:
    """Print how the configuration differs from that of the checkpoint.

    Args:
        config: Configuration of this job.
        saved: That of the checkpoint.
        done: Steps done.
        console: Prints it.
    """
    before, now = tomllib.loads(saved.to_toml()), tomllib.loads(config.to_toml())
    for key, (old, new) in differing_keys(before, now).items():
        console.say(f"  with {key} = {_or_absent(new)}, which was {_or_absent(old)}")
    last = config.training.train_steps
    if done >= last:
        console.say(
            f"nothing is left to train: {done} steps are done, and training.train_steps = {last};"
            " evaluating again"
        )
        return
    rates = [build_schedule(one).at(done) for one in (saved, config)]
    if not math.isclose(*rates, rel_tol=1e-3):
        console.say(
            f"  the learning rate of step {done + 1} is {rates[1]:.2e}; with the configuration of"
            f" the checkpoint it would be {rates[0]:.2e}"
        )


def _or_absent(value: object) -> str:
    return "absent" if value is None else f"{value!r}"


def _describe_axes(config: Config, groups: ProcessGroups) -> str:
    """Describe the parallel axes of size 2 or more, fastest first."""
    pieces = config.parallel.virtual_pipeline_model_parallel_size
    axes = {
        "tensor parallel": groups.tensor_size,
        "modality parallel": groups.modality_size,
        "data parallel": groups.data_size // groups.modality_size,
        "pipeline stages": groups.pipeline_size,
    }
    named = [f"{name} {size}" for name, size in axes.items() if size > 1]
    if pieces is not None:
        named[-1] += f" of {pieces} pieces"
    return ", ".join(named) or "no parallelism"


def _units(loss_units: Mapping[str, LossUnit]) -> str:
    """Return the unit of all losses, or that of each modality."""
    common = common_unit(loss_units.values())
    if common:
        return common.name
    return ", ".join(f"{unit.name} ({name})" for name, unit in loss_units.items())
