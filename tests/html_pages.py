"""What tests ask of an HTML page: that it is well formed and holds all that it shows; and a browser to open it in."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
from pathlib import Path

VOID = {"meta", "img", "br", "hr", "link", "input"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip


class Page(html.parser.HTMLParser):
    """The parts of a page; ``faults`` are tags that do not balance, and attributes that must not be."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if len({key for key, _ in attrs}) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag == "td":
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data)
        if "td" in self.open:
            self.cells[-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def of(self, key: str) -> list[str]:
        """All values of an attribute."""
        return [value or "" for _, k, value in self.attributes if k == key]

    def foreign(self) -> list[str]:
        """Whatever would be fetched from elsewhere, or would run."""
        found = [
            f"<{tag}>"
            for tag in self.tags
            if tag in ("script", "link", "iframe", "object", "embed", "base", "form")
        ]
        for tag, key, value in self.attributes:
            address = key in ("src", "href", "srcset", "action", "data", "poster", "background")
            if address and not (value or "").startswith(("data:image/png;base64,", "#")):
                found.append(f"{tag} {key}={value}")
            if key.startswith("on") or key == "style":
                found.append(f"{tag} {key}={value}")
        return found


def row_of(page: Page, first: str, columns: int) -> list[str]:
    """The cells of the first table row that begins with a text."""
    at = page.cells.index(first)
    return page.cells[at : at + columns]


def browser() -> str | None:
    """A Chromium, if there is one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def opened(path: Path, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """The page as the browser has it in the end, and what it had to say on its console."""
    command = [
        browser() or "",
        *FLAGS,
        f"--user-data-dir={folder / 'browser'}",
        *flags,
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if re.search(r"CONSOLE|ERR_", line)]
