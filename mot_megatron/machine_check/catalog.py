"""The list of all checks, the most telling first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mot_megatron.machine_check.checks import Check

_PACKAGE = "mot_megatron.machine_check"
_JOB_SECONDS = 60.0
"""A short job, most of whose time is the start of its processes."""
_PLAIN_STEPS, _BRANCH_STEPS = 20, 5
_IMAGE_EXPERTS = "model.towers.image.experts"


def all_checks(device: str) -> list[Check]:
    """Return all checks for a kind of device, in their order, for any number of devices."""
    on_gpu = device == "cuda"
    checks = [
        *_of_the_machine(on_gpu),
        *_parity(on_gpu),
        *_first_speed(on_gpu),
        *_branches(on_gpu),
        *_layouts(),
        *_further_speed(on_gpu),
        *_switches(on_gpu),
    ]
    return [check for check in checks if check.device in (None, device)]


def _of_the_machine(on_gpu: bool) -> list[Check]:
    heads = {"head_dim": 128, "heads": 16, "groups": 8, "length": 1024}
    if not on_gpu:
        heads = {"head_dim": 32, "heads": 4, "groups": 2, "length": 256}
    layer = {"tokens": 2048, "hidden": 1024, "heads": 8} if on_gpu else _SMALL_LAYER
    return [
        Check("machine/software", f"{_PACKAGE}.software:check_software", 40, quick=True),
        Check("machine/host", f"{_PACKAGE}.software:check_host", 20, quick=True),
        Check("machine/devices", f"{_PACKAGE}.devices:check_devices", 40, "cuda", quick=True),
        Check("probes/zero rows", f"{_PACKAGE}.probes:zero_rows", 40, quick=True),
        Check("probes/empty groups", f"{_PACKAGE}.probes:empty_groups", 40, quick=True),
        Check("probes/torch.compile", f"{_PACKAGE}.probes:compilation", 90),
        Check(
            "probes/attention",
            f"{_PACKAGE}.attention:attention",
            90 if on_gpu else 40,
            quick=True,
            settings=heads,
        ),
        Check("probes/repeated layers", f"{_PACKAGE}.speed:repeatability", 60, settings=layer),
        *(
            Check(
                f"links/world of one, {words} device_id",
                f"{_PACKAGE}.worlds:world_of_one",
                40,
                quick=binds,
                settings={"binds_device": binds},
                device=None if binds else "cuda",
            )
            for words, binds in (("with", True), ("without", False))
        ),
        *(
            Check(
                f"links/{size} devices",
                f"{_PACKAGE}.worlds:links",
                90,
                num_devices=size,
                quick=True,
                settings={"world_size": size},
            )
            for size in (2, 4, 8)
        ),
    ]


_SMALL_LAYER = {"tokens": 256, "hidden": 128, "heads": 4}


def _check_parity(
    name: str,
    overrides: Sequence[str] = (),
    *,
    model: str = "plain",
    steps: int = _BRANCH_STEPS,
    world_size: int = 1,
    seconds: float = _JOB_SECONDS,
    quick: bool = False,
) -> Check:
    settings: dict[str, Any] = {"overrides": tuple(overrides), "model": model}
    settings |= {"steps": steps, "world_size": world_size}
    return Check(
        name,
        f"{_PACKAGE}.parity:parity",
        seconds,
        num_devices=world_size,
        quick=quick,
        settings=settings,
    )


def _parity(on_gpu: bool) -> list[Check]:
    """The losses of the small model; bf16 in a few steps on a CPU, where it is very slow."""
    fp32, bf16 = 'training.precision="fp32"', 'training.precision="bf16"'
    backends = ("sdpa", "flex") if on_gpu else ("sdpa",)
    checks = [
        _check_parity(
            f"parity/{_PLAIN_STEPS} steps, fp32, {backend}",
            [fp32, f'model.attention_backend="{backend}"'],
            steps=_PLAIN_STEPS,
            seconds=90,
            quick=True,
        )
        for backend in backends
    ]
    steps = _PLAIN_STEPS if on_gpu else 2
    name = f"parity/{steps} steps, bf16"
    checks.append(_check_parity(name, [bf16], steps=steps, seconds=90, quick=True))
    checks.append(Check("parity/stop and continue", f"{_PACKAGE}.resume:resume", 200))
    return checks


_FUSED = {
    "fused kernels": ['model.layer_backend="triton"'],
    "compiled operations": ['model.layer_backend="compile"'],
}
"""Other implementations of a layer's elementwise operations, by the name of their checks."""


def _branches(on_gpu: bool) -> list[Check]:
    """Five steps of everything that one device can do."""
    branches: dict[str, tuple[str, Sequence[str]]] = {
        "ZeRO-2": ("plain", ["parallel.zero_stage=2"]),
        "ZeRO-3": ("plain", ["parallel.zero_stage=3"]),
        "offload": ("plain", ['parallel.offload="optimizer"']),
        "budgets": ("budget", []),
        "recompute full": ("plain", ['training.recompute="full"']),
        "recompute selective": ("plain", ['training.recompute="selective"']),
        "expert choice": ("expert choice", []),
        "top-2 of 4 experts": ("top-2", []),
    }
    precision = "bf16" if on_gpu else "fp32"
    checks = [
        _check_parity(
            f"branches/{name}, {precision}",
            [*overrides, f'training.precision="{precision}"'],
            model=model,
        )
        for name, (model, overrides) in branches.items()
    ]
    # In fp32, a mistake of experts cannot hide behind rounding.
    exact = ["expert choice", "top-2 of 4 experts"] if on_gpu else []
    checks += [_check_parity(f"branches/{name}, fp32", model=branches[name][0]) for name in exact]
    if on_gpu:
        checks += [
            _check_parity(
                f"branches/{name}, {precision}", [*override, f'training.precision="{precision}"']
            )
            for name, override in _FUSED.items()
            for precision in ("fp32", "bf16")
        ]
    return [*checks, _check_parity("branches/ZeRO-0, fp32", ["parallel.zero_stage=0"])]


def _layouts() -> list[Check]:
    parallel = "parallel."
    tensor, sequence = (
        f"{parallel}tensor_model_parallel_size=2",
        f"{parallel}sequence_parallel=true",
    )
    stages = f"{parallel}pipeline_model_parallel_size=2"
    pieces = f"{parallel}virtual_pipeline_model_parallel_size=2"
    modalities = f"{parallel}modality_parallel_size=2"
    heads = f'{parallel}attention_exchange="heads"'
    experts = f"{parallel}expert_model_parallel_size=2"
    layouts: dict[str, tuple[str, int, Sequence[str]]] = {
        "DP 2": ("plain", 2, []),
        "TP 2": ("plain", 2, [tensor]),
        "TP 2, sequence parallel": ("plain", 2, [tensor, sequence]),
        "PP 2": ("plain", 2, [stages]),
        "PP 2, two pieces per stage": ("plain", 2, [stages, pieces]),
        "MP 2, sequence": ("plain", 2, [modalities]),
        "MP 2, heads": ("plain", 2, [modalities, heads]),
        "EP 2, expert choice": ("expert choice", 2, [experts]),
        "EP 2, top-2": ("top-2", 2, [experts]),
        "DP 2, ZeRO-2": ("plain", 2, [f"{parallel}zero_stage=2"]),
        "DP 2, ZeRO-3": ("plain", 2, [f"{parallel}zero_stage=3"]),
        "TP 2 x PP 2": ("plain", 4, [tensor, sequence, stages]),
        "TP 2 x MP 2": ("plain", 4, [tensor, sequence, modalities]),
        "EP 2 x DP 2": ("top-2", 4, [experts]),
        "DP 8": ("plain", 8, []),
        "DP 8, ZeRO-3": ("plain", 8, [f"{parallel}zero_stage=3"]),
        "TP 2 x PP 2 x DP 2": ("plain", 8, [tensor, sequence, stages]),
        "TP 2 x MP 2 x DP 2": ("plain", 8, [tensor, sequence, modalities]),
        "PP 2 x MP 2 x DP 2": ("plain", 8, [stages, modalities]),
        "EP 2 x DP 4": ("top-2", 8, [experts]),
    }
    return [
        _check_parity(
            f"layouts/{name}",
            overrides,
            model=model,
            world_size=size,
            seconds=_JOB_SECONDS * max(1, size // 4),
        )
        for name, (model, size, overrides) in layouts.items()
    ]


def _first_speed(on_gpu: bool) -> list[Check]:
    """The speed checks that come before the branches, so that a short time limit has them."""
    config, overrides = _base(on_gpu)
    of_rates = {"config": config, "overrides": overrides}
    if on_gpu:
        batch = ("training.micro_batch_size=4", "training.global_batch_size=4")
        of_rates = {"config": "paper/1.5b-dense.toml", "overrides": batch}
    large = {"tokens": 4096, "hidden": 2048, "heads": 16, "repeats": 10}
    return [
        Check(
            "speed/rates",
            f"{_PACKAGE}.speed:rates",
            60 if on_gpu else 40,
            settings=of_rates,
        ),
        Check(
            "speed/layer",
            f"{_PACKAGE}.speed:layer",
            90 if on_gpu else 30,
            quick=True,
            settings=large if on_gpu else _SMALL_LAYER | {"repeats": 5},
        ),
        Check(
            "speed/step",
            f"{_PACKAGE}.speed:step",
            90 if on_gpu else 50,
            quick=on_gpu,
            settings={"config": config, "overrides": overrides} | _LOWEST_MFU,
        ),
    ]


_LOWEST_MFU = {"lowest_mfu": 0.15}


def _base(on_gpu: bool) -> tuple[str, tuple[str, ...]]:
    """Return the configuration whose switches are tried, and its overrides."""
    if on_gpu:
        overrides = ("training.micro_batch_size=1", "training.global_batch_size=2")
        return "paper/443m-mot-3.toml", overrides
    small = ("data.seq_length=128", "model.num_layers=2", "model.vocab_size=512")
    batch = ("training.micro_batch_size=2", "training.global_batch_size=4")
    return "quickstart.toml", small + batch


def _further_speed(on_gpu: bool) -> list[Check]:
    if not on_gpu:
        settings = _SMALL_LAYER | {"repeats": 5, "experts": True}
        return [Check("speed/experts", f"{_PACKAGE}.speed:layer", 60, settings=settings)]
    layer = {"hidden": 2048, "heads": 16, "repeats": 10}
    checks = [
        Check(
            "speed/layer, 16k tokens",
            f"{_PACKAGE}.speed:layer",
            90,
            settings=layer | {"tokens": 16384},
        ),
        Check(
            "speed/experts",
            f"{_PACKAGE}.speed:layer",
            90,
            settings=layer | {"tokens": 4096, "experts": True},
        ),
    ]
    half = ("model.num_layers=12",)
    for name, config, more, size, memory, mfu in (
        ("443M, 3 towers, 4 sequences", "paper/443m-mot-3.toml", (), 4, 60, 0.2),
        ("1.5B, dense", "paper/1.5b-dense.toml", (), 1, 45, 0.25),
        ("1.5B, 3 towers, 12 layers", "paper/1.5b-mot-3.toml", half, 1, 55, 0.2),
        ("1.5B, 3 towers, 12 layers, 4 sequences", "paper/1.5b-mot-3.toml", half, 4, 78, 0.25),
    ):
        batch = (f"training.micro_batch_size={size}", f"training.global_batch_size={2 * size}")
        settings = {"config": config, "overrides": more + batch}
        settings |= {"memory_gb": memory, "lowest_mfu": mfu}
        checks.append(Check(f"speed/{name}", f"{_PACKAGE}.speed:step", 120, settings=settings))
    return checks


def _switches(on_gpu: bool) -> list[Check]:
    config, base = _base(on_gpu)
    switches: dict[str, dict[str, Any]] = {
        "budgets": {"overrides": ['data.packing="budget"']},
        "recompute selective": {"overrides": ['training.recompute="selective"']},
        "recompute full": {"overrides": ['training.recompute="full"']},
        "ZeRO-2": {
            "overrides": ["parallel.zero_stage=2"],
            "advice": "set parallel.zero_stage = 2 here, which changes no number",
        },
        "ZeRO-3": {"overrides": ["parallel.zero_stage=3"]},
        "offload": {"overrides": ['parallel.offload="optimizer"']},
    }
    if on_gpu:
        first: dict[str, dict[str, Any]] = {
            "sdpa": {
                "overrides": ['model.attention_backend="sdpa"'],
                "advice": 'set model.attention_backend = "sdpa" here',
            },
            **{
                name: {
                    "overrides": override,
                    "advice": f"set {override[0].replace('=', ' = ')} here",
                }
                for name, override in _FUSED.items()
            },
            "expandable segments": {
                "variables": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
                "advice": "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True for all ranks",
            },
        }
        switches = first | switches
    return [
        Check(
            f"switches/{name}",
            f"{_PACKAGE}.speed:switch",
            2 * _JOB_SECONDS,
            settings={"config": config, "base": base, **settings},
        )
        for name, settings in switches.items()
    ]
