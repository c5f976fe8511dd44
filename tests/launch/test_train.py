"""launch/train.py as a whole: the files of a run, and the one-line message of each error."""

from __future__ import annotations

import json
import math
import re
import resource
import shutil
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # type: ignore[attr-defined]

from mot_megatron.job.ports import free_port
from tests.columns import widest
from tests.launch.entry_points import EntryPoint, Finished, run_entry_point
from tests.small_runs import CONFIG, MODALITIES, write_corpus

pytestmark = pytest.mark.slow

SCRIPT = "launch/train.py"
STEPS = 4
NAMES = [modality.name for modality in MODALITIES]
FAST = ("training.micro_batch_size=4", "checkpoint.interval_steps=2", "logging.interval_steps=2")


class Workplace:
    """A folder with a configuration and a folder for runs; the corpus may be shared."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder = folder
        self.corpus = corpus
        self.run = folder / "runs" / "small"
        self.checkpoints = self.run / "checkpoints"
        self.config = folder / "small.toml"
        folder.mkdir(exist_ok=True)
        self.write_config(CONFIG.format(corpus=corpus))

    def write_config(self, text: str) -> None:
        self.config.write_text(text)

    def train(
        self,
        *overrides: str,
        steps: int = STEPS,
        environment: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> Finished:
        return run_entry_point(
            self.folder / "console",
            SCRIPT,
            *self.arguments(*overrides, steps=steps),
            environment=environment,
            prepare=prepare,
        )

    def arguments(self, *overrides: str, steps: int = STEPS) -> list[str]:
        """Return the command-line arguments."""
        settings = [f"run.directory={self.folder / 'runs'}", f"training.train_steps={steps}"]
        settings += [*FAST, *overrides]
        return [f"--config={self.config}", *(f"--set={setting}" for setting in settings)]

    def saved(self) -> dict[str, bytes]:
        """Return the contents of all files under checkpoints/."""
        files = self.checkpoints.rglob("*")
        return {str(file): file.read_bytes() for file in files if file.is_file()}


def assert_one_line(finished: Finished, *parts: str) -> None:
    assert finished.status == 2, finished.errors
    (line,) = finished.errors.splitlines()  # no traceback, no warning
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "small")


@pytest.fixture(scope="module")
def finished_run(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workplace, Finished]:
    place = Workplace(tmp_path_factory.mktemp("trained"), corpus)
    finished = place.train()
    assert finished.status == 0, finished.errors
    return place, finished


@pytest.fixture
def place(tmp_path: Path, corpus: Path) -> Workplace:
    """A workplace without a run."""
    return Workplace(tmp_path, corpus)


@pytest.fixture
def trained(place: Workplace, finished_run: tuple[Workplace, Finished]) -> Workplace:
    """A workplace with a copy of a run that has checkpoints of steps 2 and 4."""
    shutil.copytree(finished_run[0].run, place.run)
    return place


def events_of(run: Path) -> EventAccumulator:
    size_guidance = {"scalars": 0, "tensors": 0}
    return EventAccumulator(str(run / "tensorboard"), size_guidance).Reload()


# --- files of a run


def test_console_lines_are_short_and_stderr_is_empty(
    finished_run: tuple[Workplace, Finished],
) -> None:
    place, finished = finished_run
    assert finished.errors == ""
    lines = finished.output.splitlines()
    assert widest(lines) <= 120
    steps = [re.match(r"step +(\d+)/4 ", line) for line in lines]
    assert [int(match[1]) for match in steps if match] == [2, 4]
    assert lines[-1] == f"done: {place.run / 'summary.json'}"


def test_contents_of_summary(finished_run: tuple[Workplace, Finished]) -> None:
    place, _ = finished_run
    summary = json.loads((place.run / "summary.json").read_text())
    assert summary["name"] == "small"
    assert summary["corpus"] == "small"
    assert summary["steps"] == STEPS
    assert summary["seconds"] > 0
    assert summary["tokens_per_second"] == pytest.approx(
        summary["tokens"] / summary["seconds"], rel=0.01
    )
    assert summary["parameters"] > 1e4
    assert summary["world_size"] == 1
    assert list(summary["modalities"]) == NAMES
    for modality, reached in zip(MODALITIES, summary["modalities"].values(), strict=True):
        # After so few steps, predictions are still near uniform over the whole vocabulary.
        assert 0 < reached["held_out_bits_per_token"] < 2 * math.log2(256)
        assert 0 < reached["unigram_entropy"] < math.log2(modality.size) + 0.5
        assert reached["two_token_context_entropy"] > 0


def test_resolved_config_reads_back(finished_run: tuple[Workplace, Finished]) -> None:
    place, _ = finished_run
    resolved = tomllib.loads((place.run / "config.toml").read_text())
    assert resolved["model"]["vocab_size"] == 256  # 192 ids rounded up to a multiple of 128
    assert resolved["training"]["train_steps"] == STEPS


def test_tensorboard_scalars(finished_run: tuple[Workplace, Finished]) -> None:
    events = events_of(finished_run[0].run)
    per_step = {
        "gradient_norm/total",
        "gradient_norm/shared",
        *(f"gradient_norm/tower_{name}" for name in NAMES),
        "learning_rate",
        "loss_total/train",
        "step_seconds/total",
        *(f"loss_train/{name}" for name in NAMES),
        "memory/peak_gib",
        *(f"progress/{name}" for name in ("tokens", "flops", "seconds")),
        *(f"step_seconds/{phase}" for phase in ("data", "forward_backward", "optimizer")),
        *(f"tokens_per_second/{name}" for name in ("total", *NAMES)),
        "utilization/mfu_percent",
    }
    held_out = {"loss_total/held_out", *(f"loss_held_out/{name}" for name in NAMES)}
    saves = {"checkpoint/stall_seconds", "checkpoint/write_seconds"}
    assert set(events.Tags()["scalars"]) == per_step | held_out | saves
    for tag in per_step | held_out:
        points = events.Scalars(tag)
        assert [point.step for point in points] == ([2, 4] if tag in per_step else [4]), tag
        assert all(math.isfinite(point.value) for point in points), tag


def test_tensorboard_page_shows_every_scalar_once(
    finished_run: tuple[Workplace, Finished],
) -> None:
    events = events_of(finished_run[0].run)
    (tag,) = [tag for tag in events.Tags()["tensors"] if "custom_scalars" in tag]
    layout = Layout.FromString(events.Tensors(tag)[0].tensor_proto.string_val[0])
    shown = [
        tag
        for category in layout.category
        for chart in category.chart
        for tag in chart.multiline.tag
    ]
    for scalar in events.Tags()["scalars"]:
        assert [bool(re.match(pattern, scalar)) for pattern in shown].count(True) == 1, scalar
    assert all(any(re.match(p, s) for s in events.Tags()["scalars"]) for p in shown)
    assert [category.title for category in layout.category] == [
        "1 Loss",
        "2 Optimization",
        "3 Speed",
    ]


def test_a_finished_run_with_more_steps_continues_its_log(trained: Workplace) -> None:
    before = [point.step for point in events_of(trained.run).Scalars("loss_held_out/text")]
    finished = trained.train(steps=6)
    assert finished.status == 0, finished.errors
    after = [point.step for point in events_of(trained.run).Scalars("loss_held_out/text")]
    assert after == [*before, 6]


def test_restarting_a_finished_run_changes_nothing(trained: Workplace) -> None:
    before = trained.saved()
    summary = (trained.run / "summary.json").read_text()
    finished = trained.train()
    assert finished.status == 0, finished.errors
    assert trained.saved() == before
    assert (trained.run / "summary.json").read_text() == summary
    events = events_of(trained.run)
    for tag in events.Tags()["scalars"]:
        steps = [point.step for point in events.Scalars(tag)]
        assert len(steps) == len(set(steps)), tag


# --- bad input


def _forbid_process_groups() -> None:
    """Make a rank fail if it joins a process group before the error is reported."""

    def join(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"a process group was made: {arguments} {keywords}")

    dist.init_process_group = join


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.hiden_size=64"], ["model.hiden_size", "unknown key", "mean hidden_size;"]),
        (["modle.hidden_size=64"], ["modle", "unknown key", "mean model;"]),
        (["training.train_steps=many"], ["training.train_steps = 'many'", "integer"]),
        (["optimizer.lr=-1.0"], ["optimizer.lr = -1.0", "greater than 0"]),
        (["model.norm_placement=sandwich"], ["model.norm_placement = 'sandwich'", "'post' or"]),
        (
            ["parallel.tensor_model_parallel_size=3"],
            ["num_attention_heads = 4", "tensor_model_parallel_size = 3", "1, 2"],
        ),
        (["data.corpus=/nowhere"], ["/nowhere/corpus.toml", "No such file"]),
        (["data.seq_length=24"], ["small: split train: document", "24"]),
        (
            ['data.packing="budget"', "data.seq_length=52", "training.micro_batch_size=1"],
            ["small: split train: document", "tokens of the tower of", "raise micro_batch_size"],
        ),
        (['model.attention_backend="flex"'], ['attention_backend = "flex"', "CPU", '"sdpa"']),
        (["model.vocab_size=128"], ["model.vocab_size = 128", "192"]),
        (['model.modalities.music={tower="text"}'], ["music", "text, image, speech"]),
        (["run.name=../elsewhere"], ["run.name = '../elsewhere'"]),
        (["train_steps"], ["--set train_steps", "section.key=value"]),
    ],
    ids=lambda value: value[0].partition("=")[0] if "=" in value[0] else None,
)
def test_configuration_errors_are_one_line(
    place: Workplace, overrides: list[str], parts: list[str]
) -> None:
    assert_one_line(place.train(*overrides, prepare=_forbid_process_groups), *parts)
    assert not place.run.parent.exists()


@pytest.mark.parametrize(
    ("world_size", "override", "parts"),
    [
        (3, "parallel.tensor_model_parallel_size=2", ["world size 3", "legal world size: 2 or 4"]),
        (3, "parallel.zero_stage=2", ["global_batch_size = 8", "4 * 3", "nearest legal: 12"]),
    ],
)
def test_indivisible_world_size_is_one_line_on_rank_0(
    place: Workplace, world_size: int, override: str, parts: list[str]
) -> None:
    world = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with ExitStack() as stack:
        first, *others = [
            stack.enter_context(
                EntryPoint(
                    place.folder / f"console{rank}",
                    SCRIPT,
                    *place.arguments(override),
                    environment={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
            )
            for rank in range(world_size)
        ]
        assert_one_line(first.wait(), *parts)
        # The others wait for a sign that rank 0 does not have the error; then they end too.
        assert [other.errors for other in others] == [""] * len(others)
    assert not place.run.parent.exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [("[model", "not valid TOML"), ("[run]\nname = 'x'\n", "required, but absent")],
)
def test_invalid_configuration_files_are_one_line(place: Workplace, text: str, part: str) -> None:
    place.write_config(text)
    assert_one_line(place.train(), str(place.config), part)
    assert not place.run.parent.exists()


def _id_out_of_range(corpus: Path) -> None:
    ids = np.fromfile(corpus / "train.bin", dtype=np.uint16)
    ids[5] = 60000
    ids.tofile(corpus / "train.bin")


def _truncated(corpus: Path) -> None:
    content = (corpus / "train.bin").read_bytes()
    (corpus / "train.bin").write_bytes(content[:-2])


def _without_index(corpus: Path) -> None:
    (corpus / "validation.idx").unlink()


def _without_description(corpus: Path) -> None:
    (corpus / "corpus.toml").unlink()


def _without_held_out(corpus: Path) -> None:
    description = tomllib.loads((corpus / "corpus.toml").read_text())
    del description["splits"]["validation"]
    (corpus / "corpus.toml").write_text(tomli_w.dumps(description))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_id_out_of_range, ["train.bin", "document 0", "60000", "0..191"]),
        (_truncated, ["train.bin", "bytes"]),
        (_without_index, ["validation.idx"]),
        (_without_description, ["corpus.toml", "No such file"]),
        (_without_held_out, ["no split 'validation'"]),
    ],
)
def test_corpus_errors_are_one_line(
    place: Workplace, tmp_path: Path, damage: Callable[[Path], None], parts: list[str]
) -> None:
    copy = shutil.copytree(place.corpus, tmp_path / "damaged")
    damage(copy)
    assert_one_line(place.train(f"data.corpus={copy}"), str(copy), *parts)
    assert not place.run.parent.exists()


def test_run_directory_that_cannot_be_created_is_one_line(place: Workplace) -> None:
    (place.folder / "runs").write_text("a file where a folder should be")
    assert_one_line(place.train(), str(place.run))


# --- checkpoints


def damage(checkpoint: Path) -> None:
    """Flip one bit in the middle of the largest file."""
    file = max(checkpoint.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_corrupt_newest_checkpoint_is_skipped_for_an_older_one(trained: Workplace) -> None:
    damage(trained.checkpoints / "step_00000004")
    finished = trained.train(steps=6)
    assert finished.status == 0, finished.errors
    assert re.search(r"^skipped .*step_00000004: .*SHA-256", finished.output, re.MULTILINE)
    assert f"continuing from {trained.checkpoints / 'step_00000002'}" in finished.output
    assert "  with training.train_steps = 6, which was 4\n" in finished.output
    assert json.loads((trained.run / "summary.json").read_text())["steps"] == 6


def test_a_run_with_only_corrupt_checkpoints_does_not_start_afresh(trained: Workplace) -> None:
    for step in ("step_00000002", "step_00000004"):
        damage(trained.checkpoints / step)
    before = trained.saved()
    assert_one_line(trained.train(), "step_00000002", "step_00000004", "SHA-256", "start afresh")
    assert trained.saved() == before


def test_checkpoint_of_another_program_is_an_error(place: Workplace) -> None:
    foreign = place.checkpoints / "global_step5"
    foreign.mkdir(parents=True)
    (foreign / "mp_rank_00_model_states.pt").write_bytes(b"somebody else's")
    before = place.saved()
    assert_one_line(place.train(), str(foreign), "not a checkpoint of this program")
    assert place.saved() == before


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.hidden_size=16", ["another model", "[256, 32]", "[256, 16]"]),
        ("model.num_layers=3", ["another model", "lacks", "layers.2"]),
        ("model.modalities.speech.tower=text", ["another model"]),
        ("run.seed=4", ["seed = 3", "4"]),
    ],
)
def test_checkpoint_of_another_model_or_seed_is_an_error(
    trained: Workplace, override: str, parts: list[str]
) -> None:
    before = trained.saved()
    assert_one_line(trained.train(override, steps=6), *parts)
    assert trained.saved() == before


def test_checkpoint_of_another_corpus_is_an_error(trained: Workplace, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", without="speech")
    before = trained.saved()
    assert_one_line(trained.train(f"data.corpus={other}", steps=6), "corpus", str(other))
    assert trained.saved() == before


def _limit_file_size() -> None:
    # Longer writes fail as on a full disk; event files and logs stay below the limit.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_full_disk_keeps_older_checkpoints(trained: Workplace) -> None:
    before = trained.saved()
    finished = trained.train(steps=6, prepare=_limit_file_size)
    assert_one_line(finished, "step_00000006", "File too large", "older checkpoints are untouched")
    assert trained.saved() == before
    assert trained.train(steps=6).status == 0


def test_nan_loss_stops_the_run_without_a_checkpoint(trained: Workplace) -> None:
    before = trained.saved()
    # Step 5 moves the weights to about 1e30, whose squares overflow in fp32.
    finished = trained.train("optimizer.lr=1e30", "optimizer.lr_warmup_steps=0", steps=8)
    assert_one_line(finished, "step 6", "loss of text (nan)", "last good checkpoint: step 4")
    assert trained.saved() == before
    # The log up to the failure is kept.
    events = events_of(trained.run)
    assert [point.step for point in events.Scalars("loss_train/text")] == [2, 4]
    assert trained.train(steps=6).status == 0
