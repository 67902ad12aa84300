"""New recordings in files meet a saved fit: from how many trials it adapts, and to what."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyro_metassm import _checks as checks
from pyro_metassm import baselines, metrics
from pyro_metassm.adaptation import adapt
from pyro_metassm.experiments import adapting_report, files, reading, report
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.observations import counted
from pyro_metassm.posterior import forecast, posterior
from pyro_metassm.rebuilding import for_recordings
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.result import Fit

MOST = 128  # test trials of a recording, where their number is not asked for
START = 500  # steps of the warm start of a model from scratch


def run(
    run: str | Path,
    new: Sequence[str | Path],
    out: str | Path,
    *,
    bins: Mapping[str, Any] | None = None,
    num_trials: int = 8,
    num_steps: int | None = None,
    train: Collection[str] = ("read_in", "read_out"),
    test_fraction: float | None = None,
    context: int | None = None,
    horizon: int | None = None,
    scratch_steps: int = 300,
    num_samples: int = 25,
    save_trials: int = 16,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> dict:
    """Adapt a fit to recordings that it does not know from 1, 2, 4, ... of their trials, and write what was found.

    Smaller numbers of trials are subsets of larger ones, and all are scored on the same test trials. Beside it, from
    the same trials, the same model from scratch (of the same sizes, for one recording and with shared dynamics, rank 0)
    and the constant forecast that is their mean.

    Args:
        run: folder that ``metassm fit`` or ``Fit.save`` wrote.
        new: files as :func:`files.run` takes them, and ``bins`` for those in NWB.
        out: folder to write into: ``fit/`` (adapted from ``num_trials``), ``adaptation.csv``, ``metrics.json``,
            ``posterior.nc``, ``forecast.nc`` and pictures.
        num_trials: trials of each recording to adapt from, at most; they also make the decoder and the null model of
            the scores, whatever number the fit has seen.
        num_steps, train: of :func:`pyro_metassm.adapt`.
        test_fraction: share of each recording's trials to score on, the one that :func:`files.run` holds out with the
            same seed; None: those that are not among the ``num_trials``, 128 of them at most.
        context: bins given to forecasts; None: half of the usual length of a test trial (the shortest median).
        horizon: bins forecast; None: up to the usual length.
        scratch_steps: steps of SVI of the models from scratch, after a warm start; 0 leaves them out.
        num_samples: posterior draws of scores and files.
        save_trials: test trials of each recording whose draws are written (scores use all of them).
        seed: of everything random.
        device: "cpu", "cuda" or "auto".
        progress: show progress bars.

    Returns:
        what ``metrics.json`` holds.

    Raises:
        ValueError: files that cannot be read; recordings that the fit knows, in other bins, with too few or too short
            trials, or that its likelihood cannot have produced.
    """
    checks.integers(1, num_trials=num_trials, num_samples=num_samples, save_trials=save_trials)
    checks.integers(0, scratch_steps=scratch_steps)
    out = report.folder(out)
    seconds: dict[str, float] = {}
    with report.timed(seconds, "read"):
        known = files.load_fit(run, device)
        recs = reading.recordings(new, bins)
        recs.summary()  # warns of what will hurt
        for recording in recs.values():
            known.model.observation.check(recording)  # the test trials as well
        pool, test = split(recs, num_trials, test_fraction, seed)
        context, horizon = _window(test, context, horizon)
    family = type(known.model.observation)
    scored: dict[str, Any] = {
        "context": context,
        "horizon": horizon,
        "num_samples": num_samples,
        "seed": seed,
    }
    score = "forecast_bits_per_spike" if _all_counts(known, recs) else "forecast_r2"
    scores: dict[str, dict] = {"adapted": {}, "scratch": {}, "constant": {}}
    found: dict[str, dict] = {name: {} for name in recs}
    adapted = known
    for number in numbers_of_trials(num_trials):
        few = pool.take_trials(number, seed=seed)
        with report.timed(seconds, "adapt"):
            adapted = adapt(known, few, num_steps=num_steps, train=train, seed=seed, progress=progress)
        for name, row in _embeddings(adapted, recs.names).items():
            found[name][str(number)] = row | adapted.attrs["adaptation"].get(name, {})
        with report.timed(seconds, "scores"):
            scores["adapted"][str(number)] = files.scores(adapted, pool, test, **scored)
            scores["constant"][str(number)] = {score: _constant(few, test, score, context, horizon)}
        alone: list[dict] = []
        for name in recs if scratch_steps else ():
            one, its_pool, its_test = (part.select([name]) for part in (few, pool, test))
            with report.timed(seconds, "scratch"):
                single = from_scratch(known, one, num_steps=scratch_steps, seed=seed, progress=progress)
            with report.timed(seconds, "scores"):
                alone.append(files.scores(single, its_pool, its_test, **scored))
        if alone:
            scores["scratch"][str(number)] = _merged(alone)
    prior = known.model.embedding_prior()
    numbers = {
        "score": score,
        "scores": {method: by_number for method, by_number in scores.items() if by_number},
        "embedding": found,
        "embedding_known": _embeddings(known, known.names),
        "rollout_error_known": known.attrs.get("rollout_error", {}),
        "embedding_prior": {"mean": prior.mean.tolist(), "sd": prior.stddev.tolist()},
        "trials": {name: {"adapt": num_trials, "test": r.num_trials} for name, r in test.items()},
        "likelihood": family.__name__,
        "test_fraction": test_fraction,
        **scored,
    }
    numbers["fits"] = {name: adapting_report.fits(numbers, name) for name in recs}
    with report.timed(seconds, "write"):
        adapted.save(out / "fit")
        adapting_report.write_csv(numbers, out / "adaptation.csv")
        shown = Recordings(
            [r.take(np.flatnonzero(r.lengths >= context)[:save_trials]) for r in test.values()]
        )
        tree = posterior(adapted, shown, num_samples=num_samples, seed=seed)
        ahead = forecast(adapted, shown, **scored)
        report.write_tree(tree, out / "posterior.nc")
        report.write_tree(ahead, out / "forecast.nc")
        adapting_report.draw(numbers, tree, ahead, out)
    return report.write_metrics(numbers | {"seconds": seconds}, out)


def numbers_of_trials(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``."""
    return sorted({2**power for power in range(most.bit_length())} | {most})


def from_scratch(known: Fit, few: Recordings, *, num_steps: int, seed: int, progress: bool) -> Fit:
    """A model and a guide of the classes and sizes of a fit, with rank 0, from one recording's trials alone."""
    steps: dict[str, Any] = {"num_steps": num_steps, "warm_start_steps": START, "seed": seed}
    (name,) = few.names
    return baselines.single_recording(known, few, progress=progress, **steps)[name]


# ---- parts -----------------------------------------------------------------------------------------------


def _all_counts(known: Fit, recs: Recordings) -> bool:
    """Whether the likelihood has all neurons of recordings that the fit does not know as counts."""
    model, _ = for_recordings(known.model, known.guide, NeuronTable.of(recs))
    model.observation.start(recs)
    return all(counted(model, name).all() for name in recs)


def split(recs: Recordings, num_trials: int, test_fraction: float | None, seed: int):
    """The trials to adapt from, ``num_trials`` of each recording, and those to score on."""
    pools, tests = [], []
    for name, recording in recs.items():
        trials = recording.num_trials
        share = 1 - num_trials / trials if test_fraction is None else test_fraction
        needed = f"more than the {num_trials} trials to adapt from, to score on the others"
        if trials <= num_trials:
            raise checks.fail(name, needed, f"{trials}", "adapt from fewer (--trials)")
        pool, test = (part[name] for part in Recordings([recording]).split(share, seed=seed))
        if pool.num_trials < num_trials:
            needed = f"{num_trials} trials to adapt from beside {test.num_trials} to score on"
            raise checks.fail(name, needed, f"{pool.num_trials}", "lower --trials or --test-fraction")
        pools.append(pool)
        tests.append(test if test_fraction is not None else _at_most(MOST, test, seed))
    return Recordings(pools).take_trials(num_trials, seed=seed), Recordings(tests)


def _at_most(number: int, recording: Recording, seed: int) -> Recording:
    few = Recordings([recording]).take_trials(min(number, recording.num_trials), seed=seed)
    return few[recording.name]


def _window(test: Recordings, context: int | None, horizon: int | None) -> tuple[int, int]:
    """Bins given and bins forecast, such that every recording has trials that reach their end."""
    usual = files.usual_length(test)
    context = max(1, usual // 2) if context is None else context
    horizon = max(1, usual - context) if horizon is None else horizon
    checks.integers(1, context=context, horizon=horizon)
    for name, recording in test.items():
        longest = int(recording.lengths.max())
        if longest < context + horizon:
            needed = f"test trials of context + horizon = {context} + {horizon} bins"
            raise checks.fail(name, needed, f"at most {longest}", "choose a shorter context or horizon")
    return context, horizon


def _constant(few: Recordings, test: Recordings, score: str, context: int, horizon: int) -> dict:
    """The score of forecasts that are the mean of the trials to adapt from (of half a count where there was none)."""
    found = {}
    for name, recording in test.items():
        seen = recording.observations[recording.lengths >= context, context : context + horizon]
        total, bins = few[name].values.sum((0, 1), dtype=np.float64), few[name].mask.sum((0, 1))
        counts = score != "forecast_r2"
        mean = np.broadcast_to(
            (np.maximum(total, 0.5) if counts else total) / np.maximum(bins, 1), seen.shape
        )
        found[name] = metrics.bits_per_spike(mean, seen) if counts else metrics.r2(seen[:, -1], mean[:, -1])
    return found if counts else {str(horizon): found}


def _embeddings(fit: Fit, names: Sequence[str]) -> dict[str, dict]:
    """Mean and sd of the posterior of recordings' embeddings; those never seen are left out."""
    known = [name for name in names if bool(fit.statistics[fit.names.index(name)].isfinite().all())]
    rows = {name: fit.guide.embedding_posterior(fit.statistics[[fit.names.index(name)]]) for name in known}
    return {
        name: {"mean": q.mean.flatten().tolist(), "sd": q.stddev.flatten().tolist()}
        for name, q in rows.items()
    }


def _merged(parts: Sequence[dict]) -> dict:
    """One dict of dicts that have other recordings at their leaves."""
    keys = dict.fromkeys(key for part in parts for key in part)
    inner = {key: [part[key] for part in parts if key in part] for key in keys}
    return {
        key: _merged(values) if isinstance(values[0], dict) else values[0] for key, values in inner.items()
    }
