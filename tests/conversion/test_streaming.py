"""Reading boxes and writing pieces: memory, damaged and hostile files."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from mot_megatron.checkpoint import NamedTensor, save_checkpoint
from mot_megatron.checkpoint.storage import read_index
from mot_megatron.checkpoint.streaming import Piece, read_box, write_file, write_index_of
from mot_megatron.cli import checkpoint_inspect, checkpoint_reshard, checkpoint_weights
from mot_megatron.conversion.source import CheckpointSource
from mot_megatron.conversion.tensors import OutputTensor, TensorInfo
from mot_megatron.conversion.write import write_checkpoint
from mot_megatron.errors import CheckpointError
from mot_megatron.model.sharding import ParameterSharding
from tests.checkpoint import states
from tests.checkpoint.states import global_values, reseal
from tests.conversion.states import TP2, assert_equal_files, config_of, infos_of, write_source
from tests.ranks import PRELOAD

BIG = ("model.hidden_size=512", "model.ffn_hidden_size=1024", "model.num_layers=6")


def test_boxes_of_tensors_in_pieces(tmp_path: Path) -> None:
    value = torch.randn(4, 6, 5)
    pieces = [Piece("w", (4, 6, 5), torch.float32, (0, start, 0), (4, 2, 5)) for start in (0, 2, 4)]
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        typed = (value > 0) if dtype is torch.bool else (value * 100).to(dtype)
        files = [
            write_file(
                folder / f"{number}.distcp",
                [Piece("w", (4, 6, 5), dtype, piece.offsets, piece.sizes)],
                lambda piece, typed=typed: typed[:, piece.offsets[1] : piece.offsets[1] + 2],
                lambda _: None,
            )
            for number, piece in enumerate(pieces)
        ]
        write_index_of(folder, files)
        index = read_index(folder)
        for box in ((0, 0, 0, 4, 6, 5), (1, 1, 2, 3, 4, 2), (0, 5, 4, 1, 1, 1), (2, 0, 0, 0, 6, 5)):
            a, b, c, x, y, z = box
            expected = typed[a : a + x, b : b + y, c : c + z]
            assert torch.equal(read_box(folder, index, "w", (a, b, c), (x, y, z)), expected)


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    states.save(tmp_path / "a", 3)
    source = CheckpointSource(tmp_path / "a")
    for name, value in global_values(3).items():
        read = source.read(name)
        assert read.dtype == value.dtype
        assert torch.equal(read, value)
    with pytest.raises(CheckpointError, match="it lacks nothing"):
        source.read("nothing")


def outputs(source: CheckpointSource) -> list[OutputTensor]:
    return [
        OutputTensor(name, info, (name,), lambda name=name: source.read(name))
        for name, info in source.infos.items()
    ]


def test_written_as_torch_writes(tmp_path: Path) -> None:
    first = states.save(tmp_path / "a", 3).path
    source = CheckpointSource(tmp_path / "a")
    info = write_checkpoint(
        tmp_path / "b",
        outputs(source),
        step=3,
        metadata=source.metadata,
        config_text=source.config_text,
    )
    assert_equal_files(info.path, first)


def test_files_of_a_limited_size(tmp_path: Path) -> None:
    states.save(tmp_path / "a", 3)
    source = CheckpointSource(tmp_path / "a")
    write_checkpoint(
        tmp_path / "b", outputs(source), step=3, metadata={}, config_text="", file_bytes=150
    )
    written = CheckpointSource(tmp_path / "b")
    assert len(list(written.checkpoint.path.glob("*.distcp"))) == 4
    assert all(torch.equal(written.read(n), value) for n, value in global_values(3).items())


def test_wrong_outputs_are_defects(tmp_path: Path) -> None:
    info = TensorInfo((2,), torch.float32)
    right = OutputTensor("w", info, (), lambda: torch.zeros(2))
    wrong = OutputTensor("w", info, (), lambda: torch.zeros(3))
    for given, message in (([right, right], "same name"), ([wrong], "w was produced as")):
        with pytest.raises(ValueError, match=message):
            write_checkpoint(tmp_path, given, step=1, metadata={}, config_text="")
        assert list(tmp_path.iterdir()) == []


def big_source(directory: Path) -> int:
    """Write a checkpoint of many alike tensors, and return the bytes of the largest."""
    config = config_of(*BIG)
    infos = infos_of(config)
    zero = torch.zeros(())
    save_checkpoint(
        directory,
        1,
        [
            NamedTensor(n, zero.expand(i.shape), ParameterSharding(i.shape))
            for n, i in infos.items()
        ],
        metadata={},
        config_text=config.to_toml(),
        groups=None,
        keep=1,
    )
    return max(info.num_bytes for info in infos.values())


def peak_of(command: str, warm_up: list[str], arguments: list[str], found: Any) -> None:
    """Send the growth of this process's peak resident memory during a command, in bytes.

    The command has run before, so that its code is in memory and only data counts.
    """
    torch.set_num_threads(1)
    main: Callable[[list[str]], int] = {
        "inspect": checkpoint_inspect.main,
        "reshard": checkpoint_reshard.main,
        "weights": checkpoint_weights.main,
    }[command]
    assert main(warm_up) == 0
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    assert main(arguments) == 0
    found.send(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """At most three times the largest tensor, plus what does not depend on the checkpoint."""
    largest = big_source(tmp_path / "a")
    total = sum(path.stat().st_size for path in (tmp_path / "a").rglob("*.distcp"))
    allowance = 48 << 20  # 1 GB, scaled down
    assert total > 3 * (3 * largest + allowance)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    write_source(tmp_path / "small", config_of())
    for command, more in (
        ("reshard", ["b", "--world-size", "2", "--set", TP2, "--verify"]),
        ("weights", ["b", "--dtype", "bf16", "--verify"]),
        ("inspect", ["--statistics", "weight/*"]),
    ):
        warm_up, arguments = (
            [
                str(tmp_path / name),
                *(str(tmp_path / name / command) if m == "b" else m for m in more),
            ]
            for name in ("small", "a")
        )
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=peak_of, args=(command, warm_up, arguments, sender))
        process.start()
        sender.close()
        grown = receiver.recv()
        process.join()
        assert grown < 3 * largest + allowance, (command, grown, largest)


class Poison:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def _archive(content: bytes, data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["poison", "compressed", "noise", "strided", "short"])
def test_hostile_pieces_are_refused(tmp_path: Path, kind: str) -> None:
    """With a valid manifest, as whoever wrote the file can also write that."""
    value = torch.arange(600.0)
    tensors = [NamedTensor("w", value, ParameterSharding((600,)))]
    info = save_checkpoint(
        tmp_path / "a", 1, tensors, metadata={}, config_text="", groups=None, keep=1
    )
    path = info.path / "__0_0.distcp"
    length = path.stat().st_size
    marker = tmp_path / "marker"
    stream = io.BytesIO()
    torch.save(value[::2] if kind == "strided" else value[:8].clone(), stream)
    content = {
        "poison": _archive(pickle.dumps(Poison(marker)), b"\0" * 2400),
        "compressed": _archive(b"", b"\0" * 100_000, zipfile.ZIP_DEFLATED),
        "noise": b"PK" * 50,
        "strided": stream.getvalue(),
        "short": stream.getvalue(),
    }[kind]
    assert len(content) <= length + 200
    content = content[:length]
    # Archives are found from their end.
    path.write_bytes(b"\0" * (length - len(content)) + content)
    reseal(info.path)
    source = CheckpointSource(tmp_path / "a")
    with pytest.raises(CheckpointError) as caught:
        source.read("w")
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    assert str(info.path) in str(caught.value)
