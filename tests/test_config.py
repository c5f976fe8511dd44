"""Configuration files: parsing, overrides, and one-line error messages for invalid input."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from mot_megatron.cli.arguments import add_overrides, user_path
from mot_megatron.config import Config
from mot_megatron.config_files import as_arguments, load_config, parse_config
from mot_megatron.errors import ConfigError

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.toml"
GOOD = """
[run]
name = "test"
[data]
corpus = "corpora/test"
[model]
num_layers = 2
hidden_size = 64
num_attention_heads = 8
[model.modalities]
text = { tower = "text" }
image = { tower = "vision", loss_weight = 0.5 }
speech = { tower = "text" }
[training]
train_steps = 10
global_batch_size = 8
precision = "fp32"
"""


def parse(*overrides: str) -> Config:
    return parse_config(GOOD, "test.toml", list(overrides))


def error_message(*overrides: str, text: str = GOOD) -> str:
    """Return the error message of an invalid configuration, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "test.toml", list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_towers_in_order_of_first_mention() -> None:
    model = parse().model
    assert model.tower_names == ("text", "vision")
    assert model.num_towers == 2
    assert model.towers_of_modalities == (0, 1, 0)
    assert model.loss_weights == (1.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("hidden", "expected"),
    # 256 * ceil((8 * hidden / 3) / 256): the paper's rule
    [(256, 768), (512, 1536), (1024, 2816), (1536, 4096), (2048, 5632), (4096, 11008)],
)
def test_feed_forward_size_follows_the_papers_rule(hidden: int, expected: int) -> None:
    assert parse(f"model.hidden_size={hidden}").model.feed_forward_size == expected
    assert parse("model.ffn_hidden_size=96").model.feed_forward_size == 96


def test_config_is_immutable() -> None:
    with pytest.raises(ValidationError):
        parse().model.hidden_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("model.hiden_size", "hidden_size"),
        ("model.num_layer", "num_layers"),
        ("model.untied.feedforward", "feed_forward"),
        ("model.modalities.text.los_weight", "loss_weight"),
        ("optimizer.lr_warmup", "lr_warmup_steps"),
        ("training.train_step", "train_steps"),
        ("model.towers.text.expert", "experts"),
        ("paralel.zero_stage", "parallel"),
    ],
)
def test_misspelled_key_is_named_with_a_suggestion(key: str, suggestion: str) -> None:
    message = error_message(f"{key}=1")
    named = key if not key.startswith("paralel") else "paralel"
    assert message.startswith(f"test.toml: {named}: unknown key")
    assert f"did you mean {suggestion};" in message


def test_unknown_key_without_a_close_match_lists_the_allowed_keys() -> None:
    message = error_message("checkpoint.zzz=1")
    assert "did you mean" not in message
    assert "allowed: asynchronous, interval_steps, keep, keep_every_steps" in message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.hidden_size=big", "model.hidden_size = 'big'"),
        ("model.hidden_size=0", "model.hidden_size = 0"),
        ("model.hidden_size=64.5", "model.hidden_size = 64.5"),
        ("model.num_layers=-1", "model.num_layers = -1"),
        ("model.norm_placement=middle", "model.norm_placement = 'middle'"),
        ("model.untied.qkv=[1]", "model.untied.qkv = [1]"),
        ("parallel.zero_stage=4", "parallel.zero_stage = 4"),
        ("optimizer.adam_beta2=1.0", "optimizer.adam_beta2 = 1.0"),
        ("optimizer.lr=nan", "optimizer.lr = nan"),
        ("optimizer.lr=inf", "optimizer.lr = inf"),
        ("training.precision=fp8", "training.precision = 'fp8'"),
        ("training.recompute=some", "training.recompute = 'some'"),
        ("run.name=../elsewhere", "run.name = '../elsewhere'"),
        ("model.modalities.image.loss_weight=-1", "model.modalities.image.loss_weight = -1"),
    ],
)
def test_invalid_value_is_named(override: str, key: str) -> None:
    assert error_message(override).startswith(f"test.toml: {key}: ")


def test_allowed_values_are_listed() -> None:
    message = error_message("training.recompute=some")
    assert all(f"'{value}'" in message for value in ("none", "selective", "full"))


def test_missing_key_is_named() -> None:
    message = error_message(text=GOOD.replace("num_layers = 2\n", ""))
    assert message == "test.toml: model.num_layers: required, but absent"


def test_further_problems_are_counted() -> None:
    assert error_message("model.num_layers=0", "training.train_steps=0").endswith("(and 1 more)")


def test_overrides_replace_values_of_the_file() -> None:
    config = parse(
        "model.num_layers=5",
        "optimizer.lr = 0.5",
        "run.name=other",
        'data.corpus="with spaces/and = sign"',
        "model.untied.qkv=false",
        "model.modalities.video.tower=vision",
    )
    assert config.model.num_layers == 5
    assert config.optimizer.lr == 0.5
    assert config.run.name == "other"
    assert config.data.corpus == Path("with spaces/and = sign")
    assert not config.model.untied.qkv
    assert config.model.towers_of_modalities == (0, 1, 0, 1)


@pytest.mark.parametrize("override", ["model.num_layers", "=3", "model..x=3", ".=1"])
def test_override_without_key_or_value_is_an_error(override: str) -> None:
    assert error_message(override) == f"--set {override}: expected section.key=value"


def test_override_inside_a_scalar_is_an_error() -> None:
    message = error_message("model.num_layers.x=3")
    assert "num_layers is a value, not a section" in message


def test_invalid_toml_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[run\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: not valid TOML")) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_unreadable_file_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: cannot be read")):
        load_config(path)


def test_default_vocabulary_is_the_corpus_size_rounded_up() -> None:
    resolved = parse().resolved_for(["image", "text", "speech"], 5620)
    assert resolved.model.num_vocabulary_rows == 5632  # 44 * 128
    # Modalities keep their towers if the corpus lists the modalities in another order.
    assert list(resolved.model.modalities) == ["image", "text", "speech"]
    assert resolved.model.tower_names == ("vision", "text")
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        _ = parse().model.num_vocabulary_rows


def test_mismatch_with_the_corpus_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 128 .* 5620 tokens"):
        parse("model.vocab_size=128").resolved_for(["text", "image", "speech"], 5620)
    with pytest.raises(ConfigError, match=r"model\.modalities has image, speech, text"):
        parse().resolved_for(["text", "image"], 5620)


def test_written_configuration_reads_back_equal() -> None:
    config = parse("model.num_query_groups=2", "optimizer.lr=1e-4", "run.directory=a b")
    assert parse_config(config.to_toml(), "written") == config


def write_files(folder: Path, *texts: str) -> list[Path]:
    """Write a.toml, b.toml and so on with these contents and return their paths."""
    paths = [folder / f"{name}.toml" for name in "abcd"[: len(texts)]]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


def test_later_files_override_earlier_ones_key_by_key(tmp_path: Path) -> None:
    placement = "[parallel]\nmodality_parallel_size = 2\nplacement = {}\n"
    paths = write_files(
        tmp_path,
        GOOD + placement.format("[{ text = 1.0 }, { vision = 1.0 }]"),
        "[model]\nhidden_size = 96\n[model.modalities]\nimage = { tower = 'text' }\n",
        "[model.modalities.speech]\ntower = 'vision'\n[parallel]\n"
        "placement = [{ vision = 1.0 }, { text = 1.0 }]\n",
    )
    config = load_config(paths, ["model.num_layers=5"])
    model = config.model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (5, 96, 8)
    assert {name: modality.tower for name, modality in model.modalities.items()} == {
        "text": "text",
        "image": "text",
        "speech": "vision",
    }
    assert model.loss_weights == (1.0, 0.5, 1.0)  # keys that no later file sets are kept
    assert config.parallel.placement == ({"vision": 1.0}, {"text": 1.0})  # arrays are replaced
    first, *_ = paths
    assert load_config([first]) == load_config(first)


def test_tables_and_values_replace_each_other(tmp_path: Path) -> None:
    table, value = "[run]\nname = 'other'\n", "run = 3\n"
    paths = write_files(tmp_path, value, GOOD, table)
    assert load_config(paths).run.name == "other"
    with pytest.raises(ConfigError, match=re.escape(f"{paths[0]}: run = 3: ")):
        load_config([paths[1], paths[0]])


@pytest.mark.parametrize(
    ("later", "named", "message"),
    [
        (
            "[model]\nhiden_size = 64",
            "b",
            "model.hiden_size: unknown key; did you mean hidden_size",
        ),
        ("[model]\nhidden_size = 'x'", "b", "model.hidden_size = 'x': "),
        ("[optimizer]\nlr = 0.1", "a", "training.train_steps = 0: "),
        ("[training]\ntrain_steps = 9\n[optimizer]\nmin_lr = 1.0", "a + b", "optimizer.min_lr"),
    ],
)
def test_error_names_the_file_at_fault(
    tmp_path: Path, later: str, named: str, message: str
) -> None:
    paths = write_files(tmp_path, GOOD.replace("train_steps = 10", "train_steps = 0"), later)
    if named != "a":
        paths[0].write_text(GOOD)
    source = " + ".join(str(path) for path in paths if path.stem in named)
    with pytest.raises(ConfigError, match=re.escape(f"{source}: {message}")) as caught:
        load_config(paths)
    assert str(caught.value).startswith(source)


def test_invalid_override_is_not_blamed_on_a_single_file(tmp_path: Path) -> None:
    paths = write_files(tmp_path, GOOD, "[model]\nhidden_size = 96\n")
    with pytest.raises(ConfigError) as caught:
        load_config(paths, ["model.hidden_size=big"])
    assert str(caught.value).startswith(f"{paths[0]} + {paths[1]}: model.hidden_size = 'big'")


def test_error_names_the_unreadable_file(tmp_path: Path) -> None:
    paths = write_files(tmp_path, GOOD, "[run\n")
    with pytest.raises(ConfigError, match=re.escape(f"{paths[1]}: not valid TOML")):
        load_config(paths)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'c.toml'}: cannot be read")):
        load_config([paths[0], tmp_path / "c.toml"])


@pytest.mark.parametrize(
    ("settings", "per_token", "sees_the_future", "can_be_causal"),
    [
        ("", 1.0, True, False),
        (", capacity_factor = 1.5, causal_router = true", 1.5, True, True),
        (', routing = "topk"', 1.0, False, True),
        # Which tokens an expert at capacity drops depends on later tokens too.
        (', routing = "topk", topk = 2, capacity_factor = 1.25', 2.0, True, True),
    ],
)
def test_experts_per_token_and_causality_by_routing(
    settings: str, per_token: float, sees_the_future: bool, can_be_causal: bool
) -> None:
    config = parse(f"model.towers.vision.experts={{ num_moe_experts = 4{settings} }}")
    plain, experts = config.model.experts_of_towers
    assert plain is None
    assert experts is not None
    assert experts.experts_per_token == per_token
    assert config.model.has_experts
    assert config.model.sees_the_future == sees_the_future
    assert config.model.can_be_causal == can_be_causal
    assert parse_config(config.to_toml(), "written") == config


def test_a_model_without_experts_is_causal() -> None:
    model = parse().model
    assert (model.has_experts, model.sees_the_future, model.can_be_causal) == (False, False, True)


@pytest.mark.parametrize(
    "setting",
    ["num_moe_experts = 0", "capacity_factor = 0.0", "topk = 0", 'gate = "tanh"', 'routing = "x"'],
)
def test_invalid_expert_setting_is_named(setting: str) -> None:
    given = setting if setting.startswith("num") else f"num_moe_experts = 4, {setting}"
    message = error_message(f"model.towers.text.experts={{ {given} }}")
    key = setting.split(" ")[0]
    assert message.startswith(f"test.toml: model.towers.text.experts.{key} = ")


def test_paths_are_expanded_as_a_shell_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = ["data.corpus=~/corpus", "run.directory=~/runs"]
    config = load_config(QUICKSTART, overrides)
    assert config.data.corpus == tmp_path / "corpus"
    assert config.run_directory == tmp_path / "runs" / "quickstart"


@pytest.mark.parametrize("path", ["$SCRATCH/corpus", "/data/${USER}/corpus", "~nobody-at-all/x"])
def test_paths_that_only_a_shell_understands_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.corpus = "):
        load_config(QUICKSTART, [f"data.corpus={path}"])
    with pytest.raises(argparse.ArgumentTypeError):
        user_path(path)


def test_a_key_is_unset(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(GOOD + "[logging]\nsample_interval_steps = 5\n", encoding="utf-8-sig")
    assert load_config(file).logging.sample_interval_steps == 5
    parser = argparse.ArgumentParser()
    add_overrides(parser, "help")
    words = ["--set", "run.seed=1", "--unset", "logging.sample_interval_steps"]
    overrides = parser.parse_args(words).overrides
    assert load_config(file, overrides).logging.sample_interval_steps is None
    assert [word for one in overrides for word in as_arguments(one)] == words
    with pytest.raises(ConfigError, match=r"--unset logging\.x: it is not set; set here: sample"):
        load_config(file, ["-logging.x"])
    with pytest.raises(ConfigError, match=r"--unset logging: expected section\.key"):
        load_config(file, ["-logging"])
