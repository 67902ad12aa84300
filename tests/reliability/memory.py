"""Memory of a fit over its steps: `python tests/reliability/memory.py [--num-steps 10000] [--json FILE]`.

The resident memory of the process is read as the fit goes on, after a tenth of the steps, in which caches fill and the
allocator finds its size. From there on the history may grow: some dozen numbers a step, as Python has them. Exit status
1 if memory grows by more than that and 8 MiB.
"""

import argparse
import json
import os
import sys
from pathlib import Path

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"

import numpy as np
import torch

import pyro_metassm as pm
from pyro_metassm.trainer import Trainer

SPARE = 8 * 2**20  # bytes
OF_A_NUMBER = 40  # bytes: a float and its place in a list, with room to grow


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(num_steps: int, folder: str | None = None) -> dict:
    """A fit of small recordings, its memory read some hundred times."""
    train, test = pm.simulate.limit_cycles(
        [2.5, 4.0, 5.5], num_trials=16, num_steps=25, num_neurons=8
    ).split()
    torch.manual_seed(0)
    model = pm.models.MetaSSM(train, latent_dim=2, embedding_dim=1, hidden_dim=16)
    seen: list[int] = []
    original = Trainer.take_step

    def take_step(self):
        original(self)
        if self.step % max(1, num_steps // 200) == 0:
            seen.append(resident())

    Trainer.take_step = take_step  # type: ignore[method-assign]
    try:
        fit = pm.fit(
            model, pm.guides.DKF(model, hidden_dim=8), train, num_steps=num_steps, warm_start_steps=20,
            trials_per_step=4, validation=test, validation_every=max(1, num_steps // 20), checkpoint=folder,
            checkpoint_every=max(1, num_steps // 20), device="cpu", progress=False,
        )  # fmt: skip
    finally:
        Trainer.take_step = original  # type: ignore[method-assign]
    after = np.array(seen[len(seen) // 10 :])
    columns = len(fit.history.data_vars)
    return {
        "num_steps": num_steps,
        "mib_at_a_tenth": round(after[0] / 2**20, 1),
        "mib_at_the_end": round(after[-1] / 2**20, 1),
        "mib_at_most": round(after.max() / 2**20, 1),
        "grown_bytes": int(after[-1] - after[0]),
        "allowed_bytes": int(SPARE + 0.9 * num_steps * columns * OF_A_NUMBER),
    }


if __name__ == "__main__":
    import tempfile

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-steps", type=int, default=10_000)
    parser.add_argument("--json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(args.num_steps, folder)
    print(json.dumps(report, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    sys.exit(report["grown_bytes"] > report["allowed_bytes"])
