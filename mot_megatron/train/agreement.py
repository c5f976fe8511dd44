"""Check that all ranks were started with the same configuration, corpus and packages."""

from __future__ import annotations

import hashlib
import json
import socket
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mot_megatron.config import Config
from mot_megatron.config_files import differing_keys
from mot_megatron.data.corpus import DESCRIPTION_FILE, Corpus
from mot_megatron.errors import ConfigError
from mot_megatron.parallel.gather import values_of_all_ranks

_PACKAGES = ("mot_megatron", "torch", "megatron-core", "deepspeed")


def check_ranks_agree(config: Config, corpus: Corpus | None) -> None:
    """Compare what this rank was started with to the other ranks.

    Ranks that differ would train on without an error, on other data or with another learning rate,
    or wait for each other forever. The path of the corpus may differ between nodes if its content
    does not.

    Collectives: one all-gather of a digest over the world, and one of all values if they differ.

    Args:
        config: Resolved configuration of this rank.
        corpus: The corpus that it names, opened on this rank; None for synthetic batches.

    Raises:
        ConfigError: Two ranks differ; raised on every rank, with the first difference.
        DataError: A codebook of the corpus cannot be read on this rank.
    """
    mine = {
        "host": socket.gethostname(),
        # Nested one level down, since differing_keys ignores the section "run" at the top.
        "values": {"": _values(config, corpus)},
    }
    digest = hashlib.sha256(json.dumps(mine["values"], sort_keys=True).encode()).hexdigest()
    digests = values_of_all_ranks(digest)
    if len(set(digests)) == 1:
        return
    everyone = values_of_all_ranks(mine)
    rank = next(rank for rank, other in enumerate(digests) if other != digests[0])
    differences = differing_keys(everyone[0]["values"], everyone[rank]["values"])
    key, (first, second) = next(iter(differences.items()))
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    raise ConfigError(
        f"{key.removeprefix('.')} is {_show(first)} on rank 0 (host {everyone[0]['host']}) and"
        f" {_show(second)} on rank {rank} (host {everyone[rank]['host']}){more}; start all ranks"
        " with the same command, files and packages"
    )


def _values(config: Config, corpus: Corpus | None) -> dict[str, Any]:
    values = json.loads(config.model_dump_json())
    # Folders may differ between nodes.
    for table in (values["data"], *values["data"]["sources"]):
        del table["corpus"]
    values["version"] = package_versions()
    if corpus is not None:
        values[f"sha256 of {DESCRIPTION_FILE} of the corpus"] = corpus.fingerprint
        values["sha256 of the corpus' vocabulary and codebooks"] = corpus.vocabulary_digest
    return values


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that determine the training, by name."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _show(value: object) -> str:
    return "absent" if value is None else f"{value!r}"
