"""New recordings, options that take little time, and what holds of every adaptation."""

import torch
from fits import state
from problems import recordings

import pyro_metassm as pm
from pyro_metassm.recordings import Recordings

FIT = {"num_steps": 4, "warm_start": False, "trials_per_step": 2, "progress": False}
SMALL = {"num_steps": 3, "num_starts": 5, "search_steps": 4, "progress": False}
SHAPES = {"x": (4, (6, 3, 7)), "y": (2, (9, 1, 5))}  # missing bins, trials of unequal lengths and of one bin


def some(shapes=None, counts=False, **more) -> Recordings:
    return recordings(counts=counts, seed=9, shapes=shapes or SHAPES, **more)


def check_finite(fit: pm.Fit) -> None:
    for key, value in state(fit.model, fit.guide).items():
        assert value.isfinite().all(), key
    assert fit.statistics.isfinite().all()


def check_old(fit: pm.Fit, adapted: pm.Fit) -> None:
    """Shared tensors and the rows of the old recordings, which come first, to the bit."""
    before, after = state(fit.model, fit.guide), state(adapted.model, adapted.guide)
    assert before.keys() == after.keys() and adapted.names[: len(fit.names)] == fit.names
    longer = []
    for key, value in before.items():
        assert torch.equal(after[key][: len(value)] if value.dim() else after[key], value), key
        if after[key].shape != value.shape:
            longer.append(key.rpartition(".")[2])
    assert set(longer) >= {"weight", "bias", "center", "scale", "counts"}
    assert torch.equal(adapted.statistics[: len(fit.names)], fit.statistics)
