"""Which rank of a parallel layout writes which part of a checkpoint's tensors.

The result is what the ranks of a training job would write: every rank holds its pipeline stage's
parameters of its towers, and of those that several ranks hold, each writes a share.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mot_megatron.checkpoint.names import STATE_KINDS
from mot_megatron.checkpoint.streaming import Piece, divide
from mot_megatron.config import Config, ParallelConfig
from mot_megatron.config_files import differing_keys, parse_config
from mot_megatron.config_section import Section
from mot_megatron.conversion.tensors import TensorInfo
from mot_megatron.errors import CheckpointError, ConfigError
from mot_megatron.model.inventory import HeldParameter, held_parameters
from mot_megatron.model.sharding import SHARED, ParameterSharding, name_of_expert
from mot_megatron.parallel.mesh import Mesh
from mot_megatron.parallel.placement import Placement
from mot_megatron.planning.memory import mesh_of
from mot_megatron.planning.placing import check_placed, place_towers, tokens_of_towers
from mot_megatron.rules import check_world_size


@dataclass(frozen=True)
class Layout:
    """A parallel layout of a model."""

    config: Config
    """Resolved configuration."""
    mesh: Mesh
    placement: Placement | None
    """Which ranks of a modality group hold which towers; None without modality parallelism."""

    @classmethod
    def of(cls, config: Config, world_size: int) -> Layout:
        """Return the layout of a resolved configuration on a number of ranks.

        Raises:
            ConfigError: They do not fit together.
            DataError: ``parallel.placement`` is "auto", and the corpus that decides it cannot be
                opened.
        """
        check_world_size(config, world_size)
        tokens: Sequence[int] = ()
        parallel = config.parallel
        if parallel.modality_parallel_size > 1 and parallel.placement == "auto":
            # Here, because it imports megatron-core, which takes as long as a GB of tensors.
            from mot_megatron.data.blend import open_training_data
            from mot_megatron.data.corpus import TRAIN_SPLIT

            split = open_training_data(config.data).description.splits[TRAIN_SPLIT]
            tokens = tokens_of_towers(config.model, split.tokens_per_modality)
        placement = place_towers(config, tokens)
        check_placed(config, placement, world_size)
        return cls(config, mesh_of(config, world_size), placement)

    def files(self, infos: Mapping[str, TensorInfo]) -> list[list[Piece]]:
        """Return the pieces that each rank writes, in the order of its file.

        Args:
            infos: The tensors of a checkpoint of this model.

        Raises:
            CheckpointError: They are those of another model.
        """
        kinds = [kind for kind in STATE_KINDS if any(name.startswith(f"{kind}/") for name in infos)]
        _check_model(self.config, infos, kinds)
        held = functools.cache(functools.partial(held_parameters, self.config))
        return divide(
            [
                [
                    _piece(f"{kind}/{name}", infos, sharding, self.mesh, rank)
                    for parameter in self._written(
                        rank, held(self.mesh.pipeline_rank(rank), self._towers(rank))
                    )
                    for kind in _kinds(parameter, kinds)
                    for name, sharding in self._parts(parameter, rank)
                ]
                for rank in range(self.mesh.world_size)
            ]
        )

    def _towers(self, rank: int) -> tuple[int, ...]:
        if self.placement is None:
            return tuple(range(self.config.model.num_towers))
        return self.placement.towers(self.mesh.modality_rank(rank))

    def _written(self, rank: int, held: Sequence[HeldParameter]) -> Iterator[HeldParameter]:
        """Yield the parameters that a rank writes: its turns among the ranks that hold each."""
        seen: Counter[tuple[tuple[int, ...], int]] = Counter()
        for parameter in held:
            if parameter.replica:
                continue
            position, size = self._holder(rank, parameter.tower)
            split = self._expert_size if parameter.experts else 1
            position, size = position // split, size // split
            owners = self._holders(parameter.tower), split
            if seen[owners] % size == position:
                yield parameter
            seen[owners] += 1

    def _holders(self, tower: int) -> tuple[int, ...]:
        """Return the ranks of a modality group that hold a tower."""
        if tower == SHARED or self.placement is None:
            return tuple(range(self.mesh.modality))
        return tuple(self.placement.holders(tower))

    def _holder(self, rank: int, tower: int) -> tuple[int, int]:
        """Return a rank's position among the ranks that hold the same of a tower; their number."""
        data_rank, data_size = self.mesh.data_rank(rank), self.mesh.data
        holders = self._holders(tower)
        group, within = divmod(data_rank, self.mesh.modality)
        position = group * len(holders) + holders.index(within)
        return position, data_size // self.mesh.modality * len(holders)

    @property
    def _expert_size(self) -> int:
        return self.config.parallel.expert_model_parallel_size

    def _parts(
        self, parameter: HeldParameter, rank: int
    ) -> Iterator[tuple[str, ParameterSharding]]:
        """Yield a parameter's name, or one per expert that the rank holds."""
        position, _ = self._holder(rank, parameter.tower)
        first = position % self._expert_size * parameter.experts
        yield from _names(parameter, first)


def _names(parameter: HeldParameter, first_expert: int) -> Iterator[tuple[str, ParameterSharding]]:
    if not parameter.experts:
        yield parameter.name, parameter.sharding
    for expert in range(first_expert, first_expert + parameter.experts):
        yield name_of_expert(parameter.name, expert), parameter.sharding


def _kinds(parameter: HeldParameter, kinds: Sequence[str]) -> Sequence[str]:
    """Return the kinds of tensors of a parameter; a frozen one has no moments."""
    return [kind for kind in kinds if kind == STATE_KINDS[0]] if parameter.frozen else kinds


def _piece(
    name: str, infos: Mapping[str, TensorInfo], sharding: ParameterSharding, mesh: Mesh, rank: int
) -> Piece:
    """Return a rank's tensor-parallel shard of a tensor."""
    info, split = infos[name], sharding.shard_dim
    if split is None or mesh.tensor == 1:
        return Piece.whole(name, info.shape, info.dtype)
    sizes = sharding.local_shape(mesh.tensor)
    offsets = [0] * len(sizes)
    offsets[split] = mesh.tensor_rank(rank) * sizes[split]
    return Piece(name, info.shape, info.dtype, tuple(offsets), sizes)


def _check_model(config: Config, infos: Mapping[str, TensorInfo], kinds: Sequence[str]) -> None:
    """Check that the tensors are exactly those of the model, of the right shapes."""
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    shapes = {
        f"{kind}/{name}": sharding.global_shape
        for parameter in held_parameters(alone, 0, range(config.model.num_towers))
        for name, sharding in _names(parameter, 0)
        for kind in _kinds(parameter, kinds or STATE_KINDS)
    }
    wrong = [f"it lacks {name}" for name in shapes if name not in infos]
    wrong += [f"{name} is not of this model" for name in infos if name not in shapes]
    wrong += [
        f"{name} has shape {list(infos[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in infos and infos[name].shape != shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"its tensors are not those of the model in its configuration: {wrong[0]}{more}"
        )


def layout_config(source: Config, wanted: Config) -> tuple[Config, list[str]]:
    """Return the configuration of ``source`` with the layout of ``wanted``.

    The layout is the section parallel, and training.micro_batch_size, whose product with it says
    which tokens experts choose among.

    Returns:
        The configuration, and the other keys in which ``wanted`` differs, which are not taken.

    Raises:
        ConfigError: They configure different models, or the result is illegal.
    """
    model = wanted.model
    names = list(source.model.modalities)
    if set(model.modalities) == set(names):
        model = model.model_copy(
            update={
                "modalities": {name: model.modalities[name] for name in names},
                "vocab_size": model.vocab_size or source.model.vocab_size,
            }
        )
    of_model = differing_keys(_tree(source.model), _tree(model))
    if of_model:
        key, (old, new) = next(iter(of_model.items()))
        more = f" (and {len(of_model) - 1} more keys)" if len(of_model) > 1 else ""
        raise ConfigError(
            f"model.{key} = {new!r} where the checkpoint has {old!r}{more}; a layout cannot change"
            " the model"
        )
    training = source.training.model_copy(
        update={"micro_batch_size": wanted.training.micro_batch_size}
    )
    config = source.model_copy(update={"parallel": wanted.parallel, "training": training})
    config = parse_config(config.to_toml(), "the checkpoint's configuration in this layout")
    complete = wanted.model_copy(update={"model": model})
    return config, list(differing_keys(_tree(config), _tree(complete)))


def describe_layout(config: Config) -> str:
    """Return the axes of a layout that are in use, in one line."""
    parallel = config.parallel
    axes = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "pieces per stage": parallel.virtual_pipeline_model_parallel_size or 1,
        "modality": parallel.modality_parallel_size,
        "expert": parallel.expert_model_parallel_size,
    }
    used = [f"{axis} {size}" for axis, size in axes.items() if size > 1]
    if parallel.pipeline_layers is not None:
        used.append(f"layers {list(parallel.pipeline_layers)}")
    if parallel.modality_parallel_size > 1:
        where = "auto" if parallel.placement == "auto" else "listed"
        used.append(f"placement {where}, exchange {parallel.attention_exchange}")
    return ", ".join([*used, f"ZeRO-{parallel.zero_stage}"])


def _tree(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude_none=True)
