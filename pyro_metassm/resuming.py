"""What a checkpoint must have in common with the fit that takes it up, beyond the specification."""

from __future__ import annotations

import math
from typing import Any

import torch

from pyro_metassm.history import LOOKED_AT
from pyro_metassm.recordings import Recordings

VALIDATION = "validation_elbo"  # a column that ends with the last step that was validated
COLUMNS = {"elbo", "log_likelihood", "gradient_norm", "learning_rate", "seconds", VALIDATION}
OF_ADAM = ("step", "exp_avg", "exp_avg_sq")


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
    _alike("numpy_rng", header.get("numpy_rng"), trainer.rng.bit_generator.state)
    _alike("seconds", header.get("seconds"), trainer.seconds)
    if header.get("validated", "nothing") is not None:
        _alike("validated", header.get("validated"), 0.0)
    _check_skipped(header.get("skipped"), step, trainer.recs)
    history = {k.removeprefix("history."): v for k, v in tensors.items() if k.startswith("history.")}
    _check_history(history, step)
    moments = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
    _check_optimizer(moments, step, trainer)
    known = {f"last_good.{index}": value for index, value in enumerate(trainer.last_good)}
    for part in ("model", "guide"):
        known |= {f"{part}.{k}": v for k, v in getattr(trainer, part).state_dict().items()}
    known["rng"] = known["rng_cuda"] = torch.get_rng_state()
    rest = {k: v for k, v in tensors.items() if not k.startswith(("history.", "optimizer."))}
    if wrong := (rest.keys() ^ known.keys()) - {"rng_cuda"}:
        raise ValueError(f"{min(wrong)}: needed the tensors of this fit, no more and no less")
    for key, value in rest.items():
        own = known[key]
        if value.dtype != own.dtype or (value.shape != own.shape and key != "rng_cuda"):
            raise ValueError(f"{key}: needed {own.dtype} of shape {tuple(own.shape)}, got {_kind(value)}")
        # Some numbers may be meant to be infinite, such as bounds in a buffer of the user's.
        if value.is_floating_point() and bool(own.isfinite().all()) and not bool(value.isfinite().all()):
            raise ValueError(f"{key}: needed finite numbers, got others")


def _check_skipped(found: Any, step: int, recs: Recordings) -> None:
    """Raise ``ValueError`` where this is not what :meth:`History.skipped_as_plain` gives after so many steps."""
    if not isinstance(found, list):
        raise ValueError(f"skipped: needed a list, got {found!r:.100}")
    before = 0
    for entry in found:
        if not isinstance(entry, dict) or entry.keys() != {"step", "what", "trials"}:
            raise ValueError(f"skipped: needed step, what and trials, got {entry!r:.100}")
        if type(entry["step"]) is not int or not before < entry["step"] <= step:
            raise ValueError(f"skipped: needed steps up to {step} in order, got {entry['step']!r:.100}")
        if not isinstance(entry["what"], str) or entry["what"] not in LOOKED_AT:
            raise ValueError(f"skipped: needed one of {', '.join(LOOKED_AT)}, got {entry['what']!r:.100}")
        if not isinstance(entry["trials"], dict):
            raise ValueError(f"skipped: needed trials by recording, got {entry['trials']!r:.100}")
        for name, trials in entry["trials"].items():
            number = recs[name].num_trials if name in recs else 0
            if not isinstance(trials, list) or not all(type(k) is int and 0 <= k < number for k in trials):
                raise ValueError(f"skipped: needed trials of recordings, got {name!r:.40}: {trials!r:.60}")
        before = entry["step"]


def _check_history(columns: dict[str, torch.Tensor], step: int) -> None:
    """Raise ``ValueError`` where these are not the columns of a :class:`History` after so many steps."""
    for name, column in columns.items():
        if name not in COLUMNS and (not name.startswith("kl_") or "/" in name):
            raise ValueError(f"history.{name}: needed a column of a history, got another")
        if column.dtype != torch.float64 or column.dim() != 1 or len(column) > step:
            raise ValueError(f"history.{name}: needed at most {step} float64 numbers, got {_kind(column)}")
        if name != VALIDATION and len(column) < step:
            raise ValueError(f"history.{name}: needed {step} numbers, got {_kind(column)}")
    if step and (missing := COLUMNS - {VALIDATION} - columns.keys()):
        raise ValueError(f"history: needed {', '.join(sorted(missing))}, got none")


def _check_optimizer(tensors: dict[str, torch.Tensor], step: int, trainer) -> None:
    """Raise ``ValueError`` where these are not what Adam knows of the trainer's parameters."""
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    needed = {f"{key.partition('.')[0]}.{name}" for key in tensors for name in OF_ADAM}
    indices = {str(index) for index in range(len(parameters))}
    for key in tensors.keys() | needed:
        index, _, name = key.partition(".")
        if key not in tensors or name not in OF_ADAM or index not in indices:
            raise ValueError(
                f"optimizer.{key}: needed {', '.join(OF_ADAM)} of a parameter, no more and no less"
            )
        value, parameter = tensors[key], parameters[int(index)]
        dtype, shape = parameter.dtype, parameter.shape
        if name == "step":  # in the default dtype of the process where Adam is not in one pass
            dtype, shape = (torch.float64 if value.dtype == torch.float64 else torch.float32), torch.Size()
        if value.dtype != dtype or value.shape != shape:
            raise ValueError(f"optimizer.{key}: needed {dtype} of shape {tuple(shape)}, got {_kind(value)}")
        if not bool(value.isfinite().all()) or (name != "exp_avg" and bool((value < 0).any())):
            raise ValueError(f"optimizer.{key}: needed finite numbers, and no negative ones, got others")
        if name == "step" and float(value) > step:
            raise ValueError(f"optimizer.{key}: needed at most {step}, got {float(value)}")


def _kind(value: torch.Tensor) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}"


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
    elif type(found) not in (int, type(like)) or not math.isfinite(found) or (found < 0 <= like):
        raise ValueError(f"{where}: needed a finite number such as {like!r}, got {found!r:.100}")
