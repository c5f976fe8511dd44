"""Long documents: where they are cut, compared with a plain splitter, and how they are read."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mot_megatron.data import blend_stream
from mot_megatron.data.blend import Blend
from mot_megatron.data.blend_stream import progress_of_sources
from mot_megatron.data.codebooks.image import PatchCodec
from mot_megatron.data.codebooks.speech import UnitCodec
from mot_megatron.data.corpus import (
    Corpus,
    CorpusDescription,
    LongDocuments,
    Modality,
    TokenSplit,
)
from mot_megatron.data.loader import (
    DataShard,
    GroupingPlan,
    PackedLoader,
    describe_long_documents,
    evaluation_batches,
)
from mot_megatron.data.pieces import Pieces, describe_pieces, pieces_of
from mot_megatron.data.writer import CorpusWriter
from mot_megatron.errors import CheckpointError, DataError

from .test_blend import documents_of

SPECIAL = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<boa>", "<eoa>", "<en>", "<de>")
PAD, BOS, EOS, BOI, EOI, BOA, EOA, EN, DE = range(9)
PICTURE = 64
TEXT, IMAGE, SPEECH, SCAN = range(4)
MODALITIES = (
    Modality(name="text", first_id=0, size=100, codec="bpe", codebook="text.json"),
    Modality(
        name="image", first_id=100, size=20, codec="image_patches", codebook="image.npz",
        begin_token=BOI, end_token=EOI,
    ),
    Modality(
        name="speech", first_id=120, size=20, codec="speech_units", codebook="speech.npz",
        begin_token=BOA, end_token=EOA,
    ),
    Modality(name="scan", first_id=140, size=10, codec="image_patches", codebook="scan.npz"),
)  # fmt: skip
FIRST = {TEXT: 20, IMAGE: 100, SPEECH: 120, SCAN: 140}
PLAN = GroupingPlan(towers_of_modalities=(0, 1, 2, 1), num_towers=3)


def description(modalities: tuple[Modality, ...] = MODALITIES) -> CorpusDescription:
    return CorpusDescription(
        name="long", builder="tests 1", seed=0, vocab_size=150, pad_token=PAD,
        modalities=modalities, special_tokens={name: id_ for id_, name in enumerate(SPECIAL)},
    )  # fmt: skip


def tokens_per_item(modality: Modality) -> int | None:
    return PICTURE if modality.codec == "image_patches" else None


def split_of(documents: list[list[int]]) -> TokenSplit:
    offsets = np.cumsum([0, *map(len, documents)])
    return TokenSplit("train", np.concatenate(documents).astype(np.int32), offsets)


def cut(
    documents: list[list[int]], seq_length: int, long_documents: LongDocuments = "split"
) -> Pieces:
    return pieces_of(
        split_of(documents), description(), seq_length, long_documents, "here", tokens_per_item
    )


def lists(pieces: Pieces) -> list[list[int]]:
    return [pieces[number].tolist() for number in range(len(pieces))]


Segment = tuple[int, list[int]]
"""A modality, and the tokens of a segment with those around it."""


def segment(modality: int, length: int, language: int | None) -> list[Segment]:
    """Return the segments of one item; a scan has nothing around it."""
    ids = [FIRST[modality] + place % 10 for place in range(length)]
    if modality == TEXT:
        return [(TEXT, [*([language] if language else []), *ids])]
    if modality == SCAN:
        return [(SCAN, ids[:PICTURE])] * (1 + length // 40)
    around = (BOI, EOI) if modality == IMAGE else (BOA, EOA)
    return [(modality, [around[0], *ids, around[1]])]


def plain_pieces(segments: list[Segment], seq_length: int) -> list[list[int]]:
    """Cut a document, given as its segments, token by token."""
    if sum(len(ids) for _, ids in segments) <= seq_length:
        return [[id_ for _, ids in segments for id_ in ids]]
    pieces: list[list[int]] = [[]]
    for modality, ids in segments:
        if len(ids) > seq_length:
            assert modality in (TEXT, SPEECH)
            for id_ in ids:
                if len(pieces[-1]) == seq_length:
                    pieces.append([])
                pieces[-1].append(id_)
        else:
            if len(pieces[-1]) + len(ids) > seq_length:
                pieces.append([])
            pieces[-1] += ids
    return [piece for piece in pieces if piece]


def joined(segments: list[Segment]) -> list[Segment]:
    """Join neighboring texts that no token separates, since nobody can tell them apart."""
    result: list[Segment] = []
    for modality, ids in segments:
        together = result and modality == TEXT == result[-1][0] and ids[0] not in (EN, DE)
        if together:
            result[-1] = (TEXT, [*result[-1][1], *ids])
        else:
            result.append((modality, list(ids)))
    return result


ITEMS = st.lists(
    st.one_of(
        st.tuples(st.just(TEXT), st.integers(1, 300), st.sampled_from([None, EN, DE])),
        st.tuples(st.just(IMAGE), st.just(PICTURE), st.none()),
        st.tuples(st.just(SPEECH), st.integers(1, 250), st.none()),
        st.tuples(st.just(SCAN), st.integers(PICTURE, 200), st.none()),
    ),
    max_size=8,
)


@settings(max_examples=80, deadline=None)
@given(st.lists(ITEMS, min_size=1, max_size=6), st.integers(PICTURE + 2, 400))
def test_equals_a_plain_splitter(items: list[list[tuple]], seq_length: int) -> None:
    documents, expected = [], []
    for item in items:
        inner = [part for each in item for part in segment(*each)]
        segments = joined([(TEXT, [BOS]), *inner, (TEXT, [EOS])])
        documents.append([id_ for _, ids in segments for id_ in ids])
        expected.append(plain_pieces(segments, seq_length))
    pieces = cut(documents, seq_length)
    assert lists(pieces) == [piece for each in expected for piece in each]
    assert [pieces.document_of(number) for number in range(len(pieces))] == [
        document for document, each in enumerate(expected) for _ in each
    ]
    first = cut(documents, seq_length, "truncate")
    assert lists(first) == [each[0] for each in expected]
    assert [first.document_of(number) for number in range(len(first))] == list(range(len(first)))
    assert first.lengths.tolist() == [len(each[0]) for each in expected]
    assert first.dropped_tokens == sum(map(len, documents)) - int(first.lengths.sum())
    assert first.num_long == pieces.num_long == sum(len(each) > 1 for each in expected)
    assert pieces.num_made == sum(len(each) for each in expected if len(each) > 1)


def test_pictures_are_not_cut() -> None:
    picture = [BOI, *[100] * PICTURE, EOI]
    document = [BOS, *[30] * 10, *picture, *picture, EOS]
    assert [len(piece) for piece in lists(cut([document], 80))] == [77, 67]
    with pytest.raises(
        DataError, match=r"here: document 1 has an item of 66 tokens, .* at most 65 \(data.seq"
    ):
        cut([[BOS], document], 65)
    scans = [140] * PICTURE * 3
    assert [len(piece) for piece in lists(cut([[BOS, *scans]], 130))] == [129, 64]


def test_items_without_a_codec_are_not_cut() -> None:
    modalities = tuple(
        each.model_copy(update={"codec": "none", "codebook": None}) for each in MODALITIES
    )
    split = split_of([[BOS, *[30] * 90, BOI, *[100] * 30, EOI]])
    pieces = pieces_of(split, description(modalities), 40, "split", "here", tokens_per_item)
    assert pieces.lengths.tolist() == [40, 40, 11, 32]
    with pytest.raises(DataError, match="an item of 32 tokens"):
        pieces_of(split, description(modalities), 31, "split", "here", tokens_per_item)


def test_refusing_names_the_key() -> None:
    message = '1..20 (seq_length); data.long_documents can be "split" or "truncate"'
    with pytest.raises(DataError, match=re.escape(f"document 1 has 21 tokens, expected {message}")):
        cut([[1] * 20, [1] * 21], 20, "refuse")


def test_what_became_of_them_is_described() -> None:
    documents = [[30] * 5, [30] * 25, [30] * 10]
    split, first = cut(documents, 10), cut(documents, 10, "truncate")
    assert describe_pieces([split, first, cut(documents, 40)], ["a", "b", "c"]) == [
        "a: 1 documents longer than data.seq_length, split into 3 pieces",
        "b: 1 documents longer than data.seq_length, truncated: 15 tokens (37.5%) are not read",
    ]


SEQ_LENGTH = 96


def random_document(number: int, generator: np.random.Generator) -> list[int]:
    """Return a document that begins with its number."""
    kinds = generator.permutation([IMAGE, SPEECH, *[TEXT] * (1 + number % 2)])
    lengths = {IMAGE: PICTURE, SPEECH: 20, TEXT: int(generator.integers(1, 120))}
    items = [segment(int(kind), lengths[int(kind)], None) for kind in kinds]
    ids = [id_ for each in items for _, part in each for id_ in part]
    return [BOS, 20 + number, *ids, EOS]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    root = tmp_path_factory.mktemp("corpora")
    found = {}
    for seed, name in enumerate(("one", "two")):
        generator = np.random.default_rng(seed)
        with CorpusWriter(
            directory=root / name, name=name, builder="tests 1", seed=0, modalities=MODALITIES,
            pad_token=PAD, special_tokens=description().special_tokens,
        ) as writer:  # fmt: skip
            for modality in MODALITIES:
                content = b"x"
                if modality.codec == "image_patches":
                    content = PatchCodec(modality, np.zeros((modality.size, 48), np.float32)).save()
                elif modality.codec == "speech_units":
                    centroids = np.zeros((modality.size, 160), np.float32)
                    content = UnitCodec(modality, centroids, np.zeros(40, np.float32)).save()
                elif modality.codec == "bpe":
                    content = Tokenizer(models.BPE()).to_str().encode()
                writer.add_file(str(modality.codebook), content)
            for split, count in (("train", 30), ("validation", 9)):
                for number in range(count):
                    writer.add_document(split, np.array(random_document(number, generator)))
        found[name] = Corpus.open(root / name)
    return found


def loader(
    corpus: Corpus, packing: str = "sequence", long_documents: LongDocuments = "split"
) -> PackedLoader:
    return PackedLoader(
        replace(corpus, long_documents=long_documents),
        "train",
        seq_length=SEQ_LENGTH,
        micro_batch_size=8,
        grouping=PLAN,
        shard=DataShard(0, 1),
        seed=1,
        packing=packing,  # type: ignore[arg-type]
    )


def pieces_in(corpus: Corpus, split: str, long_documents: LongDocuments) -> Counter:
    """Return the pieces of a split, and how often each occurs."""
    parts = corpus.parts(split)
    found = [
        pieces_of(part, corpus.description, SEQ_LENGTH, long_documents, "x", tokens_per_item)
        for part in parts
    ]
    return Counter(tuple(ids) for pieces in found for ids in lists(pieces))


@pytest.mark.parametrize("long_documents", ["split", "truncate"])
@pytest.mark.parametrize("packing", ["sequence", "budget"])
def test_an_epoch_has_every_piece_once(
    corpora: dict[str, Corpus], packing: str, long_documents: LongDocuments
) -> None:
    reader = loader(corpora["one"], packing, long_documents)
    expected = pieces_in(corpora["one"], "train", long_documents)
    assert max(map(len, expected)) <= SEQ_LENGTH
    found: Counter = Counter()
    while reader.state_dict()["epoch"] == 0:
        found += Counter(documents_of(reader.next_micro_batch()))
    # The last batch of an epoch packed by sequence may have documents of the next one.
    assert not expected - found
    assert (found - expected).total() <= (0 if packing == "budget" else 12)


@pytest.mark.parametrize("long_documents", ["split", "truncate"])
def test_held_out_documents_are_cut_too(
    corpora: dict[str, Corpus], long_documents: LongDocuments
) -> None:
    both = Blend.of([("one", corpora["one"], 1), ("two", corpora["two"], 3)])
    both = replace(both, long_documents=long_documents)
    batches = evaluation_batches(
        both,
        "validation",
        seq_length=SEQ_LENGTH,
        micro_batch_size=2,
        grouping=PLAN,
        shard=DataShard(0, 1),
    )
    found = Counter(ids for batch in batches for ids in documents_of(batch))
    assert found == pieces_in(both, "validation", long_documents)
    lines = describe_long_documents(both, "validation", SEQ_LENGTH)
    assert [line.split(":")[0] for line in lines] == [
        str(corpora[name].directory) for name in ("one", "two")
    ]


@pytest.mark.parametrize("long_documents", ["split", "truncate"])
@pytest.mark.parametrize("packing", ["sequence", "budget"])
def test_blends_read_pieces_and_resume(
    corpora: dict[str, Corpus],
    packing: str,
    long_documents: LongDocuments,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blend_stream, "WINDOW_DOCUMENTS", 30)
    monkeypatch.setattr(blend_stream, "_BINS", 1)
    alone = loader(corpora["one"], packing, long_documents)
    found = Counter(ids for _ in range(3) for ids in documents_of(alone.next_micro_batch()))
    both = Blend.of([("one", corpora["one"], 1), ("two", corpora["two"], 1)])
    reader = loader(both, packing, long_documents)
    reader.load_state_dict(alone.state_dict())
    expected = pieces_in(corpora["one"], "train", long_documents)
    other = pieces_in(corpora["two"], "train", long_documents)
    while progress_of_sources(reader.state_dict())[0].epochs < 2:
        resumed = loader(both, packing, long_documents)
        resumed.load_state_dict(reader.state_dict())
        batch = documents_of(reader.next_micro_batch())
        assert documents_of(resumed.next_micro_batch()) == batch
        found += Counter(batch)
    assert not expected - found
    assert set(found) <= {*expected, *other}
    wrong: LongDocuments = "truncate" if long_documents == "split" else "split"
    for corpus, position in ((both, reader), (both, alone), (corpora["one"], alone)):
        with pytest.raises(CheckpointError, match=f"long_documents = '{long_documents}', but"):
            loader(corpus, packing, wrong).load_state_dict(position.state_dict())


def test_reports_name_the_document_of_a_piece(corpora: dict[str, Corpus]) -> None:
    reader = loader(corpora["one"])
    position = reader.state_dict()
    numbers = [number for each in reader.documents_at(position, 8) for number in each]
    batch = documents_of(reader.next_micro_batch())
    train = corpora["one"].split("train")
    for number, ids in zip(numbers, batch, strict=True):
        whole = train[number].tolist()
        assert any(
            whole[at : at + len(ids)] == list(ids) for at in range(len(whole) - len(ids) + 1)
        )
