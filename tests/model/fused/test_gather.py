"""The gather from sequence order to towers equals plain PyTorch, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from mot_megatron.model.fused.gather import gathered
from tests.model.fused.comparisons import assert_equal_operations, random_rows
from tests.model.fused.test_qkv import TOKENS, random_grouping


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_equals_plain_pytorch(
    tokens: tuple[tuple[int, ...], tuple[int, ...]], padded: bool, dtype: torch.dtype
) -> None:
    grouping = random_grouping(*tokens)
    rows = random_rows(sum(tokens[0]), 11, seed=0, dtype=dtype, padded=padded)
    assert_equal_operations(
        lambda rows: gathered(grouping, rows), lambda rows: grouping.to_towers(rows), [rows]
    )
    for index, part in zip(grouping.indices, gathered(grouping, rows), strict=True):
        assert torch.equal(part[: len(index)], rows[index])
        assert not part[len(index) :].any()
