"""Lay a checkpoint's files out anew, as the ranks of another layout would have written them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mot_megatron.checkpoint.find import CheckpointInfo
from mot_megatron.checkpoint.streaming import Piece
from mot_megatron.config import Config
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.conversion.write import write_pieces


def reshard(
    source: CheckpointSource,
    directory: Path,
    config: Config,
    files: Sequence[Sequence[Piece]],
    *,
    workers: int = 1,
    verify: bool = False,
) -> CheckpointInfo:
    """Write all tensors of ``source`` as the files of a layout, with everything else as it is.

    Args:
        source: The checkpoint to read.
        directory: Folder of checkpoints to write to.
        config: Configuration to store; see ``layout_config``.
        files: Pieces that each rank writes; see ``Layout.files``.
        workers: Number of files that are written at a time.
        verify: Read the files back and compare them with the source.

    Raises:
        CheckpointError: The source cannot be read, or the new checkpoint not be written.
    """
    return write_pieces(
        directory,
        {f"__{rank}_0.distcp": pieces for rank, pieces in enumerate(files)},
        lambda piece: source.read_box(piece.name, piece.offsets, piece.sizes),
        step=source.checkpoint.step,
        metadata=source.metadata,
        config_text=config.to_toml(),
        workers=workers,
        verify=verify,
    )
