"""One page for a fit: what was fitted, is it good, the map of its dynamics, and every recording."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from pyro_metassm import _checks as checks
from pyro_metassm import writing
from pyro_metassm.recordings import Recordings
from pyro_metassm.reporting import atlas, html, mapping, overview, places, quality, scoring
from pyro_metassm.reporting.album import Album
from pyro_metassm.reporting.asked import Asked, Told, refuse, window_of
from pyro_metassm.result import Fit

TITLES = {"what": "What was fitted", "good": "Is it good?", "map": "The map", "recordings": "The recordings"}


def report(
    fit: Fit,
    recs: Recordings | None = None,
    *,
    out: str | os.PathLike[str],
    train: Recordings | None = None,
    context: int | None = None,
    horizon: int | None = None,
    title: str | None = None,
    num_samples: int = 20,
    num_draws: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write one self-contained HTML page of a fit: what was fitted, is it good, the map of its dynamics, and a section
    for every recording.

    Pictures are in the page itself, at most 5 MB in all; nothing is fetched from elsewhere and nothing runs. What
    cannot be found, for want of data or since the model does not have it, is left out, and the page says why.

    - *Is it good*: :func:`~pyro_metassm.metrics.reconstruction_r2`, :func:`~pyro_metassm.metrics.forecast_r2`, the
      coverage of 90 % forecast intervals, and with ``train`` the :func:`~pyro_metassm.baselines.table`; the
      training curve.
    - *The map*: :func:`~pyro_metassm.analysis.embedding_map`, and :func:`~pyro_metassm.analysis.bifurcation` along the
      first principal axis of the embeddings.
    - *Every recording*: findings of :meth:`Recordings.summary`, scores, a trial as it was observed, reconstructed and
      forecast, the flow with :func:`~pyro_metassm.analysis.fixed_points` and
      :func:`~pyro_metassm.analysis.limit_cycles`.

    Args:
        fit: a fit.
        recs: trials to look at, best such as it was not fitted to; without them there are no scores and no trials.
        out: the file to write; its folder must be there.
        train: trials that it was fitted to: simple predictions are made from them.
        context: bins given to forecasts; None: half of the usual trial.
        horizon: bins forecast; None: to the end of the usual trial, 50 at most.
        title: of the page.
        num_samples: posterior draws of trials, two or more.
        num_draws: of embeddings.
        seed: of the draws.
        progress: show a progress bar.

    Returns:
        the file.

    Raises:
        ValueError: data that do not belong to the fit (recordings, neurons, bins, values), sizes out of range.
        OSError: a file that cannot be written.

    Example:
        >>> import tempfile
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> out = Path(tempfile.mkdtemp()) / "report.html"
        >>> pm.report(fit, out=out, num_draws=2, progress=False).stat().st_size < 5_000_000
        True
    """
    asked = ask(fit, recs, train, Told(), context, horizon, num_samples, num_draws, seed)
    title = f"A fit of {len(fit.names)} recordings" if title is None else title
    return write(asked, out, title, progress)


def ask(
    fit: Fit,
    recs: Recordings | None,
    train: Recordings | None,
    told: Told,
    context: int | None = None,
    horizon: int | None = None,
    num_samples: int = 20,
    num_draws: int = 20,
    seed: int = 0,
) -> Asked:
    """What a page is to be about, checked.

    Raises:
        ValueError: as :func:`report`.
    """
    checks.integers(2, num_samples=num_samples)
    checks.integers(num_draws=num_draws)
    refuse(fit, recs, train)
    context, horizon = window_of(recs, context, horizon)
    return Asked(fit, recs, train, told, context, horizon, num_samples, num_draws, seed)


def write(asked: Asked, out: str | os.PathLike[str], title: str, progress: bool = True) -> Path:
    """Make the page and write it, in whole or not at all.

    Raises:
        OSError: a file that cannot be written, told before anything is computed where that can be known.
    """
    path = Path(out)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: needed a file to write the page into, got a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: needed a folder that is there, got none; make {path.parent} first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: the folder {path.parent} cannot be written into")
    page = html.document(title, parts(asked, progress), policy=html.ALONE)
    writing.write_part(path, page.encode())
    writing.commit(path)
    return path


def parts(asked: Asked, progress: bool = False) -> Iterator[str]:
    """All of a page."""
    names = asked.names
    keys = {name: f"recording-{number}" for number, name in enumerate(names, 1)}
    album = Album(len(names))
    with tqdm(total=2 * len(names) + 3, disable=not progress, desc="report", dynamic_ncols=True) as bar:
        bar.set_description("scores")
        scores = scoring.measure(asked)
        bar.update()
        bar.set_description("map")
        found = mapping.find(asked, bar.update)
        doctor = overview.summary(asked)
        yield html.contents(
            [
                (key, text, [(k, n) for n, k in keys.items()] if key == "recordings" else [])
                for key, text in _titles(keys)
            ]
        )
        yield html.section("what", TITLES["what"], overview.parts(asked))
        yield html.section("good", TITLES["good"], quality.parts(asked, scores, album))
        yield html.section("map", TITLES["map"], atlas.parts(asked, found, album, keys))
        bar.set_description("recordings")
        # What a run wrote is of all its held-out trials; with the data at hand these are scored here, and beside more.
        told, own = asked.told.scores, scores.scores
        both, inner = own | told if asked.train is None else told | own, []
        for name in names:
            of = places.parts(asked, found, name, both, doctor, album)
            inner.append(html.section(keys[name], name, of, level=3))
            bar.update()
        yield html.section("recordings", TITLES["recordings"], inner)
    if album.left_out:
        yield html.note(f"{album.left_out} pictures are left out, so that the page stays below 5 MB.")


def _titles(keys: dict[str, str]) -> list[tuple[str, str]]:
    return [(key, text) for key, text in TITLES.items() if key != "recordings" or keys]
