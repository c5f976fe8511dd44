"""Estimates equal the tensors of a training step: model state exactly, activations closely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from mot_megatron.benchmark.measure import measure_step
from mot_megatron.config import Config
from mot_megatron.data.corpus import Corpus
from mot_megatron.model.flops import count_parameters
from mot_megatron.parallel.mesh import Mesh
from mot_megatron.planning.activations import activation_bytes
from mot_megatron.planning.layouts import plan
from mot_megatron.planning.memory import RankMemory, StateBytes, state_bytes
from mot_megatron.planning.placing import tokens_of_towers
from mot_megatron.rules import check_world_size
from mot_megatron.train.session import build_groups, build_session, resolve_config
from tests.ranks import run_ranks
from tests.small_runs import small_config, write_corpus

# Sizes that no number of ranks divides, so that every buffer is padded.
ODD = ["model.hidden_size=30", "model.num_attention_heads=3", "model.num_query_groups=1",
       "model.ffn_hidden_size=45"]  # fmt: skip
# Grouped matrix products need rows whose size is a multiple of 16 bytes.
ALIGNED = ["model.hidden_size=36", "model.num_attention_heads=3", "model.num_query_groups=1",
           "model.ffn_hidden_size=44"]  # fmt: skip
DENSE = [f"model.modalities.{name}.tower=one" for name in ("text", "image", "speech")]
TP2 = "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
MP2 = "parallel.modality_parallel_size=2"
MP4 = "parallel.modality_parallel_size=4"
HEADS = "parallel.attention_exchange=heads"
ZERO0, ZERO2, ZERO3 = (f"parallel.zero_stage={stage}" for stage in (0, 2, 3))
OFFLOAD = "parallel.offload=optimizer"
BF16 = "training.precision=bf16"
BIASES = "model.add_qkv_bias=true"
TIED = "model.untie_embeddings_and_output_weights=false"
EP2 = "parallel.expert_model_parallel_size=2"
CHOSEN = "model.towers.text.experts={num_moe_experts=4,causal_router=true}"
DOUBLE = "model.towers.image.experts={num_moe_experts=2,capacity_factor=2.0}"
TOP2 = "model.towers.image.experts={num_moe_experts=4,routing='topk',topk=2,gate='softmax'}"
FOUR_LAYERS = "model.num_layers=4"
FULL, SELECTIVE = "training.recompute=full", "training.recompute=selective"


@dataclass(frozen=True)
class Comparison:
    """Measured and estimated bytes of one rank."""

    measured: RankMemory
    state: StateBytes
    activations: int


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def compare(corpus: Path, cases: Sequence[Sequence[str]]) -> list[Comparison]:
    """Measure and estimate this rank's memory for several configurations, one after the other."""
    return [_compare(small_config(corpus, list(overrides))) for overrides in cases]


def _compare(config: Config) -> Comparison:
    check_world_size(config, torch.distributed.get_world_size())
    opened = Corpus.open(config.data.folders[0])
    config = resolve_config(config, opened)
    groups = build_groups(config, opened, torch.device("cpu"))
    measured = measure_step(build_session(config, opened, groups))
    accumulation = config.accumulation_steps(groups.data_size)
    assert accumulation >= 2
    activations = activation_bytes(
        config, groups.pipeline_rank, measured.rows, accumulation, device="cpu"
    )
    state = state_bytes(config, groups.mesh, groups.placement, groups.rank)
    parallel_state.destroy_model_parallel()  # the next configuration has another layout
    return Comparison(measured, state, activations)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (
            1,
            [
                [ZERO0, FOUR_LAYERS, "model.norm_placement=pre", "training.micro_batch_size=2"],
                [*DENSE, SELECTIVE, BIASES, "model.qk_norm=false"],
                [*DENSE, SELECTIVE],
                [FULL, FOUR_LAYERS, "data.seq_length=96"],
                [BF16, "model.num_query_groups=4"],
                ["model.untied.feed_forward=false", "model.untied.norms=false", TIED],
                [CHOSEN, DOUBLE],
                [CHOSEN, TOP2, BF16, "model.norm_placement=pre"],
                [CHOSEN, TOP2, SELECTIVE],
            ],
        ),
        (
            2,
            [
                [TP2, SP, FULL],
                [TP2, SELECTIVE, ZERO2],
                [TP2, SP, BF16, BIASES],
                [PP2, TIED],
                [PP2, SELECTIVE],
                [PP2, VPP2, FOUR_LAYERS],
                [PP2, FULL, FOUR_LAYERS, "parallel.pipeline_layers=[1, 3]"],
                [MP2, *ODD],
                [MP2, HEADS, BF16],
                [MP2, ZERO2, SELECTIVE],
                [CHOSEN, EP2],
                [CHOSEN, TOP2, EP2, ZERO2, BF16],
                [CHOSEN, TP2, SP],
            ],
        ),
        (
            4,
            [
                *([stage, *ODD, *bf16] for stage in (ZERO2, ZERO3) for bf16 in ([], [BF16])),
                [*ODD, BF16],
                [MP4, *ODD],
                [MP2, *ODD, ZERO2],
                [MP2, PP2, TIED, BIASES],
                [TP2, OFFLOAD, ZERO3],
                [OFFLOAD],
                [OFFLOAD, BF16, ZERO2],
                [CHOSEN, DOUBLE, EP2, *ALIGNED],
                [CHOSEN, DOUBLE, EP2, ZERO2, FULL],
                [CHOSEN, DOUBLE, EP2, MP2, BF16],
                [CHOSEN, EP2, PP2],
            ],
        ),
    ],
)
def test_estimates_equal_measured_memory(
    corpus: Path, world_size: int, cases: list[list[str]]
) -> None:
    for results in run_ranks(compare, world_size, corpus, cases):
        for case, result in zip(cases, results, strict=True):
            assert result.state == result.measured.state, case
            ratio = result.activations / result.measured.activations
            assert 0.9 < ratio < 1.1, case


@pytest.mark.parametrize("exchange", ["sequence", "heads"])
def test_plan_equals_measured_memory_of_the_fullest_rank(corpus: Path, exchange: str) -> None:
    """Budget packing gives every micro-batch the corpus's shares of tokens, as plans assume."""
    config = small_config(
        corpus,
        [MP2, f"parallel.attention_exchange={exchange}", "data.packing=budget",
         "training.micro_batch_size=4", "training.global_batch_size=16"],
    )  # fmt: skip
    opened = Corpus.open(corpus)
    config = resolve_config(config, opened)
    tokens = tokens_of_towers(config.model, opened.description.splits["train"].tokens_per_modality)
    planned = plan(config, 2, tokens, device="cpu")
    measured = run_ranks(measure, 2, config)
    fullest = max(measured, key=lambda rank: rank.state.device + rank.activations)
    assert planned.state == fullest.state
    assert planned.activations["none"] == pytest.approx(fullest.activations, rel=0.15)
    most = max(rank.rows.stream for rank in measured) * planned.accumulation
    assert planned.tokens == pytest.approx(most, rel=0.02)


def measure(config: Config) -> RankMemory:
    """Measure this rank's memory for a resolved configuration."""
    opened = Corpus.open(config.data.folders[0])
    groups = build_groups(config, opened, torch.device("cpu"))
    return measure_step(build_session(config, opened, groups))


def test_state_includes_padding() -> None:
    """With the sizes in ODD, a rank's state exceeds its share of the elements."""
    config = small_config(Path("none"), [*ODD, "model.vocab_size=256"])
    (elements, quarter) = (
        state_bytes(config, Mesh(ranks, 1), None, 0).optimizer for ranks in (1, 4)
    )
    # Two buffers, each padded by up to 4 owners * 2 elements of 12 bytes.
    assert 0 < 4 * quarter - elements < 2 * 8 * 12


def test_offloaded_state_is_in_host_memory() -> None:
    """Weights and whole gradients stay on the device: 4 + 4 bytes per element."""
    config = small_config(Path("none"), ["model.vocab_size=256", OFFLOAD])
    state = state_bytes(config, Mesh(2, 1), None, 0)
    elements = count_parameters(config.model).total
    assert state.device == 8 * elements
    assert state.host == 16 * elements / 2  # weight, two moments and gradient of this rank's half
