"""Saving the state of a running fit, and taking it up again where it stopped."""

from __future__ import annotations

import hashlib
import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from pyro_metassm import specification as specifications
from pyro_metassm import writing
from pyro_metassm.history import History
from pyro_metassm.io._files import printable, said
from pyro_metassm.resuming import check_state

if TYPE_CHECKING:
    from pyro_metassm.result import Fit

FORMAT = 1
KEPT = 2  # states of a run: the last, and one to fall back on


class CheckpointError(OSError):
    """A state of a fit that could not be written; ``.fit`` is the fit so far, usable as any."""

    fit: Fit


class Run:
    """The folder of a running fit: one file a state, the last two kept.

    A file is written under another name, brought to the disk, and then renamed: at any moment the states that are there
    are whole. A lock on the folder, which ends with the process, keeps a second process out.

    Args:
        folder: where; None for a fit that keeps no states, whose methods do nothing.
        specification: of the fit, see :mod:`pyro_metassm.specification`.
    """

    def __init__(self, folder: str | Path | None, specification: dict):
        self.folder = None if folder is None else Path(folder)
        self.specification = specification
        self.lock: IO | None = None

    def __enter__(self) -> Run:
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"checkpoint {self.folder}: needed a folder, got {error}; choose another"
                ) from error
            self.lock = _locked(self.folder)
        return self

    def __exit__(self, *exception) -> None:
        if self.lock is not None:
            self.lock.close()

    def states(self) -> list[Path]:
        """The files of the states, the last first."""
        return [] if self.folder is None else sorted(self.folder.glob("step_*.safetensors"), reverse=True)

    def resume(self, trainer) -> bool:
        """Take up the last state that can be read; False if there is none.

        Raises:
            ValueError: the state of a fit of another specification or format, or none that can be read.
        """
        unreadable: list[ValueError] = []
        for path in self.states():
            try:
                header, tensors = _read(path)
            except _Unreadable as error:
                unreadable.append(error)
                continue
            self._check(path, header)
            try:
                check_state(header, tensors, trainer)
                _restore(trainer, header, tensors)
            except Exception as error:  # of torch and NumPy: a file may say anything
                raise ValueError(f"checkpoint {path}: needed the state of a fit, got {error!r}") from error
            if unreadable:
                warnings.warn(
                    f"{unreadable[0]}; the fit is taken up from {path.name}, step {trainer.step}",
                    stacklevel=3,
                )
            self._warn_of_environment(path, header.get("environment"), trainer.device)
            return True
        if unreadable:
            raise ValueError(
                f"{unreadable[0]}, and no other state is there that can; choose another folder, or delete this one "
                "to start afresh"
            )
        return False

    def save(self, trainer) -> None:
        """Write the trainer's state: parameters, optimiser, schedule, random states, history.

        Raises:
            CheckpointError: a full disk, a folder that is gone: which states are still there.
        """
        if self.folder is None:
            return
        trainer.settle()
        path = self.folder / f"step_{trainer.step:08d}.safetensors"
        try:
            writing.write_part(path, _state(trainer, self.specification))
            writing.commit(path)
        except OSError as error:
            left = ", ".join(state.name for state in self.states()) or "none"
            raise CheckpointError(
                f"checkpoint {path}: could not be written at step {trainer.step}: {error}; states that are still "
                f"there: {left}; make room (or see to the folder) and call the same fit again, which takes up the "
                "last of them; the fit so far is in this error's .fit"
            ) from error
        self._prune(path)

    def _prune(self, last: Path) -> None:
        """Leave the last states; what a file that could not be read says came later than ``last`` is void."""
        states = self.states()
        later = states[: states.index(last)]
        for state in later + states[len(later) + KEPT :]:
            with suppress(OSError):
                state.unlink()

    def _check(self, path: Path, header: dict) -> None:
        found = header.get("specification")
        here = json.loads(json.dumps(self.specification))
        if found != here:
            told = (
                printable(specifications.differences(here, found)) if isinstance(found, dict) else "all of it"
            )
            raise ValueError(
                f"checkpoint {path}: needed the state of this fit, got that of another specification (it differs "
                f"in {told}); choose another folder, or delete this one"
            )

    def _warn_of_environment(self, path: Path, then: Any, device: torch.device) -> None:
        now = specifications.environment(device)
        if isinstance(then, dict) and then != now:
            told = printable(specifications.differences(now, then))
            warnings.warn(
                f"checkpoint {path} was written elsewhere ({told}): the fit goes on, but its numbers may not be those "
                "of an uninterrupted one to the last digit",
                stacklevel=4,
            )


class _Unreadable(ValueError):
    """A damaged file: another may do."""


def _state(trainer, specification: dict) -> bytes:
    """Everything that the next step depends on, in one file, so that no two parts of it can disagree."""
    tensors = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    tensors |= {f"guide.{k}": v for k, v in trainer.guide.state_dict().items()}
    tensors |= {f"last_good.{index}": v for index, v in enumerate(trainer.last_good)}
    optimizer = trainer.optimizer.state_dict()
    for index, state in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors["rng"] = torch.get_rng_state()
    if trainer.device.type == "cuda":
        tensors["rng_cuda"] = torch.cuda.get_rng_state(trainer.device)
    tensors |= {
        f"history.{k}": torch.tensor(v, dtype=torch.float64) for k, v in trainer.history.columns.items()
    }
    header = {
        "format": FORMAT,
        "specification": specification,
        "environment": specifications.environment(trainer.device),
        "step": trainer.step,
        "seconds": trainer.seconds,
        "validated": trainer.validated,
        "skipped": trainer.history.skipped_as_plain(),
        "numpy_rng": trainer.rng.bit_generator.state,
    }
    text = json.dumps(header)
    # Copies: tensors that share memory are saved each on its own.
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    return to_bytes(tensors, {"checkpoint": text, "digest": _digest(text, tensors)})


def _restore(trainer, header: dict, tensors: dict[str, torch.Tensor]) -> None:
    trainer.model.load_state_dict(_part(tensors, "model."))
    trainer.guide.load_state_dict(_part(tensors, "guide."))
    state: dict[int, dict] = {}
    for key, value in _part(tensors, "optimizer.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    # Of Adam's options the rate alone changes, and it is a function of the step; which others there are depends on the
    # device and the version.
    schedule, step = trainer.schedule, header["step"]
    rates = [peak * factor(step) for peak, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    groups = [
        own | {"lr": rate}
        for own, rate in zip(trainer.optimizer.state_dict()["param_groups"], rates, strict=True)
    ]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
    at = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | at)
    trainer.rng.bit_generator.state = header["numpy_rng"]
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng_cuda"], trainer.device)
    columns = {k: v.tolist() for k, v in _part(tensors, "history.").items()}
    trainer.history = History.of_plain(columns, header["skipped"])
    trainer.step, trainer.seconds, trainer.validated = header["step"], header["seconds"], header["validated"]
    for number, kept in enumerate(trainer.last_good):
        kept.copy_(tensors[f"last_good.{number}"])


def _read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Header and tensors, on the CPU.

    Raises:
        _Unreadable: a file that is damaged, or no state of a fit at all.
        ValueError: another version of the format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get("checkpoint", "null")
            header: Any = json.loads(text)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise _Unreadable(
            f"checkpoint {path}: needed a safetensors file of a fit, got one that cannot be read: {said(error)}"
        ) from error
    if not isinstance(header, dict) or metadata.get("digest") != _digest(text, tensors):
        raise _Unreadable(f"checkpoint {path}: needed a safetensors file of a fit, got one that is damaged")
    if header.get("format") != FORMAT:
        got, where = (printable(str(header.get(key))) for key in ("format", "environment"))
        raise ValueError(
            f"checkpoint {path}: needed format {FORMAT}, got {got}, written by another version "
            f"({where}); finish the fit with that one, or choose another folder"
        )
    return header, tensors


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        found.update(name.encode())
        if tensors[name].numel():  # an empty one may have strides that no view takes
            found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _locked(folder: Path) -> IO | None:
    """A lock on the folder; None where the system has none, or where states lie in a folder that cannot be written.

    Raises:
        ValueError: another fit has it, or the folder cannot be written and holds no state: better told now than after
            the start from the data.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115 - open for as long as the fit runs
    except OSError as error:
        if any(folder.glob("step_*.safetensors")):  # a fit that has ended can be read
            return None
        raise ValueError(
            f"checkpoint {folder}: needed a folder that can be written, got {error}; choose another"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(
            f"checkpoint {folder}: needed a folder that no other fit writes into, got one where a fit is running; wait "
            "for it, end it, or choose another folder"
        ) from error
    except OSError:  # a file system without locks
        file.close()
        return None
    return file
