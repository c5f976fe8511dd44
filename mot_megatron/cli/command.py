"""The common frame of all commands: parse arguments, report progress and errors.

Results go to standard output, as text or, with ``--json``, as one document. Everything else
(progress, warnings, errors) goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mot_megatron.errors import UserError
from mot_megatron.job.outputs import protect_outputs

if TYPE_CHECKING:
    import torch

ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""Environment of ranks on the CPU of this machine. Set it before torch, megatron and deepspeed are
imported, which read it on import."""
QUIETLY_ON_CPU = {
    **ON_CPU,
    "TORCH_COMPILE_DISABLE": "1",  # compiling megatron's fused functions would take half a minute
    "DEEPSPEED_LOG_LEVEL": "error",
    "PYTHONWARNINGS": "ignore",
}
"""The same for ranks that only count or measure memory, without messages of libraries."""
BAD_INPUT = 2
"""Exit status after an error that the user can fix."""


def hide_gpus_from_cpu_ranks() -> None:
    """Hide the GPUs from a process whose launcher was told to use CPUs.

    DeepSpeed's CPU accelerator numbers its ranks' devices in CUDA_VISIBLE_DEVICES, which would hand
    them real GPUs. Call this before the first import that looks for CUDA, which looks only once.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def run_command(
    name: str,
    description: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None,
) -> int:
    """Parse the arguments of ``mot NAME`` and run it.

    Args:
        name: The command, as typed after ``mot``.
        description: Printed by ``--help``.
        add_arguments: Adds the command's arguments to a parser.
        run: Runs the command and returns the exit status.
        arguments: The command line without the command; None: that of this process.

    Returns:
        The exit status of ``run``, or 2 after a UserError, which is printed as one line.
    """
    parser = argparse.ArgumentParser(
        prog=f"mot {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    protect_outputs()
    try:
        return run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def say(name: str, text: str) -> None:
    """Print a progress line of ``mot NAME`` to standard error."""
    print(f"mot {name}: {text}", file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """Print one JSON document to standard output; numbers that are not finite become null."""
    print(json.dumps(_finite(document), ensure_ascii=False, indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choose_device() -> torch.device:
    """Return the GPU if torch finds one, otherwise the CPU.

    Call this before importing anything that imports DeepSpeed. Otherwise, without a GPU, DeepSpeed
    prints a note on its choice of accelerator.
    """
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cpu")
