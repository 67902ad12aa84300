"""Is it good: scores beside baselines, calibration, and the training curve."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pyro_metassm.reporting import html, pictures
from pyro_metassm.reporting.album import Album
from pyro_metassm.reporting.asked import Asked, Missing, Scores, attempt, methods_of
from pyro_metassm.reporting.scoring import LEVEL, Found, label_of

SIZE = 3.95, 3.1  # inches: three beside each other on a wide page
METHODS = {
    "mean rate": "mean rate: every neuron's mean over the training trials",
    "psth": "psth: the mean over the training trials of the same condition, bin by bin",
    "smoothing": "smoothing: what was observed, smoothed along time",
    "persistence": "persistence: the level at the end of the context lasts",
}


def parts(asked: Asked, found: Found, album: Album) -> Iterator[str]:
    """Scores, calibration, training."""
    told = asked.told.scores
    used = {method for of in (*told.values(), *found.scores.values()) for method in methods_of(of)}
    if told:
        yield html.heading("Scores as the run wrote them", 3)
        yield html.paragraph(asked.told.about)
        yield html.table(summary(told))
    if found.scores:
        yield html.heading("Scores of the trials shown here", 3)
        yield html.paragraph(_about(asked, found))
        yield html.table(summary(found.scores))
        if asked.train is None and not told:
            yield html.note(
                "Simple predictions stand beside these where the trials of the fit are given, too."
            )
    if not used:
        yield html.note("No scores: no data were given, and none were written with the fit.")
    yield html.items(text for method, text in METHODS.items() if method in used)
    yield from (html.note(f"Left out: {why}.") for why in found.missing)
    shown = []
    if found.curve is not None:
        shown.append(
            album.picture(
                pictures.forecasts(found.curve),
                SIZE,
                "Forecast R² of every recording against the bins ahead",
                f"Forecasts from {asked.context} bins: the share of the variance explained. 0 knows only the average "
                "trial.",
            )
        )
    if found.coverage is not None:
        shown.append(
            album.picture(
                pictures.coverage_curve(found.coverage),
                SIZE,
                f"The share of observations within {100 * LEVEL:.0f} % forecast intervals against the bins ahead",
                "Calibration: on the dashed line the intervals mean what they say, below it they are too narrow. Grey: "
                "each recording.",
            )
        )
    training = attempt(lambda: _training(asked, album))
    yield html.pictures([*shown, "" if isinstance(training, Missing) else training])
    if isinstance(training, Missing):
        yield html.note(f"No training curve: {training.why}.")


def summary(scores: Scores) -> list[dict[str, str]]:
    """A row for each score: means and standard errors over recordings, by method."""
    methods = list(dict.fromkeys(method for of in scores.values() for method in methods_of(of)))
    rows = []
    for score, of in scores.items():
        row = {"score": label_of(score), "recordings": str(len(of))}
        row |= {
            method: _mean([cells[method] for cells in of.values() if method in cells]) for method in methods
        }
        rows.append(row)
    return rows


def of_recording(scores: Scores, name: str) -> list[dict[str, str]]:
    """The scores of one recording, a row each."""
    own = {score: of[name] for score, of in scores.items() if name in of}
    methods = methods_of(own)
    return [
        {"score": label_of(score)} | {m: html.number(cells[m]) if m in cells else "" for m in methods}
        for score, cells in own.items()
    ]


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}"


def _about(asked: Asked, found: Found) -> str:
    said = "Means ± standard errors over recordings. 0 is the mean of the trials scored, in R² and in bits per spike. "
    said += f"Forecasts see {asked.context} bins and reach {asked.horizon} further."
    if found.num_ended:
        said += f" {found.num_ended} trials end before that and are not forecast."
    return said


def _training(asked: Asked, album: Album) -> str:
    return album.picture(
        pictures.history(asked.fit),
        SIZE,
        "The ELBO against the steps of the fit",
        "Training: the ELBO of every step (thin) and its running mean. A curve that still rises says that more steps "
        "would help.",
    )
