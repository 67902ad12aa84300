"""A state that is signed as its own and is none of this fit: refused before anything of it is taken."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from fits import parts
from problems import recordings

from pyro_metassm import checkpoints
from pyro_metassm.checkpoints import Run
from pyro_metassm.resuming import check_state
from pyro_metassm.trainer import Options, Trainer

STEP = 3
OPTIONS = Options(6, 2, None, 0.01, False, 0, 1.0, 0.0, 0)


def trainer() -> Trainer:
    recs = recordings()
    model, guide = parts(recs)
    guide.read_in.start(recs, model.observation.kinds)
    return Trainer(model, guide, recs, OPTIONS, torch.device("cpu"))


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> tuple[dict, dict]:
    """Header and tensors after three steps, of which the second is said to have been skipped."""
    folder = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng([]), Run(folder, {}) as run:
        running = trainer()
        for _ in range(STEP):
            running.take_step()
        running.validate(running.recs)
        run.save(running)
        header, tensors = checkpoints._read(run.states()[0])
    header["skipped"] = [{"step": 2, "what": "loss", "trials": {"a": [0]}}]
    return header, tensors


def test_a_state_of_the_fit_is_taken(state):
    check_state(*state, trainer())


def header_with(name: str, value) -> Callable:
    def change(header, tensors):
        *outer, last = name.split(".")
        for key in outer:
            header = header[int(key) if key.isdigit() else key]
        header[last] = value

    return change


def tensor_with(name: str, value) -> Callable:
    def change(header, tensors):
        tensors[name] = value(tensors.get(name)) if callable(value) else value

    return change


def without(name: str) -> Callable:
    return lambda header, tensors: tensors.pop(name)


SKIPPED = {"step": 2, "what": "loss", "trials": {"a": [0]}}
COLUMN = torch.zeros(STEP, dtype=torch.float64)
CHANGES = {
    "step: needed": [header_with("step", value) for value in (-1, True, 3.0, "3", None, 7)],
    "history.elbo: needed at most 2": [header_with("step", 2)],
    "validated: needed": [header_with("validated", value) for value in ("x", -1.0, math.nan, True, [1])],
    "skipped: needed a list": [header_with("skipped", value) for value in (None, {}, 5)],
    "skipped: needed step, what and trials": [
        header_with("skipped", [value]) for value in (5, {}, SKIPPED | {"x": 1})
    ],
    "skipped: needed steps up to 3": [
        header_with("skipped", [SKIPPED | {"step": value}]) for value in (0, -2, 4, "2", 10**400)
    ]
    + [header_with("skipped", [SKIPPED] * 1000)],
    "skipped: needed one of loss": [header_with("skipped", [SKIPPED | {"what": v}]) for v in ("it", 1, [])],
    "skipped: needed trials": [
        header_with("skipped", [SKIPPED | {"trials": value}])
        for value in (3, {"stranger": [0]}, {"a": [10**9]}, {"a": [-1]}, {"a": ["0"]}, {"a": 0})
    ],
    "history.elbo: needed": [
        tensor_with("history.elbo", value)
        for value in (
            torch.zeros(4, dtype=torch.float64),
            COLUMN[:2],
            COLUMN.to(torch.complex64),
            COLUMN[:, None],
        )
    ],
    "history.validation_elbo: needed at most": [
        tensor_with("history.validation_elbo", torch.zeros(4, dtype=torch.float64))
    ],
    "needed a column of a history": [
        tensor_with(f"history.{name}", COLUMN) for name in ("step", "kl_a/b", "x")
    ],
    "history: needed elbo": [without("history.elbo")],
    "last_good.0: needed": [
        without("last_good.0"),
        tensor_with("last_good.0", torch.zeros(())),
        tensor_with("last_good.0", lambda own: own.to(torch.complex64)),
        tensor_with("last_good.0", lambda own: own * math.nan),
    ],
    "no more and no less": [
        tensor_with("last_good.999", torch.zeros(2)),
        tensor_with("stranger", torch.zeros(2)),
        without("rng"),
        without("optimizer.0.exp_avg"),
        tensor_with("optimizer.0.more", torch.zeros(2)),
        tensor_with("optimizer.x.step", torch.zeros(())),
        tensor_with("optimizer.999.step", torch.zeros(())),
    ],
    "rng: needed": [tensor_with("rng", torch.zeros(3, dtype=torch.uint8))],
    "optimizer.0.step: needed": [
        tensor_with("optimizer.0.step", torch.tensor(value)) for value in (-1.0, 4.0, [1.0], math.inf)
    ],
    "optimizer.0.exp_avg_sq: needed": [
        tensor_with("optimizer.0.exp_avg_sq", lambda own: own - 1.0),
        tensor_with("optimizer.0.exp_avg_sq", torch.zeros(1, 1)),
    ],
}


@pytest.mark.parametrize(
    ("message", "number"), [(m, k) for m, those in CHANGES.items() for k in range(len(those))]
)
def test_what_the_fit_could_not_go_on_from_is_refused(state, message, number):
    header, tensors = copy.deepcopy(state[0]), dict(state[1])
    CHANGES[message][number](header, tensors)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        check_state(header, tensors, trainer())


def test_a_buffer_may_be_meant_to_be_infinite(state):
    """A bound in a model of the user's; one that the fit has finite is still refused."""
    header, tensors = state
    bounded, other = trainer(), trainer()
    bounded.model.register_buffer("limits", torch.tensor([-math.inf, 0.0]))
    other.model.register_buffer("limits", torch.zeros(2))
    more = tensors | {"model.limits": bounded.model.limits}
    check_state(header, more, bounded)
    with pytest.raises(ValueError, match=r"model\.limits: needed finite numbers"):
        check_state(header, more, other)


def test_an_empty_tensor_has_a_digest_whatever_its_strides():
    """A file may have one: it is refused by name, and must not stop the check of the digest."""
    empty = torch.empty_strided((0,), (0,), dtype=torch.int64)
    assert checkpoints._digest("", {"x": empty}) == checkpoints._digest("", {"x": torch.zeros(0)})
