"""Loading a trained model and generating files of every modality; errors are one line."""

from __future__ import annotations

import re
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mot_megatron.checkpoint import NamedTensor, save_checkpoint
from mot_megatron.checkpoint.names import checkpoint_directory
from mot_megatron.cli.generate import main
from mot_megatron.data.corpus import Corpus
from mot_megatron.errors import CheckpointError
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.sharding import parts_of
from mot_megatron.parallel.groups import build_single_process_groups
from mot_megatron.train.trained import load_trained_model
from tests.checkpoint.states import reseal
from tests.cli.console import only_error
from tests.small_corpus import make_config, make_corpus

CPU = torch.device("cpu")


def save_step(run: Path, corpus: Corpus, step: int, *overrides: str) -> MixtureOfTransformers:
    """Write a checkpoint as training does, of a model whose seed is the step."""
    layout = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    config = make_config(corpus, f"run.seed={step}", *overrides)
    groups = build_single_process_groups(CPU)
    model = MixtureOfTransformers(config, groups)
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    save_checkpoint(
        checkpoint_directory(run),
        step,
        [
            NamedTensor(f"{kind}/{part.name}", parameter.detach()[part.rows], part.sharding)
            for kind in kinds
            for name, parameter in model.named_parameters()
            for part in parts_of(name, parameter)
        ],
        metadata={
            "data": {"corpus": corpus.fingerprint},
            "vocabulary": corpus.vocabulary_digest,
            "meaning_of_ids": corpus.vocabulary,
        },
        config_text=make_config(corpus, *layout, *overrides).to_toml(),
        groups=groups,
        keep=5,
    )
    return model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("trained") / "corpus")


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "small"
    for step in (1, 2):
        save_step(directory, corpus, step)
    return directory


@pytest.mark.parametrize(
    ("path", "step"), [(".", 2), ("checkpoints", 2), ("checkpoints/step_00000001", 1)]
)
def test_model_loads_from_any_folder_of_a_run(run: Path, corpus: Corpus, path: str, step: int):
    trained = load_trained_model(run / path, CPU)
    assert trained.checkpoint.step == step
    config = make_config(corpus, f"run.seed={step}")
    model = MixtureOfTransformers(config, build_single_process_groups(CPU))
    expected = dict(model.named_parameters())
    found = dict(trained.model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("exchange", "sequences"), [("sequence", 4), ("heads", 2)])
def test_routing_pool_has_the_size_of_training(
    corpus: Corpus, tmp_path: Path, exchange: str, sequences: int
):
    save_step(
        tmp_path,
        corpus,
        1,
        "training.micro_batch_size=2",
        "training.global_batch_size=4",
        "parallel.modality_parallel_size=2",
        f"parallel.attention_exchange={exchange}",
    )
    trained = load_trained_model(tmp_path, CPU)
    assert trained.config.parallel.modality_parallel_size == 1
    assert trained.config.training.micro_batch_size == sequences


def test_files_of_every_modality(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "made" / "samples"
    arguments = ["--checkpoint", str(run), "--prompt", "red heart", "--output", str(output)]
    assert main([*arguments, "--samples", "2", "--max-tokens", "9", "--seed", "4"]) == 0
    names = {path.name for path in output.iterdir()}
    kinds = (("text", "txt"), ("image", "png"), ("speech", "wav"))
    assert names == {f"{name}-{number}.{suffix}" for name, suffix in kinds for number in (1, 2)}
    text = (output / "text-1.txt").read_text(encoding="utf-8")
    assert text.startswith("red heart")
    assert text.rstrip("\n") in capsys.readouterr().out
    with Image.open(output / "image-1.png") as image:
        assert image.mode == "RGB"
        assert image.size[0] == image.size[1]
        assert image.size[0] == 256  # 32 pixels, each a square of 8
        pixels = np.asarray(image)
    blocks = pixels.reshape(32, 8, 32, 8, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    with wave.open(str(output / "speech-2.wav")) as sound:
        assert sound.getframerate() == 16000
        assert sound.getnframes() >= 640
    again = tmp_path / "again"
    arguments[-1] = str(again)
    assert main([*arguments, "--samples", "1", "--max-tokens", "9", "--seed", "4"]) == 0
    for name in ("text-1.txt", "image-1.png", "speech-1.wav"):
        assert (again / name).read_bytes() == (output / name).read_bytes()


def test_only_the_requested_modality_is_generated(run: Path, tmp_path: Path):
    arguments = ["--checkpoint", str(run), "--prompt", "tree", "--output", str(tmp_path)]
    assert main([*arguments, "--into", "speech", "--language", "de", "--max-tokens", "4"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["speech-1.wav"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--checkpoint": "nowhere"}, "no such checkpoint directory"),
        ({"--into": "video"}, "modality 'video', expected one of: text, image, speech"),
        ({"--language": "xx"}, "language 'xx', expected one of: de, en"),
        ({"--prompt": "a b c d " * 60}, "the model's data.seq_length is 160"),
        ({"--temperature": "-1"}, "temperature = -1.0, expected 0 (greedy) or more"),
        ({"--output": "/dev/null/samples"}, "/dev/null/samples: cannot be written: "),
        ({"--corpus": "nowhere"}, "not a corpus directory?"),
    ],
)
def test_bad_requests_are_one_line_errors(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    message: str,
):
    output = tmp_path / "samples"
    options = {"--checkpoint": str(run), "--prompt": "tree", "--output": str(output)} | changes
    assert main([part for pair in options.items() for part in pair]) == 2
    assert message in only_error(capsys.readouterr().err)
    assert not list(output.glob("*")) if output.exists() else True


def test_another_corpus_is_an_error(
    run: Path, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    moved, other = tmp_path / "moved", tmp_path / "other"
    for directory in (moved, other):
        shutil.copytree(corpus.directory, directory)
    description = other / "corpus.toml"
    description.write_text(description.read_text().replace('"small"', '"else"'))
    name = corpus.description.modalities[0].codebook
    assert name is not None
    with (other / name).open("ab") as codebook:
        codebook.write(b" ")  # still the same tokenizer, but not the same bytes
    arguments = ["--checkpoint", str(run), "--prompt", "a", "--output", str(tmp_path / "samples")]
    arguments += ["--into", "text", "--max-tokens", "2"]
    assert main([*arguments, "--corpus", str(moved)]) == 0
    assert main([*arguments, "--corpus", str(other)]) == 2
    error = only_error(capsys.readouterr().err)
    assert "was trained on another corpus than" in error
    assert "the meanings of their token ids differ" in error
    assert "(the codebooks of modality text differ)" in error


def test_another_corpus_with_the_same_vocabulary_is_accepted(
    run: Path, corpus: Corpus, tmp_path: Path
):
    other = tmp_path / "other"
    shutil.copytree(corpus.directory, other)
    description = other / "corpus.toml"
    description.write_text(description.read_text().replace('"small"', '"else"'))
    assert Corpus.open(other).fingerprint != corpus.fingerprint
    assert load_trained_model(run, CPU, other).corpus.directory == other


@pytest.mark.parametrize("key", ["num_layers", "hidden_size"])
def test_configuration_of_an_enormous_model_is_refused(
    run: Path, corpus: Corpus, tmp_path: Path, key: str
):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        path = checkpoint / "config.toml"
        text = re.sub(rf"(?m)^{key} = \d+", f"{key} = {2**30}", path.read_text())
        path.write_text(text)
        reseal(checkpoint)
    with pytest.raises(CheckpointError, match="bytes are too few"):
        load_trained_model(copy, CPU, corpus.directory)


def test_ids_are_continued_without_codecs(run: Path, tmp_path: Path):
    output = tmp_path / "ids"
    arguments = ["--checkpoint", str(run), "--prompt", "1, 70 71", "--ids", "--max-tokens", "5"]
    assert main([*arguments, "--output", str(output)]) == 0
    found = {path.name: path.read_text().split() for path in output.iterdir()}
    assert set(found) == {f"{name}-1.ids.txt" for name in ("text", "image", "speech")}
    assert all(ids and all(map(str.isdigit, ids)) for ids in found.values())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a b", "--prompt 'a b' with --ids: expected token ids"),
        ("", "--prompt '' with --ids: expected token ids"),
        ("1 -2", "expected token ids"),
        ("1 999999", "prompt: token id 999999, expected 0.."),
        ("9" * 9999, "prompt: token id 999999999999999999, expected 0.."),
    ],
)
def test_bad_ids_are_one_line_errors(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prompt: str, message: str
):
    arguments = ["--checkpoint", str(run), "--prompt", prompt, "--ids", "--output", str(tmp_path)]
    assert main(arguments) == 2
    assert message in only_error(capsys.readouterr().err)


def test_damaged_checkpoints_are_skipped_and_named(run: Path, corpus: Corpus, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / "step_00000002"
    damaged = next(path for path in newest.iterdir() if path.suffix == ".distcp")
    content = np.frombuffer(damaged.read_bytes(), dtype=np.uint8).copy()
    content[-1] ^= 1
    damaged.write_bytes(content.tobytes())
    trained = load_trained_model(copy, CPU, corpus.directory)
    assert trained.checkpoint.step == 1
    assert len(trained.skipped) == 1
    assert "step_00000002" in trained.skipped[0]
