"""Export a checkpoint to a folder that the transformers library loads.

The folder has the weights as safetensors, config.json, the tokenizer, and the corpus's description
and codebooks; with towers also the modelling file. It is written under a temporary name with a
manifest and renamed when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mot_megatron.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    record_of,
    write_durably,
    write_manifest,
)
from mot_megatron.checkpoint.names import WEIGHT_PREFIX
from mot_megatron.checkpoint.storage import progress_bar
from mot_megatron.config import Config
from mot_megatron.conversion.folder import check_new, new_folder
from mot_megatron.conversion.huggingface.model_config import (
    MIXTURE,
    MODELLING_FILE,
    config_json,
    model_type_of,
    token_ids,
)
from mot_megatron.conversion.huggingface.names import (
    DENSE,
    TOWERS,
    Correspondence,
    correspondences,
)
from mot_megatron.conversion.huggingface.safetensors_files import (
    SUFFIX,
    SafetensorsSource,
    Shard,
    index_of,
    plan_shards,
    write_shard,
)
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.conversion.tensors import OutputTensor, TensorInfo
from mot_megatron.conversion.write import equal_bits
from mot_megatron.data.corpus import DESCRIPTION_FILE, Corpus, Modality
from mot_megatron.errors import CheckpointError, DataError
from mot_megatron.rules import check_tokens_only

TOKENIZER_FILE = "tokenizer.json"
_INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class ExportPlan:
    """What an export writes."""

    model_type: str
    """Architecture of the transformers library, or that of the modelling file."""
    step: int
    shards: tuple[Shard, ...]
    documents: Mapping[str, str]
    """Text of the other files that are written, by name."""
    copies: Mapping[str, Path]
    """Files that are copied, by new name."""
    left_out: Mapping[str, int]
    """Number of the source's tensors that have no place in the output, by kind."""

    @property
    def outputs(self) -> list[OutputTensor]:
        """All tensors, in the order of the files."""
        return [output for shard in self.shards for output in shard.outputs]

    @property
    def num_bytes(self) -> int:
        """Size of all weights."""
        return sum(output.info.num_bytes for output in self.outputs)


def plan_export(
    source: CheckpointSource, corpus: Corpus, dtype: torch.dtype | None, shard_bytes: int
) -> ExportPlan:
    """Plan the files of an export; only names and shapes are read.

    Args:
        source: The checkpoint.
        corpus: The run's corpus; its documents are not needed.
        dtype: Type of the exported weights; None: as in the checkpoint.
        shard_bytes: Size of weight files that is not exceeded, unless by a single tensor.

    Raises:
        CheckpointError: The checkpoint lacks a tensor of its model, or has an unknown one.
        ConfigError: A modality consists of vectors.
        DataError: A codebook has the name of another file of the export.
    """
    config = source.config
    check_tokens_only(config.model, "this export")
    kind = model_type_of(config.model)
    used = list(correspondences(config, TOWERS if kind == MIXTURE else DENSE))
    left_out = check_weights(source, used)
    outputs = list(_outputs(source, used, dtype))
    shards = plan_shards(outputs, shard_bytes)
    name = str(outputs[0].info.dtype).removeprefix("torch.")
    documents = _documents(config, corpus, name)
    if len(shards) > 1:
        documents[_INDEX_FILE] = _json(index_of(shards))
    copies = _copies(corpus, kind)
    clash = sorted(copies.keys() & {*documents, *(shard.name for shard in shards)})
    if clash:
        raise DataError(f"{corpus.directory}: codebook {clash[0]} has the name of an exported file")
    return ExportPlan(kind, source.checkpoint.step, tuple(shards), documents, copies, left_out)


def write_export(plan: ExportPlan, directory: Path, verify: bool = False) -> Manifest:
    """Write the files of a plan to a new folder; it is complete or absent.

    Args:
        plan: What to write.
        directory: The folder.
        verify: Read the weights back and compare them with tensors that are produced again.

    Raises:
        CheckpointError: See ``check_new``; or a file cannot be written, or differs.
        UserError: A tensor cannot be read.
    """
    check_new(directory, plan.num_bytes)
    known = {*plan.documents, *plan.copies, MANIFEST_NAME}
    with new_folder(directory, lambda name: name in known or name.endswith(SUFFIX)) as temporary:
        manifest = _write(plan, temporary)
        if verify:
            _compare(plan, temporary)
    return manifest


def _write(plan: ExportPlan, temporary: Path) -> Manifest:
    records: dict[str, FileRecord] = {}
    with progress_bar(f"writing {temporary.stem}", plan.num_bytes, unit="B") as progress:
        for shard in plan.shards:
            records[shard.name] = write_shard(temporary, shard, progress.update)
    for name, text in plan.documents.items():
        write_durably(temporary / name, text)
    for name, path in plan.copies.items():
        shutil.copyfile(path, temporary / name)
    for name in (*plan.documents, *plan.copies):
        records[name] = record_of(temporary / name)
    manifest = Manifest(
        step=plan.step, num_tensors=len(plan.outputs), files=dict(sorted(records.items()))
    )
    write_manifest(temporary, manifest)
    return manifest


def _compare(plan: ExportPlan, temporary: Path) -> None:
    """Compare the files with the tensors, produced again.

    Raises:
        CheckpointError: They differ.
    """
    written = SafetensorsSource(temporary)
    with progress_bar(f"comparing {temporary.stem}", plan.num_bytes, unit="B") as progress:
        for output in plan.outputs:
            if not equal_bits(written.read(output.name), output.produce().contiguous()):
                raise CheckpointError(f"{output.name} was not stored as it was written")
            progress.update(output.info.num_bytes)


def check_weights(source: CheckpointSource, used: Iterable[Correspondence]) -> dict[str, int]:
    """Check that the weights are those of the model, and count the other tensors, by kind.

    Raises:
        CheckpointError: The checkpoint lacks a weight, or has one that is unknown.
    """
    path, shapes = source.checkpoint.path, {each.name: each.shape for each in used}
    left_out: Counter[str] = Counter()
    for name, info in source.infos.items():
        if not name.startswith(WEIGHT_PREFIX):
            left_out[f"{name.partition('/')[0]} of the optimizer"] += 1
            continue
        shape = shapes.pop(name.removeprefix(WEIGHT_PREFIX), None)
        if shape != info.shape:
            raise CheckpointError(
                f"{path}: {name} is {list(info.shape)}; in a model of its configuration it is"
                f" {'absent' if shape is None else list(shape)}"
            )
    if shapes:
        raise CheckpointError(f"{path}: it lacks {WEIGHT_PREFIX}{next(iter(shapes))}")
    return dict(left_out)


class _LastRead:
    """Keeps the tensor that was read last, because several outputs in a row are parts of it."""

    def __init__(self, source: CheckpointSource) -> None:
        self._source = source
        self._last: tuple[str, torch.Tensor] | None = None

    def read(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is read
            self._last = name, self._source.read(name)
        return self._last[1]


def _outputs(
    source: CheckpointSource, used: list[Correspondence], dtype: torch.dtype | None
) -> Iterator[OutputTensor]:
    last = _LastRead(source)

    def part(each: Correspondence, number: int, kind: torch.dtype) -> Callable[[], torch.Tensor]:
        return lambda: each.split(last.read(WEIGHT_PREFIX + each.name))[number].to(kind)

    for each in used:
        name = WEIGHT_PREFIX + each.name
        kind = dtype or source.infos[name].dtype
        for number, (new, shape) in enumerate(zip(each.split_into, each.shapes(), strict=True)):
            yield OutputTensor(new, TensorInfo(shape, kind), (name,), part(each, number, kind))


def _documents(config: Config, corpus: Corpus, dtype: str) -> dict[str, str]:
    description = corpus.description
    ids = token_ids(description)
    # No token has the ids of the rows that pad the vocabulary.
    padding = list(range(description.vocab_size, config.model.num_vocabulary_rows))
    documents = {
        "config.json": _json(config_json(config, description, dtype)),
        "generation_config.json": _json({**ids, "suppress_tokens": padding}),
    }
    text = _text_modality(corpus)
    if text is not None:
        names = {id_: name for name, id_ in description.special_tokens.items()}
        special = {key.removesuffix("_id"): names[id_] for key, id_ in ids.items() if id_ in names}
        tokenizer = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.data.seq_length,
            "clean_up_tokenization_spaces": False,
            **special,
        }
        documents["tokenizer_config.json"] = _json(tokenizer)
    return documents


def _copies(corpus: Corpus, kind: str) -> dict[str, Path]:
    names = [m.codebook for m in corpus.description.modalities if m.codebook is not None]
    copies = {name: corpus.directory / name for name in (DESCRIPTION_FILE, *names)}
    text = _text_modality(corpus)
    if text is not None:
        assert text.codebook is not None
        copies[TOKENIZER_FILE] = corpus.directory / text.codebook
    if kind == MIXTURE:
        copies[MODELLING_FILE] = Path(__file__).with_name(MODELLING_FILE)
    return copies


def _text_modality(corpus: Corpus) -> Modality | None:
    """Return the modality whose tokenizer has the ids of the model, or None."""
    for modality in corpus.description.modalities:
        if modality.codec == "bpe" and modality.first_id == 0:
            return modality
    return None


def _json(document: Any) -> str:
    return json.dumps(document, indent=2) + "\n"
