"""Mixture-of-Transformers for Hugging Face transformers, in one file that travels with the weights.

Every token is processed by the weights of its tower, which its id determines; one causal
attention spans all tokens. It needs PyTorch and transformers only, and is loaded with
``AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)``.

The residual stream is in grouped order: all tokens of tower 0, then those of tower 1, and so on, so
that a tower's matrices multiply one contiguous slice. Only attention needs sequence order.

Letters: b sequences of s tokens, t = b * s, n rows of a tower, K towers, h hidden size, d head
size, E experts, V vocabulary rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

_COMPONENTS = ("feed_forward", "qkv", "output_projection", "norms", "qk_norm", "final_norm")
# Later versions of transformers call the key-value cache ``cache``.
_CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in CausalLMOutputWithPast.__dataclass_fields__
)

Slices = Sequence[torch.Tensor]
"""One tensor per tower, [n, ...] each."""


class MixtureOfTransformersConfig(PretrainedConfig):
    """Shapes of the model, the tower of every token id, and each tower's experts.

    Besides the usual values these:

    - towers: names of the K towers.
    - tower_starts: pairs of a first id and the index of the tower that processes the ids from there
      up to the next pair's, in ascending order from id 0.
    - untied: per component, whether every tower has its own weights; absent: true.
    - norm_placement: "pre", x + f(norm(x)), or "post", x + norm(f(x)).
    - experts: per tower its mixture of experts, or None for a plain network, with the keys
      num_experts, routing ("topk" or "expert_choice"), experts_per_token, gate ("sigmoid" or
      "softmax"), capacity_factor and causal_router.
    - route_causally: whether routing ignores later tokens, so that causal routers replace expert
      choice and no expert drops tokens over its capacity. False: experts route as in training.
    """

    model_type = "mixture_of_transformers"
    keys_to_ignore_at_inference = (_CACHE,)
    defaults = {  # noqa: RUF012
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "rotary_base": 10000.0,
        "norm_placement": "post",
        "qk_norm": True,
        "qkv_bias": False,
        "towers": ["text"],
        "tower_starts": [[0, 0]],
        "route_causally": True,
        "initializer_range": 0.02,
        "use_cache": True,
    }

    def __init__(
        self,
        num_key_value_heads: int | None = None,
        untied: dict[str, bool] | None = None,
        experts: list[dict[str, Any] | None] | None = None,
        **values: Any,
    ) -> None:
        """Store the values, with ``defaults`` for absent ones."""
        for name, default in self.defaults.items():
            setattr(self, name, values.pop(name, copy.copy(default)))
        self.num_key_value_heads = num_key_value_heads or self.num_attention_heads
        values["head_dim"] = self.hidden_size // self.num_attention_heads
        self.untied = {**dict.fromkeys(_COMPONENTS, True), **(untied or {})}
        self.experts = experts or [None] * len(self.towers)
        super().__init__(**values)


class PerTower(nn.Module):
    """One module per tower, or one that all towers share."""

    def __init__(self, make: Callable[[int], nn.Module], num_towers: int, untied: bool) -> None:
        super().__init__()
        self.num_towers = num_towers
        if untied:
            self.towers = nn.ModuleList([make(tower) for tower in range(num_towers)])
        else:
            self.shared = make(0)
        self.untied = untied

    def forward(self, slices: Slices, *others: Slices) -> list[torch.Tensor]:
        """Apply each tower's module to that tower's slice, even if it has no rows."""
        modules = self.towers if self.untied else [self.shared] * self.num_towers
        return [module(*given) for module, *given in zip(modules, slices, *others, strict=True)]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize [..., size]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Grouping:
    """Moves rows between sequence order [b, s] and the towers' slices."""

    def __init__(self, input_ids: torch.Tensor, config: MixtureOfTransformersConfig) -> None:
        self.shape = tuple(input_ids.shape)
        first_ids, towers = torch.tensor(config.tower_starts, device=input_ids.device).T
        pair = torch.bucketize(input_ids.flatten(), first_ids.contiguous(), right=True) - 1
        tower = towers[pair]
        self.order = tower.argsort(stable=True)
        self.back = torch.empty_like(self.order)
        self.back[self.order] = torch.arange(len(self.order), device=self.order.device)
        self.sizes = tower.bincount(minlength=len(config.towers)).tolist()

    def to_towers(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """[b, s, ...] -> K x [n, ...]."""
        return list(rows.flatten(0, 1)[self.order].split(self.sizes))

    def to_sequence(self, slices: Slices) -> torch.Tensor:
        """K x [n, ...] -> [b, s, ...]."""
        return torch.cat(tuple(slices))[self.back].unflatten(0, self.shape)


class Rotary:
    """Rotary position embedding, which pairs element i with i + d / 2."""

    def __init__(self, positions: torch.Tensor, base: float, like: torch.Tensor, d: int) -> None:
        exponents = torch.arange(0, d, 2, device=like.device, dtype=torch.float32) / d
        angles = positions[..., None].float() * base**-exponents
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        self.cosine, self.sine = angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate [b, heads, s, d] by the angles of its positions."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cosine + torch.cat((-second, first), dim=-1) * self.sine


class Attention(nn.Module):
    """Untied projections around one attention over all tokens."""

    def __init__(self, config: MixtureOfTransformersConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        h, d = config.hidden_size, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.grouped, self.d = groups != heads, d
        untied, towers = config.untied, len(config.towers)

        def projection(width: int) -> PerTower:
            return PerTower(
                lambda _: nn.Linear(h, width * d, bias=config.qkv_bias), towers, untied["qkv"]
            )

        def norm(_tower: int) -> nn.Module:
            return RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()

        self.q_proj, self.k_proj, self.v_proj = map(projection, (heads, groups, groups))
        self.q_norm = PerTower(norm, towers, untied["qk_norm"])
        self.k_norm = PerTower(norm, towers, untied["qk_norm"])
        self.o_proj = PerTower(
            lambda _: nn.Linear(heads * d, h, bias=False), towers, untied["output_projection"]
        )

    def forward(
        self,
        stream: Slices,
        grouping: Grouping,
        rotary: Rotary,
        mask: torch.Tensor | None,
        cache: Any,
    ) -> list[torch.Tensor]:
        """Attend: K x [n, h] -> K x [n, h]; a cache is extended."""

        def heads(slices: Slices) -> list[torch.Tensor]:
            return [rows.unflatten(-1, (-1, self.d)) for rows in slices]

        q, k, v = (
            grouping.to_sequence(part).transpose(1, 2)  # [b, heads, s, d]
            for part in (
                self.q_norm(heads(self.q_proj(stream))),
                self.k_norm(heads(self.k_proj(stream))),
                heads(self.v_proj(stream)),
            )
        )
        q, k = rotary.rotate(q), rotary.rotate(k)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        causal = mask is None and q.shape[2] > 1
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped
        )
        return self.o_proj(grouping.to_towers(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU: (silu(x W_gate) * (x W_up)) W_down."""

    def __init__(self, config: MixtureOfTransformersConfig) -> None:
        super().__init__()
        h, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(h, f, bias=False)
        self.up_proj = nn.Linear(h, f, bias=False)
        self.down_proj = nn.Linear(f, h, bias=False)

    def forward(self, x: torch.Tensor, _filled: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the network to every row, [n, h] -> [n, h]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class CausalRouter(nn.Module):
    """Predicts, from a token alone, the experts that would choose it."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, hidden_size // 2, bias=False)
        self.output = nn.Linear(hidden_size // 2, num_experts, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Predict logits, [n, h] -> [n, E]; a positive one means that the expert chooses."""
        return self.output(F.silu(self.hidden(x)))


class ExpertFeedForward(nn.Module):
    """A mixture of experts; a token's result is the weighted sum of those of its experts."""

    def __init__(self, config: MixtureOfTransformersConfig, settings: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.settings = config, settings
        number = settings["num_experts"]
        self.gate = nn.Linear(config.hidden_size, number, bias=False)
        self.experts = nn.ModuleList([FeedForward(config) for _ in range(number)])
        if settings["causal_router"]:
            self.causal_gate = CausalRouter(config.hidden_size, number)

    def forward(self, x: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
        """Apply the experts to [n, h]; ``filled`` [n] is false for padding."""
        weights, assigned = self.route(x, filled)
        weights = (weights * assigned).to(x.dtype)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = assigned[:, number].nonzero()[:, 0]
            output = expert(x[rows]) * weights[rows, number, None]
            total = total.index_add(0, rows, output)
        return total

    def route(self, x: torch.Tensor, filled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts' weights [n, E] in fp32 and which experts process a row [n, E]."""
        logits = F.linear(x.float(), self.gate.weight.float())
        sigmoid = self.settings["gate"] == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        if self.settings["routing"] == "topk":
            return self._top_k(scores, filled, normalized=sigmoid)
        if self.config.route_causally:
            return scores, (self.causal_gate(x) > 0) & filled[:, None]
        # Logits have the order of their sigmoids, without saturation.
        return scores, self._largest(logits if sigmoid else scores, filled, self._per_token())

    def _top_k(
        self, scores: torch.Tensor, filled: torch.Tensor, normalized: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.settings["experts_per_token"]
        values, chosen = scores.topk(k, dim=-1)
        if normalized and k > 1:
            values = values / (values.sum(-1, keepdim=True) + 1e-20)
        weights = torch.zeros_like(scores).scatter(1, chosen, values)
        assigned = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
        assigned &= filled[:, None]
        if self.settings["capacity_factor"] is not None and not self.config.route_causally:
            capacity = self.settings["capacity_factor"] * k
            assigned &= self._largest(weights * assigned, None, capacity, int(filled.sum()))
        return weights, assigned

    def _per_token(self) -> float:
        return self.settings["experts_per_token"]

    def _largest(
        self,
        scores: torch.Tensor,
        filled: torch.Tensor | None,
        per_token: float,
        num_tokens: int | None = None,
    ) -> torch.Tensor:
        """Return which rows have an expert's largest scores, an equal number for every expert."""
        if filled is not None:
            scores = scores.masked_fill(~filled[:, None], -math.inf)
            num_tokens = int(filled.sum())
        assert num_tokens is not None
        rows = math.ceil(per_token * num_tokens / self.settings["num_experts"] - 1e-6)
        chosen = scores.topk(min(rows, num_tokens), dim=0).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(0, chosen, True)


class DecoderLayer(nn.Module):
    """Attention and a feed-forward network, with norms before or after each."""

    def __init__(self, config: MixtureOfTransformersConfig, layer_idx: int) -> None:
        super().__init__()
        untied, towers = config.untied, len(config.towers)

        def norm() -> PerTower:
            return PerTower(
                lambda _: RMSNorm(config.hidden_size, config.rms_norm_eps), towers, untied["norms"]
            )

        def network(tower: int) -> nn.Module:
            settings = config.experts[tower]
            return ExpertFeedForward(config, settings) if settings else FeedForward(config)

        self.self_attn = Attention(config, layer_idx)
        self.mlp = PerTower(network, towers, untied["feed_forward"])
        self.post_norm = config.norm_placement == "post"
        self.post_attention_layernorm = norm()
        if self.post_norm:
            self.post_feedforward_layernorm = norm()
        else:
            self.input_layernorm = norm()

    def forward(self, stream: Slices, filled: Slices, *attention: Any) -> list[torch.Tensor]:
        """Apply the layer: K x [n, h] -> K x [n, h]."""
        if self.post_norm:
            update = self.post_attention_layernorm(self.self_attn(stream, *attention))
            stream = _add(stream, update)
            return _add(stream, self.post_feedforward_layernorm(self.mlp(stream, filled)))
        stream = _add(stream, self.self_attn(self.input_layernorm(stream), *attention))
        return _add(stream, self.mlp(self.post_attention_layernorm(stream), filled))


def _add(stream: Slices, update: Slices) -> list[torch.Tensor]:
    return [x + y for x, y in zip(stream, update, strict=True)]


class MixtureOfTransformersPreTrainedModel(PreTrainedModel):
    """What all models of this file have in common."""

    config: MixtureOfTransformersConfig
    config_class = MixtureOfTransformersConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = False


class MixtureOfTransformersModel(MixtureOfTransformersPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: MixtureOfTransformersConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = PerTower(
            lambda _: RMSNorm(config.hidden_size, config.rms_norm_eps),
            len(config.towers),
            config.untied["final_norm"],
        )
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the normed stream [b, s, h] of the token ids [b, s].

        Args:
            input_ids: The new tokens. Embeddings in their place would have no tower.
            attention_mask: [b, past + s], 0 for padding.
            position_ids: [b or 1, s]; None: counted from the first token of the cache.
            past_key_values: The cache under its earlier name.
            use_cache: Whether to create a cache and return it.
            cache: Keys and values of earlier tokens; it is extended.
            kwargs: Ignored, except for results that this model does not record.

        Raises:
            ValueError: An argument is not supported, or routing needs later tokens, which do not
                exist yet with a cache.
        """
        _check_arguments(input_ids, attention_mask, kwargs)
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not self.training and _can_be_causal(self.config):
            cache = DynamicCache()
        if cache is not None:
            _check_can_be_causal(self.config)
        past = 0 if cache is None else cache.get_seq_length()
        length = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device)[None]
        embedded = self.embed_tokens(input_ids)
        grouping = Grouping(input_ids, self.config)
        rotary = Rotary(position_ids, self.config.rotary_base, embedded, self.config.head_dim)
        mask, filled = _masks(attention_mask, input_ids, past)
        stream, filled = grouping.to_towers(embedded), grouping.to_towers(filled)
        for layer in self.layers:
            stream = layer(stream, filled, grouping, rotary, mask, cache)
        rows = grouping.to_sequence(self.norm(stream))
        return BaseModelOutputWithPast(last_hidden_state=rows, **{_CACHE: cache})


class MixtureOfTransformersForCausalLM(MixtureOfTransformersPreTrainedModel, GenerationMixin):
    """The model with its output head."""

    # A dictionary since version 5 of transformers, before that a list.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MixtureOfTransformersConfig) -> None:
        super().__init__(config)
        self.model = MixtureOfTransformersModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits [b, s, V] and, with ``labels`` [b, s], the mean loss of the next tokens.

        Labels of -100 are left out. ``logits_to_keep`` selects the last positions, or those in a
        tensor; 0: all. For the other arguments see ``MixtureOfTransformersModel.forward``.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, cache, **kwargs
        )
        rows = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            rows = rows[:, -logits_to_keep:] if logits_to_keep else rows
        else:
            rows = rows[:, logits_to_keep]
        logits = self.lm_head(rows)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, **{_CACHE: getattr(outputs, _CACHE)}
        )


def _masks(
    attention_mask: torch.Tensor | None, input_ids: torch.Tensor, past: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return who attends to whom, [b, 1, s, past + s], and which tokens are no padding, [b, s].

    The first is None for plain causal attention.
    """
    length, device = input_ids.shape[1], input_ids.device
    if attention_mask is None or bool(attention_mask.all()):
        filled = torch.ones_like(input_ids, dtype=torch.bool)
        if past == 0 or length == 1:
            return None, filled
        present = filled.new_ones(input_ids.shape[0], past + length)
    else:
        present = attention_mask.bool()
        filled = present[:, -length:]
    keys = torch.arange(past + length, device=device)
    queries = keys[past:, None]
    visible = (keys <= queries) & present[:, None, None]
    # Padding attends to itself: a row of zeros would turn into NaN.
    return visible | (keys == queries), filled


def _can_be_causal(config: MixtureOfTransformersConfig) -> bool:
    return config.route_causally or not any(config.experts)


def _check_can_be_causal(config: MixtureOfTransformersConfig) -> None:
    if not _can_be_causal(config):
        raise ValueError(
            "config.route_causally is false, so experts choose among later tokens too; generate"
            " with route_causally = true, which needs top-k routing or causal routers"
        )


def _check_arguments(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, others: dict[str, Any]
) -> None:
    if others.get("inputs_embeds") is not None or input_ids is None:
        raise ValueError("give input_ids: a token's id determines its tower")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"attention_mask has {attention_mask.ndim} dimensions; allowed: 2")
    for name in ("output_attentions", "output_hidden_states"):
        if others.get(name):
            raise ValueError(f"{name} is not supported by this model")
