"""Pieces of the pipeline: each layer once, in order, assigned to the stages round-robin."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mot_megatron.config import Config
from mot_megatron.model.pieces import Piece, all_pieces, pieces_of_stage
from tests.model.small_models import small_config


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Draw a number of stages, pieces per stage, and equal or listed piece sizes."""
    stages, per_stage = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    if stages == 1:
        per_stage = 1
    pieces = stages * per_stage
    listed = draw(st.booleans())
    if listed:
        sizes = draw(st.lists(st.integers(1, 4), min_size=pieces, max_size=pieces))
    else:
        sizes = [draw(st.integers(1, 3))] * pieces
    overrides = [
        f"model.num_layers={sum(sizes)}",
        f"parallel.pipeline_model_parallel_size={stages}",
    ]
    if per_stage > 1:
        overrides.append(f"parallel.virtual_pipeline_model_parallel_size={per_stage}")
    if listed:
        overrides.append(f"parallel.pipeline_layers={sizes}")
    return small_config({"text": "text", "image": "image"}, *overrides)


@settings(deadline=None)
@given(configs())
def test_pieces_cover_the_layers_in_order(config: Config) -> None:
    parallel, pieces = config.parallel, all_pieces(config)
    layers = [layer for piece in pieces for layer in piece.layers]
    assert layers == list(range(config.model.num_layers))
    sizes = [len(piece.layers) for piece in pieces]
    if parallel.pipeline_layers is None:
        assert len(set(sizes)) == 1
    else:
        assert tuple(sizes) == parallel.pipeline_layers
    for index, piece in enumerate(pieces):
        assert piece.first == (index == 0)
        assert piece.last == (index == len(pieces) - 1)


@settings(deadline=None)
@given(configs())
def test_pieces_are_assigned_to_stages_round_robin(config: Config) -> None:
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    by_stage = [pieces_of_stage(config, stage) for stage in range(stages)]
    assert {len(pieces) for pieces in by_stage} == {
        parallel.virtual_pipeline_model_parallel_size or 1
    }
    assert [piece for turn in zip(*by_stage, strict=True) for piece in turn] == all_pieces(config)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [[Piece(range(8), first=True, last=True)]]),
        (
            ["pipeline_model_parallel_size=2"],
            [
                [Piece(range(4), first=True, last=False)],
                [Piece(range(4, 8), first=False, last=True)],
            ],
        ),
        (
            ["pipeline_model_parallel_size=2", "pipeline_layers=[3, 5]"],
            [
                [Piece(range(3), first=True, last=False)],
                [Piece(range(3, 8), first=False, last=True)],
            ],
        ),
        (
            [
                "pipeline_model_parallel_size=2",
                "virtual_pipeline_model_parallel_size=2",
                "pipeline_layers=[1, 2, 4, 1]",
            ],
            [
                [
                    Piece(range(1), first=True, last=False),
                    Piece(range(3, 7), first=False, last=False),
                ],
                [
                    Piece(range(1, 3), first=False, last=False),
                    Piece(range(7, 8), first=False, last=True),
                ],
            ],
        ),
    ],
)
def test_hand_computed_pieces(overrides: list[str], expected: list[list[Piece]]) -> None:
    config = small_config(
        {"text": "text"}, "model.num_layers=8", *(f"parallel.{override}" for override in overrides)
    )
    assert [list(pieces_of_stage(config, stage)) for stage in range(len(expected))] == expected
