"""Tables of trials and of units: which rows are meant, and which columns go along."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from pyro_metassm import _checks as checks

Choice = Mapping[str, Any] | Callable[[pd.DataFrame], Any] | None
"""Which rows of a table: column -> value (or a list of values), or a function of the table to bools; None: all."""


def column_of(name: str, table: pd.DataFrame, column: Any, what: str) -> pd.Series:
    """A column, or a `ValueError` that lists those that there are."""
    if column not in table.columns:
        raise checks.fail(
            name,
            f"a column {column!r} of the {what}",
            f"only {checks.some(sorted(map(str, table.columns)), 40)}",
            "use one of these",
        )
    return table[column]


def chosen_rows(name: str, table: pd.DataFrame, choice: Choice, what: str) -> np.ndarray:
    """The rows that a choice means, as bool `(rows,)`; at least one.

    Rows where a column asked for is empty (NaN, "") are not chosen, and counted in a warning.

    Raises:
        ValueError: An unknown column, no row left, or a function that does not return bools.
    """
    if choice is None:
        keep = np.ones(len(table), dtype=bool)
    elif callable(choice):
        try:
            keep = np.asarray(choice(table))
        except KeyError as error:
            column_of(name, table, error.args[0], what)
            raise
        if keep.shape != (len(table),) or keep.dtype.kind != "b":
            raise checks.fail(
                name,
                f"a function of the {what} that returns bools ({len(table)},)",
                f"{keep.dtype} of shape {keep.shape}",
                'use such as lambda table: table["result"] == "R"',
            )
    elif not isinstance(choice, Mapping):
        raise checks.fail(
            name,
            f"columns of the {what} with values, or a function",
            repr(choice),
            'use such as {"result": "R"}',
        )
    else:
        keep = np.ones(len(table), dtype=bool)
        for column, wanted in choice.items():
            values = column_of(name, table, column, what)
            several = isinstance(wanted, (list, tuple, set, frozenset, np.ndarray))
            passed = values.isin(list(wanted) if several else [wanted]).to_numpy()
            if not passed.any():
                raise checks.fail(
                    name,
                    f"{what} with {column} = {wanted!r}",
                    f"none: there {column} is {checks.some(sorted(map(str, values.unique())), 12)}",
                    "choose another value",
                )
            empty = (values.isna() | values.isin([""])).to_numpy() & ~passed
            if empty.any():
                warnings.warn(
                    f"recording {name!r}: {column} is empty for {empty.sum()} of {len(table)} {what}, which are "
                    "left out",
                    UserWarning,
                    stacklevel=4,
                )
            keep &= passed
    if not keep.any():
        raise checks.fail(
            name, f"at least one of the {len(table)} {what}", "none after the choice", "choose less strictly"
        )
    return keep


def conditions_of(name: str, table: pd.DataFrame, condition: Any) -> np.ndarray | None:
    """The condition of each row: a column, or several as one text, `a|b`."""
    if condition is None:
        return None
    if isinstance(condition, str):
        return labels(column_of(name, table, condition, "trials"))
    parts = [labels(column_of(name, table, column, "trials")).astype(str) for column in condition]
    return np.array(["|".join(row) for row in zip(*parts, strict=True)])


def labels(values: pd.Series) -> np.ndarray:
    """A column as numbers, bools or text."""
    array = values.to_numpy()
    return array if array.dtype.kind in "biuf" else np.array([str(value) for value in array], dtype=str)


def plain_columns(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """All columns as arrays that a recording can keep: numbers, bools and text."""
    return {str(column): labels(table[column]) for column in table.columns}
