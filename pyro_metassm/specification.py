"""What decides the numbers of a fit: what must agree between a state that was saved and the fit that takes it up."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.metadata
import inspect
import math
import platform
import textwrap
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_metassm.recordings import Recording, Recordings

OF_RECORDINGS = ("values", "mask", "lengths", "inputs", "condition", "neuron_ids", "held_out_neurons")
LIBRARIES = ("pyro_metassm", "torch", "pyro", "builtins", "abc", "typing")


def specification(
    model: nn.Module,
    guide: nn.Module,
    recs: Recordings,
    options: Any,
    validation: Recordings | None = None,
    validation_every: int | None = None,
) -> dict[str, Any]:
    """The specification of a fit, as JSON has it.

    Model and guide are taken as they are before anything is trained. The values of parameters that are trained do not
    count, since a state that is taken up holds them; those of parameters that are not, and of buffers, do. So do the
    sources of classes that are not the library's, without comments and layout.

    Args:
        model, guide: what is fitted.
        recs: the training data.
        options: of the fit, a dataclass of plain values.
        validation, validation_every: what is validated on, and how often; no part of a fit without.
    """
    found: dict[str, Any] = {"options": plain(_chosen(options)), "recordings": of_recordings(recs)}
    found["order of recordings"] = list(recs.names)
    found["validation"] = (
        None if validation is None else {"every": validation_every} | of_recordings(validation)
    )
    for what, module in (("model", model), ("guide", guide)):
        found[what] = plain(type(module))
        found[f"{what}.config"] = plain(_configured(module))
        found[f"{what}.attributes"] = _attributes(module)
        found[f"{what}.trained"] = {
            name: [str(p.dtype), list(p.shape)] for name, p in module.named_parameters() if p.requires_grad
        }
        found[f"{what}.fixed"] = {
            name: _digest(value)
            for name, value in module.state_dict().items()
            if name not in found[f"{what}.trained"]
        }
        found[f"{what}.classes"] = _sources(module)
    return found


def _chosen(options: Any) -> dict[str, Any]:
    """What was chosen: an option that has a default came later, and runs that know nothing of it go on."""
    return {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    }


def _configured(module: nn.Module) -> dict[str, Any]:
    """The arguments of its constructor that were chosen, as :func:`_chosen` has it."""
    defaults = {
        name: parameter.default
        for cls in reversed(type(module).__mro__)
        for name, parameter in inspect.signature(cls.__init__).parameters.items()  # type: ignore[misc]
    }
    config = getattr(module, "config", {})
    return {
        key: value
        for key, value in config.items()
        if key not in defaults or plain(value) != plain(defaults[key])
    }


def environment(device: torch.device) -> dict[str, str]:
    """What else the last digits depend on: another one is told, not refused."""
    found = {"device": device.type, "machine": platform.machine(), "torch": str(torch.__version__)}
    for name in ("numpy", "pyro-ppl", "pyro-metassm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
            found[name] = "unknown"
    return found


def differences(here: dict, there: dict, limit: int = 5) -> str:
    """Entries in which two specifications differ, for a message."""
    one, other = _flat(here), _flat(there)
    names = [key for key in one | other if one.get(key) != other.get(key)]
    told = [f"{key}: {_short(one.get(key))} here, {_short(other.get(key))} there" for key in names[:limit]]
    return ", ".join(told) + (f", and {len(names) - limit} more" if len(names) > limit else "")


def plain(value: Any) -> Any:
    """A value as JSON has it; what JSON has nothing for is told by its type."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, type):
        families = plain(value.families) if getattr(value, "made_by_of", False) else None  # type: ignore[attr-defined]
        name = f"{value.__module__}.{value.__qualname__}"
        return name if families is None else [name, families]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Tensor | np.ndarray):
        return _digest(value)
    return type(value).__name__


def of_recordings(recs: Recordings) -> dict[str, str]:
    """A digest by recording of all that a fit and its scores depend on."""
    return {name: _of_recording(recording) for name, recording in recs.items()}


def _of_recording(recording: Recording) -> str:
    whole = hashlib.blake2b(repr(float(recording.bin_width)).encode(), digest_size=8)
    for name in OF_RECORDINGS:
        value = getattr(recording, name)
        whole.update(f"{name} {'none' if value is None else _digest(value)}".encode())
    return f"{recording.values.shape} {whole.hexdigest()}"


def _digest(value: Tensor | np.ndarray) -> str:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    found = hashlib.blake2b(f"{value.dtype.str} {value.shape}".encode(), digest_size=8)
    found.update(repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes())
    return found.hexdigest()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Plain public attributes of a module and of those in it, but for what its configuration says."""
    said = {"": getattr(module, "config", {})}
    return {
        f"{prefix}.{name}".lstrip("."): plain(value)
        for prefix, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str | list | tuple | dict | type)
        and name[0] != "_"
        and (prefix, name) != ("", "config")
        and not (name in said.get(prefix, {}) and plain(value) == plain(said[prefix][name]))
        and name != "training"
    }


def _sources(module: nn.Module) -> dict[str, str | None]:
    """Digests of the sources of the classes that a module is made of and that are the user's."""
    classes = {cls for part in module.modules() for cls in type(part).__mro__}
    return {
        f"{cls.__module__}.{cls.__qualname__}": _source(cls)
        for cls in classes
        if cls.__module__.split(".")[0] not in LIBRARIES
    }


def _source(cls: type) -> str | None:
    try:
        text = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    except (OSError, TypeError, SyntaxError):  # typed into a prompt
        return None
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _flat(entries: dict) -> dict:
    """One level of nested entries as ``outer.inner``."""
    found: dict[str, Any] = {}
    for outer, value in entries.items():
        inside = value if isinstance(value, dict) else {"": value}
        found |= {f"{outer}.{inner}".rstrip("."): entry for inner, entry in inside.items()}
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
