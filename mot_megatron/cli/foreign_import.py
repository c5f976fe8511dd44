"""What ``mot checkpoint from-hf``, ``from-deepspeed`` and ``from-megatron`` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from mot_megatron.cli.arguments import add_config, add_verify_and_dry_run
from mot_megatron.cli.upcycle import add_map, parse_towers

if TYPE_CHECKING:
    from mot_megatron.config_model import ModelConfig
    from mot_megatron.conversion.huggingface.foreign import ForeignModel


def add_new_run(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, ``--set``, ``--map``, ``--verify`` and ``--dry-run``."""
    add_config(parser)
    add_map(parser)
    add_verify_and_dry_run(parser)


def import_model(
    source: ForeignModel,
    format_name: str,
    options: argparse.Namespace,
    check: Callable[[ForeignModel, ModelConfig], None] | None = None,
) -> None:
    """Write the run, and report its towers, its vocabulary and what was left out.

    Args:
        source: The model.
        format_name: What the source is, for people.
        options: See ``add_new_run``.
        check: Raises an error if the configuration lacks what the source does not tell.
    """
    from mot_megatron.config_files import load_config
    from mot_megatron.conversion.huggingface.imports import plan_import, write_import
    from mot_megatron.data.blend import open_training_data
    from mot_megatron.train.session import resolve_config

    defaults = (str(source.directory), {"model": dict(source.keys)})
    config = load_config(options.config, options.overrides, defaults)
    if check:
        check(source, config.model)
    corpus = open_training_data(config.data)
    config = resolve_config(config, corpus)
    plan = plan_import(source, config, corpus, parse_towers(options.towers))
    infos = source.tensors.infos
    print(f"from {source.directory}: {format_name}, {len(infos)} tensors")
    for name, old in plan.towers.items():
        print(f"tower {name}: a copy of tower {old}")
    print(
        f"vocabulary: {len(plan.rows.source)} rows, {plan.rows.num_new} of them new; matched"
        f" {plan.rows.rule}"
    )
    if plan.rows.num_left_out:
        print(f"left out: {plan.rows.num_left_out} rows of the source's vocabulary")
    if plan.drawn:
        print(f"initialized: {len(plan.drawn)} tensors of routers")
    for what, count in plan.left_out.items():
        print(f"left out: {count} {'entries' if what in source.unread else 'tensors'}, {what}")
    size = sum(output.info.num_bytes for output in plan.outputs)
    print(f"{len(plan.outputs)} tensors with zero moments, {size / 1e9:.3f} GB")
    if options.dry_run:
        print("nothing was written (--dry-run)")
        return
    checkpoint = write_import(source, plan, config, corpus, options.verify)
    compared = ", compared with the source" if options.verify else ""
    print(f"{checkpoint.path}: {checkpoint.num_tensors} tensors, step 0{compared}")
    print(f"train it with --config {config.run_directory / 'config.toml'}")
