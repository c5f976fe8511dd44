"""Codecs, which convert text, pictures and sound to ids and back.

To add a kind of token, write a subclass of ``Codec`` and add it to ``CODECS``.
"""

from __future__ import annotations

from pathlib import Path

from mot_megatron.data.codebooks.codec import Codec
from mot_megatron.data.codebooks.image import PatchCodec
from mot_megatron.data.codebooks.speech import UnitCodec
from mot_megatron.data.codebooks.text import TextCodec
from mot_megatron.data.corpus import Modality
from mot_megatron.errors import DataError

CODECS: dict[str, type[Codec]] = {
    "bpe": TextCodec,
    "image_patches": PatchCodec,
    "speech_units": UnitCodec,
}
"""Class for each value of ``Modality.codec`` except "none"."""


def load_codec(corpus_directory: Path, modality: Modality) -> Codec:
    """Load the codec of ``modality`` with its codebook from ``corpus_directory``.

    Raises:
        DataError: The modality has no codec, or its codebook file is missing, damaged or of another
            size.
    """
    if modality.codebook is None:
        raise DataError(
            f"{corpus_directory}: modality {modality.name} has codec = {modality.codec!r}, "
            f"expected one of {sorted(CODECS)} to decode its ids"
        )
    return CODECS[modality.codec].load(corpus_directory / modality.codebook, modality)
