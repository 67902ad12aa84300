"""Writing results: folders, trees, metrics, figures."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xarray as xr


def folder(path: str | Path) -> Path:
    """The folder, made if need be.

    Raises:
        ValueError: if a file has that name.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"out: needed a folder, got the file {path}; choose another name")
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time of a block to ``seconds[phase]``."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - begin


def write_tree(tree: xr.DataTree, path: Path) -> None:
    """Write a tree as compressed netCDF."""
    groups = {node.path: node.to_dataset(inherit=False) for node in tree.subtree}
    encoding = {
        path_: {
            name: {"zlib": True, "complevel": 1}
            for name, v in ds.data_vars.items()
            if v.dtype.kind in "fib" and v.ndim
        }
        for path_, ds in groups.items()
    }
    tree.to_netcdf(path, engine="h5netcdf", encoding={k: v for k, v in encoding.items() if v})


def by_recording(values: xr.DataArray) -> dict[str, float]:
    """A value by recording as plain numbers."""
    return {str(name): float(values.sel(recording=name)) for name in values["recording"].values}


def write_metrics(numbers: dict, out: Path) -> dict:
    """Write ``metrics.json``, with the versions of what made it; returns what it holds."""
    packages = ("pyro-metassm", "torch", "pyro-ppl", "numpy", "xarray", "arviz")
    numbers["versions"] = {"python": platform.python_version()} | {p: _version(p) for p in packages}
    (out / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return numbers


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def save_figure(figure, path: Path) -> None:
    """Write a figure and let it go."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)
