"""Host files and SLURM jobs: machines, launchers and one-line errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from mot_megatron.errors import ConfigError
from mot_megatron.job.hosts import Hosts, hosts_of_slurm, read_hostfile

FOUR = Hosts(("a", "b", "c", "d"), 8)


def test_a_job_takes_the_first_machines(tmp_path: Path) -> None:
    path = tmp_path / "job.hosts"
    words = FOUR.command(16, 29500, path)
    assert path.read_text() == "a slots=8\nb slots=8\n"
    assert words[-6:] == ["--hostfile", str(path), "--master_addr", "a", "--master_port", "29500"]
    FOUR.command(2, 29500, path)
    assert path.read_text() == "a slots=2\n"


def test_slurm_starts_a_launcher_on_each_machine(tmp_path: Path) -> None:
    slurm = Hosts(FOUR.names, 8, by_slurm=True)
    words = slurm.command(24, 29500, tmp_path / "a b.hosts")
    assert words[0] == "srun"
    assert "--nodes=3" in words
    assert "--nodelist=a,b,c" in words
    assert words[-1] == "launcher"
    assert f"'{tmp_path / 'a b.hosts'}'" in words[-2]
    assert words[-2].endswith('--no_ssh --node_rank "$SLURM_NODEID" "$@"')


@pytest.mark.parametrize("size", [1, 8, 16, 32])
def test_whole_machines_are_legal(size: int) -> None:
    FOUR.check(size)


@pytest.mark.parametrize("size", [12, 33, 40])
def test_other_numbers_of_ranks_are_not(size: int) -> None:
    with pytest.raises(ConfigError, match=r"up to 8, or a multiple of it up to 32"):
        FOUR.check(size)


def test_a_host_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# comment\n\nnode-a slots=8\nnode-b  slots=8  # the second\n")
    assert read_hostfile(path) == Hosts(("node-a", "node-b"), 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no host in it"),
        ("a", "line 1: 'a': expected NAME slots=N"),
        ("a slots=0", "expected NAME slots=N"),
        ("a slots=2\na slots=2", "line 2: 'a slots=2': expected NAME slots=N, once each"),
        ("a slots=2\nb slots=4", "different numbers of slots"),
    ],
)
def test_bad_host_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_hostfile(tmp_path / "absent")


def test_outside_of_slurm_is_one_line() -> None:
    with pytest.raises(ConfigError, match="run this inside of a SLURM job"):
        hosts_of_slurm({})
    with pytest.raises(ConfigError, match="set RANKS_PER_NODE"):
        hosts_of_slurm({"SLURM_JOB_NODELIST": "a"})
