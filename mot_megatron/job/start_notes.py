"""Notes that ranks leave on their host while they start, so that a death before they join shows.

A rank joins the watchdog's hub only after it has imported torch. If it is killed before that, and
no launcher ends the job, the other ranks would wait for it. Its note names its process, so another
rank on the same host sees that the process is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from dataclasses import asdict
from pathlib import Path

from mot_megatron.files import read_regular_file, write_atomically
from mot_megatron.job.verdict import Peer

_LONGEST_NOTE_BYTES = 4096


class StartNotes:
    """The notes of one launch on this host, one file per rank that has started but not joined.

    Without a writable temporary folder that belongs to this user, there are no notes; a rank that
    dies while it starts is then found only after the time in which all ranks must join.
    """

    def __init__(self, host_key: bytes) -> None:
        """Look at the notes of the launch with this ``Launch.host_key``."""
        self._folder = Path(tempfile.gettempdir()) / f"mot_megatron-{os.getuid()}"
        self._launch = hashlib.sha256(b"start notes" + host_key).hexdigest()[:32]

    def write(self, rank: int, clear: bool) -> None:
        """Leave the note of this process.

        Args:
            rank: This process's rank.
            clear: Remove the notes of dead processes first, which an earlier launch with the same
                key may have left. A rank of this launch that has died by then is then found only
                after the time in which all ranks must join.
        """
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if not self._is_own():
                return
            if clear:
                for peer in self.find_dead():
                    self.remove(peer.rank)
            note = asdict(Peer.of_this_process(rank))
            write_atomically(self._path(rank), json.dumps(note))

    def remove(self, rank: int) -> None:
        """Remove the note of a rank, if there is one."""
        with contextlib.suppress(OSError):
            self._path(rank).unlink()

    def find_dead(self) -> list[Peer]:
        """Return the processes with a note that have ended."""
        if not self._is_own():
            return []
        found = []
        for path in self._folder.glob(f"{self._launch}.*.json"):
            # A note may be removed, or replaced, at any time.
            with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
                peer = Peer(**json.loads(read_regular_file(path, _LONGEST_NOTE_BYTES)))
                if peer.is_dead:
                    found.append(peer)
        return found

    def _path(self, rank: int) -> Path:
        return self._folder / f"{self._launch}.{rank}.json"

    def _is_own(self) -> bool:
        """Return whether nobody else can write notes here."""
        try:
            status = self._folder.lstat()
        except OSError:
            return False
        mode = status.st_mode
        return stat.S_ISDIR(mode) and status.st_uid == os.getuid() and not mode & stat.S_IWOTH
