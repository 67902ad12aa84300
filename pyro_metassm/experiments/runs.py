"""What the folders hold that ``metassm fit``, ``adapt`` and ``demo`` write, and their page (``metassm report``)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pyro_metassm.experiments import adapting, files, reading
from pyro_metassm.io._files import LARGEST, said
from pyro_metassm.io._files import reading as reading_file
from pyro_metassm.io._hdf5 import inspect
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.reporting import page
from pyro_metassm.reporting.asked import Scores, Told
from pyro_metassm.result import Fit

METRICS, TRIALS = "metrics.json", "posterior.nc"
LONGEST = 16 * 2**20  # bytes of METRICS
FRACTION = 0.25  # of trials held out by `metassm fit`, unless told
BY_RECORDING = ("reconstruction_r2", "bits_per_spike", "forecast_bits_per_spike", "co_bps", "velocity_r2")


def write_page(
    run: str | Path,
    out: str | Path,
    *,
    data: Sequence[str | Path] = (),
    bins: Mapping[str, Any] | None = None,
    context: int | None = None,
    horizon: int | None = None,
    num_samples: int = 20,
    num_draws: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write the page of a fit in a folder.

    Args:
        run: what ``metassm fit``, ``adapt`` or ``demo`` wrote, or ``Fit.save``.
        out: the file to write.
        data: files of the recordings; they are split into the trials fitted and those held out as the run did. None:
            the held-out trials that the run wrote are shown, and its scores of all of them.
        bins: how NWB files are binned.
        context, horizon, num_samples, num_draws, seed, progress: of :func:`pyro_metassm.report`; None: as the run.

    Raises:
        ValueError: no fit, data that do not belong to it.
        OSError: no such folder or file, a page that cannot be written.
    """
    folder = Path(run)
    fit = files.load_fit(folder)
    numbers, notes = metrics(folder)
    train: Recordings | None = None
    recs: Recordings | None = None
    if data:
        train, recs = split(reading.recordings(data, bins), numbers, fit)
    else:
        recs, trouble = trials(folder, fit)
        notes += trouble
    if context is None:
        context = _integer(numbers.get("context"))
        horizon = _integer(numbers.get("horizon")) if horizon is None and context is not None else horizon
    told = Told(scores(numbers), facts(numbers), about(numbers), tuple(notes))
    asked = page.ask(fit, recs, train, told, context, horizon, num_samples, num_draws, seed)
    return page.write(asked, out, f"{folder.resolve().name}: a fit of {len(fit.names)} recordings", progress)


def metrics(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What ``metrics.json`` holds, and what was wrong with it."""
    path = folder / METRICS
    if not path.is_file():
        return {}, []
    try:
        if path.stat().st_size > LONGEST:
            raise ValueError(f"needed at most {LONGEST} bytes, got more")
        numbers = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(numbers, dict):
            raise ValueError("needed an object, got something else")
    except (ValueError, RecursionError) as error:
        return {}, [f"{METRICS} could not be read: {said(error)}"]
    return numbers, []


def trials(folder: Path, fit: Fit) -> tuple[Recordings | None, list[str]]:
    """The held-out trials that the run wrote, and what was wrong with them."""
    path = folder / TRIALS
    if not path.is_file():
        return None, []
    width = fit.attrs.get("bin_width")
    try:
        with reading_file(path, "trials of a run"):
            inspect(path, LARGEST)
            with xr.open_datatree(path, engine="h5netcdf", decode_times=False) as tree:
                known = [name for name in fit.names if name in tree.children]
                found = [_recording(tree, name, float(width)) for name in known] if width else []
        return (Recordings(found) if found else None), []
    except ValueError as error:
        return None, [f"The trials of the run are not shown: {error}"]


def _recording(tree: xr.DataTree, name: str, width: float) -> Recording:
    """A recording from the groups that :func:`pyro_metassm.trees.recording_groups` made."""
    seen, beside = (tree[name][part].to_dataset().load() for part in ("observed_data", "constant_data"))
    more: dict[str, Any] = {
        key: beside[key].values for key in ("condition", "behavior", "inputs") if key in beside
    }
    if "behavior" in more and beside["behavior_dim"].dtype.kind in "OUT":
        more["attrs"] = {"behavior_names": [str(text) for text in beside["behavior_dim"].values]}
    values = seen["observations"].transpose("trial", "time", "neuron").values
    held_out = np.asarray(beside["held_out"].values, bool)
    return Recording(
        name,
        np.where(np.asarray(beside["mask"].values, bool), values, np.nan),
        bin_width=width,
        lengths=np.minimum(beside["length"].values, values.shape[1]),
        held_out_neurons=held_out if held_out.any() else None,
        neuron_ids=seen["neuron"].values,
        **more,
    )


def split(recs: Recordings, numbers: Mapping[str, Any], fit: Fit) -> tuple[Recordings, Recordings]:
    """The trials that a run fitted and those that it held out, by what it wrote of them."""
    seed = _integer(numbers.get("seed"), least=0)
    seed = fit.seed if seed is None else seed
    fraction = numbers.get("test_fraction")
    fraction = float(fraction) if isinstance(fraction, int | float) and 0 < fraction < 1 else None
    of = numbers.get("trials")
    if "scores" in numbers and isinstance(of, dict):
        adapted = [_integer(row.get("adapt")) for row in of.values() if isinstance(row, dict)]
        if adapted and adapted[0] is not None and set(recs) <= set(of):
            return adapting.split(recs, adapted[0], fraction, seed)
    return recs.split(test_fraction=FRACTION if fraction is None else fraction, seed=seed)


def scores(numbers: Mapping[str, Any]) -> Scores:
    """The scores that a run wrote: of the fit, or of an adaptation from most trials and of what stands beside it."""
    of = numbers.get("scores")
    if not isinstance(of, dict):
        found = _scores(numbers, "fit", {})
        for score, of_names in _dict(numbers.get("simple_forecasts")).items():
            for name, row in _dict(of_names).items():
                if name in found.get(score, {}):
                    found[score][name] |= {str(k): float(v) for k, v in _dict(row).items() if _is_number(v)}
        return found
    merged: Scores = {}
    for method, label in (
        ("adapted", "fit"),
        ("scratch", "from scratch"),
        ("constant", "mean of the trials"),
    ):
        by_number = {k: v for k, v in _dict(of.get(method)).items() if str(k).isdigit()}
        if by_number:
            _scores(_dict(by_number[max(by_number, key=int)]), label, merged)
    return merged


def _scores(numbers: Mapping[str, Any], method: str, found: Scores) -> Scores:
    """The scores of one method, put beside others."""
    forecasts = {
        f"forecast_r2, {k} bin{'s' * (k != '1')} ahead": v
        for k, v in _dict(numbers.get("forecast_r2")).items()
    }
    for score, values in ({key: numbers.get(key) for key in BY_RECORDING} | forecasts).items():
        for name, value in _dict(values).items():
            if _is_number(value):
                found.setdefault(score, {}).setdefault(str(name), {})[method] = float(value)
    return found


def about(numbers: Mapping[str, Any]) -> str:
    """What the scores of a run are of."""
    if isinstance(numbers.get("scores"), dict):
        return (
            "Of held-out trials of the new recordings, adapted from as many trials as the run took. R² of 0 is the "
            "mean of the trials scored."
        )
    return "Of all held-out trials: means ± standard errors over recordings. R² of 0 is the mean of the trials scored."


def facts(numbers: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What a run says of itself."""
    rows = []
    seconds = {str(k): float(v) for k, v in _dict(numbers.get("seconds")).items() if _is_number(v)}
    if seconds:
        rows.append(
            ("time of the run", ", ".join(f"{phase} {value:.0f} s" for phase, value in seconds.items()))
        )
    versions = {str(k): v for k, v in _dict(numbers.get("versions")).items() if isinstance(v, str)}
    if versions:
        rows.append(
            ("run made with", ", ".join(f"{package} {version}" for package, version in versions.items()))
        )
    return tuple(rows)


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: Any, least: int = 1) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= least else None
