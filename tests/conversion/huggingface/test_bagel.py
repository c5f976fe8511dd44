"""BAGEL's published layout, und and gen weights side by side, becomes two towers.

The checkpoint is made here with random values, in the names and shapes of BAGEL's modelling code.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mot_megatron.cli.checkpoint import main
from tests.conversion.huggingface.exported import own_logits, random_ids
from tests.conversion.huggingface.test_import import command, loaded
from tests.small_corpus import FIRST_IMAGE, FIRST_SPEECH, make_corpus

H, D, HEADS, GROUPS, FFN, LAYERS, VOCABULARY = 32, 8, 4, 2, 48, 2, 400
EPS, BASE = 1e-6, 1e6
LEFT_OUT = {
    "vit_model.vision_model.encoder.layers.0.mlp.fc1.weight": (12, 8),
    "vit_model.vision_model.encoder.layers.0.mlp.fc1.bias": (12,),
    "connector.fc1.weight": (H, 8),
    "vit_pos_embed.pos_embed": (16, H),
    "latent_pos_embed.pos_embed": (16, H),
    "time_embedder.mlp.0.weight": (H, 16),
    "vae2llm.weight": (H, 64),
    "llm2vae.bias": (64,),
}
MAP = ["--map", "text=und", "image=gen"]
TWO_TOWERS = ["model.modalities.speech.tower=text"]


def bagel_weights() -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (VOCABULARY, H),
        "language_model.lm_head.weight": (VOCABULARY, H),
        **LEFT_OUT,
    }
    for suffix in ("", "_moe_gen"):
        shapes[f"language_model.model.norm{suffix}.weight"] = (H,)
        for layer in range(LAYERS):
            at = f"language_model.model.layers.{layer}"
            for name, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
                shapes[f"{at}.self_attn.{name}_proj{suffix}.weight"] = (heads * D, H)
                shapes[f"{at}.self_attn.{name}_proj{suffix}.bias"] = (heads * D,)
            shapes[f"{at}.self_attn.o_proj{suffix}.weight"] = (H, HEADS * D)
            for name in ("q_norm", "k_norm"):
                shapes[f"{at}.self_attn.{name}{suffix}.weight"] = (D,)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{at}.{name}{suffix}.weight"] = (H,)
            for name, shape in (("gate", (FFN, H)), ("up", (FFN, H)), ("down", (H, FFN))):
                shapes[f"{at}.mlp{suffix}.{name}_proj.weight"] = shape
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator) * 0.3 + ("norm" in name)
        for name, shape in shapes.items()
    }


def write_bagel(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(weights, folder / "ema.safetensors")
    save_file({"decoder.weight": torch.zeros(2)}, folder / "ae.safetensors")
    config = {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": H,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "rms_norm_eps": EPS,
        "rope_theta": BASE,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
    }
    (folder / "llm_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text("{}")
    return folder


def bagel_logits(
    weights: dict[str, torch.Tensor], ids: torch.Tensor, generated: torch.Tensor
) -> torch.Tensor:
    """Compute logits [s, V] of one sequence plainly, in fp64, from BAGEL's names."""
    wide = {name.removeprefix("language_model."): w.double() for name, w in weights.items()}
    gen = generated[:, None]

    def linear(x: torch.Tensor, name: str, end: str = "") -> torch.Tensor:
        def of(suffix: str) -> torch.Tensor:
            module = f"{name}{suffix}{end}"
            return F.linear(x, wide[f"{module}.weight"], wide.get(f"{module}.bias"))

        return torch.where(gen, of("_moe_gen"), of(""))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        both = wide[f"{name}_moe_gen.weight"], wide[f"{name}.weight"]
        return normal * torch.where(gen.view(-1, *[1] * (x.ndim - 1)), *both)

    length = len(ids)
    angles = torch.arange(length)[:, None] * BASE ** (-torch.arange(0, D, 2).double() / D)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    x = wide["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        rows = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            linear(rows, f"{at}.self_attn.{name}_proj").view(length, -1, D) for name in "qkv"
        )
        q = rotate(norm(q, f"{at}.self_attn.q_norm"))
        k = rotate(norm(k, f"{at}.self_attn.k_norm"))
        k, v = (each.repeat_interleave(HEADS // GROUPS, dim=1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / D**0.5
        hidden = torch.ones(length, length).triu(1).bool()
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        x = x + linear(mixed.flatten(1), f"{at}.self_attn.o_proj")
        rows = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (linear(rows, f"{at}.mlp", f".{name}_proj") for name in ("gate", "up"))
        x = x + linear(gate * gate.sigmoid() * up, f"{at}.mlp", ".down_proj")
    return norm(x, "model.norm") @ wide["lm_head.weight"].T


def test_bagel_becomes_two_towers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    weights = bagel_weights()
    source = write_bagel(tmp_path / "bagel", weights)
    given = command(tmp_path, source, corpus, *TWO_TOWERS, "--verify")
    assert main([*given, *MAP]) == 0
    out = capsys.readouterr().out
    assert "tower image: a copy of tower gen" in out
    for what, count in (("vit_model", 2), ("time_embedder", 1), ("latent_pos_embed", 1)):
        assert f"left out: {count} tensors" in next(
            line for line in out.splitlines() if what in line
        )
    counts = re.findall(r"^left out: (\d+) (\w+)", out, re.MULTILINE)
    assert sum(int(count) for count, what in counts if what == "tensors") == len(LEFT_OUT)
    assert [what for _, what in counts if what != "tensors"] == ["rows"]  # of the vocabulary
    model = loaded(tmp_path)
    assert model.config.num_towers == 2
    ids = random_ids(8, corpus, (1, 30))
    generated = (ids[0] >= FIRST_IMAGE) & (ids[0] < FIRST_SPEECH)
    assert generated.any()
    expected = bagel_logits(weights, ids[0], generated)[:, : model.config.num_vocabulary_rows]
    actual = own_logits(model, corpus, ids)[0]
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_tower_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    source = write_bagel(tmp_path / "bagel", bagel_weights())
    one = [f"model.modalities.{name}.tower=text" for name in ("image", "speech")]
    assert main([*command(tmp_path, source, corpus, *one), "--map", "text=und"]) == 0
    assert "tower gen, which no tower copies" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"language_model.model.layers.1.mlp_moe_gen.up_proj.weight": None}, "it lacks"),
        ({"language_model.model.norm_moe_gen.weight": torch.ones(H + 1)}, "needed: [32]"),
        ({"language_model.model.norm.weight": torch.ones(H, dtype=torch.int8)}, "int8; needed"),
        ({"something.weight": torch.ones(1)}, "something.weight is not a tensor of a bagel"),
    ],
)
def test_other_tensors_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, torch.Tensor | None],
    message: str,
) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    weights = {
        name: tensor for name, tensor in {**bagel_weights(), **change}.items() if tensor is not None
    }
    source = write_bagel(tmp_path / "bagel", weights)
    assert main([*command(tmp_path, source, corpus, *TWO_TOWERS), *MAP]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "runs").exists()
