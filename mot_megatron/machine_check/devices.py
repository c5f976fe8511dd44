"""A check of the GPUs that this machine shows."""

from __future__ import annotations

import torch

from mot_megatron.machine_check.checks import Context
from mot_megatron.machine_check.outcome import Outcome

_LARGEST_USED = 0.1
"""Share of a GPU's memory that its driver may use; more belongs to another process."""


def check_devices(context: Context) -> Outcome:
    """List the GPUs, their memory and which of them reach each other directly."""
    found = []
    for number in range(context.num_devices):
        free, total = torch.cuda.mem_get_info(number)
        properties = torch.cuda.get_device_properties(number)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": total,
                "free_bytes": free,
                "reaches": [
                    other
                    for other in range(context.num_devices)
                    if other != number and torch.cuda.can_device_access_peer(number, other)
                ],
            }
        )
    kinds = {f"{each['name']} ({each['memory_bytes'] / 1e9:.0f} GB)" for each in found}
    seen = f"{len(found)} x {' and '.join(sorted(kinds))}, capability {found[0]['capability']}"
    numbers = {"devices": found}
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Outcome("FAIL", f"{seen}: no bf16", "train with training.precision = fp32", numbers)
    advice = []
    if len(kinds) > 1:
        advice.append("the slowest GPU sets the pace: choose equal ones, CUDA_VISIBLE_DEVICES")
    used = [
        n for n, e in enumerate(found) if 1 - e["free_bytes"] / e["memory_bytes"] > _LARGEST_USED
    ]
    if used:
        advice.append(f"other processes use memory of GPU {used}: see nvidia-smi")
    if any(len(each["reaches"]) < len(found) - 1 for each in found):
        advice.append("not all GPUs reach each other directly: see nvidia-smi topo -m")
    return Outcome("SLOW" if advice else "PASS", seen, "; ".join(advice), numbers)
