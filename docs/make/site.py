"""What mkdocs does beside its own: pages of the repository outside docs/ are pages of the site, and links reach them.

A link from docs/ is relative in the repository, as in ../benchmarks/plan.md. Pages that are named so are built, too, at
the same place below the site; other files (code, manifests) are not part of it, and stand there as code without a link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$|`[^`\n]*`(?!\]))", re.M | re.S)
_OUTSIDE = ["CONTRIBUTING.md", "CHANGELOG.md", "cluster/manifests/README.md", "benchmarks/*.md"]
"""Pages that are built beside those of docs/."""


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages outside docs/, which stand in no menu."""
    for pattern in _OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = _site_name(path.relative_to(ROOT).as_posix())
            added = File.generated(config, name, content=path.read_text(encoding="utf-8"))
            added.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as the site has them."""
    here = page.file.src_uri
    parts = _FENCE.split(markdown)
    return "".join(part if number % 2 else _relinked(part, here, files) for number, part in enumerate(parts))


def _relinked(text: str, here: str, files: Files) -> str:
    def link(found: re.Match[str]) -> str:
        words, path, anchor = found[1], found[2], found[3] or ""
        if not path or "://" in path:
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(_repository_name(here)), path))
        name = _site_name(target)
        if files.get_file_from_path(name) is not None:
            return f"[{words}]({posixpath.relpath(name, posixpath.dirname(here) or '.')}{anchor})"
        if (ROOT / target).exists() and not target.startswith("docs/"):
            return f"{words} (`{target}`)" if words.strip("`") not in target else f"`{target}`"
        return found[0]

    return _LINK.sub(link, text)


def _repository_name(name: str) -> str:
    """Where a page of the site lies in the repository."""
    outside = name.startswith(("benchmarks/", "cluster/")) or name in {"CHANGELOG.md", "CONTRIBUTING-whole.md"}
    return name.replace("CONTRIBUTING-whole", "CONTRIBUTING") if outside else f"docs/{name}"


def _site_name(path: str) -> str:
    """What a file of the repository is called in the site. docs/contributing.md is there already."""
    return path.removeprefix("docs/").replace("CONTRIBUTING.md", "CONTRIBUTING-whole.md")
