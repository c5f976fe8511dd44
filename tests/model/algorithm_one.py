"""A literal, slow implementation of the paper's Algorithm 1: the reference for the grouped model.

It uses boolean masks per modality and one softmax over an explicit [t, t] mask per head, without
grouping, packing tricks or megatron. It reads the weights of the model under test, so the gradients
of both accumulate in the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mot_megatron.config_model import ModelConfig
from mot_megatron.model.micro_batch import NO_LABEL
from mot_megatron.model.model import MixtureOfTransformers
from tests.model.small_models import Tokens


class AlgorithmOne:
    """Algorithm 1 in sequence order, with the weights of the model under test."""

    def __init__(self, model: MixtureOfTransformers) -> None:
        self.config: ModelConfig = model.config
        self.weights = dict(model.named_parameters())

    def logits(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (stream after the last layer [t, h], logits [t, V]), both in sequence order."""
        ids = torch.from_numpy(tokens.token_ids).flatten()
        embedding = self.weights["embedding.lookup.weight"]
        x = self.embedded(embedding[ids])
        for index in range(self.config.num_layers):
            x = self._layer(f"layers.{index}", x, tokens)
        head = self.weights.get("head.linear.weight", embedding)
        return x, self.normed(x, tokens) @ head.T

    def normed(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Apply the final norm to the stream [t, h]."""
        return self._per_modality(
            tokens, x, lambda rows, tower: self._rms(rows, "final_norm", tower)
        )

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the first rows of the stream, given embedded tokens, [t, h]."""
        return tokens

    def visible(self, tokens: Tokens) -> torch.Tensor:
        """Return whether a position (row) sees another one (column), [t, t] bool."""
        documents = tokens.documents
        t = len(documents)
        return (documents[:, None] == documents) & torch.ones(t, t).tril().bool()

    def loss(self, tokens: Tokens) -> torch.Tensor:
        """Return the weighted sum over labels of cross entropy + coefficient * log(Z)^2 (fp32)."""
        logits = self.logits(tokens)[1].float()
        labels = next_tokens(tokens)
        total = torch.zeros(())
        for row, label in zip(logits, labels.tolist(), strict=True):
            if label == NO_LABEL:
                continue
            weight = self.config.loss_weights[tokens.modality_of_id[label]]
            log_z = torch.logsumexp(row, 0)
            z_loss = self.config.z_loss_coefficient * log_z**2
            total = total + weight * (log_z - row[label] + z_loss)
        return total

    def _layer(self, name: str, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        def normed(rows: torch.Tensor, component: str) -> torch.Tensor:
            return self._per_modality(
                tokens, rows, lambda part, tower: self._rms(part, f"{name}.{component}", tower)
            )

        def feed_forward(rows: torch.Tensor) -> torch.Tensor:
            return self._per_modality(
                tokens, rows, lambda part, tower: self._swiglu(part, name, tower)
            )

        if self.config.norm_placement == "post":
            h = x + normed(self._attention(name, x, tokens), "attention_norm")
            return h + normed(feed_forward(h), "feed_forward_norm")
        h = x + self._attention(name, normed(x, "attention_norm"), tokens)
        return h + feed_forward(normed(h, "feed_forward_norm"))

    def _attention(self, name: str, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        config, t = self.config, x.shape[0]
        d, groups = config.head_dim, config.num_key_value_heads
        per_group = config.num_attention_heads // groups
        qkv = self._per_modality(
            tokens, x, lambda rows, k: self._projected(rows, f"{name}.attention.qkv", k)
        ).view(t, groups, per_group + 2, d)
        positions, visible = positions_of(tokens), self.visible(tokens)
        outputs = []
        for head in range(config.num_attention_heads):
            group = head // per_group
            q, k = qkv[:, group, head % per_group], qkv[:, group, per_group]
            if config.qk_norm:
                q = self._qk_norm(tokens, q, f"{name}.attention.q_norm")
                k = self._qk_norm(tokens, k, f"{name}.attention.k_norm")
            q, k = (rotate(part, positions, config.rotary_base) for part in (q, k))
            scores = (q @ k.T / d**0.5).masked_fill(~visible, -torch.inf)
            outputs.append(scores.softmax(dim=-1) @ qkv[:, group, per_group + 1])
        return self._per_modality(
            tokens,
            torch.cat(outputs, dim=-1),
            lambda rows, k: (
                rows @ self._weight(f"{name}.attention.output_projection", "linear", k).T
            ),
        )

    def _projected(self, rows: torch.Tensor, component: str, tower: int) -> torch.Tensor:
        products = rows @ self._weight(component, "linear", tower).T
        if not self.config.add_qkv_bias:
            return products
        untied = f"{component}.towers.{tower}.linear.bias"
        shared = f"{component}.shared.linear.bias"
        return products + self.weights[untied if untied in self.weights else shared]

    def _qk_norm(self, tokens: Tokens, rows: torch.Tensor, name: str) -> torch.Tensor:
        return self._per_modality(tokens, rows, lambda part, tower: self._rms(part, name, tower))

    def _swiglu(self, x: torch.Tensor, name: str, tower: int) -> torch.Tensor:
        gate_up = self._weight(f"{name}.feed_forward", "gate_up.linear", tower)
        gate, up = x @ gate_up[: len(gate_up) // 2].T, x @ gate_up[len(gate_up) // 2 :].T
        down = self._weight(f"{name}.feed_forward", "down.linear", tower)
        return (gate * torch.sigmoid(gate) * up) @ down.T

    def _rms(self, x: torch.Tensor, name: str, tower: int) -> torch.Tensor:
        root = torch.sqrt(x.square().mean(dim=-1, keepdim=True) + self.config.norm_eps)
        return x / root * self._weight(name, "", tower)

    def _weight(self, component: str, leaf: str, tower: int) -> torch.Tensor:
        end = f".{leaf}.weight" if leaf else ".weight"
        untied = f"{component}.towers.{tower}{end}"
        return self.weights[untied if untied in self.weights else f"{component}.shared{end}"]

    def _per_modality(
        self,
        tokens: Tokens,
        rows: torch.Tensor,
        function: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        """Apply ``function`` to each X_m = x[I_m] and scatter the results to sequence order."""
        merged = None
        for modality, tower in enumerate(self.config.towers_of_modalities):
            mask = tokens.modalities == modality
            output = function(rows[mask], tower)
            if merged is None:
                merged = rows.new_zeros(len(rows), output.shape[-1])
            merged[mask] = output
        assert merged is not None
        return merged


def rotate(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """Rotate the complex numbers x[i] + j x[i + d / 2] by position * base^(-2 i / d) radians."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angles), angles
    ).to(torch.promote_types(x.dtype, torch.complex64))
    return torch.cat((turned.real, turned.imag), dim=-1)


def positions_of(tokens: Tokens) -> torch.Tensor:
    """Return the position [t] of every token in its document."""
    seen: dict[int, int] = {}
    positions = []
    for document in tokens.documents.tolist():
        positions.append(seen.get(document, 0))
        seen[document] = positions[-1] + 1
    return torch.tensor(positions)


def next_tokens(tokens: Tokens) -> torch.Tensor:
    """Return, for every token [t], the next token of its document, or NO_LABEL."""
    ids, documents = tokens.token_ids.flatten().tolist(), tokens.documents.tolist()
    labels = [
        ids[i + 1] if i + 1 < len(ids) and documents[i + 1] == documents[i] else NO_LABEL
        for i in range(len(ids))
    ]
    return torch.tensor(labels)
