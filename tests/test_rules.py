"""Rules between keys: every layout that cannot be, the line that says why, and what would do."""

from __future__ import annotations

import pytest

from mot_megatron.config import Config, parse_config
from mot_megatron.errors import ConfigError
from mot_megatron.rules import check_world_size

GOOD = """
[run]
name = "test"
[data]
corpus = "corpora/test"
[model]
num_layers = 8
hidden_size = 64
num_attention_heads = 8
[model.modalities]
text = { tower = "text" }
image = { tower = "vision" }
speech = { tower = "audio" }
[training]
train_steps = 10
global_batch_size = 16
precision = "fp32"
"""

TENSOR = "parallel.tensor_model_parallel_size"
PIPELINE = "parallel.pipeline_model_parallel_size"
VIRTUAL = "parallel.virtual_pipeline_model_parallel_size"
LAYERS = "parallel.pipeline_layers"
MODALITY = "parallel.modality_parallel_size"
PLACEMENT = "parallel.placement"
HEADS = "parallel.attention_exchange=heads"
ZERO = "parallel.zero_stage"


def parse(*overrides: str) -> Config:
    return parse_config(GOOD, "test.toml", list(overrides))


def assert_one_line(message: str) -> None:
    assert "\n" not in message
    assert len(message) <= 300


SHAPES = [
    (
        ["model.hidden_size=60"],
        ["model.hidden_size = 60", "2 * model.num_attention_heads = 2 * 8", "legal: 48 or 64"],
        ["model.hidden_size=48", "model.hidden_size=64"],
    ),
    (
        ["model.hidden_size=24"],  # three columns per head
        ["model.hidden_size = 24", "even head size", "legal: 16 or 32"],
        ["model.hidden_size=16", "model.hidden_size=32"],
    ),
    (
        ["model.num_query_groups=3"],
        [
            "model.num_attention_heads = 8",
            "model.num_query_groups = 3",
            "nearest legal model.num_query_groups: 1, 2, 4, 8",
        ],
        [f"model.num_query_groups={groups}" for groups in (1, 2, 4, 8)],
    ),
    (["model.num_query_groups=16"], ["model.num_query_groups = 16"], ["model.num_query_groups=8"]),
]
TENSOR_PARALLEL = [
    (
        [f"{TENSOR}=3"],
        ["model.num_attention_heads = 8", f"{TENSOR} = 3", f"nearest legal {TENSOR}: 1, 2, 4, 8"],
        [f"{TENSOR}={size}" for size in (1, 2, 4, 8)],
    ),
    (
        # Eight would divide the query heads, but no more than two divides the key-value heads.
        [f"{TENSOR}=5", "model.num_query_groups=2"],
        ["model.num_attention_heads = 8", f"nearest legal {TENSOR}: 1, 2"],
        [f"{TENSOR}=1", f"{TENSOR}=2"],
    ),
    (
        [f"{TENSOR}=4", "model.num_query_groups=2"],
        ["model.num_query_groups = 2", f"{TENSOR} = 4", f"nearest legal {TENSOR}: 1, 2"],
        [f"{TENSOR}=2"],
    ),
    (
        [f"{TENSOR}=4", "model.ffn_hidden_size=90"],
        ["model.ffn_hidden_size = 90", f"{TENSOR} = 4", f"nearest legal {TENSOR}: 1, 2"],
        [f"{TENSOR}=2"],
    ),
    (
        [f"{TENSOR}=4", "model.vocab_size=1022"],
        ["model.vocab_size = 1022", f"{TENSOR} = 4"],
        [f"{TENSOR}=2"],
    ),
    (
        ["parallel.sequence_parallel=true"],
        ["parallel.sequence_parallel = true", f"{TENSOR} of 2 or more, not 1"],
        [f"{TENSOR}=2"],
    ),
]
PIPELINES = [
    (
        [f"{PIPELINE}=3"],
        [
            "model.num_layers = 8",
            f"{PIPELINE} = 3;",
            "nearest legal: 1, 2, 4, 8",
            f"{LAYERS}, 3 numbers that sum to 8",
        ],
        [f"{PIPELINE}={stages}" for stages in (1, 2, 4, 8)] + [f"{LAYERS}=[3, 3, 2]"],
    ),
    (
        [f"{PIPELINE}=2", f"{VIRTUAL}=3"],
        [
            "virtual_pipeline_model_parallel_size = 6;",
            "nearest legal: 4, 8,",  # 1 and 2 are no product of two sizes above 1
            f"{LAYERS}, 6 numbers that sum to 8",
        ],
        [f"{VIRTUAL}=2", f"{VIRTUAL}=4", f"{LAYERS}=[2, 2, 1, 1, 1, 1]"],
    ),
    (
        [f"{PIPELINE}=2", f"{VIRTUAL}=2", "model.num_layers=7"],
        ["nearest legal: none, or give", "4 numbers that sum to 7"],
        [f"{LAYERS}=[2, 2, 2, 1]", "model.num_layers=8"],
    ),
    (
        [f"{PIPELINE}=16"],
        [f"{PIPELINE} = 16 is above model.num_layers = 8", "one piece per layer, 8"],
        [f"{PIPELINE}=8"],
    ),
    (
        [f"{PIPELINE}=4", f"{VIRTUAL}=3"],
        ["virtual_pipeline_model_parallel_size = 12 is above model.num_layers = 8"],
        [f"{VIRTUAL}=2"],
    ),
    ([f"{VIRTUAL}=2"], [f"{VIRTUAL} = 2", f"{PIPELINE} of 2 or more, not 1"], [f"{PIPELINE}=2"]),
    (
        [f"{PIPELINE}=2", f"{LAYERS}=[4, 3, 1]"],
        [f"{LAYERS} = [4, 3, 1] has 3 numbers that sum to 8", "needed: 2", "that sum to 8"],
        [f"{LAYERS}=[5, 3]"],
    ),
    (
        [f"{PIPELINE}=2", f"{LAYERS}=[4, 5]"],
        [f"{LAYERS} = [4, 5] has 2 numbers that sum to 9", "needed: 2", "that sum to 8"],
        [f"{LAYERS}=[4, 4]"],
    ),
    (
        [f"{PIPELINE}=2", f"{VIRTUAL}=2", f"{LAYERS}=[4, 4]"],
        ["needed: 4", "virtual_pipeline_model_parallel_size) that sum to 8"],
        [f"{LAYERS}=[1, 2, 3, 2]"],
    ),
    ([f"{LAYERS}=[4, 4]"], ["needed: 1"], [f"{LAYERS}=[8]", f"{PIPELINE}=2"]),
]
EXCHANGES = [
    (
        [HEADS],
        ['attention_exchange = "heads"', f"{MODALITY} of 2 or more, not 1"],
        [f"{MODALITY}=2"],
    ),
    (
        [HEADS, f"{MODALITY}=3"],
        ["8 heads and 8 key-value heads", f"{MODALITY} = 3", "nearest legal: 2, 4, 8"],
        [f"{MODALITY}={size}" for size in (2, 4, 8)],
    ),
    (
        # Four ranks do not divide the two heads that four tensor-parallel ranks leave.
        [HEADS, f"{MODALITY}=4", f"{TENSOR}=4"],
        ["2 heads and 2 key-value heads of a tensor-parallel rank", "nearest legal: 2"],
        [f"{MODALITY}=2", f"{TENSOR}=2"],
    ),
    (
        # Four ranks divide twelve heads, but six key-value heads neither divide nor replicate.
        [
            HEADS,
            f"{MODALITY}=4",
            "model.hidden_size=96",
            "model.num_attention_heads=12",
            "model.num_query_groups=6",
        ],
        ["12 heads and 6 key-value heads", f"{MODALITY} = 4", "nearest legal: 2, 3, 6, 12"],
        [f"{MODALITY}={size}" for size in (2, 3, 6, 12)],
    ),
    (
        [HEADS, f"{MODALITY}=2", f"{TENSOR}=8"],
        ["1 heads", "nearest legal: none"],
        ["parallel.attention_exchange=sequence", f"{TENSOR}=4"],
    ),
]
ALL_HELD = "{text = 0.5, vision = 0.5, audio = 0.5}"
PLACEMENTS = [
    (
        [f"{PLACEMENT}=[{{text = 1.0, vision = 1.0, audio = 1.0}}]"],
        [f"{PLACEMENT} needs {MODALITY} of 2 or more, not 1", '"auto"'],
        [f"{PLACEMENT}=auto"],
    ),
    (
        [f"{MODALITY}=3", f"{PLACEMENT}=[{ALL_HELD}, {ALL_HELD}]"],
        [f"{PLACEMENT} has 2 entries", f"{MODALITY} = 3"],
        [f"{MODALITY}=2", f"{PLACEMENT}=auto"],
    ),
    (
        [f"{MODALITY}=2", f"{PLACEMENT}=[{ALL_HELD}, {{image = 1.0}}]"],
        [f"{PLACEMENT}[1] names image", "no tower", "allowed: text, vision, audio"],
        [f"{PLACEMENT}=[{ALL_HELD}, {ALL_HELD}]"],
    ),
    (
        [f"{MODALITY}=2", f"{PLACEMENT}=[{{text = 1.0, vision = 1.0, audio = 1.0}}, {{}}]"],
        [f"{PLACEMENT}[1] is empty", "every rank needs a tower"],
        [f"{PLACEMENT}=[{ALL_HELD}, {ALL_HELD}]"],
    ),
    (
        [f"{MODALITY}=2", f"{PLACEMENT}=[{{text = 1.0}}, {{vision = 1.0}}]"],
        ["the shares of tower audio", "sum to 0; needed: 1"],
        [f"{PLACEMENT}=[{{text = 1.0}}, {{vision = 1.0, audio = 1.0}}]"],
    ),
    (
        [f"{MODALITY}=2", f"{PLACEMENT}=[{{text = 0.9, audio = 1}}, {{vision = 1, text = 0.2}}]"],
        ["the shares of tower text", "sum to 1.1; needed: 1"],
        [f"{PLACEMENT}=[{{text = 0.8, audio = 1}}, {{vision = 1, text = 0.2}}]"],
    ),
]
ZERO_STAGES = [
    *(
        (
            [f"{PIPELINE}=2", f"{ZERO}={stage}"],
            [f"{ZERO} = {stage}", f"{PIPELINE} = 2", "legal", "zero_stage 1 only"],
            [f"{ZERO}=1", f"{PIPELINE}=1"],
        )
        for stage in (0, 2, 3)
    ),
    *(
        (
            [f"{MODALITY}=2", f"{ZERO}={stage}"],
            [f"{ZERO} = {stage}", f"{MODALITY} = 2", "legal", "zero_stage 1 and 2"],
            [f"{ZERO}=1", f"{ZERO}=2", f"{MODALITY}=1"],
        )
        for stage in (0, 3)
    ),
    (
        # Both allow stage 1 only; so must the message, or its advice would be refused.
        [f"{PIPELINE}=2", f"{MODALITY}=2", f"{ZERO}=3"],
        [f"{ZERO} = 3", "zero_stage 1 only"],
        [f"{ZERO}=1"],
    ),
    (
        ["parallel.offload=optimizer", f"{ZERO}=0"],
        ['parallel.offload = "optimizer"', f"{ZERO} 1, 2 or 3, not 0"],
        [f"{ZERO}={stage}" for stage in (1, 2, 3)],
    ),
    (
        ["training.precision=bf16", f"{ZERO}=0"],
        ['training.precision = "bf16"', f"{ZERO} = 0", "zero_stage 1, 2 or 3, or precision fp32"],
        [f"{ZERO}=1", "training.precision=fp32"],
    ),
]
TRAINING = [
    (
        ["optimizer.min_lr=1.0"],
        ["optimizer.min_lr = 1.0 is above optimizer.lr"],
        ["optimizer.lr=1.0"],
    ),
    (
        [f"model.modalities.{name}.loss_weight=0" for name in ("text", "image", "speech")],
        ["loss_weight is 0"],
        ["model.modalities.speech.loss_weight=0.5"],
    ),
    *(
        (
            ["logging.sample_interval_steps=5", f"{key}=2"],
            ["logging.sample_interval_steps = 5", "without pipeline and modality parallelism"],
            [f"{key}=1"],
        )
        for key in (PIPELINE, MODALITY)
    ),
]
ILLEGAL = [
    *SHAPES,
    *TENSOR_PARALLEL,
    *PIPELINES,
    *EXCHANGES,
    *PLACEMENTS,
    *ZERO_STAGES,
    *TRAINING,
]


@pytest.mark.parametrize(
    ("overrides", "parts", "remedies"), ILLEGAL, ids=[" ".join(case[0]) for case in ILLEGAL]
)
def test_keys_that_contradict_each_other(
    overrides: list[str], parts: list[str], remedies: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*overrides)
    message = str(caught.value)
    assert message.startswith("test.toml: ")
    assert_one_line(message)
    for part in parts:
        assert part in message
    for remedy in remedies:  # what the message calls legal is
        parse(*overrides, remedy)


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{MODALITY}=8"],  # three towers on eight ranks
        [f"{MODALITY}=2"],
        [f"{MODALITY}=3", HEADS, "model.hidden_size=96", "model.num_attention_heads=6"],
        [f"{MODALITY}=4", HEADS, "model.num_query_groups=2"],  # replicated key-value heads
        [f"{MODALITY}=4", HEADS, f"{TENSOR}=2"],
        [
            f"{MODALITY}=2",
            *(f"model.modalities.{name}.tower=all" for name in ("text", "image", "speech")),
        ],  # the dense model
        [
            f"{MODALITY}=3",
            # What a person writes for a third.
            f"{PLACEMENT}=[{{text = 0.333, vision = 1}}, {{text = 0.333}}, "
            "{text = 0.334, audio = 1}]",
        ],
        [f"{PIPELINE}=3", f"{LAYERS}=[1, 6, 1]"],
        [f"{PIPELINE}=2", f"{VIRTUAL}=4"],
        [f"{PIPELINE}=8", f"{MODALITY}=4", f"{TENSOR}=8", "parallel.sequence_parallel=true"],
        [f"{MODALITY}=2", f"{ZERO}=2"],
        [f"{ZERO}=0"],
        [f"{ZERO}=3", f"{TENSOR}=2", "training.precision=bf16"],
        ["logging.sample_interval_steps=5", f"{TENSOR}=2"],
    ],
    ids=" ".join,
)
def test_keys_that_go_together(overrides: list[str]) -> None:
    parse(*overrides)


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts", "legal"),
    [
        ([f"{TENSOR}=4"], 6, ["world size 6", f"{TENSOR} = 4;", "world size: 4 or 8"], [4, 8]),
        ([f"{TENSOR}=4"], 2, ["world size 2", "legal world size: 4"], [4]),
        ([f"{PIPELINE}=4"], 6, ["world size 6", f"{PIPELINE} = 4;", "size: 4 or 8"], [4, 8]),
        ([f"{MODALITY}=4"], 6, ["world size 6", f"{MODALITY} = 4;", "size: 4 or 8"], [4, 8]),
        (
            [f"{TENSOR}=2", f"{PIPELINE}=2", f"{MODALITY}=2"],
            12,
            ["world size 12", f"{TENSOR} * {PIPELINE} * {MODALITY} = 2 * 2 * 2;", "8 or 16"],
            [8, 16],
        ),
    ],
)
def test_world_size_that_does_not_divide(
    overrides: list[str], world_size: int, parts: list[str], legal: list[int]
) -> None:
    config = parse(*overrides)
    with pytest.raises(ConfigError) as caught:
        check_world_size(config, world_size)
    assert_one_line(str(caught.value))
    for part in parts:
        assert part in str(caught.value)
    for size in legal:
        check_world_size(config, size)


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts", "legal"),
    [
        (["training.micro_batch_size=1"], 3, ["= 1 * 3;", "legal: 15 or 18"], [15, 18]),
        (["training.micro_batch_size=16"], 2, ["= 16 * 2;", "nearest legal: 32"], [32]),
        # Every rank of a modality group brings its own sequences; stages share theirs.
        ([f"{MODALITY}=2", "training.micro_batch_size=3"], 4, ["= 3 * 4;", "12 or 24"], [12, 24]),
        ([f"{PIPELINE}=2", "training.micro_batch_size=3"], 4, ["= 3 * 2;", "12 or 18"], [12, 18]),
        (
            [f"{PIPELINE}=4", f"{VIRTUAL}=2"],
            24,
            ["(interleaved) = 1 * 6 * 4;", "nearest legal: 24"],
            [24],
        ),
    ],
)
def test_batch_that_does_not_divide(
    overrides: list[str], world_size: int, parts: list[str], legal: list[int]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world_size(parse(*overrides), world_size)
    assert_one_line(str(caught.value))
    for part in ("training.global_batch_size = 16 is not divisible by", *parts):
        assert part in str(caught.value)
    for size in legal:
        check_world_size(parse(*overrides, f"training.global_batch_size={size}"), world_size)


def test_world_sizes_that_divide() -> None:
    config = parse(f"{TENSOR}=2", "training.micro_batch_size=2")
    for world_size in (2, 4, 8):
        check_world_size(config, world_size)
    assert config.accumulation_steps(data_parallel_size=2) == 4  # 16 / (2 * 2)
    check_world_size(parse(f"{TENSOR}=2", f"{PIPELINE}=2", f"{MODALITY}=2"), 32)
