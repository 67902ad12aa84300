"""HTML from text, tables and pictures. Whatever text is given is escaped; nothing comes from elsewhere."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

# The colours of text and lines follow the reader's device; pictures are drawn on white, and lie on a white card.
STYLE = """
:root { color-scheme: light dark; --ink: #222; --dim: #555; --paper: #fff; --stripe: #f4f4f4; --line: #bbb;
  --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --dim: #aaa; --paper: #1b1b1d; --stripe: #28282b; --line: #555; --link: #8ab8f0; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper); overflow-wrap: break-word; }
a { color: var(--link); }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
section section { margin-top: 2.5rem; }
p, li { max-width: 50rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figure { margin: 1.5rem 0; overflow-x: auto; } figcaption { color: var(--dim); max-width: 50rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.pictures figure { flex: 0 1 auto; max-width: 100%; margin: 1rem 0; }
.pictures figcaption { contain: inline-size; font-size: 0.9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.92em; }
th, td { padding: 0.25rem 0.7rem; text-align: right; }
td { white-space: nowrap; } td:first-child { white-space: normal; min-width: 12rem; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid var(--ink); vertical-align: bottom; }
tr:nth-child(even) td { background: var(--stripe); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1.2rem; max-width: 60rem; }
dt { color: var(--dim); } dd { margin: 0; }
pre { overflow-x: auto; background: var(--stripe); padding: 0.8rem; font-size: 0.85rem; line-height: 1.35; }
.note { border-left: 3px solid var(--line); padding-left: 0.8rem; color: var(--dim); }
nav ul { padding-left: 1.2rem; } nav ul ul { columns: 18rem; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; } th, td { padding: 0.25rem 0.45rem; } dl { grid-template-columns: 1fr; }
  td:first-child { min-width: 7rem; }
  dd { margin-bottom: 0.4rem; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --dim: #444; --paper: #fff; --stripe: #f4f4f4; --line: #bbb; --link: #000; }
  body { max-width: none; margin: 0; } figure, tr, .note { break-inside: avoid; } h2, h3, h4 { break-after: avoid; }
  .scroll, figure, pre { overflow: visible; } pre { white-space: pre-wrap; }
}
"""
ALONE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""The policy of a page that holds all that it shows: a browser fetches nothing for it, and runs nothing."""


def write(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page of parts, which the functions below make."""
    path.write_text(document(title, parts), encoding="utf-8")


def document(title: str, parts: Iterable[str], *, policy: str | None = None) -> str:
    """A page of parts, maybe with a content security policy."""
    head = ['<meta charset="utf-8">']
    head += (
        [] if policy is None else [f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">']
    )
    head += ['<meta name="viewport" content="width=device-width, initial-scale=1">']
    head += [f"<title>{text(title)}</title>", f"<style>{STYLE}</style>"]
    body = "\n".join([f"<h1>{text(title)}</h1>", *parts])
    top = "\n".join(head)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{top}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def text(value: Any) -> str:
    """A text as HTML: escaped, and without letters that are not printed (such as those that turn its direction)."""
    return escape(
        "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in str(value))
    )


def heading(title: str, level: int = 2) -> str:
    return f"<h{level}>{text(title)}</h{level}>"


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def note(words: str) -> str:
    """A remark, such as on what is missing and why."""
    return f'<p class="note">{text(words)}</p>'


def preformatted(words: str) -> str:
    return f"<pre>{text(words)}</pre>"


def items(lines: Iterable[str]) -> str:
    """A list of lines; none of no lines."""
    inside = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<ul>{inside}</ul>" if inside else ""


def facts(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and their values."""
    return "<dl>" + "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in rows) + "</dl>"


def section(key: str, title: str, parts: Iterable[str], level: int = 2) -> str:
    """A part of the page that :func:`contents` can lead to; ``key`` is letters, digits and hyphens."""
    return "\n".join(
        [f'<section id="{escape(key)}">', heading(title, level), *filter(None, parts), "</section>"]
    )


def contents(entries: Iterable[tuple[str, str, Sequence[tuple[str, str]]]]) -> str:
    """A table of contents: keys and titles of sections, each with those of the sections in it."""

    def item(key: str, title: str, inner: Sequence[tuple[str, str]] = ()) -> str:
        below = "".join(item(*entry) for entry in inner)
        return f'<li><a href="#{escape(key)}">{text(title)}</a>{f"<ul>{below}</ul>" if below else ""}</li>'

    return '<nav aria-label="Contents"><ul>' + "".join(item(*entry) for entry in entries) + "</ul></nav>"


def table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """A table of rows; numbers are rounded to three places.

    Args:
        rows: by column.
        columns: those to show, in this order; None for all.
        links: keys of the sections that texts of the first column lead to.
    """
    if not rows:
        return ""
    columns = list(rows[0]) if columns is None else list(columns)
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    lines = []
    for row in rows:
        cells = [text(cell(row[column])) for column in columns]
        key = (links or {}).get(str(row[columns[0]]))
        if key is not None:
            cells[0] = f'<a href="#{escape(key)}">{cells[0]}</a>'
        lines.append("<tr>" + "".join(f"<td>{inside}</td>" for inside in cells) + "</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def cell(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def number(value: float, digits: int = 3) -> str:
    """A number to some digits; a dash for one that is not known."""
    return f"{value:.{digits}g}" if value is not None and math.isfinite(value) else "–"


def figure(name: str, caption: str) -> str:
    """A picture beside the page."""
    return _figure(quote(name), caption, caption)


def picture(png: bytes, alt: str, caption: str, width: int) -> str:
    """A picture in the page itself; ``width`` in pixels of the page."""
    return _figure(f"data:image/png;base64,{b64encode(png).decode()}", alt, caption, width)


def _figure(source: str, alt: str, caption: str, width: int | None = None) -> str:
    size = "" if width is None else f' width="{width}"'
    return (
        f'<figure><img src="{escape(source)}" alt="{text(alt)}"{size}>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def pictures(figures: Iterable[str]) -> str:
    """Pictures beside each other, as far as the window is wide; none of no pictures."""
    inside = "\n".join(filter(None, figures))
    return f'<div class="pictures">\n{inside}\n</div>' if inside else ""


def links(names: Iterable[str]) -> str:
    """Links to files beside the page."""
    return "<p>" + ", ".join(f'<a href="{escape(quote(n))}">{text(n)}</a>' for n in names) + "</p>"
