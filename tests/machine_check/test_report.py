"""What the report says."""

from __future__ import annotations

from mot_megatron.machine_check.outcome import Outcome
from mot_megatron.machine_check.report import NOT_ON_A_GPU, page

OUTCOMES = {
    "machine/host": Outcome("PASS", "2 cores"),
    "machine/disk": Outcome("PASS", "tape", "buy a disk some day"),
    "probes/rows": Outcome("FAIL", "3 | 4 rows", "count again"),
    "speed/step": Outcome("SLOW", "9 ms"),
    "speed/layer": Outcome("SKIPPED", "needs 8 devices"),
}


def test_every_check_has_a_line_and_what_is_wrong_comes_first() -> None:
    text = page({"device": "cuda", "name": "a GPU"}, OUTCOMES)
    lines = text.splitlines()
    assert NOT_ON_A_GPU not in text
    assert "2 PASS, 1 FAIL, 1 SLOW, 1 SKIPPED." in lines
    todo = lines.index("## What to do")
    assert lines[todo + 2 : todo + 4] == [
        "- **FAIL** probes/rows: 3 | 4 rows. Count again.",
        "- **SLOW** speed/step: 9 ms.",
    ]
    assert "| rows | **FAIL** | 3 \\| 4 rows |" in lines
    assert "| layer | skipped | needs 8 devices |" in lines
    assert "| disk | PASS | tape (buy a disk some day) |" in lines
    assert [line for line in lines if line.startswith("## ")][1:] == [
        "## Machine",
        "## Probes",
        "## Speed",
    ]


def test_a_report_without_a_gpu_says_so() -> None:
    text = page({"device": "cpu"}, {"machine/host": OUTCOMES["machine/host"]})
    assert NOT_ON_A_GPU in text.splitlines()
    assert "What to do" not in text
