"""Damaged and malicious files run nothing, exhaust nothing and give one line."""

from __future__ import annotations

import json
import pickle
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mot_megatron.conversion.huggingface.foreign import open_foreign
from mot_megatron.conversion.huggingface.safetensors_files import (
    SafetensorsSource,
    plan_shards,
    write_shard,
)
from mot_megatron.conversion.tensors import OutputTensor, TensorInfo
from mot_megatron.errors import CheckpointError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
GROWTH = 64 << 20
CONFIG = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def raw(header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(first: int, last: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


FILES = {
    "overlap": raw({"a": entry(0, 16, [4]), "b": entry(8, 16, [2])}),
    "out of bounds": raw({"a": entry(0, 32, [8])}),
    "gap": raw({"a": entry(0, 4, [1]), "b": entry(8, 16, [2])}),
    "negative": raw({"a": entry(-4, 12, [4])}),
    "huge shape": raw({"a": entry(0, 16, [1 << 62, 1 << 62])}),
    "zero times huge": raw({"a": entry(0, 16, [4]), "b": entry(16, 16, [0, 1 << 62, 1 << 62])}),
    "other size": raw({"a": entry(0, 16, [5])}),
    "unknown type": raw({"a": entry(0, 16, [4], "F99")}),
    "float as a size": raw({"a": entry(0, 16, [4.0])}),  # type: ignore[list-item]
    "no offsets": raw({"a": {"dtype": "F32", "shape": [4]}}),
    "twice": raw(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    ),
    "huge header": raw({"a": entry(0, 16, [4])}, length=1 << 62),
    "long header": raw(b" " * (40 << 20), length=40 << 20),
    "nested": raw(b"[" * 100_000),
    "list": raw(b"[1]"),
    "not JSON": raw(b"hello"),
    "not text": raw(b"\xff\xfe\x00"),
    "short": b"\x01\x02",
    "empty": b"",
    "trailing bytes": raw({"a": entry(0, 16, [4])}, b"\0" * 24),
}


def one_line(action: Callable[[], object]) -> str:
    """Return the message of the error, having checked its length and the memory used."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        action()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < GROWTH
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("name", FILES)
def test_damaged_file(tmp_path: Path, name: str) -> None:
    (tmp_path / FILE).write_bytes(FILES[name])
    assert FILE in one_line(lambda: SafetensorsSource(tmp_path))


def indexed(folder: Path, weight_map: Any) -> None:
    save_file({"a": torch.zeros(4)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(4)}, folder / "two.safetensors")
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / INDEX).write_text(text)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../one.safetensors"}, "in the same folder"),
        ({"a": "/etc/passwd"}, "in the same folder"),
        ({"a": "folder/one.safetensors"}, "in the same folder"),
        ({"a": ".."}, "in the same folder"),
        ({"a": "one.bin"}, "in the same folder"),
        ({"a": "absent.safetensors"}, "cannot be read"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "are not in their files"),
        ({"a": "two.safetensors", "b": "two.safetensors"}, "are not in their files"),
        ({"b": "two.safetensors", "c": "one.safetensors"}, "contains 'a'"),
        (["one.safetensors"], "not a table"),
        ({"a": 3}, "not a table"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "occurs twice"),
        ('{"weight_map": ' + "[" * 100_000, "not legal JSON"),
        ("[]", "not an object"),
    ],
)
def test_damaged_index(tmp_path: Path, weight_map: Any, message: str) -> None:
    indexed(tmp_path, weight_map)
    assert message in one_line(lambda: SafetensorsSource(tmp_path))


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return exec, ("import pathlib; pathlib.Path(__file__).touch()", "")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_never_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Malicious()))
    assert f"{name} is a pickle" in one_line(lambda: SafetensorsSource(tmp_path))


def test_a_pickle_with_the_name_of_a_safetensors_file(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / FILE)
    assert FILE in one_line(lambda: SafetensorsSource(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "but its files only"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"vocab_size": "8"}, "vocab_size"),
        ({"model_type": "gpt2"}, "known: llama, qwen2, qwen3"),
        ({"model_type": ["llama"]}, "known: llama, qwen2, qwen3"),
        ({"head_dim": 8}, "head_dim = 8"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0}}, "rope_scaling"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "layer_types"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ],
)
def test_configurations_that_compute_something_else(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / FILE)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    assert message in one_line(lambda: open_foreign(tmp_path))


def test_no_model_there(tmp_path: Path) -> None:
    assert "no such folder" in one_line(lambda: SafetensorsSource(tmp_path / "absent"))
    assert "neither config.json" in one_line(lambda: open_foreign(tmp_path))


def test_written_files_are_those_of_the_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "matrix": torch.randn(5, 3, generator=generator),
        "half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "transposed": torch.randn(3, 4, generator=generator).T,
    }
    outputs = [
        OutputTensor(name, TensorInfo(tuple(t.shape), t.dtype), (), lambda t=t: t)
        for name, t in tensors.items()
    ]
    (shard,) = plan_shards(outputs, 1 << 20)
    write_shard(tmp_path, shard, lambda _: None)
    source = SafetensorsSource(tmp_path)
    read = load_file(tmp_path / FILE)
    assert read.keys() == tensors.keys() == source.infos.keys()
    for name, tensor in tensors.items():
        for other in (read[name], source.read(name)):
            assert other.dtype == tensor.dtype
            assert torch.equal(other, tensor)
