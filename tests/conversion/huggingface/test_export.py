"""Exported models compute the same logits in the transformers library, and generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mot_megatron.data.corpus import Corpus
from tests.conversion.huggingface.exported import (
    BIASES,
    CHOSEN,
    DENSE,
    NO_QK_NORM,
    PRE,
    TIED,
    TOP2,
    export,
    own_logits,
    random_ids,
    random_model,
    save_run,
)
from tests.small_corpus import make_config, make_corpus

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def load(directory: Path, **changes: object) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **changes).eval()


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ([*DENSE, PRE], "qwen3"),
        ([*DENSE, PRE, TIED], "qwen3"),
        ([*DENSE, PRE, NO_QK_NORM], "llama"),
        ([*DENSE, PRE, NO_QK_NORM, BIASES], "qwen2"),
        ([*DENSE, PRE, BIASES], "mixture_of_transformers"),
        (DENSE, "mixture_of_transformers"),
        ([], "mixture_of_transformers"),
        ([PRE, BIASES, TIED], "mixture_of_transformers"),
        (["model.untied.qkv=false", "model.untied.norms=false"], "mixture_of_transformers"),
        ([CHOSEN, TOP2], "mixture_of_transformers"),
    ],
)
def test_logits_equal(tmp_path: Path, corpus: Corpus, overrides: list[str], kind: str) -> None:
    config = make_config(corpus, *overrides, f'run.directory="{tmp_path}"')
    model = random_model(config)
    folder = export(save_run(model, config, corpus), corpus, tmp_path / "out", shard_bytes=1 << 16)
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == kind
    loaded = load(folder)
    ids = random_ids(1, corpus, (2, 33))
    with torch.no_grad():
        logits = loaded(ids).logits
    expected = own_logits(model, corpus, ids)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < TOLERANCE * max(1, expected.abs().max())


@pytest.mark.parametrize(
    "overrides", [[*DENSE, PRE], [], [PRE, BIASES, "model.untied.qkv=false"], [CHOSEN, TOP2]]
)
def test_generates_with_a_cache_as_without(
    tmp_path: Path, corpus: Corpus, overrides: list[str]
) -> None:
    config = make_config(corpus, *overrides, f'run.directory="{tmp_path}"')
    model = random_model(config)
    loaded = load(export(save_run(model, config, corpus), corpus, tmp_path / "out"))
    prompts = random_ids(2, corpus, (3, 9))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = loaded.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    assert ids.shape == (3, 21)
    logits = own_logits(model, corpus, ids)
    used = corpus.description.vocab_size
    assert torch.equal(logits[:, 8:-1, :used].argmax(-1), ids[:, 9:])
    again = loaded.generate(
        prompts, attention_mask=torch.ones_like(prompts), use_cache=False, **options
    )
    assert torch.equal(ids, again)


@pytest.mark.parametrize("overrides", [[], [PRE, CHOSEN, TOP2]])
def test_padding_on_the_left_changes_nothing(
    tmp_path: Path, corpus: Corpus, overrides: list[str]
) -> None:
    config = make_config(corpus, *overrides, f'run.directory="{tmp_path}"')
    model = random_model(config)
    loaded = load(export(save_run(model, config, corpus), corpus, tmp_path / "out"))
    long, short = random_ids(3, corpus, (1, 10)), random_ids(4, corpus, (1, 6))
    pad = torch.full((1, 4), corpus.description.pad_token)
    batch = torch.cat((long, torch.cat((pad, short), dim=1)))
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    both = loaded.generate(batch, attention_mask=mask, **options)
    for row, prompt in ((0, long), (1, short)):
        alone = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(both[row, -8:], alone[0, -8:])


def test_experts_route_as_in_training_on_request(tmp_path: Path, corpus: Corpus) -> None:
    """Expert choice, and capacities that drop tokens, depend on all tokens of the batch."""
    config = make_config(corpus, CHOSEN, TOP2, f'run.directory="{tmp_path}"')
    model = random_model(config)
    folder = export(save_run(model, config, corpus), corpus, tmp_path / "out")
    loaded = load(folder, route_causally=False)
    ids = random_ids(5, corpus, (2, 40))
    with torch.no_grad():
        logits = loaded(ids).logits
    expected = own_logits(model, corpus, ids, causal=False)
    assert (expected - own_logits(model, corpus, ids)).abs().max() > 1e-2
    assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()
    with pytest.raises(ValueError, match="route_causally is false"):
        loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)


def test_loss_and_gradients(tmp_path: Path, corpus: Corpus) -> None:
    config = make_config(corpus, TOP2, f'run.directory="{tmp_path}"')
    model = random_model(config)
    loaded = load(export(save_run(model, config, corpus), corpus, tmp_path / "out"))
    ids = random_ids(6, corpus, (2, 16))
    outputs = loaded(ids, labels=ids)
    outputs.loss.backward()
    logits = own_logits(model, corpus, ids)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    assert all(p.grad is not None for name, p in loaded.named_parameters() if "experts" not in name)


def test_files_of_an_export(tmp_path: Path, corpus: Corpus) -> None:
    config = make_config(corpus, f'run.directory="{tmp_path}"')
    run = save_run(random_model(config), config, corpus)
    folder = export(run, corpus, tmp_path / "out", torch.bfloat16, 30_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 35_000 for path in shards)
    assert not list(folder.glob("*.bin"))
    loaded = load(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("<bos><en>red heart<boi>")["input_ids"]
    assert ids == [1, 7, *ids[2:-1], 3]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "red heart"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert Corpus.open_vocabulary(folder).vocabulary_digest == corpus.vocabulary_digest
