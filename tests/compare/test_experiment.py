"""Planning the runs of a comparison, and storing those that have ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from mot_megatron.compare.experiment import (
    Circumstances,
    PlannedRun,
    is_recorded,
    load_experiment,
    read_record,
    read_records,
    record_run,
)
from mot_megatron.errors import ConfigError, DataError
from tests.compare.small_comparison import MACHINE, MODALITIES, plan, save_ended_run
from tests.compare.synthetic_runs import CORPUS, Loss, losses

LOSSES: dict[str, Loss] = {name: losses(1.0) for name in MODALITIES}
COMPARE = Path(__file__).parents[2] / "configs" / "compare"


def names(runs: list[PlannedRun]) -> list[str]:
    return [run.name for run in runs]


def test_first_seeds_come_first_and_the_baseline_first_of_all(tmp_path: Path) -> None:
    assert names(plan(tmp_path)) == ["dense-s1", "pair-s1", "mot-s1", "dense-s2", "mot-s2"]
    assert names(plan(tmp_path, arms=["mot", "dense"])) == [
        "dense-s1",
        "mot-s1",
        "dense-s2",
        "mot-s2",
    ]
    assert names(plan(tmp_path, seeds=[2])) == ["dense-s2", "mot-s2"]


def test_a_run_is_its_arm_with_its_seed(tmp_path: Path) -> None:
    run = plan(tmp_path, overrides=["training.train_steps=70"], seeds=[2])[0]
    assert run.config.training.train_steps == 70
    assert run.config.run.seed == 2
    assert run.config.run_directory == tmp_path / "out" / "runs" / "dense-s2"
    assert run.config.model.tower_names == ("all",)
    assert run.config.model.vocab_size == 256  # the corpus's 192, rounded up
    configs = tmp_path / "configs"
    assert run.arguments == [
        *("--config", f"{configs}/base.toml", "--config", f"{configs}/dense.toml"),
        *("--set", "training.train_steps=70", "--set", "run.name=dense-s2", "--set", "run.seed=2"),
        *("--set", f"run.directory={tmp_path}/out/runs"),
    ]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"arms": ["moth"]}, "--arms moth: not in .*allowed: pair, dense, mot$"),
        ({"seeds": [3]}, "--seeds 3: no chosen arm has this seed"),
        ({"arms": ["pair"], "seeds": [1, 2]}, "--seeds 2: no chosen arm has this seed"),
        ({"overrides": ["model.num_layer=3"]}, "num_layer: unknown key"),
        (
            {"overrides": ["training.train_steps=49"]},
            "evaluation.interval_steps = 10: dense-s1 has 4 evaluations in"
            " training.train_steps = 49; step matching needs at least 5",
        ),
        (
            {"overrides": ["logging.interval_steps=301"]},
            "logging.interval_steps = 301: dense-s1 has 4 reports",
        ),
    ],
)
def test_invalid_choices(tmp_path: Path, choice: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, **choice)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'baseline = "dense"',
            'baseline = "sparse"',
            "baseline = 'sparse' is not an arm; allowed: ",
        ),
        ('files = ["pair.toml"]', "", "arms.pair.files: required, but absent"),
        ("seeds = [1, 2]", "seeds = [1, 1]", r"seeds = \[1, 1\]: seeds must differ"),
        ("seeds = [1]", "seed = [1]", "arms.pair.seeds"),
        ("[arms.mot.paper]", "[arms.mot.papers]", "papers: unknown key; did you mean paper; allow"),
        ("[arms.pair]", "[arms.pair", "not valid TOML"),
        ('files = ["mot.toml"]', 'files = ["moth.toml"]', "moth.toml: cannot be read"),
    ],
)
def test_invalid_experiment(tmp_path: Path, old: str, new: str, message: str) -> None:
    plan(tmp_path)
    path = tmp_path / "configs" / "experiment.toml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        plan(tmp_path)
    assert "\n" not in str(caught.value).removesuffix("\n")


def test_absent_experiment_and_corpus(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"experiment\.toml: cannot be read"):
        load_experiment(tmp_path)
    plan(tmp_path)
    (tmp_path / "corpus" / "corpus.toml").unlink()
    with pytest.raises(DataError, match=r"corpus\.toml: cannot be read"):
        plan(tmp_path)


def test_recorded_runs_are_not_run_again_and_are_all_that_a_report_needs(tmp_path: Path) -> None:
    runs = plan(tmp_path)
    output = tmp_path / "out"
    assert not any(is_recorded(run, output) for run in runs)
    with pytest.raises(DataError, match=r"nothing to compare yet.*finished runs of: none"):
        read_records(load_experiment(tmp_path / "configs"), output)
    for run in reversed(runs):
        save_ended_run(run, output, LOSSES)
    assert all(is_recorded(run, output) for run in plan(tmp_path))
    (output / "runs").rename(tmp_path / "gone")
    assert all(is_recorded(run, output) for run in plan(tmp_path))
    kept = read_records(load_experiment(tmp_path / "configs"), output)
    assert list(kept) == ["dense", "pair", "mot"]
    assert [run.record.seed for run in kept["mot"]] == [1, 2]
    assert kept["mot"][0].record.config == runs[2].config
    assert ("train", "speech") in kept["mot"][0].curves.curves
    assert kept["dense"][0].record.corpus["tokens"]["train"]["image"] == 5


@pytest.mark.parametrize("ended", [True, False])
def test_a_changed_configuration_is_refused(tmp_path: Path, ended: bool) -> None:
    (run,) = plan(tmp_path, arms=["pair"])
    output = tmp_path / "out"
    if ended:
        save_ended_run(run, output, LOSSES)
    else:
        run.config.run_directory.mkdir(parents=True)
        (run.config.run_directory / "config.toml").write_text(run.config.to_toml())
        assert not is_recorded(run, output)
    (changed,) = plan(tmp_path, arms=["pair"], overrides=["optimizer.lr=0.5"])
    source = output / ("records/pair-s1.json" if ended else "runs/pair-s1")
    with pytest.raises(ConfigError) as caught:
        is_recorded(changed, output)
    message = str(caught.value)
    assert message.startswith(f"{source}: was run with optimizer.lr = 0.01, but ")
    assert "pair.toml now say 0.5" in message


@pytest.mark.parametrize("ended", [True, False])
def test_a_rebuilt_corpus_is_refused(tmp_path: Path, ended: bool) -> None:
    (run,) = plan(tmp_path, arms=["pair"])
    output = tmp_path / "out"
    save_ended_run(run, output, LOSSES)
    if not ended:
        (output / "records").rename(tmp_path / "gone")
    path = tmp_path / "corpus" / "corpus.toml"
    path.write_text(CORPUS.format(text_size=100, image_size=60, digest="9"))
    (anew,) = plan(tmp_path, arms=["pair"])
    source = "curves/pair-s1.csv" if ended else "runs/pair-s1/corpus.toml"
    with pytest.raises(DataError) as raised:
        is_recorded(anew, output)
    assert str(raised.value).startswith(f"{output / source}: was trained on other tokens than")


def test_a_run_that_was_not_trained_as_planned_is_not_recorded(tmp_path: Path) -> None:
    """A configuration file changed after planning and before the run started."""
    (run,) = plan(tmp_path, arms=["pair"])
    (changed,) = plan(tmp_path, arms=["pair"], overrides=["optimizer.lr=0.5"])
    save_ended_run(run, tmp_path / "out", LOSSES)
    circumstances = Circumstances("compare", 2, MACHINE)
    with pytest.raises(ConfigError, match=r"pair-s1: was run with optimizer\.lr = 0\.01, but"):
        record_run(changed, tmp_path / "out", circumstances, ended="now", command="train")


def test_a_run_whose_curves_were_lost_is_recorded_again(tmp_path: Path) -> None:
    (run,) = plan(tmp_path, arms=["pair"])
    output = tmp_path / "out"
    save_ended_run(run, output, LOSSES)
    (output / "curves" / "pair-s1.csv").unlink()
    assert not is_recorded(run, output)
    save_ended_run(run, output, LOSSES)
    assert is_recorded(run, output)


def test_runs_of_an_arm_that_differ_in_more_than_their_seed_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    save_ended_run(plan(tmp_path, seeds=[1], arms=["dense"])[0], output, LOSSES)
    other = plan(tmp_path, seeds=[2], arms=["dense"], overrides=["optimizer.lr=0.5"])[0]
    save_ended_run(other, output, LOSSES)
    with pytest.raises(DataError, match=r"dense-s2.json: optimizer.lr differs from dense-s1"):
        read_records(load_experiment(tmp_path / "configs"), output)


def test_damaged_record_and_unknown_arm(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (run,) = plan(tmp_path, arms=["pair"])
    save_ended_run(run, output, LOSSES)
    path = output / "records" / "pair-s1.json"
    text = path.read_text()
    path.write_text(text.replace('"arm":"pair"', '"arm":"bear"').replace('"pair"', '"bear"'))
    with pytest.raises(DataError, match=r"pair-s1.json: arm bear is not in experiment.toml"):
        read_records(load_experiment(tmp_path / "configs"), output)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"pair-s1.json: not a run's record") as caught:
        read_record(path)
    assert "\n" not in str(caught.value)


def test_the_experiment_of_the_papers_arms_is_complete() -> None:
    experiment = load_experiment(COMPARE)
    three = [name for name, arm in experiment.arms.items() if len(arm.seeds) == 3]
    assert three == ["dense", "mot", "mot-text-moe-4x"]
    assert len(experiment.arms) == 10
    for arm in experiment.arms.values():
        assert all((COMPARE / file).exists() for file in arm.files)
    assert experiment.arms["mot"].paper["speech"]["7B (3)"] == 0.229
