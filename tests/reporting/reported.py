"""Recordings with hostile names, a fit of them, and its page."""

from pathlib import Path

import numpy as np
from fits import parts
from html_pages import Page

import pyro_metassm as pm
from pyro_metassm.reporting.album import LARGEST

SCRIPT, IMAGE, FORMULA = "<script>alert(1)", '"><img src=x onerror=alert(2)>', "cost $x^$ & $"
NAMES = (SCRIPT, IMAGE, FORMULA)
QUICK = {"num_draws": 2, "num_samples": 3, "progress": False}


def recordings(names=NAMES, num_trials=12, num_bins=16, counts=True) -> pm.Recordings:
    rng = np.random.default_rng(0)
    draw = (lambda shape: rng.poisson(2.0, shape) * 1.0) if counts else (lambda shape: rng.normal(size=shape))
    more = {"attrs": {"subject": "<b>cat</b>", "weight": 3}, "neuron_ids": ["<i>a</i>", "b", "$c^$"]}
    found = []
    for number, name in enumerate(names):
        y = draw((num_trials, num_bins, 3))
        y[:6, 14:], y[1, 3, 0] = np.nan, np.nan
        more["attrs"] = more["attrs"] | {"weight": number}
        found.append(pm.Recording(name, y, bin_width=0.02, condition=np.arange(num_trials) % 2, **more))
    return pm.Recordings(found)


def fitted(recs, **more) -> pm.Fit:
    model, guide = parts(
        recs, pm.likelihoods.Poisson if next(iter(recs.values())).has_counts else pm.likelihoods.Gaussian
    )
    return pm.fit(
        model, guide, recs, num_steps=2, warm_start_steps=2, trials_per_step=2, progress=False, **more
    )


def page_of(fit, folder: Path, *args, **options) -> Page:
    path = pm.report(fit, *args, out=folder / "report.html", **QUICK | options)
    assert path.stat().st_size < LARGEST
    return Page(path.read_text(encoding="utf-8"))
