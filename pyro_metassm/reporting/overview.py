"""What was fitted: the first part of a page."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import numpy as np
import xarray as xr

from pyro_metassm.recordings import Recordings
from pyro_metassm.reporting import html
from pyro_metassm.reporting.asked import Asked, Missing, attempt
from pyro_metassm.result import Fit

PACKAGES = ("pyro-metassm", "torch", "pyro-ppl", "numpy", "xarray")
SKIPPED = 5  # steps that are listed


def parts(asked: Asked) -> Iterator[str]:
    """The overview."""
    yield html.facts(facts(asked))
    skipped = asked.fit.attrs.get("skipped")
    if isinstance(skipped, list) and skipped:
        yield html.note(
            f"{len(skipped)} steps of the fit were skipped, since a loss or gradient was not finite:"
        )
        yield html.items(_skipped(entry) for entry in skipped[:SKIPPED])
        if len(skipped) > SKIPPED:
            yield html.note(f"and {len(skipped) - SKIPPED} more: fit.attrs['skipped'] lists them.")
    yield from map(html.note, asked.told.notes)
    described = attempt(asked.fit.model.describe)
    if not isinstance(described, Missing):
        yield html.heading("The model", 3)
        yield html.preformatted(described)


def facts(asked: Asked) -> list[tuple[str, str]]:
    """Names and values."""
    fit, model = asked.fit, asked.fit.model
    config = dict(model.config)
    family = getattr(config.pop("likelihood", None), "__name__", type(model.observation).__name__)
    sizes = ", ".join(
        f"{key.replace('_', ' ')} {getattr(value, '__name__', value)}" for key, value in config.items()
    )
    neurons = model.neurons.num_neurons
    rows = [
        ("model", f"{type(model).__name__}, fitted with the guide {type(fit.guide).__name__}"),
        ("likelihood", family),
        ("sizes", sizes),
        ("recordings", f"{len(fit.names)}, of {_span(neurons)} neurons"),
    ]
    for label, data in (("trials fitted", asked.train), ("trials shown here", asked.recs)):
        rows += [] if data is None else [(label, trials(data))]
    if asked.recs is None:
        rows.append(("trials shown here", "none: no data were given"))
    width, number = fit.attrs.get("bin_width"), fit.history.attrs.get("num_observed")
    rows += [] if width is None else [("bins", f"{1000 * width:g} ms")]
    rows += [] if not number else [("numbers observed", f"{number:,.0f}")]
    rows += [("steps of SVI", _steps(fit)), ("seed", str(fit.seed)), ("time", minutes(fit))]
    rows += [("device of this page", str(fit.device))] if fit.device.type != "cpu" else []
    return rows + list(asked.told.facts) + [("page made with", versions())]


def trials(data: Recordings) -> str:
    """How many, of which lengths."""
    number = sum(recording.num_trials for recording in data.values())
    bins = np.concatenate([recording.lengths for recording in data.values()])
    return f"{number} of {len(data)} recordings, {_span(bins.tolist())} bins each"


def minutes(fit: Fit) -> str:
    """How long the fit took."""
    known = {
        label: fit.history.attrs.get(f"{key}_seconds")
        for key, label in (("warm_start", "warm start"), ("svi", "SVI"))
    }
    given = {label: float(s) for label, s in known.items() if isinstance(s, int | float)}
    if not given:
        return "not known"
    total = f"{sum(given.values()) / 60:.1f} min"
    return f"{total} ({', '.join(f'{label} {s:.0f} s' for label, s in given.items())})"


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
            continue
    return ", ".join(found)


def _steps(fit: Fit) -> str:
    steps = f"{fit.history.sizes.get('step', 0)}"
    skipped = fit.history.attrs.get("num_skipped", 0)
    steps += f", {skipped:.0f} skipped" if isinstance(skipped, int | float) and skipped else ""
    return steps + (
        f"; interrupted at step {fit.attrs['interrupted_at']}" if "interrupted_at" in fit.attrs else ""
    )


def _skipped(entry: object) -> str:
    match entry:
        case {"step": step, "what": what, "trials": dict(of)}:
            return f"step {step}: the {what}, in " + "; ".join(
                f"{name} (trials {ks})" for name, ks in of.items()
            )
    return str(entry)


def _span(numbers: list[int] | tuple[int, ...]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def summary(asked: Asked) -> xr.Dataset | Missing:
    """The data doctor's table of the training trials, or of those shown."""
    data = asked.recs if asked.train is None else asked.train
    return Missing("no data were given") if data is None else attempt(data.summary)
