"""The package as others get it: built, installed apart from this tree, and imported in a fresh process."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import pyro_metassm

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("models", "guides")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def _run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that does not see this tree, unless told to."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))} | environment
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def _build(folder: Path, links: bool) -> Path:
    """Build the wheel from a copy of the sources, where `links` says whether links are links or text."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("pyro_metassm", "models", "guides"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    if not links:  # what git checks out where the system has no symbolic links
        for name in LINKS:
            (tree / "pyro_metassm" / name).unlink()
            (tree / "pyro_metassm" / name).write_text(f"../{name}")
    built = _run(sys.executable, "-c", BUILD, folder, cwd=tree)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("with_links"), links=True)


def _expected() -> list[str]:
    """The files that a wheel must have, from the sources: nothing may be left out of `packages` unseen."""
    found = ["pyro_metassm/py.typed"]
    for folder, prefix in (("pyro_metassm", ""), ("models", "pyro_metassm/"), ("guides", "pyro_metassm/")):
        for path in (path for kind in ("*.py", "*.c", "*.h") for path in (ROOT / folder).rglob(kind)):
            relative = path.relative_to(ROOT)
            if relative.parts[:2] not in {("pyro_metassm", name) for name in LINKS}:
                found.append(prefix + relative.as_posix())
    return sorted(found)


def _contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


def test_links_are_relative():
    for name in LINKS:
        assert os.readlink(ROOT / "pyro_metassm" / name) == f"../{name}"


def test_wheel_has_every_module_once(wheel: Path):
    assert _contents(wheel) == _expected()


def test_wheel_is_the_same_without_links(tmp_path: Path):
    assert _contents(_build(tmp_path, links=False)) == _expected()


def test_installed_wheel_imports_and_every_class_exists_once(wheel: Path, tmp_path: Path):
    target = tmp_path / "site"
    installed = _run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel,
        cwd=tmp_path,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    imported = _run(
        sys.executable, ROOT / ".ci" / "import_all.py", target, cwd=tmp_path, PYTHONPATH=str(target)
    )
    assert imported.returncode == 0, imported.stderr


def test_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pyro_metassm.__version__ == project["version"]


@pytest.mark.parametrize("name", LINKS)
def test_bare_names_are_refused(name: str):
    result = _run(sys.executable, "-c", f"import {name}", cwd=ROOT)
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert f"pyro_metassm.{name}" in result.stderr, "the message says what to import instead"


CHANGES = """
import sys, numpy, pyro, torch
def state():
    return pyro.settings.get(), torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed()
before = state()
import pyro_metassm
assert state() == before, "importing changed global state"
slow = {"arviz", "pynwb", "zarr", "pynapple", "scipy.io", "fsspec"} & set(sys.modules)
assert not slow, f"importing the package imported {slow}"
"""


def test_importing_prints_nothing_and_changes_nothing(tmp_path: Path):
    result = _run(sys.executable, "-c", CHANGES, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
