"""What a checkpoint must have in common with the fit that takes it up, beyond the specification."""

from __future__ import annotations

import math
from typing import Any

import torch


def check_state(header: dict, tensors: dict[str, torch.Tensor], trainer) -> None:
    """Refuse a state that the trainer could not go on from, before anything is taken from it.

    A file may say anything: optimiser, schedule and generators take most of it and stop many steps later, or never.

    Args:
        header: of the checkpoint, plain values.
        tensors: of the checkpoint.
        trainer: that is to go on.

    Raises:
        ValueError: what is not as the trainer has it.
    """
    step, most = header.get("step"), trainer.options.num_steps
    if type(step) is not int or not 0 <= step <= most:
        raise ValueError(f"step: needed an integer from 0 to {most}, got {step!r}")
    schedule = {k: v for k, v in trainer.schedule.state_dict().items() if isinstance(v, int | float | list)}
    _alike("groups", header.get("groups"), trainer.optimizer.state_dict()["param_groups"])
    _alike("schedule", header.get("schedule"), schedule)
    _alike("numpy_rng", header.get("numpy_rng"), trainer.rng.bit_generator.state)
    _alike("seconds", header.get("seconds"), trainer.seconds)
    parameters = dict(enumerate(p for g in trainer.optimizer.param_groups for p in g["params"]))
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if part != "history" and value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{key}: needed finite numbers, got others")
        if part == "history" and (value.dim() != 1 or len(value) > step):
            raise ValueError(f"{key}: needed at most {step} numbers, got shape {tuple(value.shape)}")
        if part == "optimizer":
            index, _, name = rest.partition(".")
            parameter = parameters.get(int(index))
            if parameter is None or (name != "step" and value.shape != parameter.shape):
                raise ValueError(f"{key}: needed the state of a parameter, got shape {tuple(value.shape)}")


def _alike(where: str, found: Any, like: Any) -> None:
    """Raise ``ValueError`` where plain values are not of the kinds and sizes of others."""
    if isinstance(like, dict):
        if not isinstance(found, dict) or found.keys() != like.keys():
            raise ValueError(f"{where}: needed {sorted(like)}, got {found!r:.100}")
        for key in like:
            _alike(f"{where}.{key}", found[key], like[key])
    elif isinstance(like, list | tuple):
        if not isinstance(found, list) or len(found) != len(like):
            raise ValueError(f"{where}: needed a list of {len(like)}, got {found!r:.100}")
        for number, (one, other) in enumerate(zip(found, like, strict=True)):
            _alike(f"{where}[{number}]", one, other)
    elif isinstance(like, bool) or not isinstance(like, int | float):
        if type(found) is not type(like) or (isinstance(like, str) and found != like):
            raise ValueError(f"{where}: needed {like!r}, or another of its kind, got {found!r:.100}")
    elif type(found) not in (int, float) or not math.isfinite(found) or (found < 0 <= like):
        raise ValueError(f"{where}: needed a finite number, got {found!r:.100}")
