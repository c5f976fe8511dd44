"""Models in Hugging Face formats as sources: their configuration, tensors and towers.

Known are Llama, Qwen2 and Qwen3 of the transformers library, BAGEL as its authors publish it, and
this program's own exports. Whatever would compute something else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from mot_megatron.config import Config
from mot_megatron.config_model import ExpertsConfig, ModalityConfig, TowerConfig, UntiedConfig
from mot_megatron.config_section import PositiveFloat
from mot_megatron.conversion.huggingface.model_config import MIXTURE
from mot_megatron.conversion.huggingface.names import (
    BAGEL,
    DENSE,
    TOWERS,
    Correspondence,
    Naming,
    correspondences,
)
from mot_megatron.conversion.huggingface.safetensors_files import (
    SUFFIX,
    SafetensorsSource,
    read_json,
)
from mot_megatron.conversion.tensors import TensorSource
from mot_megatron.errors import CheckpointError, first_problem

CONFIG_FILE = "config.json"
BAGEL_CONFIG = "llm_config.json"
_BAGEL_WEIGHTS = "ema"
_BAGEL_LEFT_OUT = {
    "vit_model.": "vision transformer (vit_model)",
    "connector.": "connector of the vision transformer (connector)",
    "vit_pos_embed.": "positions of the vision transformer (vit_pos_embed)",
    "time_embedder.": "embedder of diffusion times (time_embedder)",
    "vae2llm.": "connector from the autoencoder (vae2llm)",
    "llm2vae.": "connector to the autoencoder (llm2vae)",
    "latent_pos_embed.": "positions of latents (latent_pos_embed)",
}
"""Beginnings of the names of tensors for which a model of discrete tokens has no place."""
_DENSE_LEFT_OUT = {"model.rotary_emb.": "angles of the rotary embedding, which are computed"}
DENSE_TOWER = "dense"
"""Name of the only tower of a dense model."""
_QWEN3_HEAD_DIM = 128
"""Head size of a Qwen3 configuration that does not state it."""

Size = Annotated[int, Field(gt=0, lt=1 << 31)]
_Parsed = TypeVar("_Parsed", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class _Shapes(_Strict):
    """Keys that all formats have."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    quantization_config: None = None

    def model_keys(self) -> dict[str, Any]:
        """Return what the keys mean in this program's [model] section."""
        return {
            "num_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_key_value_heads or self.num_attention_heads,
            "ffn_hidden_size": self.intermediate_size,
            "norm_eps": self.rms_norm_eps,
            "untie_embeddings_and_output_weights": not self.tie_word_embeddings,
        }


class _Rope(_Strict):
    rope_type: Literal["default"] = Field(
        default="default", validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: PositiveFloat | None = None


class _Dense(_Shapes):
    """Keys of Llama, Qwen2 and Qwen3; the values allowed are those that this program computes."""

    model_type: Literal["llama", "qwen2", "qwen3"]
    hidden_act: Literal["silu"] = "silu"
    rope_theta: PositiveFloat | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention"]] | None = None

    @property
    def rotary_base(self) -> float:
        """Base of the rotary embedding."""
        table = self.rope_parameters
        return (table and table.rope_theta) or self.rope_theta or 10000.0

    def model_keys(self) -> dict[str, Any]:
        return {
            **super().model_keys(),
            "norm_placement": "pre",
            "qk_norm": self.model_type == "qwen3",
            "add_qkv_bias": self.model_type == "qwen2",
            "rotary_base": self.rotary_base,
        }


class _Experts(_Strict):
    num_experts: Size
    routing: Literal["expert_choice", "topk"]
    experts_per_token: PositiveFloat
    gate: Literal["sigmoid", "softmax"]
    capacity_factor: PositiveFloat | None
    causal_router: bool

    def own(self) -> ExpertsConfig:
        """Return the same in this program's words."""
        chosen = {"topk": int(self.experts_per_token)} if self.routing == "topk" else {}
        return ExpertsConfig(
            num_moe_experts=self.num_experts,
            routing=self.routing,
            capacity_factor=self.capacity_factor,
            gate=self.gate,
            causal_router=self.causal_router,
            **chosen,
        )


class _Mixture(_Shapes):
    """Keys of this program's own exports with towers."""

    model_type: Literal["mixture_of_transformers"]
    rotary_base: PositiveFloat
    norm_placement: Literal["pre", "post"]
    qk_norm: bool
    qkv_bias: bool
    towers: list[str] = Field(min_length=1)
    tower_of_modality: dict[str, str]
    untied: UntiedConfig
    experts: list[_Experts | None]

    def model_keys(self) -> dict[str, Any]:
        towers = {
            name: {"experts": experts.own().model_dump(exclude_none=True)}
            for name, experts in zip(self.towers, self.experts, strict=True)
            if experts is not None
        }
        return {
            **super().model_keys(),
            "norm_placement": self.norm_placement,
            "qk_norm": self.qk_norm,
            "add_qkv_bias": self.qkv_bias,
            "rotary_base": self.rotary_base,
            "modalities": {name: {"tower": t} for name, t in self.tower_of_modality.items()},
            "untied": self.untied.model_dump(),
            "towers": towers,
        }


@dataclass(frozen=True)
class ForeignModel:
    """A model in one of the known formats; no weights have been read."""

    directory: Path
    """Folder of the weights."""
    description: Path
    """Folder of the configuration, and of the tokenizer if there is one."""
    kind: str
    """Architecture, as in "qwen3" or "bagel"."""
    tensors: TensorSource
    vocab_size: int
    """Rows of its embedding."""
    keys: Mapping[str, Any]
    """Values of the [model] section that its weights determine."""
    towers: Mapping[str, str]
    """Tower of each modality."""
    correspondences: Callable[[Config], Iterator[Correspondence]]
    """Yields all tensors of a resolved model, with the source's tensors that they consist of."""
    known_left_out: Mapping[str, str]
    """Beginnings of names of tensors that have no place in this program, with what they are."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Number of other entries of the files, which are not read, by what they are."""

    def config_for(self, target: Config) -> Config:
        """Return this model's configuration, with the vocabulary size of ``target``."""
        towers = {
            name: TowerConfig.model_validate(settings)
            for name, settings in self.keys.get("towers", {}).items()
        }
        modalities = {name: ModalityConfig(tower=tower) for name, tower in self.towers.items()}
        plain = {key: value for key, value in self.keys.items() if not isinstance(value, dict)}
        update = {
            **plain,
            "modalities": modalities,
            "towers": towers,
            "untied": UntiedConfig.model_validate(self.keys.get("untied", {})),
        }
        return target.model_copy(update={"model": target.model.model_copy(update=update)})


def open_foreign(directory: Path) -> ForeignModel:
    """Open a model and check its configuration and the headers of its files.

    Args:
        directory: Folder with config.json, or BAGEL's llm_config.json, and safetensors files.

    Raises:
        CheckpointError: The format is unknown, a file is damaged, or the model computes something
            that this program does not.
    """
    if (directory / BAGEL_CONFIG).is_file():
        return _open_bagel(directory)
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory} contains neither {CONFIG_FILE} nor {BAGEL_CONFIG}, so it is no model of"
            " the transformers library"
        )
    return open_described(directory, path, lambda: SafetensorsSource(directory))


def open_described(
    directory: Path, path: Path, tensors: Callable[[], TensorSource]
) -> ForeignModel:
    """Check a configuration, and the names and shapes of tensors that it describes.

    Args:
        directory: Folder of the weights.
        path: The configuration, as the transformers library writes it.
        tensors: Opens the weights; called once the architecture is known.

    Raises:
        CheckpointError: See ``open_foreign``.
    """
    document = read_json(path)
    kind = document.get("model_type")
    known = ("llama", "qwen2", "qwen3", MIXTURE)
    if kind not in known:
        raise CheckpointError(
            f"{path}: model_type is {kind!r}; known: {', '.join(known)}, and BAGEL by its"
            f" {BAGEL_CONFIG}"
        )
    if kind == MIXTURE:
        mixture = _parsed(_Mixture, document, path)
        names = list(dict.fromkeys(mixture.tower_of_modality.values()))
        if names != mixture.towers or len(mixture.experts) != len(names):
            raise CheckpointError(f"{path}: tower_of_modality and experts do not match towers")
        shapes, towers, naming = mixture, mixture.tower_of_modality, TOWERS
    else:
        shapes, towers, naming = _parsed(_Dense, document, path), {DENSE_TOWER: DENSE_TOWER}, DENSE
    return _foreign(directory, path.parent, kind, shapes, towers, naming, tensors())


def _foreign(
    directory: Path,
    description: Path,
    kind: str,
    shapes: _Dense | _Mixture,
    towers: Mapping[str, str],
    naming: Naming,
    tensors: TensorSource,
) -> ForeignModel:
    _check_layers(directory, shapes, tensors)
    left_out = dict(_DENSE_LEFT_OUT)
    if shapes.tie_word_embeddings:
        left_out["lm_head.weight"] = "output head, which is tied to the embedding"
    return ForeignModel(
        directory,
        description,
        kind,
        tensors,
        shapes.vocab_size,
        shapes.model_keys(),
        towers,
        partial(correspondences, naming=naming),
        left_out,
    )


def _open_bagel(directory: Path) -> ForeignModel:
    path = directory / BAGEL_CONFIG
    shapes = _parsed(_Dense, {**read_json(path), "tie_word_embeddings": False}, path)
    if shapes.model_type != "qwen2":
        raise CheckpointError(f"{path}: model_type is {shapes.model_type!r}; allowed: 'qwen2'")
    stem = _BAGEL_WEIGHTS if (directory / (_BAGEL_WEIGHTS + SUFFIX)).is_file() else "model"
    tensors = SafetensorsSource(directory, stem)
    _check_layers(directory, shapes, tensors)
    normed = f"{BAGEL.prefix}model.layers.0.self_attn.q_norm.weight" in tensors.infos
    return ForeignModel(
        directory,
        directory,
        "bagel",
        tensors,
        shapes.vocab_size,
        {**shapes.model_keys(), "qk_norm": normed},
        {"understanding": "und", "generation": "gen"},
        partial(correspondences, naming=BAGEL),
        _BAGEL_LEFT_OUT,
    )


def _check_layers(directory: Path, shapes: _Shapes, tensors: TensorSource) -> None:
    """Check the sizes before anything is listed that is as long as they claim."""
    heads, hidden = shapes.num_attention_heads, shapes.hidden_size
    stated = shapes.head_dim
    if stated is None and isinstance(shapes, _Dense) and shapes.model_type == "qwen3":
        stated = _QWEN3_HEAD_DIM
    if hidden % (2 * heads) or (stated or hidden // heads) != hidden // heads:
        raise CheckpointError(
            f"{directory}: head_dim = {stated or hidden / heads:g} with hidden_size = {hidden} and"
            f" num_attention_heads = {heads}; allowed: hidden_size / num_attention_heads, an even"
            " number"
        )
    if heads % (shapes.num_key_value_heads or heads):
        raise CheckpointError(
            f"{directory}: num_key_value_heads = {shapes.num_key_value_heads} does not divide"
            f" num_attention_heads = {heads}"
        )
    experts = [each for each in getattr(shapes, "experts", ()) if each is not None]
    most = max([shapes.num_hidden_layers, *(each.num_experts for each in experts)])
    if most > len(tensors.infos):
        raise CheckpointError(
            f"{directory}: its configuration has {most} layers or experts, but its files only"
            f" {len(tensors.infos)} tensors"
        )


def _parsed(kind: type[_Parsed], document: Mapping[str, Any], path: Path) -> _Parsed:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from None
