"""The placement table lists every rank's towers, share of FLOPs, parameters and bytes."""

from __future__ import annotations

from mot_megatron.config_files import parse_config
from mot_megatron.parallel.mesh import Mesh
from mot_megatron.parallel.placement import Placement, balanced_placement
from mot_megatron.planning.placement_table import placement_table
from tests.columns import widest
from tests.small_runs import CONFIG

SETTINGS = ["model.vocab_size=256", "parallel.modality_parallel_size=2"]


def table_of(placement: Placement, pipeline: int = 1) -> list[str]:
    overrides = [*SETTINGS, f"parallel.pipeline_model_parallel_size={pipeline}"]
    config = parse_config(CONFIG.format(corpus="none"), "small.toml", overrides)
    mesh = Mesh(2 * pipeline, tensor=1, pipeline=pipeline, modality=2)
    return placement_table(config, mesh, placement, (3.0, 2.0, 1.0)).splitlines()


def test_table_has_one_line_per_rank() -> None:
    header, first, second, last = table_of(balanced_placement((3.0, 2.0, 1.0), 2))
    assert [line.split()[:3] for line in (first, second)] == [
        ["0", "text", "50.0%"],
        ["1", "image,", "speech"],
    ]
    # A layer has h = 32, 4 heads and 2 key-value heads of size 8, and ffn 48:
    # 32 * 8 * 8 + 32 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 8 = 7760 parameters.
    # A tower (two layers and the final norm) has 15552; embedding and head have 16384.
    assert "31,936" in first  # 15552 + 16384
    assert "47,488" in second  # 2 * 15552 + 16384
    assert last == "busiest rank: 1.00 times the mean FLOPs; 3 copies of towers"
    assert widest((header, first, second)) <= 120


def test_split_towers_show_their_shares() -> None:
    lines = table_of(Placement(((1.0, 0.25, 0.0), (0.0, 0.75, 1.0))), pipeline=2)
    assert "text, image (25%)" in lines[1]
    assert "image (75%), speech" in lines[2]
    # (3 + 0.25 * 2) / 3 of the mean
    assert lines[3].startswith("busiest rank: 1.17 times the mean FLOPs; 4 copies of towers")
    assert lines[3].endswith("of the fullest stage")
