"""Names of codecs in corpus.toml: registered ones, or ``module:Class`` for a user's own."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

NO_CODEC = "none"
"""Name of no codec: the ids of the modality cannot be decoded."""
_PACKAGE = "mot_megatron.data.codebooks"
REGISTERED = {
    "bpe": f"{_PACKAGE}.text:TextCodec",
    "image_patches": f"{_PACKAGE}.image:PatchCodec",
    "speech_units": f"{_PACKAGE}.speech:UnitCodec",
    "vqgan": f"{_PACKAGE}.vqgan:ConvolutionalCodec",
    "hubert_units": f"{_PACKAGE}.hubert:HubertCodec",
}
"""Class of each registered name. They are strings, since some classes are slow to import."""
_OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def check_codec_name(name: str) -> str:
    """Return ``name``.

    Raises:
        ValueError: It is neither registered nor of the form ``module:Class``.
    """
    if name in REGISTERED or name == NO_CODEC or _OWN.fullmatch(name):
        return name
    known = ", ".join([*REGISTERED, NO_CODEC])
    raise ValueError(f"expected one of {known}, or module:Class for a class of your own")


CodecName = Annotated[str, AfterValidator(check_codec_name)]
