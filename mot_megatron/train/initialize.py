"""Begin a run with the weights of a trained model: fine-tuning, or training on other data."""

from __future__ import annotations

from mot_megatron.errors import CheckpointError, UserError
from mot_megatron.train.session import Session
from mot_megatron.train.state import restore_weights
from mot_megatron.train.trained import SavedRun


def initialize_from_checkpoint(session: Session) -> SavedRun:
    """Load the weights of ``run.initialize_from`` in any layout; everything else begins anew.

    Collective over the world.

    Raises:
        CheckpointError: There is no usable checkpoint, it belongs to another model, or the ids of
            its corpus mean something else. Raised on every rank.
    """
    path = session.config.run.initialize_from
    assert path is not None
    try:
        saved = SavedRun.open(path)
        saved.check_corpus(session.corpus, "data.corpus")
        restore_weights(session, saved.checkpoint)
    except UserError as error:
        raise CheckpointError(f"run.initialize_from = {path}: {error}") from error
    return saved
