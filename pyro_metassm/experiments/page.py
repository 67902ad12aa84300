"""Results as one HTML page: text, tables and pictures, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyro_metassm.experiments.tables import cell

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; } figure { margin: 1.5rem 0; overflow-x: auto; } figcaption { color: #555; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: 0.25rem 0.9rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #222; }
tr:nth-child(even) td { background: #f4f4f4; }
"""


def write(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page of parts, which the functions below make."""
    head = f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n',
        encoding="utf-8",
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """A table of rows; numbers are rounded to three places."""
    if not rows:
        return ""
    columns = list(rows[0]) if columns is None else list(columns)
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell(row[column]))}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def figure(name: str, caption: str) -> str:
    """A picture beside the page."""
    return (
        f'<figure><img src="{escape(quote(name))}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def links(names: Iterable[str]) -> str:
    """Links to files beside the page."""
    return "<p>" + ", ".join(f'<a href="{escape(quote(n))}">{escape(n)}</a>' for n in names) + "</p>"
