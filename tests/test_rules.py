"""Rules between keys: illegal combinations, their error messages, and the values these suggest."""

from __future__ import annotations

import pytest

from mot_megatron.config import Config
from mot_megatron.config_files import parse_config
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
        # Eight would divide the query heads, but nothing above two divides the key-value heads.
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
            "nearest legal: 4, 8,",  # 1 and 2 are not products of two sizes above 1
            f"{LAYERS}, 6 numbers that sum to 8",
        ],
        [f"{VIRTUAL}=2", f"{VIRTUAL}=4", f"{LAYERS}=[2, 2, 1, 1, 1, 1]"],
    ),
    (
        [f"{PIPELINE}=2", f"{VIRTUAL}=2", "model.num_layers=7"],
        ["nearest legal: none, or set", "4 numbers that sum to 7"],
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
        # A tensor-parallel rank has two heads, which four modality-parallel ranks cannot split.
        [HEADS, f"{MODALITY}=4", f"{TENSOR}=4"],
        ["2 heads and 2 key-value heads of a tensor-parallel rank", "nearest legal: 2"],
        [f"{MODALITY}=2", f"{TENSOR}=2"],
    ),
    (
        # Four ranks can split 12 heads, but can neither split nor replicate 6 key-value heads.
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
        [f"{PLACEMENT}[1] names image", "not a tower", "allowed: text, vision, audio"],
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
            [f"{ZERO} = {stage}", f"{PIPELINE} = 2", "allows", "zero_stage 1 only"],
            [f"{ZERO}=1", f"{PIPELINE}=1"],
        )
        for stage in (0, 2, 3)
    ),
    *(
        (
            [f"{MODALITY}=2", f"{ZERO}={stage}"],
            [f"{ZERO} = {stage}", f"{MODALITY} = 2", "allows", "zero_stage 1 and 2"],
            [f"{ZERO}=1", f"{ZERO}=2", f"{MODALITY}=1"],
        )
        for stage in (0, 3)
    ),
    (
        # Both together allow stage 1 only, so the message must not suggest stage 2.
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
VECTORS = "model.modalities.image.objective.kind=flow_matching"
TRAINING = [
    (
        [
            f"model.modalities.{name}.objective.kind=diffusion"
            for name in ("text", "image", "speech")
        ],
        ["no model.modalities.*.objective.kind is next_token"],
        [],
    ),
    (
        [VECTORS, f"{MODALITY}=2"],
        [f"{MODALITY} = 2", 'image.objective.kind = "flow_matching"', "allowed: 1"],
        [f"{MODALITY}=1"],
    ),
    (
        [
            "model.modalities.image.objective.kind=diffusion",
            "model.modalities.image.objective.times=uniform",
        ],
        ['objective.times = "uniform" is for flow_matching'],
        [VECTORS],
    ),
    (
        ["model.modalities.image.objective.condition_dropout=0.1"],
        ["image.objective.condition_dropout is of vectors"],
        [VECTORS],
    ),
    (["model.modalities.image.width=8"], ["image.width = 8 is of vectors"], [VECTORS]),
    (
        ["checkpoint.keep_every_steps=1500"],
        ["checkpoint.keep_every_steps = 1500", "interval_steps = 1000", "legal: 1000 or 2000"],
        ["checkpoint.keep_every_steps=2000", "checkpoint.keep_every_steps=0"],
    ),
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
TEXT = "model.towers.text.experts"
EXPERT = "parallel.expert_model_parallel_size"


def mixture(settings: str = "num_moe_experts = 4") -> str:
    return f"{TEXT}={{ {settings} }}"


EXPERTS = [
    (
        [mixture("num_moe_experts = 6"), f"{EXPERT}=4"],
        [f"{TEXT}.num_moe_experts = 6", f"{EXPERT} = 4", f"nearest legal {EXPERT}: 1, 2, 3, 6"],
        [f"{EXPERT}={size}" for size in (1, 2, 3, 6)],
    ),
    (
        [mixture("num_moe_experts = 4, capacity_factor = 0.0625"), "data.seq_length=32"],
        [f"{TEXT}.capacity_factor = 0.0625", "4 experts less than one", "32 tokens", "least 0.125"],
        [mixture("num_moe_experts = 4, capacity_factor = 0.125"), "data.seq_length=64"],
    ),
    (
        [mixture("num_moe_experts = 64"), "data.seq_length=16"],
        [f"{TEXT}.capacity_factor = 1 ", "64 experts", "16 tokens", "at least 4"],
        [mixture("num_moe_experts = 64, capacity_factor = 4"), "training.micro_batch_size=4"],
    ),
    (  # 4 / 4096 = 0.0009765625: the suggested value must not be rounded below it
        [mixture("num_moe_experts = 4, capacity_factor = 0.000976562"), "data.seq_length=4096"],
        [f"{TEXT}.capacity_factor = 0.000976562", "least 0.000976563"],
        [f"{TEXT}.capacity_factor=0.000976563"],
    ),
    (  # the smallest legal value needs no rounding
        [mixture("num_moe_experts = 4, capacity_factor = 0.099"), "data.seq_length=40"],
        [f"{TEXT}.capacity_factor = 0.099", "least 0.1"],
        [f"{TEXT}.capacity_factor=0.1"],
    ),
    (
        [
            mixture('num_moe_experts = 4, routing = "topk", capacity_factor = 0.0001'),
            "data.seq_length=64",
        ],
        [f"{TEXT}.capacity_factor = 0.0001", "4 experts less than one", "64 tokens", "0.0625"],
        [f"{TEXT}.capacity_factor=0.0625"],
    ),
    (  # two experts per token make twice as many assignments
        [
            mixture('num_moe_experts = 4, routing = "topk", topk = 2, capacity_factor = 0.03'),
            "data.seq_length=64",
        ],
        [f"{TEXT}.capacity_factor = 0.03 ", "at least 0.03125"],
        [f"{TEXT}.capacity_factor=0.03125"],
    ),
    (
        [mixture("num_moe_experts = 4, capacity_factor = 4.5")],
        [f"{TEXT}.capacity_factor = 4.5", "num_moe_experts = 4", "at most 4"],
        [mixture("num_moe_experts = 4, capacity_factor = 4")],
    ),
    (
        [mixture('num_moe_experts = 4, routing = "topk", topk = 5')],
        [f"{TEXT}.topk = 5", "num_moe_experts = 4", "1 to 4"],
        [mixture('num_moe_experts = 4, routing = "topk", topk = 4')],
    ),
    *(
        (
            [mixture(f"num_moe_experts = 4, {key} = {value}")],
            [f"{TEXT}.{key} = {value}", 'routing = "topk"'],
            [
                mixture(f'num_moe_experts = 4, routing = "topk", {key} = {value}'),
                f"{TEXT}.routing=topk",
            ],
        )
        for key, value in (("topk", 1), ("aux_loss_coefficient", 0.01))
    ),
    (
        [mixture('num_moe_experts = 4, routing = "topk", causal_router = true')],
        [f"{TEXT}.causal_router = true", 'routing = "expert_choice"', "without later ones"],
        [f"{TEXT}.routing=expert_choice", f"{TEXT}.causal_router=false"],
    ),
    (
        [f"{EXPERT}=2"],
        [f"{EXPERT} = 2", "no tower has experts", "allowed without model.towers.NAME.experts: 1"],
        [f"{EXPERT}=1", mixture()],
    ),
    (
        [mixture(), f"{TENSOR}=2"],
        [f"{TENSOR} = 2 with experts", "parallel.sequence_parallel = true"],
        ["parallel.sequence_parallel=true", f"{TENSOR}=1"],
    ),
    (
        ["model.towers.image.experts={ num_moe_experts = 4 }"],
        ["model.towers.image is not a tower", "allowed: text, vision, audio"],
        ["model.modalities.image.tower=image"],
    ),
    (
        [mixture(), "model.untied.feed_forward=false"],
        ["model.untied.feed_forward = false", "allowed: true, or a single tower"],
        [
            "model.untied.feed_forward=true",
            'model.modalities={ text = { tower = "text" } }',
        ],
    ),
    *(
        (
            [mixture(), f"{EXPERT}=2", f"{ZERO}={stage}"],
            [f"{ZERO} = {stage}", f"{EXPERT} = 2", "zero_stage 1 and 2"],
            [f"{ZERO}=1", f"{ZERO}=2", f"{EXPERT}=1"],
        )
        for stage in (0, 3)
    ),
    (
        [mixture(), "model.ffn_hidden_size=90"],
        ["model.ffn_hidden_size = 90 with experts", "by 4 (4 numbers of", "fp32", "88 or 92"],
        ["model.ffn_hidden_size=88", "model.ffn_hidden_size=92"],
    ),
    (
        [
            mixture(),
            "model.ffn_hidden_size=88",
            f"{TENSOR}=2",
            "parallel.sequence_parallel=true",
            "training.precision=bf16",
        ],
        ["model.ffn_hidden_size = 88 with experts", "by 16 (8 numbers of", "bf16", "80 or 96"],
        ["model.ffn_hidden_size=96", "training.precision=fp32"],
    ),
    (
        [
            mixture("num_moe_experts = 3, causal_router = true"),
            "model.hidden_size=12",
            "model.num_attention_heads=1",
        ],
        ["model.hidden_size = 12 with experts", "by 8 (4 numbers of", "odd experts", "8 or 16"],
        ["model.hidden_size=16", f"{TEXT}.num_moe_experts=4"],
    ),
    (
        [mixture(), "model.hidden_size=10", "model.num_attention_heads=1"],
        ["model.hidden_size = 10 with experts", "legal: 8 or 12"],
        ["model.hidden_size=8", "model.hidden_size=12"],
    ),
]
ALL_FROZEN = [f"model.towers.{name}.frozen=true" for name in ("text", "vision", "audio")]
FROZEN = [
    (
        ["model.towers.text.frozen=true", "model.towers.text.lr_mult=0.5"],
        ["model.towers.text.lr_mult = 0.5 with frozen = true", "allowed: 1"],
        ["model.towers.text.lr_mult=1", "model.towers.text.frozen=false"],
    ),
    (
        [f"{PIPELINE}=4", *ALL_FROZEN],
        [f"{PIPELINE} = 4", "ranks hold only text, vision, audio", "at most 2 stages"],
        [f"{PIPELINE}=2", "model.towers.audio.frozen=false", "model.untied.norms=false"],
    ),
    (
        [
            f"{PIPELINE}=4",
            f"{MODALITY}=2",
            f"{PLACEMENT}=[{{text = 1, audio = 1}}, {{vision = 1}}]",
            "model.towers.vision.frozen=true",
        ],
        [f"{PIPELINE} = 4", "ranks hold only vision"],
        [f"{PIPELINE}=2", "model.towers.vision.frozen=false", f"{PLACEMENT}=auto"],
    ),
]
ILLEGAL = [
    *SHAPES,
    *TENSOR_PARALLEL,
    *PIPELINES,
    *EXCHANGES,
    *PLACEMENTS,
    *EXPERTS,
    *FROZEN,
    *ZERO_STAGES,
    *TRAINING,
]


@pytest.mark.parametrize(
    ("overrides", "parts", "remedies"), ILLEGAL, ids=[" ".join(case[0]) for case in ILLEGAL]
)
def test_illegal_combination_is_an_error_with_legal_suggestions(
    overrides: list[str], parts: list[str], remedies: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*overrides)
    message = str(caught.value)
    assert message.startswith("test.toml: ")
    assert_one_line(message)
    for part in parts:
        assert part in message
    for remedy in remedies:  # every value that the message suggests is legal
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
            # Thirds, rounded to three decimals.
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
        [mixture('num_moe_experts = 1, gate = "softmax"')],
        [mixture(), "model.towers.vision.experts={ num_moe_experts = 8 }", f"{EXPERT}=4"],
        [mixture("num_moe_experts = 4, causal_router = true"), f"{ZERO}=3"],
        [mixture(), f"{EXPERT}=2", f"{MODALITY}=2", f"{ZERO}=2"],
        [
            mixture('num_moe_experts = 4, routing = "topk", topk = 2, capacity_factor = 1.25'),
            f"{EXPERT}=4",
            f"{TENSOR}=2",
            f"{PIPELINE}=2",
            "parallel.sequence_parallel=true",
        ],
    ],
    ids=" ".join,
)
def test_legal_combination_parses(overrides: list[str]) -> None:
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
def test_world_size_not_divisible_by_the_layout_is_an_error(
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
        # Every rank of a modality group has its own sequences; pipeline stages share theirs.
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
def test_batch_size_not_divisible_by_the_layout_is_an_error(
    overrides: list[str], world_size: int, parts: list[str], legal: list[int]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world_size(parse(*overrides), world_size)
    assert_one_line(str(caught.value))
    for part in ("training.global_batch_size = 16 is not divisible by", *parts):
        assert part in str(caught.value)
    for size in legal:
        check_world_size(parse(*overrides, f"training.global_batch_size={size}"), world_size)


def test_divisible_world_sizes_are_legal() -> None:
    config = parse(f"{TENSOR}=2", "training.micro_batch_size=2")
    for world_size in (2, 4, 8):
        check_world_size(config, world_size)
    assert config.accumulation_steps(data_parallel_size=2) == 4  # 16 / (2 * 2)
    check_world_size(parse(f"{TENSOR}=2", f"{PIPELINE}=2", f"{MODALITY}=2"), 32)


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts", "legal"),
    [
        ([f"{EXPERT}=2"], 3, [f"{EXPERT} = 2", "the 3 data", "tower text", "legal: 1"], [1]),
        ([f"{EXPERT}=4"], 2, [f"{EXPERT} = 4", "the 2 data", "nearest legal: 1, 2"], [1, 2]),
        ([f"{EXPERT}=2", f"{PIPELINE}=2"], 2, ["the 1 data-parallel", "nearest legal: 1"], [1]),
    ],
)
def test_expert_parallel_size_must_divide_the_ranks_of_a_tower(
    overrides: list[str], world_size: int, parts: list[str], legal: list[int]
) -> None:
    batch = f"training.global_batch_size={world_size}"
    with pytest.raises(ConfigError) as caught:
        check_world_size(parse(mixture(), batch, *overrides), world_size)
    assert_one_line(str(caught.value))
    for part in parts:
        assert part in str(caught.value)
    for size in legal:
        check_world_size(parse(mixture(), batch, *overrides, f"{EXPERT}={size}"), world_size)


BLEND = "data.sources=[{corpus='a/web', weight=2}, {corpus='books', weight=1}]"


def test_one_of_corpus_and_sources_is_needed() -> None:
    for overrides, words in (
        ([BLEND], "both given"),
        (["-data.corpus"], "both absent"),
        (["-data.corpus", "data.sources=[]"], "both absent"),
    ):
        with pytest.raises(ConfigError) as error:
            parse(*overrides)
        message = str(error.value)
        assert_one_line(message)
        assert f"data.corpus and data.sources are {words}; needed: one of them" in message
    config = parse("-data.corpus", BLEND)
    assert [source.label for source in config.data.sources] == ["web", "books"]
    assert parse_config(config.to_toml(), "again") == config


def test_sources_have_different_names() -> None:
    same = "data.sources=[{corpus='a/web', weight=2}, {corpus='b/web', weight=1}]"
    with pytest.raises(ConfigError, match=r"2 sources named web; .*\(data.sources.name\)"):
        parse("-data.corpus", same)
    named = "data.sources=[{corpus='a/web', weight=2}, {corpus='b/web', weight=1, name='new'}]"
    assert parse("-data.corpus", named).data.sources[1].label == "new"


def test_losses_per_source_need_sources() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.per_source = true needs data.sources"):
        parse("evaluation.per_source=true")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{corpus='a'}", "test.toml: data.sources.0.weight: required, but absent"),
        ("{corpus='a', weight=0}", "data.sources.0.weight = 0: "),
        ("{corpus='a', weight=1, nam='x'}", "data.sources.0.nam: unknown key; did you mean name"),
    ],
)
def test_an_invalid_source_is_named(entry: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse("-data.corpus", f"data.sources=[{entry}]")
    assert message in str(error.value)
