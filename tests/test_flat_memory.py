"""A fit keeps nothing of its steps but their numbers. The full form is tests/reliability/memory.py."""

import gc
import sys

import pytest
import torch
from fits import QUICK, parts
from problems import recordings
from reliability import memory

import pyro_metassm as pm
from pyro_metassm.trainer import Trainer


def test_no_tensor_of_a_step_stays(monkeypatch, tmp_path):
    """After every fifth step there are as many tensors as after the fifth, with validation and states in between."""
    recs, counted, original = recordings(), [], Trainer.take_step

    def take_step(self):
        if self.step and self.step % 5 == 0:
            gc.collect()
            counted.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
        original(self)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    options = {"validation": recs, "validation_every": 3, "checkpoint": tmp_path, "checkpoint_every": 4}
    pm.fit(*parts(recs), recs, **(QUICK | options | {"num_steps": 21}))
    assert len(counted) == 4 and max(counted) <= counted[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measurement_of_the_full_form():
    report = memory.measure(60)
    assert report["grown_bytes"] <= report["allowed_bytes"]
    assert report["mib_at_most"] >= report["mib_at_the_end"] > 50
