"""Ranks that are still starting when their launcher ends: they have nothing to save, and exit.

Later, the end of the launcher is a request to stop (see ``stop``), which is looked for between
steps. Before the first step, a rank imports, joins, builds and loads, and looks for nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

from mot_megatron.job.outputs import write_line
from mot_megatron.job.processes import Process
from mot_megatron.job.progress_report import ProgressReport
from mot_megatron.job.verdict import LOST_STATUS

_POLL_SECONDS = 0.5


def leave_without_launcher(
    launchers: Sequence[Process], progress_report: ProgressReport, reports: bool
) -> None:
    """Start a thread that ends this process if a launcher ends before the first step.

    Args:
        launchers: Processes without which this one should not go on; none of them: do nothing.
        progress_report: Of this process.
        reports: Whether this rank prints the reason.
    """

    def watch() -> None:
        while progress_report.now.step is None:
            for launcher in launchers:
                if launcher.is_dead:
                    if reports:
                        reason = f"the launcher, pid {launcher.pid}, has ended"
                        write_line(1, f"{reason}; leaving before the first step")
                    os._exit(LOST_STATUS)
            time.sleep(_POLL_SECONDS)

    if launchers:
        threading.Thread(target=watch, name="launcher watch", daemon=True).start()
