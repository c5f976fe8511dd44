"""Codecs, which convert text, pictures and sound to ids and back.

To add a kind of token, write a subclass of ``PictureCodec``, ``SoundCodec`` or ``Codec`` in a
module that Python can import, and name it as ``module:Class`` in corpus.toml.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from mot_megatron.data.codebooks.codec import Codec
from mot_megatron.data.codec_names import NO_CODEC, REGISTERED, check_codec_name
from mot_megatron.data.corpus import Modality
from mot_megatron.errors import DataError


def codec_class(name: str) -> type[Codec]:
    """Return the class of a codec; this imports its module.

    Args:
        name: A registered name, or ``module:Class``.

    Raises:
        DataError: The name is invalid, the module cannot be imported, or it has no such class, or
            the class is not a codec.
    """
    try:
        check_codec_name(name)
    except ValueError as error:
        raise DataError(f"codec {name!r}: {error}") from None
    if name == NO_CODEC:
        raise DataError(f"codec {name!r} has no class")
    module, _, attribute = REGISTERED.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise DataError(
            f"codec {name!r}: module {module} cannot be imported: {error}; is it installed here?"
        ) from None
    except AttributeError:
        raise DataError(f"codec {name!r}: module {module} has no class {attribute}") from None
    if not (isinstance(found, type) and issubclass(found, Codec)):
        raise DataError(
            f"codec {name!r}: {found!r} is not a subclass of {Codec.__module__}.{Codec.__name__}"
        )
    return found


def load_codec(corpus_directory: Path, modality: Modality) -> Codec:
    """Load the codec of ``modality`` with its codebook from ``corpus_directory``.

    Raises:
        DataError: The modality has no codec, its class cannot be used, or its codebook file is
            missing, damaged or of another size.
    """
    if modality.codebook is None:
        raise DataError(
            f"{corpus_directory}: modality {modality.name} has codec = {modality.codec!r}, "
            f"expected one of {sorted(REGISTERED)} or module:Class to decode its ids"
        )
    return codec_class(modality.codec).load(corpus_directory / modality.codebook, modality)
