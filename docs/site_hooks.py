"""What mkdocs does to the pages beyond its configuration.

The pages are written to be read in the repository as well. Files at the top that are pages of the
site (CONTRIBUTING.md, CHANGELOG.md) are added from there, and links are turned into what they are
on the site: to a page, or, where they lead out of docs/, to the file's path in words.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
TOP_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Page of the site by the file in the repository."""
OTHER_PAGES = {"README.md": "index.md"}
"""Files that are no pages, by the page that takes their place."""

_CODE_BLOCK = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)"
)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages whose files are at the top of the repository."""
    for source, page in TOP_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    sources = {target: source for source, target in TOP_PAGES.items()}
    uri = page.file.src_uri
    source = sources.get(uri, f"docs/{uri}")

    def replace(match: re.Match[str]) -> str:
        return _site_link(match, source, uri)

    parts, end = [], 0
    for block in _CODE_BLOCK.finditer(markdown):
        parts += [_LINK.sub(replace, markdown[end : block.start()]), block.group()]
        end = block.end()
    return "".join([*parts, _LINK.sub(replace, markdown[end:])])


def _site_link(match: re.Match[str], source: str, uri: str) -> str:
    """Rewrite one link of the file ``source``, which is the page ``uri``."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
    page = {**TOP_PAGES, **OTHER_PAGES}.get(path)
    if page is None and path.startswith("docs/"):
        page = path.removeprefix("docs/")
    if page is None:
        # The text may name the path already.
        text = match["text"]
        return text if path in text else f"{text} (`{path}`)"
    target = posixpath.relpath(page, posixpath.dirname(uri) or ".")
    return f"{match['image']}[{match['text']}]({target}{match['anchor'] or ''})"
