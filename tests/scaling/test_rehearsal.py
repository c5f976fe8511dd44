"""A rehearsed rank does, collective by collective, what a real rank does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mot_megatron.config import Config
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import ConfigError
from mot_megatron.model.flops import step_flops
from mot_megatron.parallel.groups import build_single_process_groups
from mot_megatron.planning.activations import Rows, activation_bytes
from mot_megatron.planning.memory import mesh_of, state_bytes
from mot_megatron.scaling.balanced_routing import balanced_routing
from mot_megatron.scaling.ledger import (
    ATTENTION,
    FORWARD,
    MATRICES,
    PARTS,
    Ledger,
    Memory,
    Product,
    Work,
)
from mot_megatron.scaling.rehearsal import (
    record_step,
    rehearse_in_fake_world,
    run_in_fake_world,
)
from mot_megatron.scaling.synthetic import (
    SyntheticBatches,
    build_groups,
    parse_shares,
    tokens_of,
)
from mot_megatron.train.session import build_session, build_trainer, resolve_config
from tests.data.corpora import random_documents, write_corpus
from tests.fake_world import fake_world
from tests.model.small_models import small_config
from tests.ranks import run_ranks

CPU = torch.device("cpu")
THREE = {"text": "text", "image": "image", "speech": "speech"}
SHARES = [0.25, 0.4, 0.35]
COMMON = ["data.seq_length=48"]
BF16 = "training.precision=bf16"
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
PIECES = [*PP2, "parallel.virtual_pipeline_model_parallel_size=2", "model.num_layers=4"]
MP2 = ["parallel.modality_parallel_size=2"]
EP2 = "parallel.expert_model_parallel_size=2"
TOP_K = ["model.towers.text.experts={num_moe_experts=4, routing='topk', topk=2}"]
CHOICE = ["model.towers.text.experts={num_moe_experts=4, routing='expert_choice'}"]


VOCABULARY = 200
"""No other size of the model."""
RANKS = {4: (0, 3), 8: (0, 3, 6)}
"""World size -> ranks to rehearse; every tensor-parallel rank, pipeline stage and modality rank is
among them."""


def zero(stage: int) -> str:
    return f"parallel.zero_stage={stage}"


FOUR_RANKS = {
    "data, ZeRO-0": [zero(0)],
    "data, ZeRO-1, bf16": [zero(1), BF16],
    "data, ZeRO-2": [zero(2)],
    "data, ZeRO-3": [zero(3)],
    "tensor": TP2,
    "pipeline": [*PP2, BF16],
    "pipeline, two pieces": PIECES,
    "modality, sequence": [*MP2, zero(2)],
    "modality, heads": [*MP2, "parallel.attention_exchange=heads"],
    "expert choice, expert-parallel": [*CHOICE, EP2],
    "expert choice in pipelines": [*CHOICE, *PP2],
    "full recomputation": [*TP2, "training.recompute=full"],
    "selective recomputation": ["training.recompute=selective"],
}
EIGHT_RANKS = {
    "tensor and modality": [*TP2, *MP2, BF16],
    "pipeline and modality": [*PP2, *MP2],
    "experts, tensor and expert-parallel": [*TOP_K, EP2, *TP2, BF16, "model.ffn_hidden_size=48"],
    "experts and modality": [*TOP_K, EP2, *MP2],
}
LAYOUTS = {4: FOUR_RANKS, 8: EIGHT_RANKS}
"""World size -> layouts, with a sequence per rank and step where all ranks read others."""


def config_of(overrides: list[str], size: int = 8) -> Config:
    return small_config(THREE, *COMMON, f"training.global_batch_size={size}", *overrides)


def record_all(layouts: list[list[str]]) -> list[Ledger]:
    """Record a real step of this gloo rank in every layout."""
    ledgers = []
    for overrides in layouts:
        config = config_of(overrides, dist.get_world_size())
        groups = build_groups(config, SHARES, CPU)
        batches = SyntheticBatches(config, groups, SHARES)
        with balanced_routing():
            ledgers.append(record_step(build_trainer(config, groups, batches))[0])
        parallel_state.destroy_model_parallel()
    return ledgers


def rehearse_all(layouts: list[list[str]], ranks: Sequence[int], size: int) -> list[Ledger]:
    """Rehearse a step of one of ``ranks`` in every layout."""
    rank = ranks[dist.get_rank()]
    ledgers = []
    with fake_world(rank, size):
        for overrides in layouts:
            config = config_of(overrides, size)
            groups = build_groups(config, SHARES, CPU)
            ledgers.append(run_in_fake_world(config, groups, SHARES)[0])
            parallel_state.destroy_model_parallel()
    build_single_process_groups(CPU)  # run_ranks destroys a world at the end
    return ledgers


@pytest.fixture(scope="module")
def rehearsed() -> dict[int, list[list[Ledger]]]:
    """World size -> the ledgers of some of its ranks, rehearsed in every layout."""
    return {
        size: run_ranks(
            rehearse_all, len(RANKS[size]), list(layouts.values()), RANKS[size], size, timeout=580
        )
        for size, layouts in LAYOUTS.items()
    }


def assert_equal(
    rehearsed: list[list[Ledger]], real: list[list[Ledger]], names: Iterable[str]
) -> None:
    for rank, (mine, theirs) in enumerate(zip(rehearsed, real, strict=True)):
        for name, own, expected in zip(names, mine, theirs, strict=True):
            assert own.order == expected.order, (name, rank)
            assert own.order, name
            for part in PARTS:
                assert_equal_work(own.tally.work[part], expected.tally.work[part])


def assert_equal_work(rehearsed: Work, real: Work) -> None:
    assert rehearsed.products == real.products
    assert rehearsed.attention_flops == real.attention_flops
    assert rehearsed.attention_calls == real.attention_calls
    # When an asynchronous collective ends late, gloo copies its result under the recorder.
    assert 0 <= real.launches - rehearsed.launches <= 8
    assert rehearsed.memory_bytes == pytest.approx(real.memory_bytes, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 8])
def test_rehearsed_ranks_equal_real_ones(
    rehearsed: dict[int, list[list[Ledger]]], size: int
) -> None:
    # Few layouts per process: torch never stops the threads of a process group.
    names = list(LAYOUTS[size])
    for first in range(0, len(names), 7):
        some = slice(first, first + 7)
        layouts = [LAYOUTS[size][name] for name in names[some]]
        real = run_ranks(record_all, size, layouts)
        mine = [ledgers[some] for ledgers in rehearsed[size]]
        assert_equal(mine, [real[rank] for rank in RANKS[size]], names[some])


@pytest.mark.slow
def test_rehearsed_modality_group_of_three_equals_a_real_one() -> None:
    layouts = [["parallel.modality_parallel_size=3"]]
    mine = run_ranks(rehearse_all, 3, layouts, range(3), 3)
    theirs = run_ranks(record_all, 3, layouts)
    assert_equal(mine, theirs, ["three modality ranks"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], MP2], ids=["data", "modality"])
def test_rehearsed_budgets_are_those_of_a_corpus(tmp_path: Path, layout: list[str]) -> None:
    documents = random_documents(400, longest=12)
    corpus = write_corpus(tmp_path / "corpus", train=documents, validation=documents[:20])
    overrides = [
        *("data.packing=budget", "training.micro_batch_size=2", "data.seq_length=48"),
        *("training.global_batch_size=8", f"data.corpus={corpus.directory}", *layout),
    ]
    real = run_ranks(record_corpus, 2, overrides)
    rehearsed = run_ranks(rehearse_corpus, 2, overrides)
    for own, expected in zip(rehearsed, real, strict=True):
        assert own.order == expected.order
        assert own.order
        for part in PARTS:
            # The lengths of documents, and thereby the pairs that attend and the rows with a
            # label, are those of the corpus.
            assert without_head(own.tally.work[part]) == without_head(expected.tally.work[part])


def without_head(work: Work) -> dict[Product, int]:
    return {
        product: times
        for product, times in work.products.items()
        if VOCABULARY not in (product.m, product.k, product.n)
    }


def open_corpus(overrides: list[str]) -> tuple[Config, Corpus, list[float]]:
    config = small_config(THREE, f"model.vocab_size={VOCABULARY}", *overrides)
    corpus = Corpus.open(config.data.folders[0])
    tokens = corpus.description.splits["train"].tokens_per_modality
    config = resolve_config(config, corpus)
    return config, corpus, [tokens[name] / sum(tokens.values()) for name in config.model.modalities]


def record_corpus(overrides: list[str]) -> Ledger:
    config, corpus, shares = open_corpus(overrides)
    return record_step(build_session(config, corpus, build_groups(config, shares, CPU)))[0]


def rehearse_corpus(overrides: list[str]) -> Ledger:
    config, _, shares = open_corpus(overrides)
    with fake_world(dist.get_rank(), dist.get_world_size()):
        ledger = run_in_fake_world(config, build_groups(config, shares, CPU), shares)[0]
    build_single_process_groups(CPU)  # run_ranks destroys a world at the end
    return ledger


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "name"), [(8, "tensor and modality"), (4, "pipeline"), (4, "data, ZeRO-3")]
)
def test_flops_of_all_ranks_equal_the_closed_form(
    rehearsed: dict[int, list[list[Ledger]]], size: int, name: str
) -> None:
    number = list(LAYOUTS[size]).index(name)
    # The first and the last of these ranks have every role equally often.
    some = [ledgers[number] for ledgers in (rehearsed[size][0], rehearsed[size][-1])] * (size // 2)
    total = sum((ledger.flops() for ledger in some), start=Counter[str]())
    tokens = [size * count for count in tokens_of(SHARES, 48)]
    expected = step_flops(config_of([]).model, tokens, size * 48 * 49 // 2)
    # The last token of a sequence has no label.
    assert total[MATRICES] == sum(expected.towers) + expected.head * 47 // 48
    of_towers = sum(sum(ledger.tower_flops.values()) for ledger in some)
    assert of_towers == sum(expected.towers)
    # The closed form leaves out the scores that a kernel's backward computes again.
    assert total[ATTENTION] == pytest.approx(expected.attention * 7 / 6)


@pytest.mark.slow
def test_a_step_of_many_micro_batches_is_known_from_a_short_one() -> None:
    names = ["data, ZeRO-3", "pipeline, two pieces", "tensor and modality"]
    layouts = [(FOUR_RANKS | EIGHT_RANKS)[name] for name in names]
    for ledgers in run_ranks(rehearse_many, 2, layouts):
        for name, (short, whole) in zip(names, ledgers, strict=True):
            assert short.ordered_micro_batches < short.micro_batches == whole.micro_batches, name
            assert short.tally == whole.tally, name


def rehearse_many(layouts: list[list[str]]) -> list[tuple[Ledger, Ledger]]:
    """Rehearse a step of four or eight micro-batches as the first and the last of eight ranks."""
    ledgers = []
    with fake_world(7 * dist.get_rank(), 8):
        for overrides in layouts:
            config = config_of(overrides, 32)
            groups = build_groups(config, SHARES, CPU)
            whole = run_in_fake_world(config, groups, SHARES)[0]
            ledgers.append((rehearse_in_fake_world(config, groups, SHARES), whole))
            parallel_state.destroy_model_parallel()
    build_single_process_groups(CPU)  # run_ranks destroys a world at the end
    return ledgers


LARGER = [
    *("model.hidden_size=512", "model.num_attention_heads=8", "model.num_layers=4"),
    *("model.vocab_size=16384", "data.seq_length=2048", BF16),
]


def rehearse_memory(overrides: list[str]) -> Memory:
    """Rehearse one step as the first of eight ranks, in a process without other tensors."""
    with fake_world(0, 8):
        config = config_of(overrides)
        memory = rehearse_in_fake_world(config, build_groups(config, SHARES, CPU), SHARES).memory
    build_single_process_groups(CPU)  # run_ranks destroys a world at the end
    return memory


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], TP2])
def test_memory_is_that_of_the_plan(layout: list[str]) -> None:
    (memory,) = run_ranks(rehearse_memory, 1, [*LARGER, *layout])
    config = config_of([*LARGER, *layout])
    state = state_bytes(config, mesh_of(config, 8), None, 0).total
    assert memory.state == pytest.approx(state, rel=0.01)
    tokens = config.training.micro_batch_size * 2048
    rows = Rows(tuple(tokens_of(SHARES, tokens)), tokens)
    saved = activation_bytes(config, 0, rows, 1, "cuda")
    # The loss has the logits of a chunk in fp32 and bf16, and the gradient of the weight from it.
    hidden = config.model.hidden_size
    vocabulary = config.model.num_vocabulary_rows // config.parallel.tensor_model_parallel_size
    chunk = (4 + 2) * hidden * vocabulary + 2 * hidden * vocabulary
    if config.parallel.sequence_parallel:
        chunk += 2 * hidden * tokens  # gathered rows
    assert memory.peak_on_gpu == pytest.approx(state + saved + chunk, rel=0.02)
    assert memory.peak_part == FORWARD


def test_shares_are_divided_into_whole_tokens() -> None:
    assert tokens_of(SHARES, 48) == [12, 19, 17]
    assert tokens_of([1 / 3] * 3, 100) == [33, 34, 33]
    assert tokens_of([1.0, 0.0], 7) == [7, 0]
    assert parse_shares(["text", "image"], []) == [0.5, 0.5]
    assert parse_shares(["text", "image"], ["image=1"]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["video=1"], "--share video=1: expected NAME=NUMBER, with one of text, image"),
        (["text"], "--share text: expected NAME=NUMBER"),
        (["text=2"], "a number from 0 to 1"),
        (["text=nan"], "a number from 0 to 1"),
        (["text=0.5"], "the shares sum to 0.5, expected 1"),
    ],
)
def test_bad_shares_are_one_line(given: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        parse_shares(["text", "image"], given)
