"""List the layouts of a configuration that fit on a number of GPUs, and what they need.

Example: plan_layout.py --config configs/paper/7b-mot-2.toml --gpus 64 --memory-gb 80

Legal is what training accepts. Of that are listed: tensor and modality parallelism together inside
a node, sequence parallelism wherever there is tensor parallelism, one, two or four pieces per
pipeline stage, every ZeRO stage, and where towers have experts every expert-parallel size. Batch
sizes, precision and offloading are the configuration's; samples during training
(logging.sample_interval_steps), which need a layout without pipeline and modality parallelism, are
left out of account.

The order is that of least communication first: fewer tensor-parallel ranks, then fewer stages and
pieces, then smaller modality groups, then smaller expert groups, then lower ZeRO stages. Bytes are
the fullest rank's, in GB of 10^9 bytes, on the device: model state as DeepSpeed lays it out,
padding included, and activations as autograd keeps them on a GPU. Buffers of collectives, temporary
tensors and the allocator's waste come on top: leave a tenth of the memory for them.

With modality parallelism a rank's activations are those of its towers' mean share of the tokens. A
micro-batch in which its towers have more than that needs more: up to all of a group's tokens, where
batches are skewed. data.packing = "budget" gives every micro-batch the mean shares. Experts are
taken to be equally busy, as expert choice makes them: top-k can need more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mot_megatron.config import Config
from mot_megatron.config_files import load_config
from mot_megatron.errors import ConfigError, UserError
from mot_megatron.planning.layouts import RECOMPUTE, Plan, legal_layouts, plan
from mot_megatron.planning.placing import tokens_of_towers

GB = 1e9
LISTED = 40
TRAIN_SPLIT = "train"
HEAD = (
    f"{'tp':>3}{'pp':>4}{'vpp':>4}{'mp':>3}{'ep':>3} {'exchange':9}{'zero':>4}{'dp':>5}{'accum':>6}"
    f"{'tokens':>10}{'weights':>9}{'grads':>8}{'optim':>8}{'act':>8}{'select':>8}{'full':>8}"
    f"{'need':>8}  recompute"
)


def resolve(config: Config) -> tuple[Config, tuple[int, ...], str]:
    """Take from the corpus, if it is there, the vocabulary and each tower's tokens.

    Returns:
        The resolved configuration, the tokens (only their proportions count), and a line that says
        where they come from.
    """
    model = config.model
    if not (config.data.corpus / "corpus.toml").exists():
        if model.vocab_size is None:
            raise ConfigError(
                f"model.vocab_size is absent and {config.data.corpus}/corpus.toml is not there to"
                " take it from; needed: either"
            )
        note = f"tokens shared equally among towers: {config.data.corpus} is not there"
        return config, (1,) * model.num_towers, note
    # It reads token files through megatron, which takes seconds to import.
    from mot_megatron.data.corpus import Corpus

    description = Corpus.open(config.data.corpus).description
    names = [modality.name for modality in description.modalities]
    config = config.resolved_for(names, description.vocab_size)
    tokens_per_modality = description.splits[TRAIN_SPLIT].tokens_per_modality
    tokens = tokens_of_towers(config.model, tokens_per_modality)
    parts = zip(config.model.tower_names, tokens, strict=True)
    note = "tokens of towers: " + ", ".join(
        f"{name} {count / sum(tokens):.0%}" for name, count in parts
    )
    return config, tokens, f"{note} ({config.data.corpus})"


def line(layout: Plan, memory: float) -> str:
    """One layout, under HEAD."""
    parallel = layout.config.parallel
    exchange = parallel.attention_exchange if parallel.modality_parallel_size > 1 else "-"
    mode = layout.recompute_for(memory)
    sizes = f"{parallel.tensor_model_parallel_size:3}{parallel.pipeline_model_parallel_size:4}"
    sizes += f"{parallel.virtual_pipeline_model_parallel_size or '-':>4}"
    sizes += f"{parallel.modality_parallel_size:3}{parallel.expert_model_parallel_size:3}"
    sizes += f" {exchange:9}{parallel.zero_stage:4}"
    sizes += f"{layout.mesh.data:5}{layout.accumulation:6}{layout.tokens:10,}"
    state = layout.state
    values = [state.gradients, state.optimizer, *layout.activations.values()]
    values.append(layout.needed[mode or RECOMPUTE[-1]])
    columns = f"{state.weights / GB:9.3f}" + "".join(f"{value / GB:8.3f}" for value in values)
    return f"{sizes}{columns}  {mode or '-'}"


def as_dict(layout: Plan, memory: float) -> dict[str, Any]:
    """For JSON; bytes."""
    state = layout.state
    shares = None if layout.placement is None else layout.placement.shares
    return {
        "parallel": layout.config.parallel.model_dump(mode="json", exclude_none=True),
        "placement": shares,
        "data_parallel_size": layout.mesh.data,
        "accumulation_steps": layout.accumulation,
        "tokens_per_rank_and_step": layout.tokens,
        "weights": state.weights,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "in_host_memory": state.host,
        "activations": dict(layout.activations),
        "needed": dict(layout.needed),
        "recompute": layout.recompute_for(memory),
    }


def shortfall(others: Sequence[Plan], memory: float) -> str:
    """How many layouts do not fit, and how near the nearest comes."""
    if not others:
        return "all legal layouts fit"
    nearest = min(others, key=lambda layout: layout.needed[RECOMPUTE[-1]])
    missing = nearest.needed[RECOMPUTE[-1]] - memory
    return (
        f"{len(others)} legal layouts do not fit, even with full recompute; the nearest lacks"
        f" {missing / GB:.3f} GB:\n{HEAD}\n{line(nearest, memory)}"
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, action="append", required=True,
        help="TOML configuration file; of several, later ones override earlier ones",
    )  # fmt: skip
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="override a key of the configuration; may be repeated",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, required=True, help="ranks of the job")
    parser.add_argument("--memory-gb", type=float, required=True, help="of one GPU, 10^9 bytes")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print the layouts; 1 if none fits, 2 after bad input."""
    options = parse_arguments(arguments)
    memory = options.memory_gb * GB
    try:
        for name in ("gpus", "memory_gb", "gpus_per_node"):
            if getattr(options, name) <= 0:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(options, name)}: needed: above 0")
        loaded = load_config(options.config, options.overrides)
        config, tokens, note = resolve(loaded)
        layouts = legal_layouts(config, options.gpus, options.gpus_per_node, tokens)
        if not layouts:
            raise ConfigError(
                f"no layout of {options.gpus} GPUs is legal; for training.global_batch_size ="
                f" {config.training.global_batch_size} and training.micro_batch_size ="
                f" {config.training.micro_batch_size} and the model's sizes none divides"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bar = tqdm(layouts, "layouts", ncols=100, leave=False, delay=5, disable=None)
    plans = sorted(
        (plan(layout, options.gpus, tokens) for layout in bar), key=lambda p: p.communication
    )
    fitting = [layout for layout in plans if layout.recompute_for(memory)]
    others = [layout for layout in plans if not layout.recompute_for(memory)]
    if options.json:
        found = [as_dict(layout, memory) for layout in fitting]
        shares = [count / sum(tokens) for count in tokens]
        result = {"token_shares": shares, "fitting": found, "not_fitting": len(others)}
        print(json.dumps(result))
    else:
        print(report(fitting, [note, *without_samples(config)], memory))
        print(shortfall(others, memory))
    return 0 if fitting else 1


def without_samples(config: Config) -> list[str]:
    """A note on the key that layouts are listed without, if it is set."""
    interval = config.logging.sample_interval_steps
    if interval is None:
        return []
    return [
        f"without logging.sample_interval_steps = {interval}: training draws samples without"
        " pipeline and modality\nparallelism only, so leave the key out of other layouts"
    ]


def report(fitting: Sequence[Plan], notes: Sequence[str], memory: float) -> str:
    """The table of the layouts that fit."""
    lines = [
        *notes,
        f"{len(fitting)} layouts fit in {memory / GB:g} GB; below GB on the fullest rank",
        "(act, select, full: activations without, with selective and with full recompute;"
        " tokens: per rank and step)",
        HEAD,
    ]
    lines += [line(layout, memory) for layout in fitting[:LISTED]]
    if len(fitting) > LISTED:
        lines.append(f"... and {len(fitting) - LISTED} that communicate more (--json has all)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
