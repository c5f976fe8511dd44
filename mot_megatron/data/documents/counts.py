"""What each source file contributed to a corpus."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mot_megatron.data.documents.encode import EncodedShard
from mot_megatron.data.documents.sources import Shard


@dataclass
class SourceCounts:
    """Documents and tokens of each source file; of texts that are a document each, by folder."""

    by_source: dict[Path, dict[str, int]] = field(default_factory=dict)

    def add(self, shard: Shard, encoded: EncodedShard) -> None:
        """Count a shard."""
        path = shard.files[0].path
        counts = self.by_source.setdefault(
            path.parent if len(shard.files) > 1 else path,
            {"documents": 0, "held_out": 0, "tokens": 0, "broken": 0},
        )
        counts["documents"] += len(encoded.lengths)
        counts["held_out"] += int(encoded.held_out.sum())
        counts["tokens"] += int(encoded.lengths.sum())
        counts["broken"] += len(encoded.broken)

    def render(self) -> bytes:
        """Return the counts as JSON, one line per source."""
        rows: list[dict[str, Any]] = [
            {"source": str(path), **counts} for path, counts in self.by_source.items()
        ]
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        return f"[\n{lines}\n]\n".encode("utf-8", "backslashreplace")
