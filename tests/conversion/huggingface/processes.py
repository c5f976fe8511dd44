"""What the tests run in a new process: the memory of both ways, and an export that is killed."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mot_megatron.checkpoint.names import WEIGHT_PREFIX
from mot_megatron.cli.checkpoint import main
from mot_megatron.config import Config
from mot_megatron.conversion.huggingface import export as exporting
from mot_megatron.conversion.huggingface.foreign import open_foreign
from mot_megatron.conversion.huggingface.imports import plan_import, write_import
from mot_megatron.conversion.huggingface.names import TOWERS, correspondences
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.conversion.tensors import TensorInfo
from mot_megatron.data.corpus import Corpus
from tests.small_corpus import make_config

GROWTH_FILE = "growth.json"
SIZES = ("model.num_layers=4", "model.hidden_size=512", "model.ffn_hidden_size=2048")


class _ManyTensors:
    """A source with a model of many tensors, none of which exists until it is read."""

    def __init__(self, config: Config, checkpoint: Any) -> None:
        self.config, self.checkpoint = config, checkpoint
        self.infos = {
            WEIGHT_PREFIX + each.name: TensorInfo(each.shape, torch.float32)
            for each in correspondences(config, TOWERS)
        }

    def read(self, name: str) -> torch.Tensor:
        return torch.full(self.infos[name].shape, 0.5)


def measured_then_killed(run: str, corpus_folder: str, folder: str) -> None:
    """Measure the memory of both ways, and then be killed in the middle of an export.

    By how many bytes this process grows in an export and an import goes to a file in ``folder``.
    The second export, to ``killed`` in ``folder``, is killed after its first file.
    """
    corpus = Corpus.open(Path(corpus_folder))
    overrides = [*SIZES, "model.norm_placement=pre", f'run.directory="{folder}/runs"']
    config = make_config(corpus, *overrides)
    source: Any = _ManyTensors(config, CheckpointSource(Path(run)).checkpoint)
    sizes = [info.num_bytes for info in source.infos.values()]
    before = _peak()
    plan = exporting.plan_export(source, corpus, None, 1 << 30)
    exporting.write_export(plan, Path(folder) / "out")
    after_export = _peak()
    foreign = open_foreign(Path(folder) / "out")
    write_import(foreign, plan_import(foreign, config, corpus, {}), config, corpus)
    growth = {"export": after_export - before, "import": _peak() - before}
    growth |= {"largest": max(sizes), "total": sum(sizes)}
    (Path(folder) / GROWTH_FILE).write_text(json.dumps(growth))
    _killed_after_a_file("to-hf", run, f"{folder}/killed", "--max-shard-size", "20KB")


def _peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _killed_after_a_file(*arguments: str) -> None:
    """Run ``mot checkpoint`` and kill the process when a file of weights is complete."""
    write = exporting.write_shard

    def killed(folder: Path, shard: Any, written: Callable[[int], object]) -> Any:
        record = write(folder, shard, written)
        os.kill(os.getpid(), signal.SIGKILL)
        return record

    exporting.write_shard = killed
    main(arguments)
