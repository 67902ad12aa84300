"""Fits that are killed, and taken up again, until they end: bit-equal to one that was not?

    python tests/reliability/kills.py --kills 50 [--seed 0] [--json FILE]

Each life of a fit is a process of its own, forked before anything was computed, and dies of SIGKILL: at a random moment
(the start from the data and the validation included), or within a write of its state: before, amid and after the data,
before the file is brought to the disk, before and after it gets its name, before and after old states are removed. What
dies is taken up by the same call, until it ends; then its parameters, history and embeddings are compared with those of
a fit that nobody killed. Exit status 1 if a bit differs.
"""

import argparse
import builtins
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"

import numpy as np
import torch

import pyro_metassm as pm
from pyro_metassm import writing

POINTS = ("opened", "half", "unsynced", "unnamed", "named", "unpruned", "pruned")
STEPS, EVERY, WARM = 40, 3, 12


def problem():
    """Recordings with gaps and counts, and two parts of their trials."""
    rng = np.random.default_rng(0)
    made = []
    for name, neurons in (("a", 3), ("b", 5), ("c", 4)):
        values = rng.poisson(2.0, (6, 9, neurons)) * 1.0
        values[0, 3] = np.nan
        made.append(pm.Recording(name, values, bin_width=0.02))
    return pm.Recordings(made).split(seed=0)


def run(folder: Path | None, num_steps: int = STEPS) -> pm.Fit:
    """The fit of all lives."""
    train, test = problem()
    torch.manual_seed(0)
    model = pm.models.MetaSSM(
        train, latent_dim=2, embedding_dim=1, hidden_dim=6, likelihood=pm.likelihoods.Poisson
    )
    guide = pm.guides.DKF(model, hidden_dim=5)
    return pm.fit(
        model, guide, train, num_steps=num_steps, warm_start_steps=WARM, trials_per_step=2, recordings_per_step=2,
        validation=test, validation_every=7, seed=3, device="cpu", checkpoint=folder, checkpoint_every=EVERY,
        progress=False,
    )  # fmt: skip


def digests(fit: pm.Fit) -> dict[str, str]:
    """Of everything that must not differ: all but the seconds that steps took."""
    arrays = {f"model.{k}": v.numpy() for k, v in fit.model.state_dict().items()}
    arrays |= {f"guide.{k}": v.numpy() for k, v in fit.guide.state_dict().items()}
    arrays |= {f"history.{k}": v.values for k, v in fit.history.items() if k != "seconds"}
    arrays["statistics"] = fit.statistics.numpy()
    return {k: f"{v.shape} {hashlib.sha256(v.tobytes()).hexdigest()}" for k, v in arrays.items()}


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: str, number: int) -> None:
    """Let this process die at a point of its ``number``-th write."""
    seen = Counter()

    def due(what: str) -> bool:
        seen[what] += 1
        return seen[what] == number

    class Dying:
        """A file that is not written to the end."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[: 0 if point == "opened" else len(data) // 2])
            self.file.flush()
            die()

    def opened(path, mode):
        file = builtins.open(path, mode)  # noqa: SIM115 - who asked for it closes it
        return Dying(file) if point in ("opened", "half") and due("write") else file

    real = {"fsync": os.fsync, "replace": os.replace, "unlink": Path.unlink}

    def fsync(descriptor):
        is_file = os.path.isfile(f"/proc/self/fd/{descriptor}")
        if point == "unsynced" and is_file and due("write"):
            die()
        real["fsync"](descriptor)

    def replace(source, target):
        now = due("write") if point in ("unnamed", "named") else False
        if now and point == "unnamed":
            die()
        real["replace"](source, target)
        if now:
            die()

    def unlink(path, **options):
        now = due("write") if point in ("unpruned", "pruned") else False
        if now and point == "unpruned":
            die()
        real["unlink"](path, **options)
        if now:
            die()

    writing.open = opened  # type: ignore[attr-defined]  # before the builtin, in this process alone
    os.fsync, os.replace, Path.unlink = fsync, replace, unlink  # type: ignore[assignment, method-assign]


def life(folder: Path | None, out: Path, kill: tuple | None, num_steps: int) -> bool:
    """One process that fits until it ends or is killed; whether it was killed.

    Args:
        kill: ``("moment", seconds)`` or ``(point, number of the write)``.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            warnings.simplefilter("error")
            if kill and kill[0] != "moment":
                die_at(*kill)
            out.write_text(json.dumps(digests(run(folder, num_steps))))
            status = 0
        except BaseException as error:
            print(f"a life ended in {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    if kill and kill[0] == "moment":
        end = time.monotonic() + kill[1]
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.02))
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
        else:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    if status:
        raise SystemExit("a life ended in an error")
    return False


def main(args: argparse.Namespace) -> dict:
    random.seed(args.seed)
    survived: Counter[str] = Counter()
    chains, differing, begin = 0, [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills") as place:
        out = Path(place) / "result.json"
        start = time.monotonic()
        life(None, out, None, args.num_steps)
        whole, expected = time.monotonic() - start, json.loads(out.read_text())
        while survived.total() < args.kills:
            folder = Path(place) / f"run_{chains}"
            out.unlink()
            while not out.exists():
                kill = None
                if survived.total() < args.kills:
                    # Alternately, so that points are met also where a moment hardly ever is one.
                    at = POINTS[survived.total() // 2 % len(POINTS)]
                    kill = (
                        ("moment", random.uniform(0.0, 0.5 * whole))
                        if survived.total() % 2
                        else (at, random.randint(1, 4))
                    )
                if life(folder, out, kill, args.num_steps):
                    assert kill is not None
                    survived[kill[0]] += 1
            found = json.loads(out.read_text())
            differing += [
                f"chain {chains}: {key}" for key in expected | found if expected.get(key) != found.get(key)
            ]
            chains += 1
    report = {
        "kills": survived.total(),
        "fits": chains,
        "by_point": dict(sorted(survived.items())),
        "differing": differing,
        "seconds": round(time.monotonic() - begin, 1),
        "seconds_of_a_whole_fit": round(whole, 2),
    }
    print(json.dumps(report, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--num-steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    sys.exit(bool(main(parser.parse_args())["differing"]))
