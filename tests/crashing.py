"""Fits that end before their time."""

from pathlib import Path

import pytest
from fits import parts

import pyro_metassm as pm
from pyro_metassm.trainer import Trainer

SHORT = {"warm_start": False, "num_steps": 6, "trials_per_step": 2, "progress": False}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Crash(Exception):
    pass


def crashed(recs, folder, monkeypatch, at=5) -> None:
    """A fit that leaves the states 2 and 4."""
    original = Trainer.take_step

    def take_step(self):
        if self.step == at:
            raise Crash
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", take_step)
        with pytest.raises(Crash):
            pm.fit(*parts(recs), recs, **SHORT, checkpoint=folder, checkpoint_every=2)
