"""Checkpoints of DeepSpeed come in as runs with the same logits, and their pickles run nothing."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mot_megatron.cli.checkpoint import main
from mot_megatron.conversion.deepspeed_source import DeepSpeedSource
from mot_megatron.conversion.torch_archive import read_archive
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import CheckpointError
from tests.conversion.huggingface.deepspeed_checkpoints import (
    CONFIGS,
    FROZEN,
    FROZEN_VALUE,
    write_checkpoints,
)
from tests.conversion.huggingface.exported import own_logits, random_ids
from tests.conversion.huggingface.test_commands import error_of
from tests.conversion.huggingface.test_import import TOLERANCE, command, loaded
from tests.ranks import run_ranks
from tests.small_corpus import make_corpus

MODEL = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    run_ranks(write_checkpoints, 2, folder)
    return folder


def arguments(folder: Path, source: Path, corpus: Corpus, *more: str) -> list[str]:
    return ["from-deepspeed", *command(folder, source, corpus, *more)[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ZeRO", "universal"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_weights_and_logits(
    tmp_path: Path,
    corpus: Corpus,
    checkpoints: Path,
    name: str,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = checkpoints / name / ("universal" if kind == "universal" else ".")
    weights = torch.load(checkpoints / f"{name}.pt")
    if name == "zero1":  # DeepSpeed's script leaves it out
        weights[FROZEN] = torch.full((36,), FROZEN_VALUE)
    opened = DeepSpeedSource(source)
    wrong = [
        n
        for n in opened.infos
        if n != "lm_head.weight" and not torch.equal(opened.read(n), weights[n])
    ]
    assert wrong == []
    assert main(arguments(tmp_path, source, corpus, "--verify")) == 0
    out = capsys.readouterr().out
    assert f"DeepSpeed checkpoint ({kind}" in out
    assert ("after 'inner.'" in out) == (name == "zero3")
    assert ("left out: 1 tensors, output head" in out) == (
        "lm_head.weight" in opened.infos and name == "zero3"
    )
    theirs = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    theirs.load_state_dict(weights, strict=name != "zero3")
    ids = random_ids(5, corpus, (2, 20))
    with torch.no_grad():
        expected = theirs(ids).logits[..., :384]  # the corpus has one token less
    actual = own_logits(loaded(tmp_path), corpus, ids)
    assert (actual - expected).abs().max() < TOLERANCE * max(1, expected.abs().max())


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def message_of(action: Callable[[], object]) -> str:
    """Return the message of the error, having checked that it is one line."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("file", [MODEL, "zero/model.embed_tokens.weight/fp32.pt"])
def test_a_poisoned_pickle_runs_nothing(tmp_path: Path, file: str) -> None:
    proof = tmp_path / "executed"
    save(tmp_path / "checkpoint" / file, {"param": torch.zeros(3), "module": Malicious(proof)})
    message = message_of(lambda: DeepSpeedSource(tmp_path / "checkpoint"))
    assert file in message
    assert "refers to" in message
    assert "open, which weights do not need" in message
    assert not proof.exists()
    torch.load(tmp_path / "checkpoint" / file, weights_only=False)
    assert proof.exists()  # the test's own pickle is as malicious as it should be


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> None:
    """Write an archive anew with changed members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def altered(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        assert content.count(old) == 1
        return content.replace(old, new)

    return change


SHAPE, STRIDES = b"K\x02K\x04\x86", b"K\x04K\x01\x86"
LARGEST = b"J\xff\xff\xff\x7f"
CHANGES = {
    "lies outside": altered(SHAPE, b"K\x03K\x04\x86"),
    "too large": altered(SHAPE, LARGEST + LARGEST + b"\x86"),
    "impossible shape": altered(SHAPE, b"J\xff\xff\xff\xffK\x04\x86"),
    "not contiguous": altered(STRIDES, b"K\x00K\x01\x86"),
    "should have 13 elements": altered(b"K\x0ct", b"K\x0dt"),
    "storage 9 is not in it": altered(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"),
    "memo entry": altered(b"cpuq\x06", b"cpur\xff\xff\xff\x7f"),
    "refers to os.system": altered(b"torch\nFloatStorage", b"os\nsystem"),
    "refers to builtins.eval": altered(b"torch._utils\n_rebuild_tensor_v2", b"builtins\neval"),
    "not little-endian": lambda name, content: b"big" if "byteorder" in name else content,
    "not in it": lambda name, content: b"" if name.endswith("/data/0") else content,
}


@pytest.mark.parametrize("message", CHANGES)
def test_altered_archive(tmp_path: Path, message: str) -> None:
    path = save(tmp_path / "a.pt", {"a": torch.arange(12.0).view(3, 4)[1:]})
    rewritten(path, lambda _, content: content)
    assert read_archive(path)["a"].info.shape == (2, 4)
    rewritten(path, CHANGES[message])
    text = message_of(lambda: read_archive(path))
    if message == "not in it":  # the storage is there, but empty
        message = "should have 12 elements, but has 0 bytes"
    assert message in text


def damaged(path: Path, how: str) -> None:
    if how == "compressed":
        rewritten(path, lambda _, content: content, zipfile.ZIP_DEFLATED)
    elif how == "twice":
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/data.pkl", b"N.")
    elif how == "no pickle":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data/0", b"")
    elif how == "link":
        path.rename(path.with_name("b.pt"))
        path.symlink_to("b.pt")
    elif how == "old format":
        torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(path.read_bytes()[: int(how)])


@pytest.mark.parametrize(
    "how", ["compressed", "twice", "no pickle", "link", "old format", "folder", "0", "300", "1000"]
)
def test_damaged_archive(tmp_path: Path, how: str) -> None:
    path = save(tmp_path / "a.pt", {"a": torch.zeros(500)})
    damaged(path, how)
    assert str(path) in message_of(lambda: read_archive(path))


def test_all_types_and_views(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    tensors = {str(dtype): base.to(dtype) for dtype in (torch.bfloat16, torch.half, torch.int64)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "part": base[1, 1:]}
    tensors["parameter"] = torch.nn.Parameter(base)
    save(tmp_path / MODEL, {"module": tensors})
    source = DeepSpeedSource(tmp_path)
    assert source.infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert source.read(name).dtype == tensor.dtype
        assert torch.equal(source.read(name), tensor)


def test_what_is_no_complete_checkpoint(tmp_path: Path) -> None:
    def message() -> str:
        return message_of(lambda: DeepSpeedSource(tmp_path))

    assert "no such folder" in message_of(lambda: DeepSpeedSource(tmp_path / "absent"))
    assert "no DeepSpeed checkpoint; known: universal" in message()
    model = save(tmp_path / MODEL, {"module": {"a": torch.zeros(2)}, "param_shapes": []})
    other = save(tmp_path / "mp_rank_01_model_states.pt", {})
    assert "divided by tensor, pipeline or expert parallelism" in message()
    other.unlink()
    state = {"optimizer_state_dict": {"partition_count": 2}}
    optimizer = save(tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt", state)
    assert "some ranks are missing" in message()
    optimizer.rename(tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "of 1 ranks, but 2 wrote it" in message()
    model.rename(tmp_path / "zero_pp_rank_1_mp_rank_00_model_states.pt")
    assert "needed: both of every rank" in message()
    for tag in ("../" + tmp_path.name, "/etc", "absent", "", ".", ".."):
        (tmp_path / "latest").write_text(tag)
        assert "allowed: the name of a folder beside it" in message()


def test_wrong_contents(tmp_path: Path) -> None:
    for content in (torch.zeros(2), [], {"module": 3}, {"module": {"a": 3}}):
        save(tmp_path / MODEL, content)
        assert "not as DeepSpeed writes them" in message_of(lambda: DeepSpeedSource(tmp_path))
    save(tmp_path / MODEL, {"module": {"a": torch.zeros(3)}, "param_shapes": [{"a": (3,)}]})
    states = {"partition_count": 1, "single_partition_of_fp32_groups": [torch.zeros(2)]}
    file = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    save(file, {"optimizer_state_dict": states})
    assert "2 elements of 1 types have shape [3]" in message_of(lambda: DeepSpeedSource(tmp_path))
    states["single_partition_of_fp32_groups"] = [torch.zeros(9)]
    save(file, {"optimizer_state_dict": states})
    assert "9 elements, of which 3" in message_of(lambda: DeepSpeedSource(tmp_path))


def test_a_linked_parameter(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "fp32.pt", {"param": torch.zeros(3)})
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "a").symlink_to(tmp_path / "elsewhere")
    assert "symbolic link" in message_of(lambda: DeepSpeedSource(tmp_path))


def test_file_that_shrinks(tmp_path: Path) -> None:
    path = save(tmp_path / MODEL, {"module": {"a": torch.zeros(500)}})
    source = DeepSpeedSource(tmp_path)
    path.write_bytes(path.read_bytes()[:1500])
    assert "shorter than it was" in message_of(lambda: source.read("a"))


def test_every_tensor_is_accounted_for(
    tmp_path: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIGS["zero1"]
    module = dict(AutoModelForCausalLM.from_config(config).state_dict())
    checkpoint = tmp_path / "checkpoint"

    def error(*more: str) -> str:
        save(checkpoint / MODEL, {"module": {f"module.{n}": w for n, w in module.items()}})
        return error_of(capsys, *arguments(tmp_path, checkpoint, corpus, *more))

    assert "give it with --architecture" in error()
    config.save_pretrained(tmp_path / "described")
    assert "no config.json" in error("--architecture=" + str(tmp_path))
    described = "--architecture=" + str(tmp_path / "described" / "config.json")
    module["model.layers.0.surplus"] = torch.zeros(3)
    assert "surplus is not a tensor of a qwen3 model" in error(described)
    del module["model.layers.0.surplus"]
    norm = module.pop("model.norm.weight")
    assert "lacks model.norm.weight" in error(described)
    module["model.norm.weight"] = norm[1:]
    assert "model.norm.weight is [35] float32; needed: [36]" in error(described)
    module |= {"model.norm.weight": norm, "model.rotary_emb.inv_freq": torch.zeros(3)}
    save(checkpoint / MODEL, {"module": {f"module.{n}": w for n, w in module.items()}})
    assert main(arguments(tmp_path, checkpoint, corpus, described, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "qwen3, DeepSpeed checkpoint (model states without ZeRO), names after 'module.'" in out
    assert "left out: 1 tensors, angles of the rotary embedding" in out
    assert not (tmp_path / "runs").exists()
