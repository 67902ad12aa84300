"""What pictures are given: the right Dataset, one place of it, a plane to draw in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks

PLACES = ("recording", "point")  # dimensions of what was asked for at several places


def dataset(caller: str, found: Any, variables: Sequence[str], source: str) -> None:
    """Raise ``ValueError`` unless a Dataset has the variables of its source."""
    if not isinstance(found, xr.Dataset):
        raise ValueError(f"{caller}: needed the Dataset of {source}, got {type(found).__name__}")
    lacking = [name for name in variables if name not in found]
    if lacking:
        raise ValueError(
            f"{caller}: needed the Dataset of {source}, with {checks.some(lacking)}, got one of "
            f"{checks.some(list(map(str, found.data_vars)))}"
        )


def one_place(caller: str, found: xr.Dataset, at: str | int | None) -> xr.Dataset:
    """What was found at one place of several (of the only one, if ``at`` is None)."""
    dim = next((dim for dim in PLACES if dim in found.dims), None)
    if dim is None:
        if at is not None:
            raise ValueError(f"{caller}: needed at=None for what was found at one place, got {at!r}")
        return found
    labels = found[dim].values.tolist()
    if at is None and len(labels) == 1:
        at = labels[0]
    if at not in labels:
        raise ValueError(f"{caller}: needed at= one of the {dim}s {checks.some(labels)}, got {at!r}")
    return found.isel({dim: labels.index(at)})


def recording(caller: str, tree: Any, name: str, *groups: str) -> None:
    """Raise ``ValueError`` unless a tree has these groups of a recording."""
    children = getattr(tree, "children", {})
    own = children[name].children if name in children else {}
    lacking = [group for group in groups if group not in own]
    if name not in children or lacking:
        known = [child for child, node in children.items() if node.children]
        what = f"with {' and '.join(lacking)} of" if name in children else "with"
        raise ValueError(
            f"{caller}: needed a tree {what} recording {name!r}, got one of {checks.some(known)}"
        )


@dataclass(frozen=True)
class Plane:
    """Where states are on paper.

    Attributes:
        axes: ``(2, latent_dim)``.
        labels: of x and y.
    """

    axes: np.ndarray
    labels: tuple[str, str]

    @classmethod
    def of(cls, caller: str, size: int, plane: Any, on: xr.Dataset | None = None) -> Plane:
        """The plane of two of ``size`` latents, or that of a flow field."""
        if on is not None:
            dataset(caller, on, ("axes", "center"), "pm.analysis.flow_field")
            if on.sizes["latent_dim"] != size:
                raise ValueError(
                    f"{caller}: needed a flow of {size} latents to draw on, got one of {on.sizes['latent_dim']}"
                )
            word = "principal axis" if on.attrs.get("principal") else "latent"
            numbers = [int(k) + 1 for k in on.attrs["plane"]]
            return cls(on["axes"].values, (f"{word} {numbers[0]}", f"{word} {numbers[1]}"))
        known = isinstance(plane, tuple | list) and len(plane) == 2 and plane[0] != plane[1]
        if not (known and all(isinstance(k, int | np.integer) and 0 <= k < size for k in plane)):
            raise ValueError(
                f"{caller}: needed a plane of two of the {size} latents, numbered from 0, got {plane!r}"
            )
        return cls(np.eye(size)[list(plane)], (f"latent {plane[0] + 1}", f"latent {plane[1] + 1}"))

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """States ``(..., latent_dim)`` on paper, ``(..., 2)``."""
        return z @ self.axes.T

    def label(self, ax: Any) -> None:
        ax.set_xlabel(self.labels[0])
        ax.set_ylabel(self.labels[1])
