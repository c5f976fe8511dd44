from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def pack(
    lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def pack_budget(
    counts: NDArray[np.int32], budgets: Sequence[int], sequences: int, capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def group(
    token_ids: NDArray[np.integer],
    document_ids: NDArray[np.integer],
    filled: NDArray[np.int64],
    modality_of_id: NDArray[np.int8],
    tower_of_modality: NDArray[np.int64],
    towers: int,
    slot_multiple: int,
) -> Mapping[str, Any]: ...
