"""Continue a prompt in any modality, token by token, with a key-value cache.

The command line and the samples during training use the same function. As in training, a token uses
only its modality's tower: a step of n samples is a micro-batch of n sequences of one token. Expert
choice, which sees later tokens in training, is replaced by causal routers, and no expert drops
tokens.

Letters: n samples, p prompt tokens, s new tokens, V vocabulary rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from tqdm import tqdm

from mot_megatron.data.batches import build_micro_batch
from mot_megatron.data.codebooks import load_codec
from mot_megatron.data.codebooks.codec import Codec, SoundCodec
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import DataError
from mot_megatron.generation.kv_cache import KeyValueCache
from mot_megatron.generation.sampling import SamplingSettings, choose_tokens, draw_uniforms
from mot_megatron.generation.segments import PromptWriter, SegmentRules, held_out_prompt
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.routing import check_can_be_causal
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.rules import check_tokens_only


class Decoder:
    """Feeds tokens to a model and returns the logits of the next token."""

    def __init__(
        self,
        model: MixtureOfTransformers,
        modality_of_id: np.ndarray,
        num_samples: int,
        capacity: int,
    ) -> None:
        self.model = model
        self.modality_of_id = modality_of_id
        self.cache = KeyValueCache(num_samples, capacity)

    def feed(self, token_ids: np.ndarray) -> torch.Tensor:
        """Process tokens: first the prompt, [1, p] ids, then [n, 1] ids per call.

        Collectives: those of the forward pass, then an all-gather over the tensor-parallel group.

        Returns:
            Logits [1 or n, V] after the last token, equal on all tensor-parallel ranks.

        Raises:
            ConfigError: The routing needs later tokens, and there is no causal router.
        """
        model = self.model
        micro_batch = build_micro_batch(
            token_ids,
            np.zeros_like(token_ids),
            self.modality_of_id,
            model.config.towers_of_modalities,
            num_towers=model.config.num_towers,
            slot_multiple=model.groups.tensor_size if model.sequence_parallel else 1,
        )
        positions = micro_batch.positions + self.cache.length
        micro_batch = dataclasses.replace(micro_batch, positions=positions)
        # Call the module, not model.sequence_logits: ZeRO-3 gathers weights only in module calls.
        with model.routed_causally():
            (logits,) = model(micro_batch.to(model.groups.device), self.cache)
        self.cache.advance(token_ids.shape[1])
        last = logits.view(*token_ids.shape, -1)[:, -1].contiguous()
        return gather_from_tensor_model_parallel_region(last, group=model.groups.tensor)


@torch.no_grad()
def generate(
    model: MixtureOfTransformers,
    modality_of_id: np.ndarray,
    prompt: np.ndarray,
    rules: SegmentRules,
    settings: SamplingSettings,
    seq_length: int,
) -> list[np.ndarray]:
    """Generate the segment that ``prompt`` has opened, once per sample.

    Every rank of the model's groups must call this with equal arguments and gets the same result.
    Ids are broadcast from data-parallel rank 0: with ZeRO-3, ranks that stopped at different tokens
    would deadlock.

    Args:
        model: The bare module, not DeepSpeed's engine.
        modality_of_id: [vocab_size] of the corpus; later vocabulary rows are padding.
        prompt: [p] ids.
        rules: Rules of the modality to generate.
        settings: Sampling settings, with the number of samples.
        seq_length: Maximum number of tokens of prompt and continuation.

    Returns:
        Ids of each sample, without the prompt and without the token that ends the segment. There is
        at least one id, unless the last item of the prompt is already complete.

    Raises:
        DataError: The prompt is empty, or leaves too little room.
        ConfigError: The routing needs later tokens, and there is no causal router.
        TrainingError: The model's logits are not finite.
    """
    begun = len(rules.open_item(prompt))
    num_tokens = _room(prompt, begun, rules, settings, seq_length)
    if num_tokens == 0:
        return [prompt[:0]] * settings.num_samples
    decoder = Decoder(model, modality_of_id, settings.num_samples, len(prompt) + num_tokens)
    chooser = _Chooser(rules, settings, num_tokens, model.groups)
    chosen = np.zeros((settings.num_samples, num_tokens), dtype=np.int64)
    lengths = np.full(settings.num_samples, num_tokens)
    logits = decoder.feed(prompt[None]).expand(settings.num_samples, -1)
    steps = tqdm(
        range(num_tokens),
        desc=rules.modality.name,
        disable=model.groups.rank != 0 or None,  # None: unless standard error is a terminal
        delay=5,
        ncols=100,
        leave=False,
    )
    for step in steps:
        chosen[:, step] = chooser(logits, step, may_end=begun + step > 0)
        ended = np.isin(chosen[:, step], rules.ends)
        lengths[ended] = np.minimum(lengths[ended], step)
        if step + 1 == num_tokens or (lengths <= step).all():
            break
        # Keep computing samples that have ended: dropping rows would copy the cache.
        logits = decoder.feed(chosen[:, step, None])
    return [ids[:length] for ids, length in zip(chosen, lengths, strict=True)]


def _room(
    prompt: np.ndarray,
    begun: int,
    rules: SegmentRules,
    settings: SamplingSettings,
    seq_length: int,
) -> int:
    """Return the maximum number of tokens to generate."""
    if not prompt.size:
        raise DataError("the prompt is empty, expected at least one token")
    fixed = rules.num_tokens
    wanted = settings.max_tokens if fixed is None else max(0, fixed - begun)
    needed = 1 if fixed is None else wanted
    room = seq_length - len(prompt)
    if room < needed:
        raise DataError(
            f"the prompt has {len(prompt)} tokens, expected at most {seq_length - needed}:"
            f" the model's data.seq_length is {seq_length}, and {rules.modality.name} needs"
            f" {needed} of it"
        )
    return min(wanted, room)


class _Chooser:
    """Chooses the next token of each sample, with the same result on all ranks."""

    def __init__(
        self,
        rules: SegmentRules,
        settings: SamplingSettings,
        num_tokens: int,
        groups: ProcessGroups,
    ) -> None:
        self.settings = settings
        self.groups = groups
        self.content = torch.from_numpy(rules.content).to(groups.device)
        ends = torch.from_numpy(rules.ends).to(groups.device)
        # An item of fixed length needs no end token; other items have at least one token.
        self.with_ends = (
            torch.cat((self.content, ends)) if rules.num_tokens is None else self.content
        )
        self.uniforms = draw_uniforms(settings.seed, settings.num_samples, num_tokens)

    def __call__(self, logits: torch.Tensor, step: int, may_end: bool) -> np.ndarray:
        """Choose ids [n] from logits [n, V]; one broadcast over the data-parallel group."""
        legal = self.with_ends if may_end else self.content
        ids = choose_tokens(logits, legal, self.settings, self.uniforms[:, step])
        if self.groups.data_size > 1:
            ids = ids.to(self.groups.device)
            dist.broadcast(ids, group=self.groups.data, group_src=0)
        return ids.cpu().numpy()


@dataclass(frozen=True)
class Item:
    """A generated text, picture or sound, as ids and decoded."""

    codec: Codec
    token_ids: np.ndarray

    @cached_property
    def media(self) -> Any:
        """Decoded value: a string, pixels uint8 [h, w, 3] or sound float32 [n]."""
        return self.codec.decode(self.token_ids)

    @property
    def sample_rate(self) -> int:
        """Samples per second of a sound; 0 of other media."""
        return self.codec.sample_rate if isinstance(self.codec, SoundCodec) else 0

    def write(self, path: Path) -> None:
        """Write a file with the codec's suffix."""
        self.codec.write(self.token_ids, path)


@dataclass(frozen=True)
class HeldOutSample:
    """A segment generated for a held-out document, with the true segment."""

    prompt: str
    """Text of the other segments of the document; empty if there is none."""
    truth: Item
    generated: Item


class Generator:
    """A model together with the codecs of its corpus.

    A modality without a codec can only be generated as ids.

    Raises:
        ConfigError: The routing needs later tokens, and there is no causal router; or a modality
            consists of vectors.
        DataError: A codebook cannot be read.
    """

    def __init__(self, model: MixtureOfTransformers, corpus: Corpus, seq_length: int) -> None:
        check_can_be_causal(model.config)
        check_tokens_only(model.config, "generation")
        self.model = model
        self.corpus = corpus
        self.seq_length = seq_length
        self.codecs: dict[str, Codec] = {
            modality.name: load_codec(corpus.directory, modality)
            for modality in corpus.description.modalities
            if modality.codebook is not None
        }

    @cached_property
    def prompts(self) -> PromptWriter:
        """Encoder of user prompts.

        Raises:
            DataError: The corpus has no text modality.
        """
        return PromptWriter.of(self.corpus.directory, self.codecs.values(), self.corpus.description)

    def rules(self, name: str) -> SegmentRules:
        """Return the rules of the modality called ``name``, which has a codec.

        Raises:
            DataError: There is no such modality, or it has no codec.
        """
        if not self.codecs:
            raise DataError(
                f"{self.corpus.directory}: no modality has a codec, so items can only be generated"
                " as token ids, with --ids"
            )
        if name not in self.codecs:
            raise DataError(f"modality {name!r}, expected one of: {', '.join(self.codecs)}")
        return self.rules_of_ids(name)

    def rules_of_ids(self, name: str) -> SegmentRules:
        """Return the rules of the modality called ``name``, with or without a codec.

        Raises:
            DataError: There is no such modality.
        """
        by_name = {modality.name: modality for modality in self.corpus.description.modalities}
        if name not in by_name:
            raise DataError(f"modality {name!r}, expected one of: {', '.join(by_name)}")
        return SegmentRules.of(self.corpus.description, by_name[name], self.codecs.get(name))

    def continue_text(
        self, text: str, into: str, settings: SamplingSettings, language: str | None = None
    ) -> list[Item]:
        """Continue a user's prompt in the modality called ``into``.

        If the prompt ends within an item, the result includes the beginning of the item.

        Raises:
            DataError: The modality or language is unknown, the prompt is too long, or the corpus
                has no text.
            TrainingError: The model's logits are not finite.
        """
        rules = self.rules(into)
        prompt = rules.opened(self.prompts.encode(text, language))
        begun = rules.open_item(prompt)
        continued = self._generate(prompt, rules, settings)
        return [self._item(rules, np.append(begun, ids)) for ids in continued]

    def continue_ids(
        self, prompt: np.ndarray, into: str, settings: SamplingSettings
    ) -> list[np.ndarray]:
        """Continue a prompt of token ids [p] in the modality called ``into``, as ``continue_text``.

        Returns:
            Ids of each item, including those at the end of the prompt that began it.

        Raises:
            DataError: The modality is unknown, the prompt is too long, or an id is outside the
                vocabulary.
            TrainingError: The model's logits are not finite.
        """
        rules = self.rules_of_ids(into)
        vocab_size = self.corpus.description.vocab_size
        wrong = prompt[(prompt < 0) | (prompt >= vocab_size)]
        if wrong.size:
            raise DataError(f"prompt: token id {wrong[0]}, expected 0..{vocab_size - 1}")
        prompt = rules.opened(prompt)
        begun = rules.open_item(prompt)
        return [np.append(begun, ids) for ids in self._generate(prompt, rules, settings)]

    def continue_held_out(
        self, split: str, into: str, settings: SamplingSettings, num_documents: int
    ) -> list[HeldOutSample]:
        """Generate the ``into`` segment of the first documents of a split that have one.

        The prompt consists of all other segments of the document. There is one sample per document,
        regardless of ``settings.num_samples``. As with ``generate``, every rank must call this.

        Raises:
            DataError: The split or modality is unknown.
            TrainingError: The model's logits are not finite.
        """
        rules = self.rules(into)
        settings = dataclasses.replace(settings, num_samples=1)
        samples: list[HeldOutSample] = []
        for document in itertools.chain.from_iterable(self.corpus.parts(split)):
            if len(samples) == num_documents:
                break
            held_out = held_out_prompt(self.corpus.description, rules, document)
            if held_out is None:
                continue
            ids = self._generate(held_out.prompt, rules, settings)[0]
            samples.append(
                HeldOutSample(
                    self._text(held_out.prompt),
                    self._item(rules, held_out.truth),
                    self._item(rules, ids),
                )
            )
        return samples

    def _generate(
        self, prompt: np.ndarray, rules: SegmentRules, settings: SamplingSettings
    ) -> list[np.ndarray]:
        table = self.corpus.description.modality_of_id
        return generate(self.model, table, prompt, rules, settings, self.seq_length)

    def _item(self, rules: SegmentRules, token_ids: np.ndarray) -> Item:
        return Item(self.codecs[rules.modality.name], token_ids)

    def _text(self, prompt: np.ndarray) -> str:
        parts = []
        for codec in self.codecs.values():
            if isinstance(codec, TextCodec):
                content = self.rules(codec.modality.name).content
                parts.append(codec.decode(prompt[np.isin(prompt, content)]))
        return "\n".join(parts)
