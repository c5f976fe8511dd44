"""Small configurations, packed token batches and comparisons shared by the model tests."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mot_megatron.config import Config
from mot_megatron.config_files import parse_config
from mot_megatron.data.batches import build_micro_batch
from mot_megatron.model.micro_batch import MicroBatch
from mot_megatron.model.model import MixtureOfTransformers
from mot_megatron.model.routing import RoutingPool
from mot_megatron.model.sharding import ParameterSharding, sharding_of
from mot_megatron.parallel.groups import build_single_process_groups

VOCABULARY_RANGES = {"text": (0, 40), "image": (40, 100), "speech": (100, 128)}
"""First token id of every modality, and the id after its last."""

SMALL = """
[run]
name = "small"
[data]
corpus = "none"
[model]
num_layers = 2
hidden_size = 32
num_attention_heads = 4
ffn_hidden_size = 40
vocab_size = 128
init_std = 0.2
[training]
train_steps = 1
global_batch_size = 1
precision = "fp32"
[model.modalities]
"""


def small_config(towers: Mapping[str, str], *overrides: str) -> Config:
    """Return a two-layer configuration.

    ``towers`` maps modality to tower; overrides are ``section.key=value``.
    """
    modalities = "".join(f'{name} = {{ tower = "{tower}" }}\n' for name, tower in towers.items())
    return parse_config(SMALL + modalities, "small", list(overrides))


def single_rank_model(config: Config, dtype: torch.dtype = torch.float32) -> MixtureOfTransformers:
    """Build the model on a single rank, with norm weights that are not all ones."""
    model = MixtureOfTransformers(config, build_single_process_groups(torch.device("cpu")), dtype)
    vary_vectors(model)
    return model


def vary_vectors(model: MixtureOfTransformers) -> None:
    """Add noise to norm weights and biases, the same in every layout.

    If all were one or zero, swapped ones would go unnoticed.
    """
    ranks = model.groups.tensor_rank, model.groups.tensor_size
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            sharding = sharding_of(parameter)
            noise = torch.randn(sharding.global_shape, generator=generator)
            with torch.no_grad():
                parameter.add_(0.1 * cut(noise, sharding, *ranks))


@dataclass(frozen=True)
class Tokens:
    """A packed batch in sequence order, as the data pipeline passes it to grouping."""

    token_ids: np.ndarray
    """[b, s] int64."""
    document_ids: np.ndarray
    """[b, s] int32."""
    modality_of_id: np.ndarray
    """[vocabulary] int8."""

    @property
    def modalities(self) -> torch.Tensor:
        """Modality index of every token [t], in sequence order."""
        return torch.from_numpy(self.modality_of_id[self.token_ids].astype(np.int64)).flatten()

    @property
    def documents(self) -> torch.Tensor:
        """Document number of every token [t], unique over the sequences of the batch."""
        rows = np.arange(self.token_ids.shape[0])[:, None] * self.token_ids.shape[1]
        return torch.from_numpy(self.document_ids.astype(np.int64) + rows).flatten()

    def micro_batch(self, config: Config) -> MicroBatch:
        """Group the tokens by ``config``'s towers, padded for its sequence parallelism."""
        parallel = config.parallel
        return build_micro_batch(
            self.token_ids,
            self.document_ids,
            self.modality_of_id,
            config.model.towers_of_modalities,
            num_towers=config.model.num_towers,
            slot_multiple=(
                parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
            ),
        )


def modality_of_id(names: Sequence[str]) -> np.ndarray:
    """Return the modality index of every token id; ``names`` are in configuration order."""
    lookup = np.zeros(VOCABULARY_RANGES["speech"][1], dtype=np.int8)
    for index, name in enumerate(names):
        first, end = VOCABULARY_RANGES[name]
        lookup[first:end] = index
    return lookup


def random_tokens(
    seed: int, names: Sequence[str], mix: Sequence[float], shape: tuple[int, int] = (2, 24)
) -> Tokens:
    """Draw random documents of short runs of random modalities.

    Args:
        seed: Seed of all random numbers.
        names: Modalities of the configuration.
        mix: Relative frequency of each modality; with 0 it is absent.
        shape: [b, s].
    """
    random = np.random.default_rng(seed)
    size = shape[0] * shape[1]
    runs = random.choice(len(names), size=size, p=np.asarray(mix) / np.sum(mix))
    modality = np.repeat(runs, random.integers(1, 5, size))[:size]
    bounds = np.array([VOCABULARY_RANGES[name] for name in names])
    token_ids = random.integers(bounds[modality, 0], bounds[modality, 1]).reshape(shape)
    document_ids = np.cumsum(random.random(shape) < 0.15, axis=1)
    return Tokens(token_ids, document_ids.astype(np.int32), modality_of_id(names))


def take_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter's gradient by name, and clear the gradients of the model."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        gradients[name] = parameter.grad
        parameter.grad = None
    return gradients


def one_sequence(filled: torch.Tensor) -> RoutingPool:
    """Return the routing pool of one sequence on one rank, [n] bool."""
    sequences = torch.zeros(len(filled), dtype=torch.int64)
    return RoutingPool(filled, int(filled.sum()), sequences, num_sequences=1)


def assert_all_close(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float
) -> None:
    """Assert the same names and tensors close to ``tolerance``, in absolute and relative terms.

    The absolute tolerance is relative to the tensor's largest element where that exceeds 1: a small
    element that is a sum of large terms has their rounding error, which depends on the CPU.
    """
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=tolerance,
            atol=tolerance * max(1.0, value.detach().abs().max().item() if value.numel() else 0.0),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_all_equal(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Assert equal names and bitwise equal tensors."""
    assert actual.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert not different


def cut(whole: torch.Tensor, sharding: ParameterSharding, rank: int, size: int) -> torch.Tensor:
    """Return tensor-parallel rank ``rank``'s shard of a whole parameter or gradient."""
    if sharding.shard_dim is None:
        return whole
    part = whole.reshape(sharding.global_shape).chunk(size, sharding.shard_dim)[rank]
    return part.flatten(0, -2) if part.ndim > 1 else part
