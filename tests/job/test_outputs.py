"""Outputs whose readers go away, and characters that an encoding lacks."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = "from mot_megatron.job.outputs import protect_outputs; protect_outputs()\n"


def run(
    code: str, *python: str, shell: str = "", **environment: str
) -> subprocess.CompletedProcess:
    command = [sys.executable, *python, "-c", HEAD + code]
    if shell:
        command = ["bash", "-o", "pipefail", "-c", f'"$@" {shell}', "bash", *command]
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **environment}
    return subprocess.run(command, env=variables, capture_output=True, timeout=60)


@pytest.mark.parametrize("unbuffered", [(), ("-u",)])
def test_a_closed_pipe_is_the_null_device(unbuffered: tuple[str, ...]) -> None:
    code = """
import sys
for number in range(200_000):
    print(number)
print("all written", file=sys.stderr)
"""
    finished = run(code, *unbuffered, shell="| head -n 1")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == b"0\n"
    assert finished.stderr == b"all written\n"


def test_characters_that_an_encoding_lacks_are_replaced() -> None:
    code = r"print('a \u00fc \u4e2d \udcff b')"
    assert run(code, PYTHONIOENCODING="ascii").stdout == b"a ? ? ? b\n"
    finished = run(code, PYTHONIOENCODING="utf-8")
    assert finished.stdout.decode() == "a \u00fc \u4e2d ? b\n"


def test_other_streams_are_left_alone() -> None:
    code = """
import io, sys
sys.stdout = io.StringIO()
protect_outputs()
assert isinstance(sys.stdout, io.StringIO)
protect_outputs()
sys.stderr.write("still there")
"""
    assert run(code).stderr == b"still there"
