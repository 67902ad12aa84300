"""Fits in threads and in processes have the results that they have alone; every program runs while it is alone."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from fits import QUICK, assert_same, parts

import pyro_metassm as pm
from pyro_metassm import _machine as machine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recs():
    return pm.simulate.limit_cycles([2.5, 5.0, 4.0], num_trials=4, num_steps=8, num_neurons=(3, 4))


@pytest.fixture(scope="module")
def pairs(recs):
    return [parts(recs.drop(["w=4"]), seed=seed) for seed in (0, 1)]


def some_work(recs, pair, seed):
    """A fit and what is done with it."""
    known = recs.drop(["w=4"])
    fit = pm.fit(*pair, known, **QUICK | {"num_steps": 4}, seed=seed)
    tree = pm.posterior(fit, known, num_samples=5, seed=seed)
    ahead = pm.forecast(fit, known, context=4, horizon=3, num_samples=5, seed=seed)
    return fit, [tree["w=5/posterior/rates"].values, ahead["w=5/predictions/latents"].values]


def test_two_threads_give_what_each_gives_alone(recs, pairs):
    alone = [some_work(recs, pair, seed) for seed, pair in enumerate(pairs)]
    before, interval = torch.get_rng_state(), sys.getswitchinterval()
    start = threading.Barrier(2)

    def work(seed):
        start.wait()
        return some_work(recs, pairs[seed], seed)

    sys.setswitchinterval(1e-4)  # threads change places as often as they can
    try:
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(work, (0, 1)))
    finally:
        sys.setswitchinterval(interval)
    for one, other in zip(alone, together, strict=True):
        assert_same(one[0], other[0])
        assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip(one[1], other[1], strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_every_handler_of_pyro_is_opened_alone(recs, pairs, monkeypatch, tmp_path):
    """The proof that does not depend on when threads change places."""
    enter, outside = pyro.poutine.messenger.Messenger.__enter__, []

    def checked(self):
        if not machine._lock._is_owned():
            outside.append(type(self).__name__)
        return enter(self)

    monkeypatch.setattr(pyro.poutine.messenger.Messenger, "__enter__", checked)
    known = recs.drop(["w=4"])
    fit, _ = some_work(recs, pairs[0], 0)
    new = recs.select(["w=4"])
    pm.adapt(fit, new, num_steps=1, num_starts=2, search_steps=2, progress=False)
    fit.save(tmp_path / "fit")
    fit = pm.load(tmp_path / "fit")
    pm.posterior(fit, known, num_samples=3, log_likelihood=True, predictive=True)
    pm.prior_predictive(fit.model, known, num_samples=3)
    pm.metrics.reconstruction_r2(fit, known, num_samples=2)
    pm.leave_future_out(fit, known, origins=[4], horizon=2, num_samples=2)
    pm.compare({"a": fit}, known, num_samples=25)
    fit.model.describe()
    pm.guides.check(fit.model, fit.guide, known)
    pm.restarts.held_out_elbo(fit, known)
    assert outside == []


def test_a_forked_process_does_not_wait_for_a_thread_that_is_not_there():
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    # In a process of its own, whose only thread forks while another one of it holds the lock.
    code = (
        "import os, sys, threading; from pyro_metassm import _machine as machine\n"
        "held, done = threading.Event(), threading.Event()\n"
        "def hold():\n"
        "    with machine.alone(): held.set(); done.wait(30)\n"
        "thread = threading.Thread(target=hold); thread.start(); held.wait()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if machine._lock.acquire(timeout=5) else 1)\n"
        "status = os.waitpid(child, 0)[1]; done.set(); thread.join(); sys.exit(os.waitstatus_to_exitcode(status))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=_environment(), timeout=300
    )
    assert ran.returncode == 0


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_several_processes_at_once_give_what_one_gives(tmp_path):
    """The libraries that are compiled at first use lie in one folder, which all of them fill at once."""
    code = (
        "import sys, json, hashlib, torch, pyro_metassm as pm; from fits import QUICK, parts, state\n"
        "torch.set_num_threads(1)\n"
        "recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=4, num_steps=8, num_neurons=(3, 4))\n"
        "fit = pm.fit(*parts(recs), recs, **QUICK)\n"
        "text = b''.join(v.numpy().tobytes() for v in state(fit.model, fit.guide).values())\n"
        "print(json.dumps(hashlib.sha256(text).hexdigest()))\n"
    )

    def start(cache):
        call = [sys.executable, "-c", code]
        environment = _environment() | {"XDG_CACHE_HOME": str(tmp_path / cache)}
        return subprocess.Popen(call, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    first = json.loads(start("alone").communicate(timeout=300)[0])
    together = [start("shared") for _ in range(3)]
    assert [json.loads(process.communicate(timeout=300)[0]) for process in together] == [first] * 3
