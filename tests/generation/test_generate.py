"""Generation with a cache equals the full forward pass and produces only legal documents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from mot_megatron.data.batches import build_micro_batch
from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.loader import DataShard, PackedLoader
from mot_megatron.errors import ConfigError, DataError
from mot_megatron.generation.generate import Decoder, Generator
from mot_megatron.generation.sampling import SamplingSettings
from mot_megatron.generation.segments import SegmentRules, held_out_prompt
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.parallel.groups import build_process_groups, build_single_process_groups
from mot_megatron.train.session import build_groups, build_session, grouping_plan
from tests.model.algorithm_one import AlgorithmOne
from tests.model.small_models import modality_of_id, random_tokens, single_rank_model, small_config
from tests.ranks import run_ranks
from tests.small_corpus import (
    BOA,
    BOI,
    BOS,
    DE,
    EN,
    EOS,
    FIRST_IMAGE,
    FIRST_SPEECH,
    TEXT_SIZE,
    VOCAB_SIZE,
    make_config,
    make_corpus,
)

CPU = torch.device("cpu")
TOWERS = {
    1: {"text": "all", "image": "all", "speech": "all"},
    2: {"text": "text", "image": "other", "speech": "other"},
    3: {"text": "text", "image": "image", "speech": "speech"},
}
SHAPES = [
    (),
    ("model.num_query_groups=2", "model.norm_placement=pre"),
    ("model.num_query_groups=1", "model.untie_embeddings_and_output_weights=false"),
    ("model.untied.qkv=false", "model.untied.norms=false", "model.qk_norm=false"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("generate") / "corpus")


@pytest.fixture(scope="module")
def generator(corpus: Corpus) -> Generator:
    config = make_config(corpus)
    model = MixtureOfTransformers(config, build_single_process_groups(CPU))
    return Generator(model, corpus, config.data.seq_length)


def one_document(model: MixtureOfTransformers, ids: np.ndarray, table: np.ndarray) -> torch.Tensor:
    """Return logits [b, s, V] of sequences of one document each, in one pass without a cache."""
    micro_batch = build_micro_batch(
        ids,
        np.zeros_like(ids),
        table,
        model.config.towers_of_modalities,
        num_towers=model.config.num_towers,
    )
    return model.sequence_logits(micro_batch).view(*ids.shape, -1)


@pytest.mark.parametrize("num_towers", TOWERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_cached_logits_equal_the_full_forward(
    num_towers: int, shape: tuple[str, ...], dtype: torch.dtype, tolerance: float
):
    towers = TOWERS[num_towers]
    model = single_rank_model(small_config(towers, "model.init_std=0.1", *shape), dtype)
    table = modality_of_id(list(towers))
    for seed, prompt_tokens in ((0, 1), (1, 9)):
        # Samples share the prompt and differ after it, in ids and in modalities.
        ids = random_tokens(seed, list(towers), (1, 1, 1), (3, prompt_tokens + 12)).token_ids
        ids[:, :prompt_tokens] = ids[0, :prompt_tokens]
        with torch.no_grad():
            full = one_document(model, ids, table)
            decoder = Decoder(model, table, num_samples=3, capacity=ids.shape[1])
            after_prompt = decoder.feed(ids[:1, :prompt_tokens])
            columns = ids[:, prompt_tokens:].T
            cached = [after_prompt.expand(3, -1), *(decoder.feed(ids[:, None]) for ids in columns)]
        torch.testing.assert_close(
            torch.stack(cached, dim=1), full[:, prompt_tokens - 1 :], rtol=tolerance, atol=tolerance
        )


EXPERTS = {
    "causal router": "{num_moe_experts=4,causal_router=true,capacity_factor=2.0}",
    "no drops": '{num_moe_experts=4,routing="topk",capacity_factor=0.5}',
}
MIXTURES = [f"model.towers.{tower}.experts=" for tower in ("text", "image")]


@pytest.mark.parametrize("experts", EXPERTS.values(), ids=EXPERTS)
def test_cached_logits_equal_the_causally_routed_full_forward(experts: str):
    """In training, routing depends on later tokens, so the logits differ."""
    towers = TOWERS[3]
    overrides = ("model.init_std=0.3", *(mixture + experts for mixture in MIXTURES))
    model = single_rank_model(small_config(towers, *overrides))  # grouped_mm does not support fp64
    table = modality_of_id(list(towers))
    ids = random_tokens(2, list(towers), (1, 1, 1), (3, 24)).token_ids
    ids[:, :9] = ids[0, :9]
    with torch.no_grad():
        with model.routed_causally():
            full = one_document(model, ids, table)
        decoder = Decoder(model, table, num_samples=3, capacity=ids.shape[1])
        cached = [decoder.feed(ids[:1, :9]).expand(3, -1)]
        cached += [decoder.feed(column[:, None]) for column in ids[:, 9:].T]
        as_trained = one_document(model, ids, table)
    torch.testing.assert_close(torch.stack(cached, dim=1), full[:, 8:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(as_trained, full, atol=1e-2)


def test_causal_routing_is_switched_off_after_an_error():
    experts = MIXTURES[0] + EXPERTS["causal router"]
    model = single_rank_model(small_config(TOWERS[3], experts))

    def fail() -> None:
        with model.routed_causally():
            assert model.routing.causal
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not model.routing.causal


def test_sequence_logits_are_in_sequence_order():
    towers = TOWERS[3]
    model = single_rank_model(small_config(towers), torch.float64)
    tokens = random_tokens(4, list(towers), (1, 1, 1))
    micro_batch = tokens.micro_batch(small_config(towers))
    expected = AlgorithmOne(model).logits(tokens)[1]
    torch.testing.assert_close(model.sequence_logits(micro_batch), expected, rtol=1e-10, atol=1e-10)


def test_greedy_decoding_follows_the_full_forward(generator: Generator):
    settings = SamplingSettings(temperature=0, max_tokens=8)
    rules = generator.rules("speech")
    prompt = rules.opened(generator.prompts.encode("red heart"))
    item = generator.continue_text("red heart", "speech", settings)[0]
    table = generator.corpus.description.modality_of_id
    sequence = np.append(prompt, item.token_ids)
    with torch.no_grad():
        logits = one_document(generator.model, sequence[None], table)[0, len(prompt) - 1 :]
    for step, chosen in enumerate(item.token_ids):
        legal = rules.content if step == 0 else np.append(rules.content, rules.ends)
        assert chosen == legal[logits[step, legal].argmax()]
    again = generator.continue_text("red heart", "speech", settings)[0]
    assert np.array_equal(item.token_ids, again.token_ids)


def test_samples_depend_on_the_seed_but_not_on_their_number(generator: Generator):
    def drawn(into: str, **settings: int) -> list[list[int]]:
        items = generator.continue_text("tree", into, SamplingSettings(**settings))
        return [item.token_ids.tolist() for item in items]

    for into in ("image", "speech", "text"):
        three = drawn(into, seed=7, num_samples=3, max_tokens=40)
        assert three == drawn(into, seed=7, num_samples=3, max_tokens=40)
        assert three[:1] == drawn(into, seed=7, num_samples=1, max_tokens=40)
        assert three != drawn(into, seed=8, num_samples=3, max_tokens=40)
        assert three[0] != three[1]


def test_only_legal_ids_are_generated(corpus: Corpus):
    config = make_config(corpus)
    model = MixtureOfTransformers(config, build_single_process_groups(CPU))
    weight = dict(model.named_parameters())["head.linear.weight"]
    assert weight.shape[0] > VOCAB_SIZE
    with torch.no_grad():
        weight[VOCAB_SIZE:] *= 50  # would nearly always be chosen if padding rows were legal
        weight[EOS] *= 50
    generator = Generator(model, corpus, config.data.seq_length)
    settings = SamplingSettings(num_samples=8, max_tokens=20, temperature=2.0)
    ranges = {
        "text": (9, TEXT_SIZE),
        "image": (FIRST_IMAGE, FIRST_SPEECH),
        "speech": (FIRST_SPEECH, VOCAB_SIZE),
    }
    lengths = {}
    for into, (first, end) in ranges.items():
        items = generator.continue_text("", into, settings)
        ids = np.concatenate([item.token_ids for item in items])
        assert ids.min() >= first
        assert ids.max() < end
        lengths[into] = {len(item.token_ids) for item in items}
    assert lengths["image"] == {64}
    assert min(lengths["speech"]) >= 1
    # The boosted <eos> ends text; it cannot end speech, whose end token is <eoa>.
    assert min(lengths["text"]) < 20


def test_rules_come_from_the_description(corpus: Corpus):
    by_name = {
        modality.name: SegmentRules.of(
            corpus.description, modality, load_codec(corpus.directory, modality)
        )
        for modality in corpus.description.modalities
    }
    assert by_name["text"].content.tolist() == list(range(9, TEXT_SIZE))
    assert by_name["text"].ends.tolist() == [EOS, BOI, BOA, EN, DE]
    assert by_name["image"].ends.tolist() == [4]
    assert [rules.num_tokens for rules in by_name.values()] == [None, 64, None]


def test_prompts_begin_with_the_tokens_that_begin_a_document(generator: Generator):
    encode = generator.prompts.encode
    name = generator.prompts.codec.encode("red heart")
    assert encode("red heart").tolist() == [BOS, EN, *name]
    assert encode("red heart", "de").tolist() == [BOS, DE, *name]
    assert encode("<de> red heart <boi>").tolist() == [BOS, DE, *name, BOI]
    assert encode("<bos>").tolist() == [BOS]
    assert encode("").tolist() == [BOS, EN]
    image = generator.rules("image")
    assert image.opened(encode("red heart"))[-1] == BOI
    assert image.opened(encode("<bos><boi>")).tolist() == [BOS, BOI]
    assert generator.rules("text").opened(encode("")).tolist() == [BOS, EN]
    with pytest.raises(DataError, match="language 'xx', expected one of: de, en"):
        encode("red heart", "xx")


def test_continued_text_includes_the_beginning_from_the_prompt(generator: Generator):
    item = generator.continue_text("red hea", "text", SamplingSettings(max_tokens=3))[0]
    assert item.media.startswith("red hea")
    assert 0 <= len(item.token_ids) - len(generator.prompts.codec.encode("red hea")) <= 3


def test_held_out_prompts_contain_all_other_segments(corpus: Corpus, generator: Generator):
    delimiters = {"text": EN, "image": BOI, "speech": BOA}
    for document in corpus.split("validation"):
        for into, begin in delimiters.items():
            rules = generator.rules(into)
            held_out = held_out_prompt(corpus.description, rules, document)
            assert held_out is not None
            assert held_out.prompt[0] == BOS
            assert held_out.prompt[-1] == begin
            assert not np.isin(held_out.prompt, rules.content).any()
            rest = [*held_out.prompt, *held_out.truth, *rules.ends[: into != "text"], EOS]
            assert sorted(rest) == sorted(document.tolist())
    only_image = np.array([BOI, *[FIRST_IMAGE] * 64])
    assert held_out_prompt(corpus.description, generator.rules("speech"), only_image) is None


def test_held_out_samples_are_decoded(generator: Generator):
    shapes = {}
    for into in generator.codecs:
        samples = generator.continue_held_out(
            "validation", into, SamplingSettings(max_tokens=5), num_documents=2
        )
        assert len(samples) == 2
        truth = samples[1].truth.media
        shapes[into] = truth if isinstance(truth, str) else (truth.shape, truth.dtype)
        assert type(samples[1].generated.media) is type(truth)
        assert samples[1].prompt == ("" if into == "text" else "blue heart")
    # 7 units of 40 ms at 16 kHz
    sound = shapes.pop("speech")
    assert shapes == {"text": "blue heart", "image": ((32, 32, 3), np.uint8)}
    assert sound[1] == np.float32
    assert sound[0][0] == pytest.approx(7 * 640, abs=640)


@pytest.mark.parametrize(
    ("text", "into", "message"),
    [
        ("red heart", "video", "modality 'video', expected one of: text, image, speech"),
        ("a b c d e f " * 30, "speech", "expected at most 159: the model's data.seq_length is 160"),
        ("a b c d e f " * 9, "image", "expected at most 96: .* image needs 64 of it"),
    ],
)
def test_invalid_requests_are_errors(generator: Generator, text: str, into: str, message: str):
    with pytest.raises(DataError, match=message):
        generator.continue_text(text, into, SamplingSettings())


def test_prompt_and_continuation_fit_in_the_sequence(generator: Generator):
    text = "a b c d e f " * 12
    prompt = len(generator.prompts.encode(text)) + 1
    room = 160 - prompt
    items = generator.continue_text(text, "speech", SamplingSettings(num_samples=4))
    assert max(len(item.token_ids) for item in items) <= room


def test_experts_without_a_causal_router_cannot_generate(corpus: Corpus):
    config = make_config(corpus, MIXTURES[1] + "{num_moe_experts=4}")
    model = MixtureOfTransformers(config, build_single_process_groups(CPU))
    needed = (
        r"needed, from the start of training: model\.towers\.image\.experts\.causal_router = true"
    )
    with pytest.raises(ConfigError, match=needed):
        Generator(model, corpus, config.data.seq_length)
    decoder = Decoder(model, corpus.description.modality_of_id, num_samples=1, capacity=2)
    with pytest.raises(ConfigError, match=needed):
        decoder.feed(np.array([[BOS]]))


LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tensor": (2, ("parallel.tensor_model_parallel_size=2",)),
    "sequence": (
        2,
        ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
    ),
    "data": (1, ()),
}


def generated_ids(generator: Generator, *names: str) -> Mapping[str, list[list[int]]]:
    settings = SamplingSettings(num_samples=3, seed=2, max_tokens=12)
    return {
        into: [item.token_ids.tolist() for item in generator.continue_text("ab", into, settings)]
        for into in names or generator.codecs
    }


def generate_on_ranks(directory: Path) -> dict[str, Mapping[str, list[list[int]]]]:
    corpus = Corpus.open(directory)
    results = {}
    for name, (tensor, overrides) in LAYOUTS.items():
        groups = build_process_groups(tensor, CPU)
        # Data-parallel ranks must stop at the same token even if rounding makes them differ. An
        # extreme case: each has different weights.
        seed = f"run.seed={1234 + groups.data_rank}"
        config = make_config(corpus, seed, *overrides)
        model = MixtureOfTransformers(config, groups, torch.float64)
        results[name] = generated_ids(Generator(model, corpus, config.data.seq_length))
        parallel_state.destroy_model_parallel()
    return results


ZERO_3 = "parallel.zero_stage=3"
TIED = "model.untie_embeddings_and_output_weights=false"


def generate_under_zero_3(directory: Path) -> list[tuple[float, Mapping[str, list[list[int]]]]]:
    """Return (loss, ids) of a training step after sampling, with and without a separate head."""
    corpus = Corpus.open(directory)
    groups = build_process_groups(1, CPU)
    results = []
    for overrides in ((ZERO_3,), (ZERO_3, TIED)):
        session = build_session(make_config(corpus, *overrides), corpus, groups)
        generator = Generator(session.model, corpus, session.config.data.seq_length)
        # Omit images to save time: each of their 64 tokens gathers all weights.
        ids = generated_ids(generator, "text", "speech")
        loss = session.engine.forward(session.loader.next_micro_batch())[0]
        session.engine.backward(loss / 1000)
        results.append((loss.item(), ids))
    return results


@pytest.mark.slow
def test_zero_3_generates_the_same_ids_and_then_the_same_loss(corpus: Corpus):
    ranks = run_ranks(generate_under_zero_3, 2, corpus.directory)
    for case, overrides in enumerate(((), (TIED,))):
        groups = build_single_process_groups(CPU)
        config = make_config(corpus, *overrides)
        model = MixtureOfTransformers(config, groups)
        generator = Generator(model, corpus, config.data.seq_length)
        expected = generated_ids(generator, "text", "speech")
        plan = grouping_plan(config)
        for rank, results in enumerate(ranks):
            loader = PackedLoader(
                corpus,
                "train",
                seq_length=config.data.seq_length,
                micro_batch_size=1,
                grouping=plan,
                shard=DataShard(rank, 2),
                seed=config.run.seed,
            )
            loss, ids = results[case]
            assert ids == expected
            assert loss == pytest.approx(model(loader.next_micro_batch())[0].item(), rel=1e-6)


@pytest.mark.slow
def test_every_layout_generates_the_same_ids(corpus: Corpus):
    config = make_config(corpus)
    model = MixtureOfTransformers(config, build_single_process_groups(CPU), torch.float64)
    expected = generated_ids(Generator(model, corpus, config.data.seq_length))
    for results in run_ranks(generate_on_ranks, 2, corpus.directory):
        for name in LAYOUTS:
            assert results[name] == expected, name


WITH_EXPERTS = MIXTURES[0] + EXPERTS["causal router"]
EXPERT_LAYOUTS = (("parallel.expert_model_parallel_size=2",), LAYOUTS["sequence"][1])


def generate_with_experts(directory: Path) -> list[Mapping[str, list[list[int]]]]:
    corpus = Corpus.open(directory)
    results = []
    for overrides in EXPERT_LAYOUTS:
        config = make_config(corpus, WITH_EXPERTS, *overrides)
        groups = build_groups(config, corpus, CPU)
        model = MixtureOfTransformers(config, groups)
        results.append(generated_ids(Generator(model, corpus, config.data.seq_length)))
        parallel_state.destroy_model_parallel()
    return results


@pytest.mark.slow
def test_experts_on_several_ranks_generate_the_same_ids(corpus: Corpus):
    config = make_config(corpus, WITH_EXPERTS)
    model = MixtureOfTransformers(config, build_single_process_groups(CPU))
    expected = generated_ids(Generator(model, corpus, config.data.seq_length))
    for results in run_ranks(generate_with_experts, 2, corpus.directory):
        assert results == [expected] * len(EXPERT_LAYOUTS)
