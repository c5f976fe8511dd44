"""``mot benchmark documents``: every kind is timed, and the codec takes a part of the whole."""

from __future__ import annotations

import json

import pytest

from mot_megatron.cli import benchmark_documents


def test_every_kind_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--documents", "12", "--repeats", "2"]
    assert benchmark_documents.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["kinds"]) == ["text", "image", "speech"]
    for rates in result["kinds"].values():
        for spread in rates.values():
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        whole, codec = rates["documents_per_second"], rates["codec_documents_per_second"]
        assert codec["high"] > whole["low"]
    # A sound of 2 s at 22,050 Hz in 16 bits, by the documents and bytes per second.
    speech = result["kinds"]["speech"]
    size = 1e6 * speech["megabytes_per_second"]["high"] / speech["documents_per_second"]["high"]
    assert size == pytest.approx(88_200, rel=0.01)


def test_the_table_has_a_line_per_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_documents.main(["--documents", "8", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["text", "image", "speech"]
    assert max(map(len, lines[:4])) <= 120
