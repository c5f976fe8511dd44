"""Export a dense model as a distributed checkpoint of megatron-core (torch_dist).

The folder is what ``dist_checkpointing.save`` writes of a GPTModel: tensor files and their index,
with all layers of a component in one tensor, metadata.json and common.pt; besides, gpt_model.json
with the arguments of such a GPTModel, and a manifest.

Letters: L layers.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mot_megatron.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    record_of,
    write_manifest,
)
from mot_megatron.checkpoint.names import WEIGHT_PREFIX
from mot_megatron.checkpoint.storage import (
    INDEX_NAME,
    progress_bar,
    read_foreign_index,
)
from mot_megatron.checkpoint.streaming import Piece, read_box, write_file, write_index_of
from mot_megatron.config import Config
from mot_megatron.conversion.folder import check_new, new_folder
from mot_megatron.conversion.huggingface.export import check_weights
from mot_megatron.conversion.huggingface.names import Correspondence
from mot_megatron.conversion.megatron.names import (
    LAYERS,
    check_dense,
    correspondences,
    stacked_name,
)
from mot_megatron.conversion.megatron.source import FORMAT, FORMAT_FILE
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.conversion.write import FILE_BYTES, equal_bits, split_into_files
from mot_megatron.errors import CheckpointError

COMMON_FILE, MODEL_FILE = "common.pt", "gpt_model.json"
_TENSOR_SUFFIX = ".distcp"
_LINEARS = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer for which megatron-core stores an object, None without Transformer Engine."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes."""

    source: CheckpointSource
    pieces: Mapping[Piece, Correspondence]
    """Every piece of a tensor, which is of one layer, and what it consists of."""
    left_out: Mapping[str, int]
    """Number of the source's tensors that have no place in the output, by kind."""

    @property
    def step(self) -> int:
        """Number of optimizer steps of the source."""
        return self.source.checkpoint.step

    @property
    def num_tensors(self) -> int:
        """Number of tensors in the output."""
        return len({piece.name for piece in self.pieces})

    @property
    def num_bytes(self) -> int:
        """Size of all weights."""
        return sum(piece.num_bytes for piece in self.pieces)

    def produce(self, piece: Piece) -> torch.Tensor:
        """Read and return the values of a piece."""
        each = self.pieces[piece]
        (values,) = each.split(self.source.read(WEIGHT_PREFIX + each.name))
        return values.to(piece.dtype).view(piece.sizes)


def plan_export(source: CheckpointSource, dtype: torch.dtype | None) -> ExportPlan:
    """Plan an export; only names and shapes are read.

    Args:
        source: The checkpoint.
        dtype: Type of the exported weights; None: as in the checkpoint.

    Raises:
        CheckpointError: No GPTModel computes the same, or the checkpoint lacks a tensor of its
            model, or has an unknown one.
    """
    check_dense(source.config.model)
    used = list(correspondences(source.config))
    left_out = check_weights(source, used)
    pieces = {}
    for each in used:
        ((shape,), (full_name,)) = each.shapes(), each.split_into
        kind = dtype or source.infos[WEIGHT_PREFIX + each.name].dtype
        name, layer = stacked_name(full_name)
        piece = Piece.whole(name, shape, kind)
        if layer is not None:
            layers = source.config.model.num_layers
            offsets = (layer, *(0,) * len(shape))
            piece = Piece(name, (layers, *shape), kind, offsets, (1, *shape))
        pieces[piece] = each
    return ExportPlan(source, pieces, left_out)


def write_export(plan: ExportPlan, directory: Path, verify: bool = False) -> Manifest:
    """Write the files of a plan to a new folder; it is complete or absent.

    Args:
        plan: What to write.
        directory: The folder.
        verify: Read the tensors back and compare them with tensors that are produced again.

    Raises:
        CheckpointError: The folder exists, there is too little space, or a file cannot be written,
            or differs.
        UserError: A tensor cannot be read.
    """
    check_new(directory, plan.num_bytes)
    with new_folder(directory, _is_own) as temporary:
        files = _write_tensors(plan, temporary)
        for name, content in _documents(plan).items():
            _write_bytes(temporary / name, content)
            files[name] = record_of(temporary / name)
        if verify:
            _compare(plan, temporary)
        manifest = Manifest(
            step=plan.step, num_tensors=plan.num_tensors, files=dict(sorted(files.items()))
        )
        write_manifest(temporary, manifest)
    return manifest


def model_arguments(config: Config) -> dict[str, dict[str, Any]]:
    """Return the arguments of the TransformerConfig and the GPTModel that compute the same.

    The activation is a name, of a function in torch.nn.functional.
    """
    model = config.model
    return {
        "TransformerConfig": {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "num_query_groups": model.num_key_value_heads,
            "ffn_hidden_size": model.feed_forward_size,
            "normalization": "RMSNorm",
            "layernorm_epsilon": model.norm_eps,
            "qk_layernorm": model.qk_norm,
            "gated_linear_unit": True,
            "activation_func": "silu",
            "add_bias_linear": False,
            "add_qkv_bias": model.add_qkv_bias,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "GPTModel": {
            "vocab_size": model.num_vocabulary_rows,
            "max_sequence_length": config.data.seq_length,
            "position_embedding_type": "rope",
            "rotary_base": model.rotary_base,
            "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
        },
    }


def _is_own(name: str) -> bool:
    known = (INDEX_NAME, FORMAT_FILE, COMMON_FILE, MODEL_FILE, MANIFEST_NAME)
    return name in known or name.endswith(_TENSOR_SUFFIX)


def _write_tensors(plan: ExportPlan, temporary: Path) -> dict[str, FileRecord]:
    """Write tensors, objects and their index; return what the manifest says of the files."""
    shares = list(split_into_files(list(plan.pieces), FILE_BYTES))
    written = []
    with progress_bar(f"writing {temporary.stem}", plan.num_bytes, unit="B") as progress:
        for number, pieces in enumerate(shares):
            path = temporary / f"__0_{number}{_TENSOR_SUFFIX}"
            written.append(write_file(path, pieces, plan.produce, progress.update))
    path = temporary / f"__0_{len(shares)}{_TENSOR_SUFFIX}"
    content = io.BytesIO()
    torch.save([None], content)
    layers, length = plan.source.config.model.num_layers, len(content.getvalue())
    names = [
        f"{LAYERS}{linear}._extra_state/shard_{layer}_{layers}"
        for linear in _LINEARS
        for layer in range(layers)
    ]
    _write_bytes(path, content.getvalue() * len(names))
    objects = {name: (path.name, at * length, length) for at, name in enumerate(names)}
    write_index_of(temporary, written, objects)
    files = {file.name: file.record for file in written}
    return {**files, **{name: record_of(temporary / name) for name in (path.name, INDEX_NAME)}}


def _documents(plan: ExportPlan) -> dict[str, bytes]:
    versions = {"sharded_backend_version": 1, "common_backend_version": 1}
    backends = {"sharded_backend": FORMAT, "common_backend": "torch", **versions}
    common = io.BytesIO()
    torch.save({}, common)  # whatever is in it becomes part of the state that is loaded
    return {
        FORMAT_FILE: _json(backends),
        MODEL_FILE: _json(model_arguments(plan.source.config)),
        COMMON_FILE: common.getvalue(),
    }


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _compare(plan: ExportPlan, temporary: Path) -> None:
    """Compare the files with the tensors, produced again.

    Raises:
        CheckpointError: They differ.
    """
    index, _ = read_foreign_index(temporary, lambda _: True)
    with progress_bar(f"comparing {temporary.stem}", plan.num_bytes, unit="B") as progress:
        for piece in plan.pieces:
            stored = read_box(temporary, index, piece.name, piece.offsets, piece.sizes)
            if not equal_bits(stored, plan.produce(piece).contiguous()):
                raise CheckpointError(f"{piece.name} was not stored as it was written")
            progress.update(piece.num_bytes)
