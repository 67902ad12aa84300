"""A step of training never asks the device for a number: run on a device whose tensors have none to give.

Tensors of PyTorch's device "meta" have shapes and no values. Whatever would make the host wait for a GPU (`item`,
`bool(tensor)`, `nonzero`, a copy to the CPU) fails there.
"""

import numpy as np
import pytest
import torch
from members import COMPARISONS
from problems import recordings

import pyro_metassm as pm
from pyro_metassm.guides.encoders import RecurrentEncoder
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.trainer import SETTLE, Options, Trainer

META = torch.device("meta")


def complete() -> Recordings:
    rng = np.random.default_rng(0)
    return Recordings(
        [
            Recording(n, rng.poisson(2.0, (5, 9, size)) * 1.0, bin_width=0.02)
            for n, size in (("a", 3), ("b", 6))
        ]
    )


@pytest.mark.parametrize("recs", [complete(), recordings(counts=True)], ids=["complete", "missing bins"])
@pytest.mark.parametrize(
    "family", [pm.likelihoods.Gaussian, pm.likelihoods.Poisson, pm.likelihoods.NegativeBinomial]
)
@pytest.mark.parametrize(
    "options", [{}, {"common_dim": 5, "embedding_encoder": RecurrentEncoder}, {"newton_step": True}], ids=str
)
def test_a_step_does_not_wait_for_its_device(recs, family, options):
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=2, likelihood=family)
    take_steps(model, pm.guides.DKF(model, hidden_dim=4, **options), recs)


@pytest.mark.parametrize("kind", COMPARISONS)
def test_nor_do_the_comparison_methods(kind):
    recs = complete()
    model = kind(recs, latent_dim=2, embedding_dim=2)
    take_steps(model, pm.guides.DKF(model, hidden_dim=4), recs)


def take_steps(model, guide, recs) -> None:
    guide.read_in.start(recs)
    model.to(META).train(), guide.to(META).train()
    # Read once when it is set, which is before the first step.
    widths = dict.fromkeys(guide.read_in.neurons.names, 1.5)
    guide._read = (guide.smoothing, guide.smoothing._version, widths)
    choice = Options(50, 3, None, 1e-2, False, 0, 1.0, 1e-4, 0)
    trainer = Trainer(model, guide, recs, choice, META)
    for _ in range(SETTLE - 1):
        trainer.take_step()
    assert trainer.step == SETTLE - 1 == len(trainer.history.waiting)
    with pytest.raises(NotImplementedError, match="meta"):  # the numbers are asked for now, as on a GPU
        trainer.take_step()


def test_what_waits_for_a_device_fails_there():
    x = torch.zeros(3, device=META)
    for wait in (lambda: x.sum().item(), lambda: bool(x.any()), x.nonzero, x.cpu, lambda: float(x[0])):
        with pytest.raises((NotImplementedError, RuntimeError)):
            wait()
