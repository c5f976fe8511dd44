"""A blend of corpora: several corpora with the same vocabulary, which training reads as one.

``open_training_data`` opens what a configuration names. Weights are shares of tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import tomli_w

from mot_megatron.config import DataConfig
from mot_megatron.data.corpus import (
    TRAIN_SPLIT,
    Corpus,
    CorpusDescription,
    FileDigests,
    SplitCounts,
    TokenSplit,
)
from mot_megatron.data.vocabulary_difference import first_difference
from mot_megatron.errors import DataError


@dataclass(frozen=True)
class Source:
    """One corpus of a blend."""

    name: str
    corpus: Corpus
    share: Fraction
    """Its share of the training tokens; the shares of all sources sum to 1."""


@dataclass(frozen=True)
class Blend(Corpus):
    """Several corpora with the same vocabulary. It stands wherever a corpus does.

    Its folder is that of the first source, whose codebooks are equal to the others'. It has no
    splits of its own; ``parts`` returns those of the sources. In its description, the training
    tokens of each modality are divided as the weights say.
    """

    sources: tuple[Source, ...] = ()

    @classmethod
    def of(cls, sources: Sequence[tuple[str, Corpus, float]]) -> Blend:
        """Blend corpora, given with their names and weights.

        Raises:
            DataError: Two corpora have different vocabularies or are the same, or one lacks a split
                that another has.
        """
        # A weight of 0.7 means 7/10, not the nearest binary fraction.
        weights = [Fraction(repr(float(weight))) for _, _, weight in sources]
        members = tuple(
            Source(name, corpus, weight / sum(weights))
            for (name, corpus, _), weight in zip(sources, weights, strict=True)
        )
        first = members[0]
        for other in members[1:]:
            if other.corpus.vocabulary_digest != first.corpus.vocabulary_digest:
                names = str(first.corpus.directory), str(other.corpus.directory)
                difference = first_difference(
                    first.corpus.vocabulary, other.corpus.vocabulary, ("the first", "the second")
                )
                raise DataError(
                    f"data.sources: {names[0]} and {names[1]} have different vocabularies: "
                    f"{difference}"
                )
            ours, theirs = (sorted(each.corpus.description.splits) for each in (first, other))
            if ours != theirs:
                raise DataError(
                    f"data.sources: {first.corpus.directory} has splits {ours}, but"
                    f" {other.corpus.directory} has {theirs}; expected the same in all sources"
                )
        _check_different(members)
        identity = "\n".join(f"{each.corpus.fingerprint} {each.share}" for each in members)
        return cls(
            directory=first.corpus.directory,
            description=_describe(members),
            splits={},
            fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
            long_documents=first.corpus.long_documents,
            sources=members,
        )

    def description_text(self) -> str:
        """Return the description of the blend as the text of a corpus.toml."""
        return tomli_w.dumps(self.description.model_dump(mode="json", exclude_none=True))

    def parts(self, name: str) -> tuple[TokenSplit, ...]:
        """Return the split called ``name`` of every source, in their order; see ``Corpus``."""
        return tuple(source.corpus.split(name) for source in self.sources)


def sources_of(corpus: Corpus) -> tuple[Source, ...]:
    """Return the sources of a blend; a plain corpus is its own only source."""
    if isinstance(corpus, Blend):
        return corpus.sources
    return (Source(corpus.description.name, corpus, Fraction(1)),)


def open_training_data(data: DataConfig, *, documents: bool = True) -> Corpus:
    """Open the corpus or the blend of a configuration, whose files are verified once per machine.

    A single source is opened as the plain corpus that it is.

    Args:
        data: The section of the configuration.
        documents: Also open the documents, and not only the descriptions and codebooks.

    Raises:
        DataError: A corpus cannot be opened, or the sources do not fit together.
    """
    corpora = [
        Corpus.open(folder, once=True) if documents else Corpus.open_vocabulary(folder)
        for folder in data.folders
    ]
    corpora = [replace(each, long_documents=data.long_documents) for each in corpora]
    if len(corpora) == 1:
        return corpora[0]
    named = zip(data.sources, corpora, strict=True)
    return Blend.of([(source.label, corpus, source.weight) for source, corpus in named])


def _check_different(members: Sequence[Source]) -> None:
    by_content: dict[str, Source] = {}
    for member in members:
        other = by_content.setdefault(member.corpus.fingerprint, member)
        if other is not member:
            raise DataError(
                f"data.sources: {other.corpus.directory} and {member.corpus.directory} are the same"
                " corpus; give it once, with the sum of the weights"
            )


def _describe(members: Sequence[Source]) -> CorpusDescription:
    descriptions = [member.corpus.description for member in members]
    return descriptions[0].model_copy(
        update={
            "name": " + ".join(member.name for member in members),
            "builder": ", ".join(dict.fromkeys(each.builder for each in descriptions)),
            "splits": {name: _counts(members, name) for name in descriptions[0].splits},
            "licences": {key: text for each in descriptions for key, text in each.licences.items()},
        }
    )


def _counts(members: Sequence[Source], split: str) -> SplitCounts:
    counts = [member.corpus.description.splits[split] for member in members]
    tokens = sum(each.tokens for each in counts)
    # Planning needs the tokens that training reads, not those that happen to be there.
    factors = [
        member.share * tokens / each.tokens if split == TRAIN_SPLIT else Fraction(1)
        for member, each in zip(members, counts, strict=True)
    ]
    per_modality = {
        name: sum(
            (
                factor * each.tokens_per_modality[name]
                for factor, each in zip(factors, counts, strict=True)
            ),
            Fraction(),
        )
        for name in counts[0].tokens_per_modality
    }
    return SplitCounts(
        documents=sum(each.documents for each in counts),
        tokens=tokens,
        tokens_per_modality=_rounded(per_modality, tokens),
        longest_document=max(each.longest_document for each in counts),
        sha256=FileDigests(
            bin=_joint_digest(
                [f"{each.sha256.bin} {f}" for each, f in zip(counts, factors, strict=True)]
            ),
            idx=_joint_digest(
                [f"{each.sha256.idx} {f}" for each, f in zip(counts, factors, strict=True)]
            ),
        ),
    )


def _rounded(numbers: dict[str, Fraction], total: int) -> dict[str, int]:
    """Round numbers that sum to ``total`` to integers that do, by largest remainder."""
    found = {name: int(number) for name, number in numbers.items()}
    by_remainder = sorted(numbers, key=lambda name: found[name] - numbers[name])
    for name in by_remainder[: total - sum(found.values())]:
        found[name] += 1
    return found


def _joint_digest(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
