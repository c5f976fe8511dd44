"""Pipeline parallelism with megatron-core's 1F1B and interleaved schedules.

Every stage reads the same micro-batches from its own loader, so stages send each other only the
residual stream. Its number of rows varies between micro-batches. It is padded to the largest number
of any micro-batch of the step, which all stages know, so no shapes are sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import nn

from mot_megatron.config import Config
from mot_megatron.model.layer import LayerInputs
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.pieces import Piece
from mot_megatron.parallel.groups import ProcessGroups


class Pipeline:
    """The pipeline as seen by one stage."""

    def __init__(self, model: MixtureOfTransformers, config: Config, groups: ProcessGroups) -> None:
        """Wrap the pieces of ``model`` for megatron's schedules; no collectives."""
        self._groups = groups
        self._num_modalities = len(config.model.modalities)
        self.num_pieces = len(model.pieces)
        schedule_config = _schedule_config(config, groups)
        self._layer_inputs_by_batch: dict[int, LayerInputs] = {}
        self._pieces = [
            _PipelinePiece(
                model,
                piece,
                schedule_config,
                self._layer_inputs_by_batch,
                vp_stage=index if self.num_pieces > 1 else None,
            )
            for index, piece in enumerate(model.pieces)
        ]
        self._run = get_forward_backward_func(
            groups.pipeline_size, self.num_pieces if self.num_pieces > 1 else None
        )

    def forward_backward(self, micro_batches: Sequence[MicroBatch], divisor: float) -> torch.Tensor:
        """Run forward and backward on all micro-batches of a step.

        Accumulates the gradients of (sum of weighted token losses) / ``divisor``. Every stage must
        call this; stages exchange the residual stream and its gradient point to point.

        Returns:
            Sums of cross entropy in nats per modality over the micro-batches, [M]; zeros except on
            the last stage.
        """
        return self._execute(micro_batches, divisor, forward_only=False)

    def forward(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """Return the sums of ``forward_backward`` without computing gradients."""
        with torch.no_grad():
            return self._execute(micro_batches, 1.0, forward_only=True)

    def _execute(
        self, micro_batches: Sequence[MicroBatch], divisor: float, forward_only: bool
    ) -> torch.Tensor:
        device = self._groups.device
        # Drop leftovers of an interrupted step, since new batches may reuse their ids.
        self._layer_inputs_by_batch.clear()
        batches = [batch.to(device) for batch in micro_batches]
        rows = max(sum(batch.tower_slots) for batch in batches)
        # Messages must not be empty. Under sequence parallelism, megatron divides rows by the
        # tensor-parallel size.
        rows = max(rows, self._groups.tensor_size)
        # The interleaved schedule needs a multiple of the number of stages. Repeat the last
        # micro-batch, and drop the results of the repeats below.
        missing = -len(batches) % self._groups.pipeline_size if self.num_pieces > 1 else 0
        assert forward_only or not missing
        scheduled = batches + [batches[-1]] * missing
        for piece in self._pieces:
            piece.rows, piece.divisor = rows, divisor
        iterators: list[Iterator[MicroBatch]] = [iter(scheduled) for _ in self._pieces]
        outputs = self._run(
            forward_step_func=_forward_step,
            data_iterator=iterators,
            model=list(self._pieces),
            num_microbatches=len(scheduled),
            seq_length=rows,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        sums = torch.zeros(self._num_modalities, dtype=torch.float64, device=device)
        for modality_sums in outputs[: len(batches)]:
            sums += modality_sums
        return sums


class _PipelinePiece(nn.Module):
    """A piece in the form of a model that megatron's schedules expect; it owns no weights."""

    def __init__(
        self,
        model: MixtureOfTransformers,
        piece: Piece,
        config: TransformerConfig,
        layer_inputs_by_batch: dict[int, LayerInputs],
        *,
        vp_stage: int | None,
    ) -> None:
        super().__init__()
        # Bound methods, so that the model does not become a submodule.
        self._run_piece, self._make_layer_inputs = model.run_piece, model.layer_inputs
        self._last_here = piece is model.pieces[-1]
        # Shared by the pieces of a stage, since several of them process the same micro-batch.
        self._layer_inputs_by_batch = layer_inputs_by_batch
        self.piece = piece
        self.config = config
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.rows = 0
        """Rows of a message between stages, over all tensor-parallel ranks."""
        self.divisor = 1.0
        self._arrived: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        """Receive the output of the previous piece; the schedule calls this per micro-batch."""
        (self._arrived,) = tensors

    def forward(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, ...]:
        """Return the message [rows, 1, h] for the next piece; the last returns (loss, sums)."""
        divisor = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        used = sum(micro_batch.tower_slots) // divisor
        arrived = None if self.piece.first else self._arrived
        if arrived is not None:
            arrived = arrived[:used, 0]
        outputs = self._run_piece(self.piece, micro_batch, self._layer_inputs(micro_batch), arrived)
        if self.piece.last:
            loss, modality_sums = outputs
            return loss / self.divisor, modality_sums
        # Pad even by 0 rows: megatron frees the sent tensor, which therefore must not be a view.
        padding = self.rows // divisor - used
        message = nn.functional.pad(outputs[0][:, None], (0, 0, 0, 0, 0, padding))
        assert message._base is None
        return (message,)

    def _layer_inputs(self, micro_batch: MicroBatch) -> LayerInputs:
        """Return the layer inputs, built once per micro-batch and stage."""
        layer_inputs = self._layer_inputs_by_batch.pop(
            id(micro_batch), None
        ) or self._make_layer_inputs(micro_batch)
        if not self._last_here:
            self._layer_inputs_by_batch[id(micro_batch)] = layer_inputs
        return layer_inputs


def _forward_step(iterator: Iterator[MicroBatch], piece: _PipelinePiece) -> tuple[Any, Any]:
    outputs = piece(next(iterator))
    if not piece.piece.last:
        return outputs[0], None
    loss, modality_sums = outputs
    # With three values and calculate_per_token_loss, megatron does not rescale the loss.
    no_tokens = torch.zeros((), dtype=torch.int, device=loss.device)
    return loss, lambda loss: (loss, no_tokens, modality_sums)


def _schedule_config(config: Config, groups: ProcessGroups) -> TransformerConfig:
    """Return the configuration that the schedules read; no layer is built from it."""
    model, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    on_gpu = groups.device.type == "cuda"
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        tensor_model_parallel_size=groups.tensor_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=groups.pipeline_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        overlap_p2p_comm=interleaved,
        # gloo has no batched sends, and sent tensors must not be freed before it has read them.
        batch_p2p_comm=on_gpu and not interleaved,
        batch_p2p_sync=False,  # a workaround for torch before 1.12 that waits for the device
        deallocate_pipeline_outputs=on_gpu,
    )
