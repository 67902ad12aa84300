"""Dependencies: what is needed, what was tried, the oldest and the hashed agree, and nothing else is asked for."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TESTED = ("nwb", "zarr")  # extras that `make test-lowest` installs, beside dev
TOOLS = {"build", "mypy", "ruff", "setuptools"}  # of dev: what does not run the tests


def lines(name: str) -> list[str]:
    return [
        line.strip()
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if re.match(r"[A-Za-z]", line)
    ]


def pins(name: str) -> dict[str, set[str]]:
    """Package -> its pinned versions, on any platform and Python."""
    found: dict[str, set[str]] = {}
    for line in lines(name):
        package, version = re.fullmatch(r"([\w.-]+)==([^\s;]+)(?:\s*;.*?)?\s*\\?", line).groups()
        found.setdefault(package.lower().replace("_", "-"), set()).add(version)
    return found


def requirement(text: str) -> tuple[str, str]:
    """Name and floor."""
    name, floor = re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", text).groups()
    return name.lower(), floor


def key(version: str) -> list[int]:
    found = [int(part) for part in re.findall(r"\d+", version)]
    return found + [0] * (4 - len(found))


NEEDED = [requirement(text) for text in PROJECT["dependencies"]]


def test_every_floor_is_one_of_the_lowest_versions():
    """On Python 3.11: the line of ArviZ for newer Pythons has its floor in another file."""
    lowest = pins("lowest.txt")
    extras = PROJECT["optional-dependencies"]
    of_extras = [requirement(text) for extra in TESTED for text in extras[extra]]
    of_tests = [requirement(text) for text in extras["dev"]]
    floors = [(n, f) for n, f in NEEDED + of_extras + of_tests if (n, f) != ("arviz", "1") and n not in TOOLS]
    wrong = [(n, f, lowest.get(n)) for n, f in floors if [key(v) for v in lowest.get(n, ())] != [key(f)]]
    assert wrong == []
    assert lowest.keys() == {name for name, _ in floors}


def test_what_was_tried_is_within_what_is_allowed():
    tried = pins("constraints.txt")
    for name, floor in NEEDED:
        assert all(
            key(version) >= key(floor) for version in tried[name] if (name, floor) != ("arviz", "1")
        ), name


def test_the_lock_has_every_dependency_as_it_was_tried_with_hashes():
    locked, tried = pins("demo.lock"), pins("constraints.txt")
    assert {name for name, _ in NEEDED} <= locked.keys()
    assert {n: v for n, v in locked.items() if n in tried and not v <= tried[n]} == {}
    assert locked.keys() - tried.keys() == {"colorama"}  # of tqdm, on Windows
    blocks = re.split(r"\n(?=[A-Za-z])", (ROOT / "demo.lock").read_text(encoding="utf-8"))[1:]
    assert len(blocks) == len(lines("demo.lock"))
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", block) for block in blocks)


def test_dependencies_stay_few():
    """One more is a decision, not an accident."""
    assert len({name for name, _ in NEEDED}) == 13


@pytest.mark.parametrize("command", ["test-lowest", "demo-locked", "sbom", "reliability"])
def test_the_commands_are_there_and_said(command):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{command}:", makefile, re.M) and f"#   make {command} " in makefile


def test_ci_has_every_python_and_the_lowest_versions():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert all(f'"{python}"' in text for python in pythons) and len(pythons) == 3
    assert "make test-lowest" in text and "make demo-locked" in text
