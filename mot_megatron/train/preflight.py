"""Checks of the corpus that each rank makes alone, before it joins the others."""

from __future__ import annotations

from mot_megatron.config import Config
from mot_megatron.data.corpus import Corpus
from mot_megatron.data.loader import DataShard, PackedLoader, evaluation_batches
from mot_megatron.train.session import HELD_OUT_SPLIT, TRAIN_SPLIT, grouping_plan


def check_documents(config: Config, corpus: Corpus) -> None:
    """Check that every document of the corpus of a resolved configuration fits; no collectives.

    With packing = "budget", this reads all tokens of the training split once.

    Raises:
        DataError: A split is missing, or a document is longer than a sequence or has more tokens of
            a tower than a micro-batch can hold.
    """
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
