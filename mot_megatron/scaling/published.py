"""Published training runs of dense models, described in the terms of the cost model.

The runs are rows of a table with their sources (``configs/scaling/published_runs.csv``). They test
the cost model on machines that this project has not run on: the same rooflines, collectives and
pipeline simulation forecast their step times.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mot_megatron.scaling.costs import (
    Constants,
    collective_seconds,
    exposed,
    work_seconds,
)
from mot_megatron.scaling.ledger import BACKWARD_OF_ATTENTION, Product, Work
from mot_megatron.scaling.machine import GroupShape, Machine
from mot_megatron.scaling.pipeline import pipeline_seconds

_WEIGHT_BYTES = 2
_FP8_SPEEDUP = 2.0
"""Peak of 8-bit over 16-bit matrix products, in every data sheet used here."""
_ELEMENTWISE = (16, 3)
"""Elements that the operators between matrix products read and write per token and layer, in units
of the hidden size (norms, residuals, biases, rotary embedding) and the feed-forward width."""
_LOGIT_BYTES = 24
"""Bytes that the loss reads and writes per token and vocabulary entry, forward and backward."""
_ADAM_BYTES = 30
"""Bytes that AdamW reads and writes per parameter: fp32 gradient, weight, moments; bf16 weight."""


@dataclass(frozen=True)
class Run:
    """One published measurement."""

    source: str
    model: str
    machine: str
    """Stem of a profile in ``configs/machines``."""
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    ffn: int
    gated: bool
    """Whether the feed-forward network has three matrices (SwiGLU) instead of two."""
    vocab: int
    seq: int
    gpus: int
    tensor: int
    pipeline: int
    context: int
    micro_batch: int
    global_batch: int
    recompute: str
    """none, selective (half of the matrix products) or full."""
    sharded: bool
    """Whether weights are sharded over the data-parallel ranks (FSDP)."""
    fp8: bool
    hides_tensor: bool
    """Whether tensor-parallel traffic overlaps computation (async TP)."""
    gradient_bytes: int
    """Bytes per gradient in its reduction: 2 (bf16) or 4 (fp32)."""
    step_seconds: float
    """Measured; 0 if it is not known."""
    towers: int = 1
    """Copies of all weights of a layer, each for an equal part of the tokens (MoT)."""
    experts: int = 1
    """Copies of a feed-forward network, each for an equal part of its tower's tokens (MoE)."""

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step and rank."""
        return max(1, round(self.global_batch / (self.data * self.micro_batch)))


_PAPER_SIZES = {"443M": (24, 1024, 16, 2816, 6), "7B": (32, 4096, 32, 11008, 2)}
"""Layers, hidden size, heads, feed-forward width and sequences per GPU."""
_MACHINES = {
    "a100_80gb": "a100-80gb-1600",
    "a100_40gb": "a100-40gb-roce",
    "h100_96gb_500W": "h100-sxm",
    "h200_141gb": "h200-sxm",
}


def read_runs(path: Path) -> list[Run]:
    """Read the table of published runs."""
    with path.open(newline="") as file:
        return [_run(row) for row in csv.DictReader(file)]


def _run(row: dict[str, str]) -> Run:
    notes = row["notes"].lower()
    recompute = "none"
    if "full ac" in notes or "full activation recompute" in notes or "checkpointing=true" in notes:
        recompute = "full"
    elif "selective ac" in notes:
        recompute = "selective"
    llama = row["model"].startswith("llama")
    return Run(
        source=row["source"],
        model=row["model"],
        machine=_MACHINES[row["gpu_type"]],
        layers=int(row["layers"]),
        hidden=int(row["hidden"]),
        heads=int(row["heads"]),
        key_value_heads=8 if "gqa 8" in notes else int(row["heads"]),
        ffn=int(row["ffn"]),
        gated=llama,
        vocab=int(row["vocab"]),
        seq=int(row["seq"]),
        gpus=int(row["gpus"]),
        tensor=int(row["tp"]),
        pipeline=int(row["pp"]),
        context=int(row["cp"] or 1),
        micro_batch=int(row["micro_batch"] or 1),
        global_batch=int(row["global_batch"]),
        recompute=recompute,
        sharded="fsdp" in notes or llama,
        fp8="fp8" in row["precision"],
        hides_tensor="async" in notes,
        # torchtitan reduces in fp32 by default, the others in 16 bits.
        gradient_bytes=4 if llama else 2,
        step_seconds=float(row["step_time_s"]),
    )


def _layer(run: Run, tokens: int) -> Work:
    """Return the forward of one layer on one tensor-parallel rank."""
    h, t = run.hidden, run.tensor
    head = h // run.heads
    qkv = head * (run.heads + 2 * run.key_value_heads)
    size = 1 if run.fp8 else _WEIGHT_BYTES
    attention = [(h, qkv // t), (h // t, h)]
    feed_forward = [(h, run.ffn // t), (run.ffn // t, h)]
    if run.gated:
        feed_forward.append((h, run.ffn // t))
    products: Counter[Product] = Counter()
    for matrices, copies in (
        (attention, run.towers),
        (feed_forward, run.towers * run.experts),
    ):
        for k, n in matrices:
            products[Product(1, tokens // copies, k, n, size)] += copies
    wide, narrow = _ELEMENTWISE
    # Tokens are sorted by tower, and by expert, and back.
    wide += 4 * (run.towers > 1) + 4 * (run.experts > 1)
    sequences = tokens / run.seq * run.context
    pairs = sequences * run.seq * (run.seq + 1) / 2 / run.context
    return Work(
        products=products,
        attention_flops=round(4 * pairs * h / t),
        attention_calls=1,
        memory_bytes=round(2 * tokens * (wide * h + narrow * run.ffn) / t),
        launches=20,
    )


@dataclass(frozen=True)
class _Model:
    """The cost model for one run."""

    run: Run
    machine: Machine
    constants: Constants

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.run.micro_batch * self.run.seq // self.run.context

    @property
    def shards(self) -> GroupShape:
        """The ranks with the same tensor-parallel part of the same weights."""
        size = self.run.data * self.run.context
        nodes = int(self.machine.devices_per_node)
        return GroupShape(size, max(1, min(size, nodes // min(nodes, self.run.tensor))))

    def seconds(self, kind: str, num_bytes: float, group: GroupShape) -> float:
        """Return the seconds of one collective."""
        return collective_seconds(kind, round(num_bytes), group, self.machine, self.constants)

    def exposed(self, computation: float, traffic: float) -> float:
        """Return the traffic that computation does not hide."""
        return exposed(computation, traffic, self.constants.overlap)

    def layer(self, work: Work) -> tuple[float, float]:
        """Return the seconds of one layer's forward and backward for a micro-batch."""
        run = self.run
        costs = work_seconds(work, self.machine, self.constants)
        if run.fp8:
            costs.matrices /= _FP8_SPEEDUP
        forward = costs.total
        backward = 2 * costs.matrices + BACKWARD_OF_ATTENTION * costs.attention + 2 * costs.memory
        backward += {
            "none": 0.0,
            "selective": costs.matrices / 2 + costs.memory,
            "full": forward,
        }[run.recompute]
        in_forward, in_backward = self._tensor_traffic(forward, backward)
        if run.sharded and self.shards.size > 1:
            gather = self.seconds("all-gather", _WEIGHT_BYTES * _weights(work), self.shards)
            reduce = self.seconds(
                "reduce-scatter", run.gradient_bytes * _weights(work), self.shards
            )
            forward += self.exposed(forward, gather)
            backward += self.exposed(backward, gather + reduce)
        return forward + in_forward, backward + in_backward

    def _tensor_traffic(self, forward: float, backward: float) -> tuple[float, float]:
        """Return what tensor parallelism adds to a layer's forward and backward.

        That is an all-reduce, or a gather and a scatter, around each half of a layer.
        """
        run = self.run
        if run.tensor == 1:
            return 0.0, 0.0
        group = GroupShape(run.tensor, min(int(self.machine.devices_per_node), run.tensor))
        in_forward = 2 * self.seconds("all-reduce", 2 * self.tokens * run.hidden, group)
        again = {"none": 0.0, "selective": 0.5, "full": 1.0}[run.recompute]
        in_backward = (1 + again) * in_forward
        if run.hides_tensor:
            return self.exposed(forward, in_forward), self.exposed(backward, in_backward)
        return in_forward, in_backward

    def head(self) -> float:
        """Return the seconds of the head and the loss for a micro-batch, forward and backward."""
        run = self.run
        product = Product(1, self.tokens, run.hidden, run.vocab // run.tensor, _WEIGHT_BYTES)
        logits = round(_LOGIT_BYTES * self.tokens * run.vocab / run.tensor)
        loss = Work(products=Counter({product: 3}), memory_bytes=logits)
        return work_seconds(loss, self.machine, self.constants).total

    def update(self, parameters: float) -> float:
        """Return the seconds of what happens once per step, for a rank's weights."""
        bandwidth = self.machine.memory_tb_per_s * 1e12 * self.constants.memory_efficiency
        if self.run.sharded or self.shards.size == 1:
            return _ADAM_BYTES * parameters / self.shards.size / bandwidth
        reduce = self.seconds("all-reduce", self.run.gradient_bytes * parameters, self.shards)
        return reduce + _ADAM_BYTES * parameters / bandwidth


def step_seconds(run: Run, machine: Machine, constants: Constants) -> float:
    """Forecast the seconds of a step of a published run."""
    model = _Model(run, machine, constants)
    work = _layer(run, model.tokens)
    forward, backward = model.layer(work)
    layers = run.layers / run.pipeline
    stages_forward = [layers * forward] * run.pipeline
    stages_backward = [layers * backward] * run.pipeline
    head = model.head()
    stages_forward[-1] += head / 3
    stages_backward[-1] += head * 2 / 3
    message = 0.0
    if run.pipeline > 1:
        message = model.seconds(
            "send", 2 * model.tokens * run.hidden / run.tensor, GroupShape(2, 1)
        )
    total = pipeline_seconds(stages_forward, stages_backward, run.micro_batches, message=message)
    return total + model.update(layers * _weights(work) + run.hidden * run.vocab / run.tensor)


def _weights(work: Work) -> int:
    """Return the weights of a layer on one tensor-parallel rank."""
    return sum(product.k * product.n * copies for product, copies in work.products.items())


def paper_run(size: str, gpus: int, *, towers: int = 1, experts: int = 1) -> Run:
    """Return a run of the Mixture-of-Transformers paper (arXiv 2411.04996), fully sharded.

    Its step times are not published. The gradients are taken to be reduced in bf16.

    Args:
        size: 443M or 7B.
        gpus: Number of GPUs; the batch per GPU is the paper's.
        towers: Towers of the model.
        experts: Experts of its feed-forward networks.
    """
    layers, hidden, heads, ffn, batch = _PAPER_SIZES[size]
    return Run(
        source="arXiv 2411.04996",
        model=size,
        machine="a100-80gb-efa",
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=heads,
        ffn=ffn,
        gated=True,
        vocab=65536,
        seq=4096,
        gpus=gpus,
        tensor=1,
        pipeline=1,
        context=1,
        micro_batch=batch,
        global_batch=batch * gpus,
        recompute="none",
        sharded=True,
        fp8=False,
        hides_tensor=False,
        gradient_bytes=2,
        step_seconds=0.0,
        towers=towers,
        experts=experts,
    )


def families(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs by their source, in the order of the table."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.source, []).append(run)
    return found
