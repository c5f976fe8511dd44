"""A tiny corpus with every codec, made in a fraction of a second, and a model that fits it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mot_megatron.config import Config
from mot_megatron.config_files import parse_config
from mot_megatron.data.codebooks.image import PatchCodec
from mot_megatron.data.codebooks.speech import UnitCodec
from mot_megatron.data.codebooks.text import TextCodec, train_text_codebook
from mot_megatron.data.corpus import Corpus, Modality
from mot_megatron.data.writer import CorpusWriter

SPECIAL = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<boa>", "<eoa>", "<en>", "<de>")
PAD, BOS, EOS, BOI, EOI, BOA, EOA, EN, DE = range(9)
TEXT_SIZE, IMAGE_SIZE, SPEECH_SIZE = 300, 16, 8
FIRST_IMAGE = TEXT_SIZE
FIRST_SPEECH = TEXT_SIZE + IMAGE_SIZE
VOCAB_SIZE = FIRST_SPEECH + SPEECH_SIZE
WORDS = ("red heart", "blue heart", "green tree", "small house")

CONFIG = """
[run]
name = "small"
[data]
seq_length = 160
[model]
num_layers = 2
hidden_size = 32
num_attention_heads = 4
num_query_groups = 2
ffn_hidden_size = 48
init_std = 0.3
[model.modalities]
text = { tower = "text" }
image = { tower = "image" }
speech = { tower = "speech" }
[training]
train_steps = 1
global_batch_size = 2
precision = "fp32"
"""


def make_corpus(directory: Path) -> Corpus:
    """Write four documents per split: a name, a picture and an utterance each, in varying order."""
    random = np.random.default_rng(3)
    text = Modality(name="text", first_id=0, size=TEXT_SIZE, codec="bpe", codebook="text.json")
    image = Modality(
        name="image",
        first_id=FIRST_IMAGE,
        size=IMAGE_SIZE,
        codec="image_patches",
        codebook="image.npz",
        begin_token=BOI,
        end_token=EOI,
    )
    speech = Modality(
        name="speech",
        first_id=FIRST_SPEECH,
        size=SPEECH_SIZE,
        codec="speech_units",
        codebook="speech.npz",
        begin_token=BOA,
        end_token=EOA,
    )
    tokenizer = train_text_codebook(WORDS, TEXT_SIZE, SPECIAL)
    codec = TextCodec.parse(tokenizer, text, "text.json")
    patches = PatchCodec(image, random.uniform(0, 255, (IMAGE_SIZE, 48)).astype(np.float32))
    units = UnitCodec(
        speech,
        random.normal(size=(SPEECH_SIZE, 160)).astype(np.float32),
        np.full(40, -5, dtype=np.float32),
    )
    writer = CorpusWriter(
        directory=directory,
        name="small",
        builder="tests 1",
        seed=3,
        modalities=[text, image, speech],
        pad_token=PAD,
        special_tokens={name: id_ for id_, name in enumerate(SPECIAL)},
    )
    with writer:
        writer.add_file("text.json", tokenizer)
        writer.add_file("image.npz", patches.save())
        writer.add_file("speech.npz", units.save())
        for split in ("train", "validation"):
            for number, words in enumerate(WORDS):
                drawn = random.integers(FIRST_IMAGE, FIRST_SPEECH, 64)
                spoken = random.integers(FIRST_SPEECH, VOCAB_SIZE, 6 + number)
                segments = [
                    [EN, *codec.encode(words)],
                    [BOI, *drawn, EOI],
                    [BOA, *spoken, EOA],
                ]
                order = segments[number % 3 :] + segments[: number % 3]
                ids = [BOS, *(id_ for segment in order for id_ in segment), EOS]
                writer.add_document(split, np.array(ids))
    return Corpus.open(directory)


def make_config(corpus: Corpus, *overrides: str) -> Config:
    """Return a two-layer configuration for the corpus; overrides are ``section.key=value``."""
    corpus_override = f'data.corpus="{corpus.directory}"'
    config = parse_config(CONFIG, "small", [corpus_override, *overrides])
    names = [modality.name for modality in corpus.description.modalities]
    return config.resolved_for(names, corpus.description.vocab_size)
