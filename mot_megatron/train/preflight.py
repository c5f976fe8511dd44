"""Checks of the corpus that each rank makes alone, before it joins the others."""

from __future__ import annotations

from mot_megatron.config import Config
from mot_megatron.data.codebooks import codec_class
from mot_megatron.data.corpus import HELD_OUT_SPLIT, TRAIN_SPLIT, Corpus
from mot_megatron.data.loader import DataShard, PackedLoader, evaluation_batches
from mot_megatron.errors import DataError
from mot_megatron.train.session import grouping_plan


def check_documents(config: Config, corpus: Corpus) -> None:
    """Check that every document of the corpus fits into a sequence; no collectives.

    The configuration must be resolved. With packing = "budget", this reads all tokens of the
    training split once.

    Raises:
        DataError: A split is missing or has nothing to predict, or a document is longer than a
            sequence or has more tokens of a tower than a micro-batch can hold.
    """
    check_labels(config, corpus)
    # The result is the same for every rank, so use the data shard of a world of one.
    grouping, alone = grouping_plan(config), DataShard(0, 1)
    sizes = {
        "seq_length": config.data.seq_length,
        "micro_batch_size": config.training.micro_batch_size,
    }
    PackedLoader(
        corpus,
        TRAIN_SPLIT,
        **sizes,
        grouping=grouping,
        shard=alone,
        seed=config.run.seed,
        packing=config.data.packing,
    )
    evaluation_batches(corpus, HELD_OUT_SPLIT, **sizes, grouping=grouping, shard=alone)


def check_labels(config: Config, corpus: Corpus) -> None:
    """Check that both splits have labels whose loss has a weight above 0.

    Raises:
        DataError: All documents of a split have one token, or a split has no token of a modality
            whose loss weight is above 0.
    """
    weights = dict(zip(config.model.modalities, config.model.loss_weights, strict=True))
    weighted = [name for name, weight in weights.items() if weight > 0]
    for split in (TRAIN_SPLIT, HELD_OUT_SPLIT):
        counts = corpus.description.splits.get(split)
        if counts is None:
            continue  # opening the split raises an error that lists the existing splits
        if counts.longest_document < 2:
            raise DataError(
                f"{corpus.directory}: every document of split {split} has a single token, so there"
                " is nothing to predict"
            )
        unpredicted = counts.context.tokens_per_modality if counts.context else {}
        tokens = {
            name: counts.tokens_per_modality.get(name, 0) - unpredicted.get(name, 0)
            for name in weighted
        }
        if not sum(tokens.values()):
            what = "label, but only context," if unpredicted else "token"
            raise DataError(
                f"{corpus.directory}: split {split} has no {what} of a modality whose"
                f" model.modalities.NAME.loss_weight is above 0 ({', '.join(weighted) or 'none'})"
            )


def check_codecs(corpus: Corpus) -> None:
    """Check that the classes of the codecs can be imported, since samples are decoded at the end.

    Raises:
        DataError: A module is missing here, or it has no such codec.
    """
    for modality in corpus.description.modalities:
        if modality.codebook is not None:
            codec_class(modality.codec)
