"""Writes the files of this version that later ones must read: `python tests/corpus/make.py`.

Run it once before a release; folders of earlier versions are never made anew. A folder is named for the version and has
`recordings/*.npz` with `recordings.json` of what was in them, a folder for each kind of fit with the numbers that it
gave, `numbers.json`, and a run that was killed after four of six steps, `run/`, with the history of the whole of it.
"""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import numpy as np
import torch
from corpus import mine

import pyro_metassm as pm
from pyro_metassm.guides.encoders import SetEncoder
from pyro_metassm.observations import observed
from pyro_metassm.result import recording_statistics
from pyro_metassm.trainer import Trainer

SIZES = {"latent_dim": 2, "embedding_dim": 1, "hidden_dim": 5}
OPTIONS = {"num_steps": 6, "warm_start_steps": 4, "trials_per_step": 2, "seed": 1, "progress": False}
FAMILIES = {"unit": pm.likelihoods.Poisson, "*": pm.likelihoods.Gamma}


def data() -> pm.Recordings:
    """Three recordings that every family may have produced, with everything that a file of one can hold."""
    rng = np.random.default_rng(0)
    made = []
    for name, neurons in (("a", 3), ("b", 4), ("c", 2)):
        values = 1.0 + rng.poisson(2.0, (4, 8, neurons))
        values[0, 3], values[1, 6:] = np.nan, np.nan
        made.append(
            pm.Recording(
                name, values, bin_width=0.02, lengths=[8, 7, 8, 8], condition=["x", "y", "x", "y"],
                behavior=rng.normal(size=(4, 8, 2)), neuron_ids=["unit", *(f"ca {n}" for n in range(1, neurons))],
                held_out_neurons=[neurons - 1],
                attrs={"subject": "b" if name == "b" else "a", "area": "ä", "trials": {"day": np.arange(4)}},
            )
        )  # fmt: skip
    return pm.Recordings(made)


def models(recs: pm.Recordings) -> dict[str, pm.models.MetaSSM]:
    """One of each kind, of two recordings."""
    torch.manual_seed(0)
    return {
        "gaussian": pm.models.MetaSSM(recs, **SIZES),
        "counts": pm.models.MetaSSM(recs, **SIZES, likelihood=pm.likelihoods.NegativeBinomial),
        "mixed": pm.models.MetaSSM(recs, **SIZES, likelihood=pm.likelihoods.Mixed.of({"*": FAMILIES})),
        "double": pm.models.MetaSSM(recs, **SIZES, likelihood=pm.likelihoods.Poisson).double(),
        "custom": mine.Pulled(recs, **SIZES, pull=0.25),
        "subjects": mine.BySubject(recs, **SIZES),
    }


def fitted(model: pm.models.MetaSSM, recs: pm.Recordings, encoder: type = SetEncoder, **more) -> pm.Fit:
    torch.manual_seed(1)
    guide = pm.guides.DKF(model, hidden_dim=4, common_dim=3, embedding_encoder=encoder)
    guide.to(model.process_noise.log_scale.dtype)
    return pm.fit(model, guide, recs, **(OPTIONS | more))


@torch.no_grad()
def numbers(fit: pm.Fit, recs: pm.Recordings) -> dict[str, list[float]]:
    """What a fit says of recordings, without a draw: each part of the model and of the guide at given values."""
    found = {}
    with fit.model.given(fit.guide.global_sites.medians()):
        for name in recs:
            batch = recs.batch(fit.names, names=[name], dtype=fit.dtype)
            z = torch.linspace(-1.0, 1.0, 4 * 8 * 2, dtype=fit.dtype).reshape(1, 4, 8, 2).sin()
            e = torch.full((1, 1, 1), 0.3, dtype=fit.dtype)
            mean = fit.model.transition(z, fit.model.dynamics_of(e, batch.recording)).base_dist.loc
            y = fit.model.likelihood(fit.model.read_out(z, batch.recording, batch.width), batch.recording)
            density = observed(y, batch.mask).log_prob(batch.observations)
            found[name] = {
                "transition": mean.flatten()[:8].tolist(),
                "log_likelihood": density.flatten().tolist(),
                "embedding_prior": fit.model.embedding_prior_of(batch.recording)
                .log_prob(e)
                .flatten()
                .tolist(),
                "embedding": recording_statistics(fit.guide, recs, name).tolist(),
            }
    return found


class Killed(Exception):
    pass


def run(recs: pm.Recordings, folder: Path | None = None, kill: bool = False) -> pm.Fit:
    """A fit with states, which may die after four of its steps."""
    original = Trainer.take_step

    def take_step(self):
        if kill and self.step == 4:
            raise Killed
        original(self)

    Trainer.take_step = take_step  # type: ignore[method-assign]
    try:
        return fitted(
            models(recs)["counts"],
            recs,
            mine.Small,
            checkpoint=folder,
            checkpoint_every=2,
            validation=recs,
            validation_every=3,
        )
    finally:
        Trainer.take_step = original  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    folder = HERE / pm.__version__
    shutil.rmtree(folder, ignore_errors=True)
    recs = data()
    (folder / "recordings").mkdir(parents=True)
    for name, recording in recs.items():
        pm.io.write_npz(recording, folder / "recordings" / f"{name}.npz")
    known = recs.drop(["c"])
    encoders = {"double": mine.Small}
    fits = {
        kind: fitted(model, known, encoders.get(kind, SetEncoder)) for kind, model in models(known).items()
    }
    adapting = {"num_steps": 2, "num_starts": 4, "search_steps": 3, "progress": False}
    fits["adapted"] = pm.adapt(fits["gaussian"], recs.select(["c"]), **adapting)
    for kind, fit in fits.items():
        fit.save(folder / kind)
        told = numbers(fit, recs.select(fit.names))
        (folder / kind / "numbers.json").write_text(json.dumps(told))
    try:
        run(known, folder / "run", kill=True)
    except Killed:
        (folder / "run" / ".lock").unlink(missing_ok=True)
    whole = run(known).history.drop_vars("seconds")
    told = {key: column.values.tolist() for key, column in whole.items()}
    (folder / "run" / "history.json").write_text(json.dumps(told))
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    print(f"{len(sizes)} files, the largest of {max(sizes.values())} bytes, {sum(sizes.values())} in all")


if __name__ == "__main__":
    main()
