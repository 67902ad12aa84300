"""The classes that docs/edits.md defines, made small, with recordings that they fit."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from problems import recordings
from pyro import poutine

import pyro_metassm as pm

DOUBLE = torch.float64
SIZES = {"latent_dim": 2, "embedding_dim": 2, "hidden_dim": 5}
PAGE = Path(__file__).parents[2] / "docs" / "edits.md"


def classes_of_the_page() -> SimpleNamespace:
    """What docs/edits.md defines, without what it does with it."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    kept = [
        node for node in ast.parse(code).body if isinstance(node, ast.ClassDef | ast.Import | ast.ImportFrom)
    ]
    namespace: dict = {"__name__": __name__}
    exec(compile(ast.Module(kept, []), "edits.md", "exec"), namespace)
    return SimpleNamespace(**namespace)


edits = classes_of_the_page()
MORE = {"ByCondition": {"conditions": ["go", "stop"]}, "Driven": {"input_dim": 2}}
WITH_SITES = ["Horseshoe", "BySubject", "ByCondition", "HeavyTails", "BayesianReadOut"]


def subjects() -> pm.Recordings:
    return pm.Recordings(
        pm.Recording(
            name,
            r.observations,
            bin_width=r.bin_width,
            lengths=r.lengths,
            condition=["stop", "go", "go", "stop"][: r.num_trials],
            attrs={"subject": "ada" if name == "b" else "bob"},
        )
        for name, r in recordings().items()
    )


def driven() -> pm.Recordings:
    rng = np.random.default_rng(1)
    return pm.Recordings(
        pm.Recording(n, r.observations, bin_width=r.bin_width, lengths=r.lengths,
                     inputs=rng.normal(size=(r.num_trials, r.num_bins, 2)))
        for n, r in recordings().items()
    )  # fmt: skip


def made(name: str, recs, dtype=DOUBLE, seed: int = 0):
    """A model of the page and its guide, every parameter moved from where it starts."""
    torch.manual_seed(seed)
    model = getattr(edits, name)(recs, **SIZES, **MORE.get(name, {}))
    guide = pm.guides.DKF(model, hidden_dim=4)
    guide.read_in.start(recs)
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval(), guide.to(dtype).eval()


def batch_of(model, recs, **choice):
    return recs.batch(model.names, dtype=DOUBLE, **choice)


def nodes(model, guide, batch) -> dict:
    """The sites of the model at a draw of the guide."""
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(batch)
        return poutine.trace(poutine.replay(model, trace=trace)).get_trace(batch).nodes


def numbers(site) -> tuple[np.ndarray, np.ndarray]:
    """The value of a site and its log density."""
    return site["value"].numpy(), site["fn"].log_prob(site["value"]).numpy()
