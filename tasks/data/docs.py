"""Great Expectations' data docs as one page that asks no other host.

GX's own site takes its style, its tables and its scripts from public hosts and fills its index by JavaScript: where
there is no way out nothing can be read. Its result pages are kept as they are worded; of their markup only what a
list of allowed tags names goes into a page of ours. Charts, which scripts would draw, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tasks.data.page import render
from tasks.spec.errors import DrydockError
from tasks.store.files import write_whole

# Kept without any attribute but those below, so that nothing can refer anywhere, whatever the data hold.
KEPT = {
    *("div", "p", "span", "strong", "b", "em", "code", "pre", "ul", "ol", "li", "h4", "h5", "h6", "br", "hr"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
SPANS = ("colspan", "rowspan")
# With all that is in them: what acts, what opens by a click, and what is for the screen only.
DROPPED = {"script", "style", "head", "nav", "button", "form", "svg", "iframe", "object", "video", "template"}
VOID = {"br", "hr", "img", "input", "link", "meta", "source", "wbr", "col", "embed", "area", "base", "track", "param"}
SIGNS = {"fa-check-circle": "✔", "fa-times": "✘", "fa-exclamation-triangle": "!"}
SECTION = "ge-section"


def write_docs(site: Path, results: Mapping[str, Any], docs: Path) -> None:
    """Write ``index.html`` into the folder ``docs``: a chapter for each suite of ``results``, from GX's site.

    Raises:
        DrydockError: GX's site has no page of a suite's result.
    """
    chapters = []
    for name, result in results.items():
        # A dot is a folder to GX, and suite w.more lies in w's: so the depth is told.
        pages = sorted((site / "validations").joinpath(*name.split(".")).glob("__none__/*/*.html"))
        if not pages:
            raise DrydockError(f"Great Expectations made no page of suite {name}'s result")
        met = sum(item["success"] is True for item in result["results"])
        facts = {"name": name, "met": met, "all": len(result["results"])}
        chapters.append(facts | {"html": sections_of(pages[-1].read_text(encoding="utf-8"))})
    write_whole(docs / "index.html", render("docs.html.j2", chapters=chapters))


def sections_of(page: str) -> str:
    """Return the sections of one of GX's result pages as plain HTML without a reference, a script or a style."""
    reader = _Sections()
    reader.feed(page)
    reader.close()
    return "".join(reader.parts)


class _Sections(HTMLParser):
    """Copies what lies in a section; ``open`` holds the tags around and whether each one is written."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []
        self.inside = 0
        self.dropped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        classes = given.get("class", "").split()
        if self.inside and not self.dropped:
            self.parts += [sign for name, sign in SIGNS.items() if name in classes]
        if tag in VOID:
            if self._writes(tag):
                self.parts.append(f"<{tag}>")
            return
        self.inside += self.inside > 0 or SECTION in classes
        self.dropped += self.dropped > 0 or tag in DROPPED or (tag == "a" and "data-toggle" in given)
        written = self._writes(tag)
        self.open.append((tag, written))
        if written:
            kept = "".join(f' {name}="{int(given[name])}"' for name in SPANS if given.get(name, "").isdigit())
            self.parts.append(f"<{tag}{kept}>")

    def handle_endtag(self, tag: str) -> None:
        if tag not in (name for name, _ in self.open):
            return
        while True:
            name, written = self.open.pop()
            self.inside, self.dropped = max(0, self.inside - 1), max(0, self.dropped - 1)
            if written:
                self.parts.append(f"</{name}>")
            if name == tag:
                return

    def handle_data(self, data: str) -> None:
        if self.inside and not self.dropped and (data.strip() or (self.parts and not self.parts[-1].isspace())):
            self.parts.append(escape(data) if data.strip() else " ")

    def _writes(self, tag: str) -> bool:
        return bool(self.inside) and not self.dropped and tag in KEPT
