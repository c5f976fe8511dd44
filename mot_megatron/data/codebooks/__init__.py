"""Codebooks: how text, pictures and sound become ids and back, chosen by a modality's ``codec``.

A further kind of token is one ``Codec`` subclass and one entry of ``CODECS``.
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
"""Class of every value of ``Modality.codec`` but "none"."""


def load_codec(corpus_directory: Path, modality: Modality) -> Codec:
    """The codec of ``modality``, with its codebook from ``corpus_directory``.

    Raises:
        DataError: The modality has none, or its codebook file is missing, damaged or of another
            size.
    """
    if modality.codebook is None:
        raise DataError(
            f"{corpus_directory}: modality {modality.name} has codec = {modality.codec!r}, "
            f"expected one of {sorted(CODECS)} to turn its ids back"
        )
    return CODECS[modality.codec].load(corpus_directory / modality.codebook, modality)
