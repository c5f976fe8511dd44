"""A small corpus and a small configuration that the tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mot_megatron.config import Config
from mot_megatron.config_files import parse_config
from mot_megatron.data.corpus import Modality
from mot_megatron.data.writer import CorpusWriter

SEQ_LENGTH = 64
MODALITIES = (
    Modality(name="text", first_id=0, size=100),
    Modality(name="image", first_id=100, size=60),
    Modality(name="speech", first_id=160, size=32),
)

# adam_eps: with the usual 1e-8, an element whose true gradient is 0 would move by a whole learning
# rate per step in the direction of its rounding error, so layouts that sum in different orders
# could never agree.
CONFIG = """
[run]
name = "small"
seed = 3
[data]
corpus = "{corpus}"
seq_length = 64
[model]
num_layers = 2
hidden_size = 32
num_attention_heads = 4
num_query_groups = 2
ffn_hidden_size = 48
init_std = 0.1
[model.modalities]
text = {{ tower = "text" }}
image = {{ tower = "image", loss_weight = 0.5 }}
speech = {{ tower = "speech" }}
[optimizer]
lr = 1e-2
lr_warmup_steps = 2
adam_eps = 1e-4
clip_grad = 0.5
[training]
train_steps = 20
micro_batch_size = 1
global_batch_size = 8
precision = "fp32"
[checkpoint]
interval_steps = 7
[evaluation]
interval_steps = 10
[logging]
interval_steps = 5
peak_flops = 1e9
"""


def write_corpus(
    directory: Path, single_modality: bool = False, without: str | None = None, seed: int = 7
) -> Path:
    """Write a random corpus and return its folder.

    Args:
        directory: Folder to write.
        single_modality: Make each document fill a sequence with one modality, so that most
            micro-batches of one sequence lack the other two.
        without: Modality to leave out of all documents.
        seed: Seed of the documents.
    """
    rng = np.random.default_rng(seed)
    present = [modality for modality in MODALITIES if modality.name != without]

    def segment(modality: Modality, tokens: int) -> tuple[str, list[int]]:
        # Squaring uniform numbers makes low ids likelier, so there is something to learn.
        ids = modality.first_id + (rng.random(tokens) ** 2 * modality.size).astype(int)
        return modality.name, ids.tolist()

    with CorpusWriter(
        directory=directory,
        name="small",
        builder="tests 1",
        seed=7,
        modalities=MODALITIES,
        pad_token=0,
    ) as writer:
        for split, documents in (("train", 60), ("validation", 12)):
            for number in range(documents):
                if single_modality:
                    chosen = [present[number % len(present)]]
                    lengths = [SEQ_LENGTH]
                else:
                    chosen = [present[i] for i in rng.permutation(len(present))]
                    lengths = [int(rng.integers(3, 20)) for _ in chosen]
                pairs = zip(chosen, lengths, strict=True)
                writer.add(split, [segment(modality, length) for modality, length in pairs])
    return directory


def small_config(corpus: Path, overrides: list[str] | None = None) -> Config:
    """Return ``CONFIG`` with this corpus and ``overrides``."""
    return parse_config(CONFIG.format(corpus=corpus), "small.toml", overrides)
