"""The Mixture-of-Transformers: shared embedding and head around layers of untied towers.

Letters as in layer.py; M modalities, V vocabulary rows, g grouped slots of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import nn

from mot_megatron.config import Config
from mot_megatron.model.attention_core import AttentionCore, build_attention_core
from mot_megatron.model.exchange import HeadSlices, ModalityExchange
from mot_megatron.model.grouping import Grouping, rank_major
from mot_megatron.model.initialization import initialize_parameters
from mot_megatron.model.layer import Layer, LayerInputs, Stream, run_layer
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.model.norm import RMSNorm
from mot_megatron.model.objectives import Labels, VocabularyShard, Weighting, head_losses
from mot_megatron.model.operations import layer_operations
from mot_megatron.model.pieces import Piece, pieces_of_stage
from mot_megatron.model.rotary import RotaryAngles
from mot_megatron.model.routing import (
    ExpertUse,
    RoutingMode,
    RoutingPool,
    check_can_be_causal,
    routing_pools,
)
from mot_megatron.model.sharding import (
    SHARED,
    ParameterSharding,
    freeze_towers,
    mark_replica,
    mark_tower,
    set_sharding,
    sharding_of,
)
from mot_megatron.model.towers import ParallelLinears, PerTower
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.rules import check_device


class Embedding(nn.Module):
    """Token embedding with rows split over the tensor-parallel ranks."""

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
        set_sharding(self.lookup.weight, ParameterSharding((num_rows, hidden_size), shard_dim=0))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embed ids [g] as [g, h] (sequence parallel: this rank's [g / tp, h]).

        Collectives over the tensor-parallel group: all-reduce in forward, none in backward
        (sequence parallel: reduce-scatter in forward, all-gather in backward).
        """
        if self.sequence_parallel:
            # megatron's layer expects [b, s] and transposes it before the reduce-scatter.
            return self.lookup(token_ids[None]).squeeze(1)
        return self.lookup(token_ids)


class _VocabularyLinear(ColumnParallelLinear):
    """Projection to logits, or to losses without storing logits.

    The loss is computed inside of the module that has the weight, because ZeRO-3 gathers the weight
    for this module's forward.
    """

    shard: VocabularyShard

    def forward(  # type: ignore[override]
        self,
        rows: torch.Tensor,
        weight: torch.Tensor | None,
        labels: Labels | None = None,
        weighting: Weighting | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return logits, or with labels what ``head_losses`` returns."""
        if labels is None or weighting is None:
            return super().forward(rows, weight=weight)[:1]
        if self.sequence_parallel:
            rows = gather_from_sequence_parallel_region(rows, group=self.shard.group)
        else:
            rows = copy_to_tensor_model_parallel_region(rows, group=self.shard.group)
        weight = self.weight if weight is None else weight
        assert weight is not None
        return head_losses(rows, weight, labels, weighting, self.shard)


class Head(nn.Module):
    """Projection to the vocabulary; its weight may be tied to the embedding."""

    def __init__(
        self, num_rows: int, hidden_size: int, linears: ParallelLinears, own_weight: bool
    ) -> None:
        super().__init__()
        self.linear = _VocabularyLinear(
            hidden_size,
            num_rows,
            config=linears.megatron_config,
            init_method=lambda _: None,
            bias=False,
            skip_weight_param_allocation=not own_weight,
            tp_group=linears.groups.tensor,
        )
        self.linear.shard = VocabularyShard(linears.groups.tensor, linears.groups.tensor_rank)
        if own_weight:
            set_sharding(
                self.linear.weight, ParameterSharding((num_rows, hidden_size), shard_dim=0)
            )

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Project [g, h] (sequence parallel: [g / tp, h]) to logits [g, V / tp]."""
        return self.linear(x, weight)[0]

    def losses(
        self, x: torch.Tensor, weight: torch.Tensor | None, labels: Labels, weighting: Weighting
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of losses; see ``head_losses``.

        Collectives over the tensor-parallel group: also an all-reduce of the gradient of ``x`` in
        backward (sequence parallel: an all-gather in forward, a reduce-scatter in backward).
        """
        return self.linear(x, weight, labels, weighting)


class MixtureOfTransformers(nn.Module):
    """The part of the model that one rank holds: its towers, its stage, its shards of matrices.

    Every parameter carries the attributes ``sharding`` (its place in the global tensor), ``tower``
    (an index, or SHARED) and megatron's ``tensor_model_parallel``.
    """

    def __init__(
        self, config: Config, groups: ProcessGroups, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        model, training = config.model, config.training
        on_gpus = groups.device.type == "cuda"
        check_device(config, on_gpus)
        self.config = model
        self.groups = groups
        self.dtype = dtype
        self.sequence_parallel = config.parallel.sequence_parallel
        self.recompute_layers = training.recompute == "full"
        operations = layer_operations(model.layer_backend, on_gpus)
        linears = ParallelLinears(groups, self.sequence_parallel, dtype)
        self.pieces = pieces_of_stage(config, groups.pipeline_rank)
        self.towers = groups.towers_held(model.num_towers)
        self.routing = RoutingMode((1.0,) * model.num_towers)
        self.heads = self._head_slices(config.parallel.attention_exchange)
        if self.pieces[0].first:
            self._add_embedding(linears)
        self.layers = nn.ModuleDict(
            {
                str(index): Layer(
                    model,
                    linears,
                    index,
                    recompute_core=training.recompute == "selective",
                    routing=self.routing,
                    operations=operations,
                )
                for piece in self.pieces
                for index in piece.layers
            }
        )
        if self.pieces[-1].last:
            self._add_end(linears)
        for parameter in self.parameters():
            sharded = sharding_of(parameter).shard_dim is not None
            parameter.tensor_model_parallel = sharded  # type: ignore[attr-defined]
        initialize_parameters(
            self, config.run.seed, model.init_std, groups.tensor_rank, groups.tensor_size
        )
        self.to(dtype=dtype, device=groups.device)
        freeze_towers(self, model.frozen_towers)
        # Not a buffer: ``to`` would round it to the weights' dtype, while the divisor is exact.
        self.loss_weights = torch.tensor(
            model.loss_weights, dtype=torch.float32, device=groups.device
        )

    def _add_embedding(self, linears: ParallelLinears) -> None:
        rows, hidden = self.config.num_vocabulary_rows, self.config.hidden_size
        self.embedding = Embedding(rows, hidden, linears)
        mark_tower(self.embedding, SHARED)
        tied = not self.config.untie_embeddings_and_output_weights
        if tied and self.groups.pipeline_size > 1:
            self.embedding.lookup.weight.tied_across_stages = True  # type: ignore[attr-defined]

    def _add_end(self, linears: ParallelLinears) -> None:
        """Add the final norm and the head, and the tied embedding if this stage lacks it."""
        model = self.config
        rows, hidden, untied = model.num_vocabulary_rows, model.hidden_size, model.untied
        self.final_norm = PerTower(
            lambda _: RMSNorm(hidden, model.norm_eps, linears.partial_rows),
            self.towers,
            untied.final_norm,
        )
        own_weight = model.untie_embeddings_and_output_weights
        self.head = Head(rows, hidden, linears, own_weight)
        mark_tower(self.head, SHARED)
        if not own_weight and not self.pieces[0].first:
            self._add_embedding(linears)
            mark_replica(self.embedding)

    def _head_slices(self, exchange: Literal["sequence", "heads"]) -> HeadSlices:
        model, size = self.config, self.groups.tensor_size
        return HeadSlices.of(
            exchange,
            model.num_attention_heads // size,
            model.num_key_value_heads // size,
            self.groups.modality_size,
        )

    def forward(
        self, micro_batch: MicroBatch, cache: AttentionCore | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Compute the losses of a micro-batch, or with a cache its logits.

        Generation also calls ``forward``, because ZeRO-3 gathers weights only in forward.

        Args:
            micro_batch: The tokens, on the model's device.
            cache: The attention core to use while generating.

        Returns:
            The weighted sum of token losses (divide it by the global batch's weight before
            backward), and the detached sums of cross entropy in nats per modality, [M]. Both cover
            this data-parallel rank's tokens and are equal on its tensor-parallel ranks. With a
            cache, only ``sequence_logits``.
        """
        if cache is not None:
            return (self.sequence_logits(micro_batch, cache),)
        return self._losses(self.hidden_states(micro_batch), micro_batch)

    @contextmanager
    def routed_causally(self) -> Iterator[None]:
        """Route causally inside the context: causal routers choose, and no expert drops tokens.

        Without experts this changes nothing.

        Raises:
            ConfigError: A tower uses expert choice without a causal router.
        """
        check_can_be_causal(self.config)
        before, self.routing.causal = self.routing.causal, True
        try:
            yield
        finally:
            self.routing.causal = before

    @contextmanager
    def counting_experts(self) -> Iterator[dict[int, ExpertUse]]:
        """Count expert assignments per tower on this rank; towers without experts are absent."""
        self.routing.use = use = {}
        try:
            yield use
        finally:
            self.routing.use = None

    def run_piece(
        self,
        piece: Piece,
        micro_batch: MicroBatch,
        layer_inputs: LayerInputs,
        arrived: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """Run one piece of the pipeline.

        Args:
            piece: One of ``pieces``.
            micro_batch: The micro-batch, on the model's device; the same on all stages.
            layer_inputs: Its layer inputs; all pieces of a stage may share them.
            arrived: [g, h] (sequence parallel: [g / tp, h]), the output of the previous piece; None
                for the first piece.

        Returns:
            The stream [g, h] for the next piece; for the last piece, what ``forward`` returns.
        """
        stream = self._embed(micro_batch) if arrived is None else self._cut(arrived, micro_batch)
        stream = self._run_layers(piece.layers, stream, layer_inputs)
        return self._losses(stream, micro_batch) if piece.last else (torch.cat(stream),)

    def logits(self, micro_batch: MicroBatch, attend: AttentionCore | None = None) -> torch.Tensor:
        """Compute logits [g, V / tp] in grouped order (sequence parallel: rank-major order)."""
        return self._logits(self.hidden_states(micro_batch, attend))

    def _logits(self, stream: Stream) -> torch.Tensor:
        return self.head(torch.cat(self.final_norm(stream)), self._tied_weight())

    def _tied_weight(self) -> torch.Tensor | None:
        if self.config.untie_embeddings_and_output_weights:
            return None
        return self.embedding.lookup.weight

    def sequence_logits(
        self, micro_batch: MicroBatch, attend: AttentionCore | None = None
    ) -> torch.Tensor:
        """Compute logits [t, V / tp] in sequence order, without padding slots."""
        slots = torch.arange(sum(micro_batch.tower_slots), device=self.groups.device)
        slot_of_row = self._stream_order(slots, micro_batch)
        row_of_slot = torch.empty_like(slots).scatter_(0, slot_of_row, slots)
        rows = row_of_slot[micro_batch.ungroup_index]
        return self.logits(micro_batch, attend).index_select(0, rows)

    def hidden_states(self, micro_batch: MicroBatch, attend: AttentionCore | None = None) -> Stream:
        """Compute the stream after the last layer, before the final norm: K x [g_k, h]."""
        stream = self._embed(micro_batch)
        layer_inputs = self.layer_inputs(micro_batch, attend)
        return self._run_layers(range(self.config.num_layers), stream, layer_inputs)

    def _embed(self, micro_batch: MicroBatch) -> Stream:
        token_ids = self._stream_order(micro_batch.token_ids, micro_batch)
        return self._cut(self.embedding(token_ids), micro_batch)

    def _cut(self, rows: torch.Tensor, micro_batch: MicroBatch) -> Stream:
        """Split [g, h] into the slices of the towers that this rank holds."""
        divisor = self.groups.tensor_size if self.sequence_parallel else 1
        return rows.split([micro_batch.tower_slots[tower] // divisor for tower in self.towers])

    def layer_inputs(
        self, micro_batch: MicroBatch, attend: AttentionCore | None = None
    ) -> LayerInputs:
        """Build the layers' inputs for a micro-batch: row order, angles, attention core, pools."""
        model, group = self.config, self.groups.modality
        if group is None:
            grouping = Grouping.of(micro_batch)
        else:
            grouping = ModalityExchange.of(self.heads, self.towers, micro_batch, group)
        return LayerInputs(
            grouping,
            RotaryAngles.of(micro_batch.positions, model.head_dim, model.rotary_base, self.dtype),
            attend or build_attention_core(micro_batch, model.attention_backend),
            self._pools(micro_batch),
        )

    def _pools(self, micro_batch: MicroBatch) -> tuple[RoutingPool, ...]:
        filled, sequences = (
            self._cut(self._own_rows(values, micro_batch), micro_batch)
            for values in (micro_batch.filled, micro_batch.slot_sequences)
        )
        return routing_pools(self.towers, filled, sequences, micro_batch)

    def _run_layers(self, layers: range, stream: Stream, layer_inputs: LayerInputs) -> Stream:
        for index in layers:
            stream = run_layer(self.layers[str(index)], stream, layer_inputs, self.recompute_layers)
        return stream

    def _losses(self, stream: Stream, micro_batch: MicroBatch) -> tuple[torch.Tensor, ...]:
        labels = Labels(
            self._stream_order(micro_batch.labels, micro_batch),
            self._stream_order(micro_batch.label_modalities, micro_batch),
            sum(micro_batch.modality_labels),
        )
        weighting = Weighting(self.loss_weights, self.config.z_loss_coefficient)
        rows = torch.cat(self.final_norm(stream))
        return self.head.losses(rows, self._tied_weight(), labels, weighting)

    def _own_rows(self, values: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """Select from [g] in grouped order the entries of this rank's rows."""
        if not self.sequence_parallel:
            return values
        ordered, ranks = self._stream_order(values, micro_batch), self.groups.tensor_size
        return ordered.chunk(ranks)[self.groups.tensor_rank]

    def _stream_order(self, values: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        ranks = self.groups.tensor_size if self.sequence_parallel else 1
        return rank_major(values, micro_batch.tower_slots, ranks)
