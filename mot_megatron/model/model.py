"""The Mixture-of-Transformers: shared embedding and head around layers of untied towers.

Letters as in layer.py; M modalities, V vocabulary rows, g grouped slots of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import nn

from mot_megatron.config import Config
from mot_megatron.model.attention_core import AttentionCore, build_attention_core
from mot_megatron.model.exchange import HeadSlices, ModalityExchange
from mot_megatron.model.grouping import Grouping, rank_major
from mot_megatron.model.initialization import initialize_parameters
from mot_megatron.model.layer import Layer, LayerInputs, Stream, run_layer
from mot_megatron.model.micro_batch import LatentRows, MicroBatch, TokenRows
from mot_megatron.model.norm import RMSNorm
from mot_megatron.model.objectives.denoising import Denoising
from mot_megatron.model.objectives.next_token import NextToken
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
    freeze_towers,
    mark_replica,
    mark_tower,
    sharding_of,
)
from mot_megatron.model.towers import ParallelLinears, PerTower
from mot_megatron.parallel.groups import ProcessGroups
from mot_megatron.rules import check_device


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
        self.objective = NextToken.of(model)
        self.denoising = Denoising.all_of(model)
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
            self.latent_entries = self._modules_of_vectors(lambda each: each.entry(linears))
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

    def _modules_of_vectors(self, build: Callable[[Denoising], nn.Module]) -> nn.ModuleDict:
        """Build a module per modality of vectors, which its tower owns."""
        modules = nn.ModuleDict({name: build(each) for name, each in self.denoising.items()})
        for name, module in modules.items():
            mark_tower(module, self.config.towers_of_modalities[self.denoising[name].modality])
        return modules

    def _add_embedding(self, linears: ParallelLinears) -> None:
        self.embedding = self.objective.entry(linears)
        mark_tower(self.embedding, SHARED)
        if self.objective.tied and self.groups.pipeline_size > 1:
            self.embedding.lookup.weight.tied_across_stages = True  # type: ignore[attr-defined]

    def _add_end(self, linears: ParallelLinears) -> None:
        """Add the final norm and the head, and the tied embedding if this stage lacks it."""
        model = self.config
        self.final_norm = PerTower(
            lambda _: RMSNorm(model.hidden_size, model.norm_eps, linears.partial_rows),
            self.towers,
            model.untied.final_norm,
        )
        self.head = self.objective.exit(linears)
        mark_tower(self.head, SHARED)
        self.latent_exits = self._modules_of_vectors(lambda each: each.exit(linears))
        if self.objective.tied and not self.pieces[0].first:
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
        return self.embedding.lookup.weight if self.objective.tied else None

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
        rows = self.embedding(self._stream_order(micro_batch.token_ids, micro_batch))
        entries = zip(self.latent_entries.values(), micro_batch.latents, strict=True)
        for entry, latents in entries:
            rows = self._overwrite(rows, entry(latents), self._places(latents, micro_batch))
        return self._cut(rows, micro_batch)

    def _overwrite(
        self, rows: torch.Tensor, others: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Replace rows of the stream by ``others`` [n, h], which all ranks have, at ``places``."""
        if not self.sequence_parallel:
            return rows.index_copy(0, places, others)
        ranks, group = self.groups.tensor_size, self.groups.tensor
        whole = others.new_zeros(len(rows) * ranks, others.shape[1]).index_copy(0, places, others)
        is_other = torch.zeros(len(whole), dtype=torch.bool, device=whole.device)
        own = is_other.index_fill(0, places, True).chunk(ranks)[self.groups.tensor_rank]
        return torch.where(
            own[:, None], scatter_to_sequence_parallel_region(whole, group=group), rows
        )

    def _places(self, latents: LatentRows, micro_batch: MicroBatch) -> torch.Tensor:
        """Return where slots are in the order of the stream that ranks gather, [n]."""
        slots = torch.arange(sum(micro_batch.tower_slots), device=self.groups.device)
        slot_of_row = self._stream_order(slots, micro_batch)
        row_of_slot = torch.empty_like(slots).scatter_(0, slot_of_row, slots)
        return row_of_slot[latents.slots]

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
        rows = TokenRows(
            self._stream_order(micro_batch.labels, micro_batch),
            self._stream_order(micro_batch.label_modalities, micro_batch),
            micro_batch.num_token_labels,
        )
        x = torch.cat(self.final_norm(stream))
        total, sums = self.head.losses(x, rows, self.loss_weights, self._tied_weight())
        exits = zip(self.latent_exits.values(), micro_batch.latents, strict=True)
        for leave, latents in exits:
            whole = x
            if self.sequence_parallel:
                # All ranks compute the same errors, so their gradients are complete, not parts.
                whole = gather_from_sequence_parallel_region(
                    x, tensor_parallel_output_grad=False, group=self.groups.tensor
                )
            its = whole.index_select(0, self._places(latents, micro_batch))
            error, its_sums = leave(its, latents, self.loss_weights)
            total, sums = total + error, sums + its_sums
        return total, sums

    def _own_rows(self, values: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """Select from [g] in grouped order the entries of this rank's rows."""
        if not self.sequence_parallel:
            return values
        ordered, ranks = self._stream_order(values, micro_batch), self.groups.tensor_size
        return ordered.chunk(ranks)[self.groups.tensor_rank]

    def _stream_order(self, values: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        ranks = self.groups.tensor_size if self.sequence_parallel else 1
        return rank_major(values, micro_batch.tower_slots, ranks)
