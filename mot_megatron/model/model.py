"""The Mixture-of-Transformers: shared embedding and head around layers of untied towers.

Letters as in layer.py; M modalities, V vocabulary rows, g all grouped slots of a micro-batch.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from torch import nn

from mot_megatron.config import Config
from mot_megatron.errors import ConfigError
from mot_megatron.model.attention_core import AttentionCore, build_attention_core
from mot_megatron.model.grouping import Grouping, rank_major
from mot_megatron.model.initialization import initialise_parameters
from mot_megatron.model.layer import Flow, Layer, Stream, run_layer
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.model.norm import RMSNorm
from mot_megatron.model.objectives import sum_losses, token_losses
from mot_megatron.model.rotary import RotaryAngles
from mot_megatron.model.sharding import SHARED, ParameterLayout, layout_of, mark_tower, set_layout
from mot_megatron.model.towers import ParallelLinears, PerTower
from mot_megatron.parallel.groups import ProcessGroups


class Embedding(nn.Module):
    """Token embedding, its rows split over the tensor-parallel ranks."""

    def __init__(self, num_rows: int, hidden_size: int, linears: ParallelLinears) -> None:
        super().__init__()
        self.sequence_parallel = linears.sequence_parallel
        self.lookup = VocabParallelEmbedding(
            num_rows,
            hidden_size,
            init_method=lambda _: None,
            reduce_scatter_embeddings=linears.sequence_parallel,
            config=linears.megatron_config,
            tp_group=linears.groups.tensor,
        )
        set_layout(self.lookup.weight, ParameterLayout((num_rows, hidden_size), shard_dim=0))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[g] -> [g, h] (sequence parallel: this rank's [g / tp, h]).

        Collectives: forward all-reduce (sequence parallel: reduce-scatter), backward none
        (sequence parallel: all-gather).
        """
        if self.sequence_parallel:
            # megatron's layer expects [b, s] and swaps the two before it scatters.
            return self.lookup(token_ids[None]).squeeze(1)
        return self.lookup(token_ids)


class Head(nn.Module):
    """Projection to the vocabulary; its weight may be the embedding's."""

    def __init__(
        self, num_rows: int, hidden_size: int, linears: ParallelLinears, own_weight: bool
    ) -> None:
        super().__init__()
        self.linear = ColumnParallelLinear(
            hidden_size,
            num_rows,
            config=linears.megatron_config,
            init_method=lambda _: None,
            bias=False,
            skip_weight_param_allocation=not own_weight,
            tp_group=linears.groups.tensor,
        )
        if own_weight:
            set_layout(self.linear.weight, ParameterLayout((num_rows, hidden_size), shard_dim=0))

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """[g, h] (sequence parallel: [g / tp, h]) -> logits [g, V / tp]."""
        return self.linear(x, weight=weight)[0]


class MixtureOfTransformers(nn.Module):
    """The model on one tensor-parallel rank.

    Every parameter carries ``shard_layout`` (its place in the global tensor), ``tower`` (an index, or
    -1 for shared) and megatron's ``tensor_model_parallel``.
    """

    def __init__(
        self, config: Config, groups: ProcessGroups, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        model, training = config.model, config.training
        if model.attention_backend == "flex" and groups.device.type != "cuda":
            raise ConfigError(
                'model.attention_backend = "flex" has no backward on a CPU; allowed there: "auto"'
                ' or "sdpa"'
            )
        self.config = model
        self.groups = groups
        self.sequence_parallel = config.parallel.sequence_parallel
        self.recompute_layers = training.recompute == "full"
        linears = ParallelLinears(groups, self.sequence_parallel, dtype)
        rows, hidden = model.num_vocabulary_rows, model.hidden_size
        self.embedding = Embedding(rows, hidden, linears)
        self.layers = nn.ModuleList(
            Layer(model, linears, index, recompute_core=training.recompute == "selective")
            for index in range(model.num_layers)
        )
        self.final_norm = PerTower(
            lambda: RMSNorm(hidden, model.norm_eps, linears.partial_rows),
            model.num_towers,
            model.untied.final_norm,
        )
        self.head = Head(rows, hidden, linears, model.untie_embeddings_and_output_weights)
        mark_tower(self.embedding, SHARED)
        mark_tower(self.head, SHARED)
        for parameter in self.parameters():
            sharded = layout_of(parameter).shard_dim is not None
            parameter.tensor_model_parallel = sharded  # type: ignore[attr-defined]
        initialise_parameters(
            self, config.run.seed, model.init_std, groups.tensor_rank, groups.tensor_size
        )
        self.to(dtype=dtype, device=groups.device)
        # No buffer: that would be rounded with the weights, while the loss's divisor is not.
        self.loss_weights = torch.tensor(
            model.loss_weights, dtype=torch.float32, device=groups.device
        )

    def forward(
        self, micro_batch: MicroBatch, cache: AttentionCore | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Losses of a micro-batch that lies on the model's device; with a cache, its logits.

        Generation comes through here too because ZeRO-3 gathers weights during forward only.

        Args:
            micro_batch: The tokens.
            cache: The attention core to use while generating.

        Returns:
            The weighted sum of token losses (divide by the global batch's weight before
            backward), and the detached sums of cross entropy in nats per modality, [M]. Both are
            this data-parallel rank's and equal on its tensor-parallel ranks. With a cache only
            ``sequence_logits``.
        """
        if cache is not None:
            return (self.sequence_logits(micro_batch, cache),)
        logits = self.logits(micro_batch)
        labels = self._stream_order(micro_batch.labels, micro_batch)
        modalities = self._stream_order(micro_batch.label_modalities, micro_batch)
        cross_entropy, log_z = token_losses(
            logits, labels, self.groups.tensor, self.groups.tensor_rank
        )
        # Chameleon, section 2.4.3.
        z_loss = self.config.z_loss_coefficient * log_z.square()
        return sum_losses(cross_entropy, z_loss, labels, modalities, self.loss_weights)

    def logits(self, micro_batch: MicroBatch, attend: AttentionCore | None = None) -> torch.Tensor:
        """Logits [g, V / tp] in grouped order (sequence parallel: rank-major order)."""
        stream = torch.cat(self.final_norm(self.hidden_states(micro_batch, attend)))
        weight = None
        if not self.config.untie_embeddings_and_output_weights:
            weight = self.embedding.lookup.weight
        return self.head(stream, weight)

    def sequence_logits(
        self, micro_batch: MicroBatch, attend: AttentionCore | None = None
    ) -> torch.Tensor:
        """Logits [t, V / tp] in sequence order, padding slots left out."""
        slots = torch.arange(sum(micro_batch.tower_slots), device=self.groups.device)
        slot_of_row = self._stream_order(slots, micro_batch)
        row_of_slot = torch.empty_like(slots).scatter_(0, slot_of_row, slots)
        rows = row_of_slot[micro_batch.ungroup_index]
        return self.logits(micro_batch, attend).index_select(0, rows)

    def hidden_states(self, micro_batch: MicroBatch, attend: AttentionCore | None = None) -> Stream:
        """The stream after the last layer, before the final norm: K x [g_k, h]."""
        token_ids = self._stream_order(micro_batch.token_ids, micro_batch)
        embedded = self.embedding(token_ids)
        divisor = self.groups.tensor_size if self.sequence_parallel else 1
        stream: Stream = embedded.split([slots // divisor for slots in micro_batch.tower_slots])
        flow = Flow(
            Grouping.of(micro_batch),
            RotaryAngles.of(
                micro_batch.positions,
                self.config.head_dim,
                self.config.rotary_base,
                embedded.dtype,
            ),
            attend or build_attention_core(micro_batch, self.config.attention_backend),
        )
        for layer in self.layers:
            stream = run_layer(layer, stream, flow, self.recompute_layers)
        return stream

    def _stream_order(self, values: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        ranks = self.groups.tensor_size if self.sequence_parallel else 1
        return rank_major(values, micro_batch.tower_slots, ranks)
