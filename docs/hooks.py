"""The site's pages that are stored outside docs/, and links to files there (used by mkdocs.yml).

README.md becomes the front page. A link to a file of the repository that is no page of the site becomes the file's
name, so that every link of the site works offline; a link to a file that does not exist fails the build.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md"}  # page → its file; those below have the name that they have in the repository
PAGES |= {name: name for name in ("demo/README.md", "demo/LICENSES.md", "demo/card/README.md")}
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")

log = logging.getLogger(f"mkdocs.plugins.{__name__}")


def on_files(files: Files, config: Any) -> Files:
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
        for _, _, target, _ in LINK.findall((ROOT / source).read_text()):
            add_picture(files, config, posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
    return files


def add_picture(files: Files, config: Any, name: str) -> None:
    if name.endswith(".png") and not name.startswith("docs/") and (ROOT / name).is_file():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown: str, page: Any, files: Files, **ignored: Any) -> str:
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return "".join(
        part if part.startswith("```") else LINK.sub(lambda match: link(match, source, page, files), part)
        for part in FENCED.split(markdown)
    )


def link(match: re.Match[str], source: str, page: Any, files: Files) -> str:
    """The same link from the page's place in the site."""
    picture, text, target, anchor = match.groups()
    if "://" in target or target.startswith("mailto:"):
        return match[0]
    name = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if not (ROOT / name).exists():
        log.warning("%s links to %s, which does not exist", source, target)
        return match[0]
    of_file = {file: uri for uri, file in PAGES.items()}
    uri = of_file.get(name, name.removeprefix("docs/") if name.startswith("docs/") else name)
    file = files.get_file_from_path(uri)
    if file is None or file.inclusion.is_excluded():
        return text if text.strip("`") == name else f"{text} (`{name}`)"
    return f"{picture}[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''})"
