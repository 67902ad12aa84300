"""Saving the state of a running fit, and taking it up again where it stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pyro_metassm.history import History
from pyro_metassm.resuming import check_state

FORMAT = 1


def save(folder: str | Path, trainer) -> None:
    """Write the trainer's state: parameters, optimiser, schedule, random states, history. New file, then rename."""
    trainer.settle()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    tensors |= {f"guide.{k}": v for k, v in trainer.guide.state_dict().items()}
    optimizer = trainer.optimizer.state_dict()
    for index, state in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors["rng"] = torch.get_rng_state()
    if trainer.device.type == "cuda":
        tensors["rng_cuda"] = torch.cuda.get_rng_state(trainer.device)
    tensors |= {
        f"history.{k}": torch.tensor(v, dtype=torch.float64) for k, v in trainer.history.columns.items()
    }
    groups = [
        {k: v for k, v in g.items() if k != "params"} | {"params": g["params"]}
        for g in optimizer["param_groups"]
    ]
    schedule = {k: v for k, v in trainer.schedule.state_dict().items() if isinstance(v, int | float | list)}
    header = {
        "format": FORMAT,
        "specification": specification(trainer),
        "step": trainer.step,
        "seconds": trainer.seconds,
        "groups": groups,
        "schedule": schedule,
        "numpy_rng": trainer.rng.bit_generator.state,
    }
    part = folder / "checkpoint.safetensors.part"
    # safetensors keeps the header beside the tensors: one file, so the two can never disagree.
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
        part,
        {"checkpoint": json.dumps(header)},
    )
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, folder / "checkpoint.safetensors")


def resume(folder: str | Path, trainer) -> bool:
    """Take up the state saved in ``folder``; False if it holds none.

    Raises:
        ValueError: a file that cannot be read, or the state of a fit of another specification.
    """
    path = Path(folder) / "checkpoint.safetensors"
    if not path.exists():
        return False
    header, tensors = _read(path, trainer.device)
    found = header.get("specification")
    if not isinstance(found, dict):
        raise ValueError(f"checkpoint {path}: needed a specification, got {found!r:.100}")
    if found != specification(trainer):
        raise ValueError(
            f"checkpoint {path}: needed the state of this fit, got that of another specification (it differs in "
            f"{_differences(specification(trainer), header['specification'])}); "
            "choose another folder, or delete this one"
        )
    try:
        check_state(header, tensors, trainer)
        _restore(header, tensors, trainer)
    except Exception as error:  # of torch and numpy: files may say anything
        raise ValueError(
            f"checkpoint {path}: needed the state of this fit, got one that cannot be taken up: {error!r}"
        ) from error
    return True


def _restore(header: dict, tensors: dict[str, torch.Tensor], trainer) -> None:
    trainer.model.load_state_dict(_part(tensors, "model."))
    trainer.guide.load_state_dict(_part(tensors, "guide."))
    state: dict[int, dict] = {}
    for key, value in _part(tensors, "optimizer.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    trainer.optimizer.load_state_dict({"state": state, "param_groups": header["groups"]})
    trainer.schedule.load_state_dict(header["schedule"])
    trainer.rng.bit_generator.state = header["numpy_rng"]
    torch.set_rng_state(tensors["rng"].cpu())
    if "rng_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng_cuda"].cpu(), trainer.device)
    trainer.history = History({k: v.tolist() for k, v in _part(tensors, "history.").items()})
    trainer.step, trainer.seconds = header["step"], header["seconds"]
    trainer.keep()


def specification(trainer) -> dict:
    """What must agree between a checkpoint and the fit that takes it up."""
    shapes = {f"model.{k}": list(v.shape) for k, v in trainer.model.state_dict().items()}
    shapes |= {f"guide.{k}": list(v.shape) for k, v in trainer.guide.state_dict().items()}
    return {
        "model": type(trainer.model).__name__,
        "guide": type(trainer.guide).__name__,
        "shapes": shapes,
        "guide_options": {k: str(v) for k, v in trainer.guide.config.items()},
        "recordings": {
            name: [*r.values.shape, zlib.crc32(r.observations.tobytes())] for name, r in trainer.recs.items()
        },
        "options": dataclasses.asdict(trainer.options),
    }


def _differences(a: dict, b: dict) -> str:
    """The entries, one level down, in which two specifications differ."""
    here, there = _flat(a), _flat(b)
    names = sorted(k for k in here | there if here.get(k) != there.get(k))
    return ", ".join(f"{k}: {here.get(k)} here, {there.get(k)} there" for k in names[:5])


def _flat(entries: dict) -> dict:
    """One level of nested entries as ``outer.inner``."""
    nested = {k: v for k, v in entries.items() if isinstance(v, dict)}
    return {k: v for k, v in entries.items() if k not in nested} | {
        f"{k}.{j}": w for k, v in nested.items() for j, w in v.items()
    }


def _read(path: Path, device: torch.device) -> tuple[dict, dict[str, torch.Tensor]]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("checkpoint", "null"))
        tensors = load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {path}: needed a safetensors file of a fit, got one that cannot be read: {error}"
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise ValueError(
            f"checkpoint {path}: needed format {FORMAT}, got {found}; it was written by another version"
        )
    return header, tensors


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
