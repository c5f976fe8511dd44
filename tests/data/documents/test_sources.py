"""Every format gives the same corpus for the same documents; bad files are one-line errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mot_megatron.data.documents import tables
from mot_megatron.data.documents.sources import Reading, list_shards, read_shard
from mot_megatron.errors import DataError
from tests.data.documents.raw_files import (
    Item,
    build,
    content,
    make_items,
    members_of,
    write_jsonl,
    write_tar,
)

WHOLE = Reading()


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return make_items()


@pytest.fixture(scope="module")
def built(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("list")
    build(write_jsonl(folder, items), folder / "corpus", reading=WHOLE)
    return content(folder / "corpus")


def table_of(items: list[Item]) -> Any:
    """Return the documents as Hugging Face datasets store them."""
    rows = [
        {
            "text": item.text,
            "image": {"bytes": item.png, "path": None},
            "audio": {"bytes": item.wav, "path": "a.wav"},
            "language": "en",
        }
        for item in items
    ]
    return pytest.importorskip("pyarrow").Table.from_pylist(rows)


def webdataset(folder: Path, items: list[Item]) -> Path:
    members = [("README", b"no document"), *members_of(items)]
    return write_tar(folder / "shard.tar", members)


def parquet(folder: Path, items: list[Item]) -> Path:
    from pyarrow import parquet

    parquet.write_table(table_of(items), folder / "data.parquet")
    return folder / "data.parquet"


def datasets_folder(folder: Path, items: list[Item]) -> Path:
    """Write what ``save_to_disk`` writes, and a file of its cache."""
    from pyarrow import ipc

    table = table_of(items)
    target = folder / "dataset" / "train"
    target.mkdir(parents=True)
    for name in ("data-00000-of-00001.arrow", "cache-0123.arrow"):
        with ipc.new_stream(str(target / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=9)
    (target / "state.json").write_text("{}", encoding="utf-8")
    return folder / "dataset"


def arrow_file(folder: Path, items: list[Item]) -> Path:
    from pyarrow import ipc

    table = table_of(items)
    with ipc.new_file(str(folder / "data.arrow"), table.schema) as file:
        file.write_table(table)
    return folder / "data.arrow"


@pytest.mark.parametrize("write", [webdataset, parquet, datasets_folder, arrow_file])
def test_formats_give_the_same_corpus(
    built: dict[str, bytes],
    items: list[Item],
    tmp_path: Path,
    write: Callable[[Path, list[Item]], Path],
) -> None:
    build(write(tmp_path, items), tmp_path / "corpus", reading=WHOLE)
    assert content(tmp_path / "corpus") == built


def read(path: Path, reading: Reading = WHOLE) -> list[Any]:
    return [each for shard in list_shards([path], reading) for each in read_shard(shard, reading)]


def test_lines_are_cut_into_shards(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    text = ["\ufeffone", "two", "", "four ä", "five", "six"]
    path.write_text("\r\n".join(text), encoding="utf-8", newline="")
    documents = read(path, Reading(shard_documents=2))
    assert len(list_shards([path], Reading(shard_documents=2))) == 3
    assert [document.segments[0].content for document in documents] == [
        "one", "two", "four ä", "five", "six",
    ]  # fmt: skip
    assert [document.where for document in documents] == [f"{path}:{n}" for n in (1, 2, 4, 5, 6)]


def test_forms_of_a_json_document(tmp_path: Path) -> None:
    path = tmp_path / "forms.jsonl"
    forms = [
        {"image": "a.png", "text": "a", "id": 7},
        [{"text": "a"}, {"image": "a.png"}, {"text": "b", "language": "de"}],
        {"segments": [{"text": "a"}], "language": "en", "id": 8},
    ]
    path.write_text("\n".join(map(json.dumps, forms)), encoding="utf-8")
    shown = [
        [
            (each.kind, getattr(each.content, "name", each.content), each.language)
            for each in d.segments
        ]
        for d in read(path)
    ]
    assert shown == [
        [("image", "a.png", None), ("text", "a", None)],
        [("text", "a", None), ("image", "a.png", None), ("text", "b", "de")],
        [("text", "a", "en")],
    ]


def test_segments_of_a_webdataset(tmp_path: Path, items: list[Item]) -> None:
    """A description may order the members; a text within it comes first otherwise."""
    segments = json.dumps({"segments": [{"image": "png"}, {"text": "b"}, {"image": "x.2.png"}]})
    members = [
        ("x.png", items[0].png), ("x.2.png", items[1].png), ("x.json", segments.encode()),
        ("y.json", b'{"text": "t"}'), ("y.png", items[2].png),
    ]  # fmt: skip
    x, y = read(write_tar(tmp_path / "a.tar", members))
    png = [segment.content.content for segment in x.segments if segment.kind == "image"]
    assert [segment.kind for segment in x.segments] == ["image", "text", "image"]
    assert png[1] == items[1].png
    assert [segment.kind for segment in y.segments] == ["text", "image"]


@pytest.mark.parametrize("value", ["../secret.png", "/etc/hostname", "link.png", "a/../../b.png"])
def test_files_outside_of_the_root_are_refused(tmp_path: Path, value: str) -> None:
    folder = tmp_path / "list"
    folder.mkdir()
    (tmp_path / "secret.png").touch()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    path = folder / "a.jsonl"
    path.write_text("\n" + json.dumps({"image": value}), encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}:2: {value!r} lies outside of {folder}; ")
    (document,) = read(path, Reading(root=Path("/")))
    if value == "/etc/hostname":
        assert document.segments[0].content.path == Path("/etc/hostname")


def damaged_tar(folder: Path, items: list[Item]) -> Path:
    path = webdataset(folder, items)
    path.write_bytes(path.read_bytes()[:5000])
    return path


def text_as(name: str) -> Callable[[Path, list[Item]], Path]:
    def write(folder: Path, items: list[Item]) -> Path:
        (folder / name).write_bytes(b"not what the name says " * 9 + bytes(len(items)))
        return folder / name

    return write


def no_table(name: str) -> Callable[[Path, list[Item]], Path]:
    def write(folder: Path, items: list[Item]) -> Path:
        pytest.importorskip("pyarrow")
        return text_as(name)(folder, items)

    return write


def mixed_folder(folder: Path, items: list[Item]) -> Path:
    write_jsonl(folder / "mixed", items[:1])
    (folder / "mixed" / "notes.txt").touch()
    return folder / "mixed"


def no_folder(folder: Path, items: list[Item]) -> Path:
    return folder / f"absent{len(items)}.jsonl"


def empty(folder: Path, items: list[Item]) -> Path:
    (folder / "empty.jsonl").write_bytes(b"" * len(items))
    return folder / "empty.jsonl"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (damaged_tar, "not a readable tar archive"),
        (text_as("a.tar"), "not a readable tar archive"),
        (no_table("a.parquet"), "not a readable Parquet file"),
        (no_table("a.arrow"), "not a readable Arrow file"),
        (text_as("a.csv"), "expected a folder or a file .jsonl, "),
        (mixed_folder, "sources of several kinds (jsonl, text)"),
        (no_folder, "No such file or directory"),
        (empty, "no documents, expected at least one"),
    ],
)
def test_bad_sources_are_one_line(
    items: list[Item],
    tmp_path: Path,
    write: Callable[[Path, list[Item]], Path],
    message: str,
) -> None:
    path = write(tmp_path, items)
    with pytest.raises(DataError) as raised:
        read(path)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_a_file_is_given_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a.txt: given twice"):
        list_shards([path, tmp_path], WHOLE)


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n", encoding="utf-8")
    (shard,) = list_shards([path], WHOLE)
    path.write_text("another\n", encoding="utf-8")
    with pytest.raises(DataError, match="changed while it was read"):
        list(read_shard(shard, WHOLE))


def test_split_key_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "id": 1}\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a.jsonl:2: no key 'id', which --split-key names"):
        read(path, Reading(split_key="id"))


def test_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("mot_megatron.data.builders.packages.importlib.import_module", absent)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match="package pyarrow is not installed"):
        tables.row_groups(tmp_path / "a.parquet")


def test_rows_are_numbered_over_row_groups(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"text": f"row {number}"} for number in range(7)]
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=3)
    assert len(list_shards([path], WHOLE)) == 3
    documents = read(path)
    assert [document.where for document in documents] == [f"{path}:{n}" for n in range(1, 8)]
    assert [d.segments[0].content for d in documents] == [row["text"] for row in rows]
