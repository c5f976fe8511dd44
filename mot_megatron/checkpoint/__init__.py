"""Saving and loading of training state; checkpoints are verified before they are used.

``save_checkpoint`` and ``load_checkpoint`` write and read tensors under global names.
``resolve_resume`` and ``open_checkpoint`` find the checkpoint to use. Nothing in this package
depends on the optimizer.
"""

from mot_megatron.checkpoint.find import (
    CheckpointInfo,
    Search,
    find_checkpoint,
    open_checkpoint,
    read_config_text,
    read_metadata,
    resolve_resume,
)
from mot_megatron.checkpoint.load import load_checkpoint, read_whole_tensors
from mot_megatron.checkpoint.save import save_checkpoint
from mot_megatron.checkpoint.tensors import NamedTensor

__all__ = [
    "CheckpointInfo",
    "NamedTensor",
    "Search",
    "find_checkpoint",
    "load_checkpoint",
    "open_checkpoint",
    "read_config_text",
    "read_metadata",
    "read_whole_tensors",
    "resolve_resume",
    "save_checkpoint",
]
