"""The reason for a stop, on which all ranks agree although it may have reached only one."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from mot_megatron.job.stop import StopRequest
from mot_megatron.run.loop import _agree_on_reason
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

ENDED, ASKED = ("the launcher, pid 1, has ended", True), ("signal SIGTERM", False)
CASES = [
    ([(None, False), ENDED], ENDED),
    ([ENDED, ENDED], ENDED),
    ([ENDED, ASKED], ASKED),  # whoever asked meant it
    ([ASKED, (None, False)], ASKED),
    ([(None, False), (None, False)], ("", False)),
]


def agree() -> list[tuple[str, bool]]:
    found = []
    for of_ranks, _ in CASES:
        stop = StopRequest()
        stop.reason, stop.launcher_ended = of_ranks[dist.get_rank()]
        found.append(_agree_on_reason(stop))
    return found


def test_all_ranks_agree_on_the_reason() -> None:
    wanted = [agreed for _, agreed in CASES]
    assert run_ranks(agree, 2) == [wanted, wanted]
