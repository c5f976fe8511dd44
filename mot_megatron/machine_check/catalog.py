"""The list of all checks, the most telling first."""

from __future__ import annotations

from mot_megatron.machine_check.checks import Check

_PACKAGE = "mot_megatron.machine_check"


def all_checks(device: str) -> list[Check]:
    """Return all checks for a kind of device, in their order."""
    del device
    return [
        Check("machine/software", f"{_PACKAGE}.software:check_software", 40, quick=True),
        Check("machine/host", f"{_PACKAGE}.software:check_host", 20, quick=True),
        Check("probes/zero rows", f"{_PACKAGE}.probes:zero_rows", 40, quick=True),
        Check("probes/empty groups", f"{_PACKAGE}.probes:empty_groups", 40, quick=True),
        Check("probes/torch.compile", f"{_PACKAGE}.probes:compilation", 90),
    ]
