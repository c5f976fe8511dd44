"""Tests that the layer benchmark compares equal computations, and that its JSON is valid."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mot_megatron.benchmark.layer_variants import FUSED_ALONE, MIXTURES, Benchmark, Variant
from mot_megatron.cli import benchmark_layer
from mot_megatron.parallel.groups import build_single_process_groups
from tests.cli.console import only_error
from tests.model.test_flops import grouped_mm_flops

SMALL = ["--tokens", "64", "--hidden", "32", "--heads", "4", "--repeats", "2"]
NAMES = ["dense"] + [f"{way}-{k}" for k in (2, 3) for way in ("mot", "mask", "gather-scatter")]


def small_variants() -> dict[str, Variant]:
    device = torch.device("cpu")
    groups = build_single_process_groups(device)
    setting = Benchmark(300, 32, 4, device, torch.float32, groups)
    return {variant.name: variant for variant in setting.variants()}


@pytest.mark.parametrize("num_towers", [2, 3])
@pytest.mark.parametrize("other", ["mask", "gather-scatter"])
def test_variants_give_equal_outputs_and_gradients(other: str, num_towers: int) -> None:
    variants = small_variants()
    results = []
    for name in (f"mot-{num_towers}", f"{other}-{num_towers}"):
        variant = variants[name]
        outputs = variant.step()
        gradients = {n: p.grad for n, p in variant.layer.named_parameters()}
        inputs = [part.grad for part in variant.inputs]
        assert all(gradient is not None for gradient in (*gradients.values(), *inputs))
        results.append(
            {
                "output": variant.to_sequence(outputs).detach(),
                "input": variant.to_sequence(tuple(part for part in inputs if part is not None)),
                **gradients,
            }
        )
        variant.clear()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-4)


def test_mixtures_have_the_flops_of_dense_and_a_router() -> None:
    setting = Benchmark(
        300,
        32,
        4,
        torch.device("cpu"),
        torch.float32,
        build_single_process_groups(torch.device("cpu")),
    )
    counts = {}
    for variant in (setting.ours(1, "dense"), *setting.mixtures()):
        mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            variant.step()
        counts[variant.name] = counter.get_total_flops()
        assert all(parameter.grad is not None for parameter in variant.layer.parameters())
    dense = counts.pop("dense")
    assert counts.keys() == MIXTURES.keys()
    # 300 tokens, one forward and two backward products, 4 experts and h = 32.
    router = 3 * 2 * 300 * 4 * 32
    # The first matrix, 16 x 32, has only a weight gradient; the second, 4 x 16, also an input's.
    causal = 2 * 2 * 300 * 16 * 32 + 3 * 2 * 300 * 4 * 16
    more = {name: count - dense for name, count in counts.items()}
    assert more.pop("expert-choice-4-causal") == router + causal
    assert more == {"expert-choice-4": router, "top-1-of-4": router}


def test_mixtures_and_exchange_are_optional(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_layer.main([*SMALL, "--experts", "--exchange", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    exchanges = {"exchange-sequence", "exchange-heads"}
    assert set(result["ratio_to_dense"]) - set(NAMES) == MIXTURES.keys() | exchanges


def test_fused_operations_are_optional(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--tokens", "24", "--hidden", "16", "--heads", "2", "--repeats", "2"]
    assert benchmark_layer.main([*tiny, "--fused", "triton", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    whole = {f"{name} triton" for name in ("dense", "mot-2", "mot-3")}
    alone = {f"mot-3 triton {field}" for field in FUSED_ALONE}
    assert set(result["ratio_to_dense"]) - set(NAMES) == whole | alone


def test_fused_operations_alone_give_the_outputs_of_plain_pytorch() -> None:
    device = torch.device("cpu")
    groups = build_single_process_groups(device)
    setting = Benchmark(24, 16, 2, device, torch.float32, groups)
    expected = setting.ours(3, "mot-3").step()
    variants = [variant for variant in setting.fused("triton") if "mot-3" in variant.name]
    assert len(variants) == 1 + len(FUSED_ALONE)
    for variant in variants:
        torch.testing.assert_close(variant.step(), expected, rtol=1e-4, atol=1e-5)


def test_every_tower_has_work() -> None:
    for variant in small_variants().values():
        assert all(len(part) > 0 for part in variant.inputs)


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_layer.main([*SMALL, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(result["ratio_to_dense"]) == sorted(NAMES)
    for ratio in result["ratio_to_dense"].values():
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert result["ratio_to_dense"]["dense"] == {"median": 1, "low": 1, "high": 1}
    assert result["machine"]["cores"] >= 1


@pytest.mark.slow
def test_pair_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_layer.main([*SMALL, "--world-size", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    variants = ["dense", "mot-2", "mot-2-mp2-sequence", "mot-2-mp2-heads"]
    names = [name + suffix for name in variants for suffix in ("", " + gradients")]
    assert sorted(result["ratio_to_dense"]) == sorted(names)
    for name, seconds in result["seconds"].items():
        # 2 ranks * 64 tokens. Two values are twice as far from their mean as their quartiles are.
        half = seconds["high"] - seconds["low"]
        rounds = [seconds["median"] - half, seconds["median"] + half]
        rate = result["tokens_per_second_of_the_pair"][name]["median"]
        assert rate == pytest.approx(sum(128 / each for each in rounds) / 2, rel=1e-3)


def test_table_and_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_layer.main(SMALL) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in NAMES)
    assert benchmark_layer.main([*SMALL, "--profile", "--experts"]) == 0
    profile = capsys.readouterr().out
    assert "mot-3 minus dense" in profile
    assert all(f"{name} minus dense" in profile for name in MIXTURES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--repeats 1", "--repeats 1: must be at least 2, to measure a spread"),
        ("--world-size 2 --profile", "--world-size 2 requires wall time and one thread per rank"),
        ("--device cuda", "--device cuda: torch finds no GPU; allowed: cpu"),
        ("--device cuda --clock processor", "--clock processor: allowed with --device cpu only"),
        ("--profile --json", "--profile prints text only; omit --json"),
    ],
)
def test_incompatible_options(
    capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert benchmark_layer.main([*SMALL, *options.split()]) == 2
    assert message in only_error(capsys.readouterr().err)


def test_shapes_that_do_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_layer.main([*SMALL, "--heads", "5"]) == 2
    error = only_error(capsys.readouterr().err)
    assert "2 * model.num_attention_heads = 2 * 5" in error
