"""Speech synthesis with libespeak-ng through ctypes, without a subprocess or an audio device.

The library keeps state (phases, noise) in static memory that even espeak_Terminate does not clear,
so its output depends on everything it has synthesized before. Each ``Speaker`` therefore loads a
private copy of the library: the same sentences in the same order then give the same samples.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from mot_megatron.data.builders.packages import optional_package
from mot_megatron.data.codebooks.mel import resample, trim_silence
from mot_megatron.data.codebooks.speech import SpeechFeatures, speech_features
from mot_megatron.errors import DataError

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS
_RATE, _PITCH = 1, 3  # espeakRATE, espeakPITCH
_UTF8 = 1  # espeakCHARS_UTF8
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
VARIANTS = ("", "+f1", "+f4", "+m1", "+m2", "+m3", "+m4", "+m5")
"""Voice variants that exist for every language. Variants with breath are excluded, because their
noise differs between runs."""


@dataclass(frozen=True)
class Utterance:
    """A sentence to synthesize, with its voice, pace and pitch."""

    text: str
    voice: str
    """A language of espeak-ng followed by one of ``VARIANTS``."""
    words_per_minute: int
    pitch: int
    """Pitch, from 0 to 100."""


def random_utterance(text: str, voice: str, random: np.random.Generator) -> Utterance:
    """Return ``text`` in language ``voice`` with a random variant, pace and pitch."""
    variant = VARIANTS[int(random.integers(len(VARIANTS)))]
    pace, pitch = int(random.integers(150, 211)), int(random.integers(35, 66))
    return Utterance(text, voice + variant, pace, pitch)


class Speaker:
    """A speech synthesizer with its own private copy of the library; a context manager."""

    def __init__(self) -> None:
        loader = optional_package("espeakng_loader", "espeakng-loader")
        with tempfile.TemporaryDirectory() as directory:
            # The dynamic linker treats a copy as a separate library. Once it is loaded, the file
            # can be deleted.
            copy = Path(shutil.copy(loader.get_library_path(), directory))
            self._library = ctypes.CDLL(str(copy))
        data = Path(loader.get_data_path()).parent
        self.sample_rate = int(
            self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), 0)
        )
        if self.sample_rate <= 0:
            raise DataError(f"{data}: espeak-ng found no voices in this directory")
        self._parts: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def __enter__(self) -> Speaker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._library.espeak_Terminate()

    def _receive(self, samples: ctypes._Pointer, count: int, _events: int | None) -> int:
        if count > 0:
            self._parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, utterance: Utterance) -> np.ndarray:
        """Synthesize ``utterance``.

        Returns:
            [n] float32 at 16 kHz, with silence trimmed from both ends.

        Raises:
            DataError: espeak-ng does not have the voice.
        """
        if self._library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
            raise DataError(f"espeak-ng has no voice {utterance.voice!r}")
        self._library.espeak_SetParameter(_RATE, utterance.words_per_minute, 0)
        self._library.espeak_SetParameter(_PITCH, utterance.pitch, 0)
        self._parts = []
        text = utterance.text.encode()
        self._library.espeak_Synth(text, len(text) + 1, 0, 1, 0, _UTF8, None, None)
        if not self._parts:
            return np.zeros(0, np.float32)
        samples = np.concatenate(self._parts).astype(np.float32) / 32768
        return trim_silence(resample(samples, self.sample_rate))


def speak(utterances: Sequence[Utterance]) -> list[SpeechFeatures]:
    """Synthesize the utterances in order with a new ``Speaker`` and return their features."""
    with Speaker() as speaker:
        return [speech_features(speaker.say(utterance)) for utterance in utterances]
