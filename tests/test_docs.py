"""The documentation is correct: links resolve, paths exist, command lines parse, examples run.

The tests collect what they check from the pages, so new pages are checked automatically.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mot_megatron.config import Config
from mot_megatron.config_files import load_config

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "configs").rglob("*.md")),
]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMPILED_ONLY = "<!-- compiled only -->"
"""Marker on the line before a Python block that is compiled but not executed."""
FOLDERS = ("mot_megatron", "tests", "tools", "launch", "configs", "docs")
"""Top-level folders; a path that begins with one of them belongs to the repository."""

_FENCE = re.compile(
    r"(?P<before>[^\n]*)\n(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_SPAN = re.compile(r"`([^`\n]+)`")
_PLACEHOLDER = re.compile(r"\.\.\.|\bmine\b|(?!README|CONTRIBUTING|CHANGELOG)(?<![A-Z])[A-Z]{2,}")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    number: int
    language: str
    before: str
    """The line before the block."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}[{self.number}]"


@dataclass(frozen=True)
class Command:
    """A command line on a page that starts a program of this repository."""

    page: str
    line: str
    program: str
    """"tools/NAME.py", "launch/train.py" or "mot"."""
    arguments: tuple[str, ...]
    whole: bool
    """Whether the command is complete; one within a sentence may omit required options."""

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """Return the page without its fenced blocks."""
    return _FENCE.sub(r"\g<before>\n", "\n" + read(page))


def blocks(*languages: str) -> list[Block]:
    """Return all blocks of all pages that are in one of ``languages``."""
    return [
        Block(name_of(page), number, match["language"], match["before"].strip(), match["text"])
        for page in PAGES
        for number, match in enumerate(_FENCE.finditer("\n" + read(page)))
        if match["language"] in languages
    ]


def heading_anchors(page: Path) -> set[str]:
    """Return the anchors that are the same on GitHub and on the documentation site."""
    headings = re.findall(r"^#{1,6} (.+?)\s*$", prose(page), re.MULTILINE)
    return set(map(on_github, headings)) & set(map(on_the_site, headings))


def on_github(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def on_the_site(heading: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def commands() -> list[Command]:
    """Return the command lines in blocks and in sentences."""
    found = []
    for block in blocks("", "bash", "sh", "shell", "console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            found += parse_line(block.page, line.strip(), whole=True)
    for page in PAGES:
        for span in _SPAN.findall(re.sub(r"\n *", " ", prose(page))):
            found += parse_line(name_of(page), span, whole=False)
    return list(dict.fromkeys(found))


def parse_line(page: str, line: str, whole: bool) -> Iterator[Command]:
    """Yield the command if the line starts a program of this repository."""
    if not re.match(r"(?:\w+=\S* )*(?:python|mot|deepspeed|torchrun|sbatch) ", line):
        return
    if "..." in line:
        return
    words = shlex.split(line, comments=True)
    end = next((at for at, word in enumerate(words) if re.fullmatch(r"[|&;<>]+", word)), len(words))
    words = [word.rstrip(";") for word in words[:end]]
    for at, word in enumerate(words):
        program = "launch/train.py" if word == "launch/slurm.sbatch" else word
        if re.fullmatch(r"tools/\w+\.py|launch/train\.py|mot", program):
            # Replace placeholders in capitals by 1, because most of them are numbers.
            arguments = tuple(re.sub(r"^[A-Z][A-Z_]*$", "1", word) for word in words[at + 1 :])
            yield Command(page, line, program, arguments, whole)
            return


class ParsedError(Exception):
    """Raised after arguments are parsed, so that the program does not run."""


def entry_point(program: str) -> Any:
    """Return the main function of a program."""
    if program == "mot":
        return pkgutil.resolve_name(PYPROJECT["project"]["scripts"]["mot"])
    return importlib.import_module(program.removesuffix(".py").replace("/", ".")).main


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_resolve(page: Path) -> None:
    broken = []
    for match in _LINK.finditer(re.sub(r"`[^`\n]*`(?!\])", "", prose(page))):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in heading_anchors(file)):
            broken.append(match["target"])
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_paths_exist(page: Path) -> None:
    roots = (ROOT, ROOT / "mot_megatron", page.parent)
    missing = []
    for span in _SPAN.findall(prose(page)):
        is_path = re.fullmatch(r"[\w.*-]+(/[\w.*-]+)+/?", span)
        is_ours = span.split("/")[0] in FOLDERS or span.endswith((".py", ".cpp"))
        if not is_path or not is_ours or _PLACEHOLDER.search(span):
            continue
        if not any(any(root.glob(span.rstrip("/"))) for root in roots):
            missing.append(span)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_modules_exist(page: Path) -> None:
    for span in _SPAN.findall(prose(page)):
        if re.fullmatch(r"mot_megatron(\.\w+)+", span):
            pkgutil.resolve_name(span)


def test_commands_are_found():
    programs = {command.program for command in commands()}
    assert {"launch/train.py", "mot"} <= programs


@pytest.mark.parametrize("command", commands(), ids=str)
def test_command_lines_parse(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = entry_point(command.program)
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(*arguments: Any, **named: Any) -> None:
        parse_args(*arguments, **named)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [command.program, *command.arguments])
    try:
        status = main()
    except ParsedError:
        status = 0
    except SystemExit as ended:  # argparse, for --help and for errors
        status = ended.code
    printed = capsys.readouterr().err
    incomplete = not command.whole and "arguments are required" in printed
    assert status == 0 or incomplete, printed


@pytest.mark.parametrize("block", blocks("bash", "sh", "shell"), ids=str)
def test_shell_blocks_parse(block: Block) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_blocks_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(block.text, str(block), "exec")
    if block.before != COMPILED_ONLY:
        monkeypatch.chdir(tmp_path)
        exec(code, {"__name__": "example"})


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_blocks_are_legal(block: Block, tmp_path: Path) -> None:
    tree = tomllib.loads(block.text)
    if set(tree) <= set(Config.model_fields):
        # Pages show parts of configurations; the quickstart supplies the other keys.
        part = tmp_path / "part.toml"
        part.write_text(block.text, encoding="utf-8")
        blended = "sources" in tree.get("data", {})
        unset = ["-data.corpus"] if blended else []
        load_config([ROOT / "configs" / "quickstart.toml", part], unset)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_configurations_load(path: Path) -> None:
    assert load_config(path).run.name == path.stem


def test_packages_in_the_architecture_page_equal_the_import_contract():
    contract = next(
        contract
        for contract in PYPROJECT["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    layers = [
        {package.strip().removeprefix("mot_megatron.") for package in layer.split("|")}
        for layer in contract["layers"]
    ]
    section = read(ROOT / "docs" / "architecture.md").partition("## Packages")[2]
    rows = [
        set(_SPAN.findall(line.split("|")[1]))
        for line in section.partition("\n## ")[0].splitlines()
        if line.startswith("| `")
    ]
    assert [row for row in rows if row in layers] == layers


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install -r requirements-docs.txt")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert built.returncode == 0, built.stderr
    # Pages must not load scripts, images or style sheets from other sites.
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r"<(script|img|link)[^>]*(src|href)=\"?https?:", read(page)), page
