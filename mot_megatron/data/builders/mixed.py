"""The mixed corpus, the largest one, built from emoji, stamps, clip art and WordNet glosses.

Text, image and speech each make up about a third of the tokens. Items that have the same name in
several sources (an emoji, a drawing and a gloss of ``apple``) or identical drawings are one concept
and therefore in the same split. As there are few drawings, each clip art drawing in the training
split is rendered several times with different augmentations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from mot_megatron.data.builders import clipart, openmoji, stamps, wordnet
from mot_megatron.data.builders.assembly import Draft, open_writer, write_documents
from mot_megatron.data.builders.clipart import ClipArt
from mot_megatron.data.builders.concepts import join_concepts, name_words
from mot_megatron.data.builders.espeak import Utterance, random_utterance, speak
from mot_megatron.data.builders.openmoji import VOICES, Emoji
from mot_megatron.data.builders.pictures import vary_picture, vary_strongly
from mot_megatron.data.builders.randomness import generator, is_held_out
from mot_megatron.data.builders.stamps import Stamp
from mot_megatron.data.builders.wordnet import Gloss
from mot_megatron.data.builders.workers import start_stage, worker_pool
from mot_megatron.data.codebooks.speech import SpeechFeatures

BUILDER = "mot_megatron.data.builders.mixed 2"
LICENCES = {**openmoji.LICENCES, **stamps.LICENCES, **clipart.LICENCES, **wordnet.LICENCES}
# Malayalam is excluded: its captions take three times as many tokens as those of other languages.
LANGUAGES = (*VOICES, *(each for each in stamps.SPOKEN if each not in {*VOICES, "ml"}))
"""Languages of the emoji names, and those in which stamps have recorded captions."""
_RENDERINGS = 10
"""Documents per clip art drawing in the training split. A held-out drawing has one."""
_VARIED_STRONGLY = 0.7
"""Fraction of training pictures that are varied strongly; the rest vary like held-out pictures."""
_SPOKEN_NAMES, _SPOKEN_GLOSSES = 0.7, 0.45
"""Fractions of emoji, stamp and clip art documents, and of short glosses, that get synthesized
speech. A stamp with a recording uses the recording instead."""
_LONGEST_SENTENCE = 85
"""Maximum characters of a spoken gloss, about six seconds."""
_LONGEST_CAPTION = 70
"""Maximum characters of a stamp's caption. Some captions explain the rules of chess."""
_MOST_KEYWORDS = 5
_DRAWINGS_PER_TASK, _RENDERINGS_PER_TASK = 16, 64
_UTTERANCES_PER_TASK, _RECORDINGS_PER_TASK = 256, 128

Item = TypeVar("Item")


class DebPackages(NamedTuple):
    """Paths of the downloaded Debian packages."""

    stamps: Path
    """The package tuxpaint-stamps-default."""
    clip_art: Path
    """The package openclipart-svg."""
    wordnet: Path
    """The package wordnet-base."""


@dataclass(frozen=True)
class Plan:
    """A document to build."""

    key: str
    subject: str
    """Name of the item within its source. Subjects that share a name or content are one concept."""
    language: str
    text: str
    drawing: str | None = None
    may_mirror: bool = False
    utterance: Utterance | None = None
    recording: str | None = None
    """Name of the recording to use instead of an utterance."""


@dataclass(frozen=True)
class _Sources:
    """The items of all sources that the documents are built from."""

    emoji: Sequence[Emoji]
    stamps: Sequence[Stamp]
    clip_art: Sequence[ClipArt]
    glosses: Sequence[Gloss]
    stamp_files: Mapping[str, bytes]
    clip_files: Mapping[str, bytes]

    def drawings(self) -> list[tuple[str, bytes]]:
        """Return (name, content) of all pictures. Each name starts with its source."""
        emoji = [(each.svg.name, each.svg.read_bytes()) for each in self.emoji]
        stamped = sorted({each.picture for each in self.stamps})
        return [
            *((f"emoji/{name}", content) for name, content in emoji),
            *((f"stamps/{name}", self.stamp_files[name]) for name in stamped),
            *((f"clipart/{each.name}", self.clip_files[each.name]) for each in self.clip_art),
        ]


def build_mixed(
    packages: DebPackages,
    directory: Path,
    *,
    seed: int = 0,
    workers: int = 2,
    limit: int | None = None,
) -> None:
    """Build the mixed corpus.

    Args:
        packages: The downloaded packages.
        directory: Output directory, which must be new or empty. The corpus appears there only once
            it is complete.
        seed: Random seed. The same seed gives the same bytes for any number of workers.
        workers: Number of processes that render pictures, synthesize speech and decode recordings.
        limit: Approximate number of items to use from each source, evenly spaced, for a quick
            trial. None uses all.

    Raises:
        DataError: The directory is not empty, a file is not the expected package, a Python package
            is missing, the limit is too low to train the codebooks, or the disk is full.
    """
    writer = open_writer(
        directory,
        name="mixed",
        builder=BUILDER,
        seed=seed,
        languages=LANGUAGES,
        licences=LICENCES,
    )
    with writer, worker_pool(workers) as pool:
        sources = _read(packages, limit)
        masters = _draw(pool, sources.drawings())
        concepts = join_concepts(_marks(sources, masters))
        plans = plan_documents(sources, masters, concepts, seed)
        write_documents(writer, _drafts(pool, plans, sources, masters, concepts, seed))


def _read(packages: DebPackages, limit: int | None) -> _Sources:
    stamp_files = stamps.read_package(packages.stamps)
    clip_files = clipart.read_package(packages.clip_art)
    gloss_files = wordnet.read_package(packages.wordnet)
    return _Sources(
        emoji=_some(openmoji.list_emoji(), limit),
        stamps=_some(stamps.list_stamps(stamp_files), limit),
        clip_art=_some(clipart.list_clip_art(clip_files), limit),
        glosses=_some(wordnet.list_glosses(gloss_files), limit),
        stamp_files=stamp_files,
        clip_files=clip_files,
    )


def _some(items: list[Item], limit: int | None) -> list[Item]:
    return items if limit is None else items[:: max(1, len(items) // limit)]


def _draw(pool: ProcessPoolExecutor, drawings: list[tuple[str, bytes]]) -> dict[str, np.ndarray]:
    """Render the masters by drawing name, omitting clip art that cannot be rendered."""
    art = [task for task in drawings if task[0].startswith("clipart/")]
    other = [task for task in drawings if not task[0].startswith("clipart/")]
    pictures = start_stage(pool, stamps.draw_pictures, other, _DRAWINGS_PER_TASK, "drawing")
    clips = start_stage(pool, clipart.draw_clip_art, art, _DRAWINGS_PER_TASK, "drawing clip art")
    names = [name for name, _ in (*other, *art)]
    masters = zip(names, (*pictures.results(), *clips.results()), strict=True)
    return {name: master for name, master in masters if master is not None}


def _marks(sources: _Sources, masters: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Map each subject to its marks: words of its English name and digests of its content."""
    marks: dict[str, list[str]] = {}

    def add(subject: str, name: str, *contents: str) -> None:
        drawn = [contents[0]] if contents and contents[0] in masters else []
        digests = [hashlib.sha256(masters[drawing].tobytes()).hexdigest() for drawing in drawn]
        marks.setdefault(subject, []).extend((name_words(name), *digests, *contents[1:]))

    for emoji in sources.emoji:
        name = emoji.base_name.replace("_", " ")
        add(f"emoji/{emoji.base_name}", name, f"emoji/{emoji.svg.name}")
    for stamp in sources.stamps:
        shared = stamps.marks_of(stamp, sources.stamp_files)
        add(f"stamps/{stamp.name}", stamp.captions["en"], f"stamps/{stamp.picture}", *shared)
    for art in sources.clip_art:
        add(f"clipart/{art.name}", art.title, f"clipart/{art.name}")
    for gloss in sources.glosses:
        add(f"wordnet/{gloss.name}", gloss.words[0])
    return marks


def plan_documents(
    sources: _Sources,
    masters: Mapping[str, np.ndarray],
    concepts: Mapping[str, str],
    seed: int,
) -> list[Plan]:
    """Plan all documents.

    They are sorted by language, because espeak-ng reloads its dictionary whenever the language
    changes.

    Args:
        sources: Items to build documents from.
        masters: Drawing name -> master. Clip art without a master gets no documents.
        concepts: Subject -> concept. It determines the split of a clip art drawing, and thereby the
            drawing's number of documents.
        seed: Random seed.
    """
    plans = [
        *_plan_emoji(sources.emoji, seed),
        *_plan_stamps(sources.stamps, seed),
        *_plan_clip_art(
            (art for art in sources.clip_art if f"clipart/{art.name}" in masters), concepts, seed
        ),
        *_plan_glosses(sources.glosses, seed),
    ]
    return sorted(plans, key=lambda plan: plan.language)


def _plan_emoji(emoji: Sequence[Emoji], seed: int) -> list[Plan]:
    plans = []
    for plan in openmoji.plan_emoji(list(emoji), seed):
        key = f"emoji/{plan.key}"
        spoken = generator(seed, key, "spoken").random() < _SPOKEN_NAMES
        plans.append(
            Plan(
                key,
                subject=f"emoji/{plan.emoji.base_name}",
                language=plan.language,
                text=plan.emoji.names[plan.language],
                drawing=f"emoji/{plan.emoji.svg.name}",
                utterance=plan.utterance if spoken else None,
            )
        )
    return plans


def _plan_stamps(listed: Iterable[Stamp], seed: int) -> list[Plan]:
    """Plan a document per stamp and language.

    Speech is the recording of the caption if there is one. Otherwise, some captions are synthesized
    with espeak-ng.
    """
    plans = []
    for stamp in listed:
        for language in LANGUAGES:
            key, text = f"stamps/{stamp.name}/{language}", stamp.captions.get(language, "")
            if not 0 < len(text) <= _LONGEST_CAPTION:
                continue
            recording = stamp.recordings.get(language)
            spoken = recording is None and language in VOICES
            plans.append(
                Plan(
                    key,
                    subject=f"stamps/{stamp.name}",
                    language=language,
                    text=text,
                    drawing=f"stamps/{stamp.picture}",
                    may_mirror=stamp.may_mirror,
                    utterance=_utterance(key, text, language, seed) if spoken else None,
                    recording=recording,
                )
            )
    return plans


def _plan_clip_art(listed: Iterable[ClipArt], concepts: Mapping[str, str], seed: int) -> list[Plan]:
    plans = []
    for art in listed:
        subject = f"clipart/{art.name}"
        renderings = 1 if is_held_out(concepts[subject]) else _RENDERINGS
        for rendering in range(renderings):
            key = f"{subject}/{rendering}"
            plans.append(
                Plan(
                    key,
                    subject=subject,
                    language="en",
                    text=_clip_art_text(art, generator(seed, key, "keywords")),
                    drawing=subject,
                    may_mirror=art.may_mirror,
                    utterance=_utterance(key, art.title, "en", seed),
                )
            )
    return plans


def _clip_art_text(art: ClipArt, random: np.random.Generator) -> str:
    """Return the title followed by some of the keywords in random order."""
    count = int(random.integers(_MOST_KEYWORDS + 1))
    chosen = [art.keywords[index] for index in random.permutation(len(art.keywords))[:count]]
    return f"{art.title}: {', '.join(chosen)}" if chosen else art.title


def _utterance(key: str, text: str, language: str, seed: int) -> Utterance | None:
    """Return a random utterance of ``text``, or None for the fraction of documents without one."""
    random = generator(seed, key, "utterance")
    if random.random() >= _SPOKEN_NAMES:
        return None
    return random_utterance(text, VOICES[language], random)


def _plan_glosses(glosses: Iterable[Gloss], seed: int) -> list[Plan]:
    plans = []
    for gloss in glosses:
        key = f"wordnet/{gloss.name}"
        random = generator(seed, key, "utterance")
        spoken = len(gloss.sentence) <= _LONGEST_SENTENCE and random.random() < _SPOKEN_GLOSSES
        utterance = random_utterance(gloss.sentence, VOICES["en"], random) if spoken else None
        plans.append(Plan(key, key, "en", gloss.text, utterance=utterance))
    return plans


class _Rendering(NamedTuple):
    """A picture to render from a master."""

    key: str
    master: np.ndarray
    may_mirror: bool
    held_out: bool
    seed: int


def _render(tasks: list[_Rendering]) -> list[np.ndarray]:
    pictures = []
    for task in tasks:
        random = generator(task.seed, task.key, "picture")
        # Only size, position and mirroring vary for held-out pictures.
        strongly = not task.held_out and random.random() < _VARIED_STRONGLY
        vary = vary_strongly if strongly else vary_picture
        pictures.append(vary(task.master, random, mirror=task.may_mirror))
    return pictures


def _drafts(
    pool: ProcessPoolExecutor,
    plans: Sequence[Plan],
    sources: _Sources,
    masters: Mapping[str, np.ndarray],
    concepts: Mapping[str, str],
    seed: int,
) -> list[Draft]:
    """Build the drafts described by ``plans``."""
    renderings = [
        _Rendering(
            plan.key,
            masters[plan.drawing],
            plan.may_mirror,
            is_held_out(concepts[plan.subject]),
            seed,
        )
        for plan in plans
        if plan.drawing is not None
    ]
    rendering = start_stage(pool, _render, renderings, _RENDERINGS_PER_TASK, "rendering")
    spoken_keys = [plan.key for plan in plans if plan.utterance is not None]
    utterances = [plan.utterance for plan in plans if plan.utterance is not None]
    speaking = start_stage(pool, speak, utterances, _UTTERANCES_PER_TASK, "speaking")
    names = sorted({plan.recording for plan in plans if plan.recording is not None})
    recordings = [(name, sources.stamp_files[name]) for name in names]
    decoding = start_stage(pool, stamps.listen, recordings, _RECORDINGS_PER_TASK, "listening")
    pictures = dict(zip((task.key for task in renderings), rendering.results(), strict=True))
    spoken = dict(zip(spoken_keys, speaking.results(), strict=True))
    recorded = dict(zip(names, decoding.results(), strict=True))

    def sound(plan: Plan) -> SpeechFeatures | None:
        return spoken.get(plan.key) if plan.recording is None else recorded[plan.recording]

    return [
        Draft(
            plan.key,
            concepts[plan.subject],
            plan.language,
            plan.text,
            pictures.get(plan.key),
            sound(plan),
        )
        for plan in plans
    ]
