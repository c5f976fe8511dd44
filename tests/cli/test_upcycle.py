"""Tests that an upcycled run computes what the command reports, and that training continues."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mot_megatron.checkpoint import (
    NamedTensor,
    open_checkpoint,
    read_whole_tensors,
    save_checkpoint,
)
from mot_megatron.checkpoint.names import STATE_KINDS, checkpoint_directory
from mot_megatron.checkpoint.storage import read_index, stored_tensors
from mot_megatron.cli.upcycle import main
from mot_megatron.data.corpus import Corpus
from mot_megatron.model.initialization import initial_values
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.sharding import parts_of
from mot_megatron.parallel.groups import build_single_process_groups
from mot_megatron.train.session import resolve_config
from tests.cli.console import only_error
from tests.model.small_models import vary_vectors
from tests.ranks import run_ranks
from tests.run.test_resume import run_training
from tests.small_runs import CONFIG, small_config, write_corpus

DENSE = [f"model.modalities.{name}.tower=one" for name in ("text", "image", "speech")]
PRE = "model.norm_placement=pre"
ALL = "model.towers.text.experts={num_moe_experts=4,capacity_factor=4.0,gate='softmax'}"
TOP2 = "model.towers.image.experts={num_moe_experts=4,routing='topk',topk=2}"
TOP1 = "model.towers.text.experts={num_moe_experts=4,routing='topk',gate='softmax'}"
POOLLESS = "{num_moe_experts=4,routing='topk',topk=2}"
CHOSEN = "model.towers.text.experts={num_moe_experts=4}"
CAUSAL = "model.towers.text.experts={num_moe_experts=4,causal_router=true}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("upcycle") / "corpus")


@pytest.fixture
def config_file(tmp_path: Path, corpus: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.format(corpus=corpus))
    return path


def save_source(folder: Path, corpus: Path, overrides: list[str]) -> Path:
    """Save a checkpoint of a run with random weights at step 7."""
    opened = Corpus.open(corpus)
    config = resolve_config(small_config(corpus, overrides), opened)
    model = MixtureOfTransformers(config, build_single_process_groups(torch.device("cpu")))
    vary_vectors(model)
    tensors = [
        NamedTensor(f"{kind}/{part.name}", parameter.detach()[part.rows], part.sharding)
        for kind in STATE_KINDS
        for name, parameter in model.named_parameters()
        for part in parts_of(name, parameter)
    ]
    save_checkpoint(
        checkpoint_directory(folder),
        7,
        tensors,
        metadata={"data": {"corpus": opened.fingerprint}},
        config_text=config.to_toml(),
        groups=None,
        keep=1,
    )
    return folder


def arguments(source: Path, config_file: Path, *settings: str) -> list[str]:
    overrides = [f'run.directory="{config_file.parent / "runs"}"', *settings]
    where = ["--checkpoint", str(source), "--config", str(config_file)]
    return where + [part for override in overrides for part in ("--set", override)]


def upcycled(
    capsys: pytest.CaptureFixture[str], command: list[str]
) -> tuple[list[str], float, float]:
    """Return the lines about towers and model, the largest difference and the largest logit."""
    assert main([*command, "--check"]) == 0
    *lines, _, last = capsys.readouterr().out.splitlines()[1:]
    found = re.fullmatch(r"logits of \d+ held-out .* at most (\S+) \(largest logit (\S+)\)", last)
    assert found is not None
    return lines, float(found[1]), float(found[2])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (DENSE, []),
        ([*DENSE, PRE], [PRE, "model.untied.qkv=false", "model.untied.final_norm=false"]),
        (["model.untied.norms=false"], []),
        ([*DENSE, PRE, "model.untied.feed_forward=false"], [PRE, ALL, TOP2]),
        ([], [ALL]),
        ([CHOSEN, TOP2], [CAUSAL, TOP2]),
        ([CHOSEN], [CHOSEN.replace("}", ",capacity_factor=1.0}")]),
        (
            [*DENSE, f"model.towers.one.experts={POOLLESS}"],
            [f"model.towers.{name}.experts={POOLLESS}" for name in ("text", "image", "speech")],
        ),
    ],
)
def test_first_forward_is_equal_if_reported_so(
    corpus: Path,
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    old: list[str],
    new: list[str],
) -> None:
    source = save_source(config_file.parent / "source", corpus, old)
    lines, difference, scale = upcycled(capsys, arguments(source, config_file, *new))
    *towers, whole = lines
    assert len(towers) == 3
    assert all(": its weights compute the same as tower " in line for line in towers)
    assert whole == (
        "whole model: first forward pass equals the source's, to 1e-6 of the largest logit"
    )
    assert scale > 0.5
    assert difference < 1e-6 * max(scale, 1.0)


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ([TOP1, PRE], "gates that sum to about 0.25"),
        ([CHOSEN, PRE], "about 0.5 on average (c = 1), and to 0 for tokens that no expert takes"),
        ([TOP1], "about 0.25; the norm after them cancels any factor except 0, up to norm_eps"),
        ([ALL.replace("softmax", "sigmoid"), PRE], "about 2 on average (c = 4)"),
    ],
)
def test_first_forward_differs_if_reported_so(
    corpus: Path,
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    new: list[str],
    reason: str,
) -> None:
    dense = [*DENSE, *(key for key in new if key == PRE)]
    source = save_source(config_file.parent / "source", corpus, dense)
    lines, difference, scale = upcycled(capsys, arguments(source, config_file, *new))
    text, *others, whole = lines
    assert text.startswith(
        "tower text: its weights do not compute the same as tower one of the source: 4 experts that"
    )
    assert reason in text
    assert all("compute the same as tower one of the source: a copy" in line for line in others)
    assert whole == (
        "whole model: first forward pass differs from the source's: attention propagates the"
        " difference in tower text to all towers"
    )
    if PRE in new:
        assert difference > 0.05 * scale
    else:  # every token has an expert, and the norm cancels its weight up to norm_eps
        assert 1e-6 < difference < 0.02 * scale


def test_experts_that_choose_among_fewer_tokens(
    corpus: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts choose among their tower's tokens; those of the source chose among all tokens."""
    choosing = "experts={num_moe_experts=4}"
    old = [*DENSE, f"model.towers.one.{choosing}", PRE]
    new = [f"model.towers.{name}.{choosing}" for name in ("text", "image", "speech")]
    source = save_source(config_file.parent / "source", corpus, old)
    lines, difference, scale = upcycled(capsys, arguments(source, config_file, *new, PRE))
    *towers, whole = lines
    assert all(
        line.endswith("experts and routers copied, but they choose among different tokens")
        for line in towers
    )
    assert "first forward pass differs from the source's: attention propagates" in whole
    assert "in tower text, image, speech to all towers" in whole
    assert difference > 0.05 * scale


def test_copies_of_another_modalitys_tower(
    corpus: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_source(config_file.parent / "source", corpus, [])
    command = [*arguments(source, config_file), "--map", "image=text"]
    lines, difference, scale = upcycled(capsys, command)
    *towers, whole = lines
    assert all(": its weights compute the same as tower " in line for line in towers)
    assert whole == (
        "whole model: first forward pass differs from the source's: image tokens were processed by"
        " tower image, not text"
    )
    assert difference > 0.05 * scale


def test_weights_of_the_result(
    corpus: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_source(config_file.parent / "source", corpus, [])
    mapped = ["--map", "text=image", "image=text", "speech=speech"]
    frozen = "model.towers.speech.frozen=true"
    assert main([*arguments(source, config_file, CAUSAL, frozen), *mapped]) == 0
    output = capsys.readouterr().out
    assert "tower text: its weights do not compute the same as tower image" in output
    old, new = (read_all(path) for path in (source, config_file.parent / "runs" / "small"))
    for layer in ("layers.0", "layers.1"):
        network = f"{layer}.feed_forward.towers"
        for expert in range(4):
            for matrix in ("gate_up", "down"):
                name = f"weight/{network}.0.experts.{expert}.{matrix}"
                assert torch.equal(new[name], old[f"weight/{network}.1.{matrix}.linear.weight"])
        for router in ("weight", "causal.hidden", "causal.output"):
            name = f"{network}.0.router.{router}"
            value = new[f"weight/{name}"]
            assert torch.equal(value, initial_values(name, value.shape, seed=3, std=0.1))
        norms = f"weight/{layer}.attention_norm.towers"
        assert torch.equal(new[f"{norms}.0.weight"], old[f"{norms}.1.weight"])
        assert torch.equal(new[f"{norms}.2.weight"], old[f"{norms}.2.weight"])
    moments = [name for name in new if not name.startswith("weight/")]
    assert not any(new[name].any() for name in moments)
    assert any(".towers.0." in name for name in moments)
    assert not any(".towers.2." in name for name in moments)  # frozen


def read_all(run: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a run's newest checkpoint."""
    checkpoint = open_checkpoint(checkpoint_directory(run)).checkpoint
    assert checkpoint is not None
    return read_whole_tensors(checkpoint, stored_tensors(read_index(checkpoint.path)))


@pytest.mark.slow
def test_training_continues_from_an_upcycled_run(
    corpus: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first loss equals that of the source in any layout; later ones differ."""
    source = save_source(config_file.parent / "source", corpus, DENSE)
    steps = ["training.train_steps=3", f'run.directory="{config_file.parent / "runs"}"']
    layouts = {
        "dense": (1, DENSE),
        "towers": (1, []),
        "experts": (2, [ALL, TOP2, "parallel.expert_model_parallel_size=2"]),
    }
    losses = {}
    for name, (ranks, overrides) in layouts.items():
        settings = [f"run.name={name}", *overrides, *steps]
        assert main(arguments(source, config_file, *settings)) == 0
        outcomes = run_ranks(run_training, ranks, corpus, settings, None)
        assert all(outcome.optimizer_steps == 3 for outcome in outcomes)
        losses[name] = torch.tensor(outcomes[0].losses)
        assert len(losses[name]) == 3
    capsys.readouterr()
    for name in ("towers", "experts"):
        torch.testing.assert_close(losses[name][0], losses["dense"][0], rtol=1e-6, atol=1e-6)
        assert (losses[name][2] - losses["dense"][2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("old", "new", "more", "message"),
    [
        (DENSE, ["model.hidden_size=64"], [], "model.hidden_size = 64, but the source has 32"),
        (
            DENSE,
            [],
            ["--map", "voice=one"],
            "tower 'voice', which the configuration of the new run (--config) does not have;",
        ),
        (
            DENSE,
            [],
            ["--map", "text=two"],
            "tower 'two', which the source model (--checkpoint) does not have; allowed: one",
        ),
        (DENSE, [], ["--map", "text"], "--map text: expected NEW=OLD"),
        (
            [],
            DENSE,
            [],
            "set the tower to copy with --map one=OLD; allowed: text, image, speech",
        ),
        ([CHOSEN], [], [], "tower text has no experts, but tower text of the source has 4 experts"),
        ([CHOSEN], [CHOSEN.replace("4", "2")], [], "num_moe_experts = 4"),
        ([CHOSEN], [CHOSEN.replace("4", "8")], [], "text has 8 experts, but tower text of the sou"),
        ([], ["model.untied.qkv=false"], [], "model.untied.qkv = false, but the towers of"),
    ],
)
def test_bad_input_is_one_line(
    corpus: Path,
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    old: list[str],
    new: list[str],
    more: list[str],
    message: str,
) -> None:
    source = save_source(config_file.parent / "source", corpus, old)
    assert main([*arguments(source, config_file, *new), *more]) == 2
    assert message in only_error(capsys.readouterr().err)
    assert not (config_file.parent / "runs").exists()


def test_no_run_is_overwritten(
    corpus: Path, config_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = save_source(config_file.parent / "source", corpus, DENSE)
    assert main(arguments(source, config_file)) == 0
    capsys.readouterr()
    assert main(arguments(source, config_file)) == 2
    assert "is not empty, so run.name = small is in use; choose" in capsys.readouterr().err
    other = write_corpus(tmp_path / "other", without="speech")
    assert main(arguments(source, config_file, f'data.corpus="{other}"', "run.name=b")) == 2
    assert "was trained on another corpus than" in capsys.readouterr().err
