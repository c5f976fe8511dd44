"""Start a new run from a model in a Hugging Face format.

Example: mot checkpoint from-hf Qwen3-8B --config run.toml --set run.name=from-qwen

Known formats: Llama, Qwen2 and Qwen3 of the transformers library, BAGEL as its authors publish it
(towers und and gen), and exports of ``mot checkpoint to-hf``; weights as safetensors only. The
source determines the keys of the [model] section that describe its shapes: the configuration may
leave them out, and must not contradict them. model.modalities say which towers the run has.

Every tower copies a tower of the source: the only one, the one with the same name, or the one given
by ``--map NEW=OLD``. As with ``mot upcycle``, a tower with experts may copy one without. The
embedding and the output head get a row for every token of the corpus: that of the same token if
both sides have a tokenizer, otherwise that of the same id; the elements of new rows are drawn from
the normal distribution with the mean and standard deviation of their column.

The command writes the folder of the run, with a checkpoint of step 0 from which training continues
and with the complete configuration, config.toml. Every tensor of the source is used, or named as
left out and counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mot_megatron.cli.arguments import add_config, add_verify_and_dry_run, user_path
from mot_megatron.cli.command import choose_device, run_command, say
from mot_megatron.cli.upcycle import parse_towers

if TYPE_CHECKING:
    from mot_megatron.config import Config
    from mot_megatron.conversion.huggingface.foreign import ForeignModel

NAME = "checkpoint from-hf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line; ``--config`` and ``--set`` configure the new run."""
    parser.add_argument(
        "source", type=user_path, metavar="SRC", help="folder with config.json and safetensors"
    )
    add_config(parser)
    parser.add_argument(
        "--map",
        dest="towers",
        nargs="+",
        action="extend",
        default=[],
        metavar="NEW=OLD",
        help="tower of the new run, and the tower of the source that it copies",
    )
    add_verify_and_dry_run(parser)


def run(options: argparse.Namespace) -> int:
    """Write the run, and report its towers, its vocabulary and what was left out."""
    say(NAME, f"reading {options.source}")
    choose_device()

    from mot_megatron.config_files import load_config
    from mot_megatron.conversion.huggingface.foreign import open_foreign

    source = open_foreign(options.source)
    defaults = (str(options.source), {"model": dict(source.keys)})
    config = load_config(options.config, options.overrides, defaults)
    wanted = parse_towers(options.towers)
    import_model(source, config, wanted, dry_run=options.dry_run, verify=options.verify)
    return 0


def import_model(
    source: ForeignModel, config: Config, wanted: Mapping[str, str], *, dry_run: bool, verify: bool
) -> None:
    """Write the run of a model from another program, and report what it consists of.

    Args:
        source: The model.
        config: The run's configuration, as it was loaded.
        wanted: Source tower of new towers.
        dry_run: Write nothing.
        verify: Compare what was written with the source.
    """
    from mot_megatron.conversion.huggingface.imports import plan_import, write_import
    from mot_megatron.data.corpus import Corpus
    from mot_megatron.train.session import resolve_config

    corpus = Corpus.open(config.data.corpus)
    config = resolve_config(config, corpus)
    plan = plan_import(source, config, corpus, wanted)
    print(f"from {source.directory}: {source.kind}, {len(source.tensors.infos)} tensors")
    for name, old in plan.towers.items():
        print(f"tower {name}: a copy of tower {old}")
    print(
        f"vocabulary: {len(plan.rows.source)} rows, {plan.rows.num_new} of them new; matched"
        f" {plan.rows.rule}"
    )
    if plan.drawn:
        print(f"initialized: {len(plan.drawn)} tensors of routers")
    for what, count in plan.left_out.items():
        print(f"left out: {count} {'entries' if what in source.unread else 'tensors'}, {what}")
    size = sum(output.info.num_bytes for output in plan.outputs)
    print(f"{len(plan.outputs)} tensors with zero moments, {size / 1e9:.3f} GB")
    if dry_run:
        print("nothing was written (--dry-run)")
        return
    checkpoint = write_import(source, plan, config, corpus, verify)
    compared = ", compared with the source" if verify else ""
    print(f"{checkpoint.path}: {checkpoint.num_tensors} tensors, step 0{compared}")
    print(f"train it with --config {config.run_directory / 'config.toml'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mot checkpoint from-hf``; return the exit status."""
    return run_command(NAME, __doc__, add_arguments, run, arguments)
