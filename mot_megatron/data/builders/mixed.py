"""One larger corpus of many sources: emoji, stamps, clip art, and WordNet's glosses.

Text, image and speech hold about a third of the tokens each. What the sources call by one name
(an emoji, a drawing and a gloss of ``apple``), or draw alike, is one concept and so in one split.
Drawings are few; training sees each of them several times, every time varied.
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
# Without Malayalam, whose captions take three times as many tokens as any other's.
LANGUAGES = (*VOICES, *(each for each in stamps.SPOKEN if each not in {*VOICES, "ml"}))
"""Of emoji's names, and those with recorded captions of stamps."""
_RENDERINGS = 10
"""Documents of a clip art drawing in training; held out it has one."""
_VARIED_STRONGLY = 0.7
"""Share of the training pictures; the others look as held-out ones do."""
_SPOKEN_NAMES, _SPOKEN_GLOSSES = 0.7, 0.45
"""Share of the documents with a picture, and of short enough glosses, that are also spoken."""
_LONGEST_SENTENCE = 85
"""Characters; some six seconds."""
_LONGEST_CAPTION = 70
"""Characters; some stamps' captions explain the rules of chess."""
_MOST_KEYWORDS = 5
_DRAWINGS_PER_TASK, _RENDERINGS_PER_TASK = 16, 64
_UTTERANCES_PER_TASK, _RECORDINGS_PER_TASK = 256, 128

Item = TypeVar("Item")


class DebPackages(NamedTuple):
    """Where the downloaded Debian packages lie."""

    stamps: Path
    """tuxpaint-stamps-default."""
    clip_art: Path
    """openclipart-svg."""
    wordnet: Path
    """wordnet-base."""


@dataclass(frozen=True)
class Plan:
    """A document to be made."""

    key: str
    subject: str
    """What its source calls it; subjects that share a name or content are one concept."""
    language: str
    text: str
    drawing: str | None = None
    may_mirror: bool = False
    utterance: Utterance | None = None
    recording: str | None = None
    """Instead of an utterance."""


@dataclass(frozen=True)
class _Sources:
    """All that documents are made of; keys of drawings and recordings name their source."""

    emoji: Sequence[Emoji]
    stamps: Sequence[Stamp]
    clip_art: Sequence[ClipArt]
    glosses: Sequence[Gloss]
    stamp_files: Mapping[str, bytes]
    clip_files: Mapping[str, bytes]

    def drawings(self) -> list[tuple[str, bytes]]:
        """Name and content of everything that is drawn."""
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
    """Build the corpus.

    Args:
        packages: The downloaded packages.
        directory: Where; must not exist or be empty. It appears when the corpus is complete.
        seed: The same seed gives the same bytes, whatever the number of workers.
        workers: Processes that draw, speak and decode recordings.
        limit: Use only about this many things of every source, evenly spread, for a quick look;
            None for all.

    Raises:
        DataError: The directory is taken, a file is not the package it should be, the limit is too
            low to train the codebooks, or the disk is full.
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
    """Masters by the names of drawings, without clip art that draws nothing."""
    art = [task for task in drawings if task[0].startswith("clipart/")]
    other = [task for task in drawings if not task[0].startswith("clipart/")]
    pictures = start_stage(pool, stamps.draw_pictures, other, _DRAWINGS_PER_TASK, "drawing")
    clips = start_stage(pool, clipart.draw_clip_art, art, _DRAWINGS_PER_TASK, "drawing clip art")
    names = [name for name, _ in (*other, *art)]
    masters = zip(names, (*pictures.results(), *clips.results()), strict=True)
    return {name: master for name, master in masters if master is not None}


def _marks(sources: _Sources, masters: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Subject -> its English name's words and digests of what it contains."""
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
    """All documents, by language: espeak-ng loads its dictionary anew with every change of it.

    Args:
        sources: What they are made of.
        masters: Drawings by name; clip art without one has no documents.
        concepts: Subject -> concept, which decides how many documents clip art has.
        seed: Of every choice.
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
    """Captions are heard as recorded; some others are spoken by espeak-ng."""
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
    """The title and some of the keywords, in any order."""
    count = int(random.integers(_MOST_KEYWORDS + 1))
    chosen = [art.keywords[index] for index in random.permutation(len(art.keywords))[:count]]
    return f"{art.title}: {', '.join(chosen)}" if chosen else art.title


def _utterance(key: str, text: str, language: str, seed: int) -> Utterance | None:
    """How ``text`` is said; None for the share of documents that have no sound."""
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
    """One picture to be made of a master."""

    key: str
    master: np.ndarray
    may_mirror: bool
    held_out: bool
    seed: int


def _render(tasks: list[_Rendering]) -> list[np.ndarray]:
    pictures = []
    for task in tasks:
        random = generator(task.seed, task.key, "picture")
        # What is held out looks as its source drew it, but for size and place.
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
    """Carry out ``plans``."""
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
    said = [plan.key for plan in plans if plan.utterance is not None]
    utterances = [plan.utterance for plan in plans if plan.utterance is not None]
    speaking = start_stage(pool, speak, utterances, _UTTERANCES_PER_TASK, "speaking")
    names = sorted({plan.recording for plan in plans if plan.recording is not None})
    recordings = [(name, sources.stamp_files[name]) for name in names]
    hearing = start_stage(pool, stamps.listen, recordings, _RECORDINGS_PER_TASK, "listening")
    pictures = dict(zip((task.key for task in renderings), rendering.results(), strict=True))
    spoken = dict(zip(said, speaking.results(), strict=True))
    heard = dict(zip(names, hearing.results(), strict=True))

    def sound(plan: Plan) -> SpeechFeatures | None:
        return spoken.get(plan.key) if plan.recording is None else heard[plan.recording]

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
