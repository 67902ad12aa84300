"""Fits as files: a folder with `fit.safetensors` (numbers) and `fit.json` (how to rebuild the classes). No
pickle.

What is read is data, never code: classes are looked up by name in this library and among those that the
caller passes, nothing named in a file is imported, and no more is allocated than the file itself holds.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from pyro_metassm import _checks as checks
from pyro_metassm import guides, likelihoods, models, writing
from pyro_metassm._budget import Budget
from pyro_metassm.guides import encoders
from pyro_metassm.io._files import said
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.rebuilding import build, check_config
from pyro_metassm.result import Fit

FORMAT = 1
TENSORS, HEADER = "fit.safetensors", "fit.json"
LARGEST_HEADER = 16 * 2**20  # bytes; as Python objects some twenty times as much
# Tensors that constructors may make beyond some for each one in the file and each recording.
MOST_CALLS = 10_000
# Numbers that constructors may make beyond those in the file: temporaries, tables that are not saved.
SPARE = 2**24
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
PLAIN = "None, booleans, numbers, text, classes, and lists, tuples and dicts of these"


def save(fit: Fit, path: str | os.PathLike[str]) -> None:
    """Write a fit into a folder, as :func:`load` reads it.

    The files are written beside the old ones and then renamed, `fit.json` last; other files of the folder
    stay.

    Args:
        fit: the fit. ``model.config`` and ``guide.config`` hold the arguments of their constructors.
        path: the folder, which is made if it is not there.

    Raises:
        ValueError: a model or guide that cannot be rebuilt from its ``config`` (nothing is written), or
            ``attrs`` of other than plain values.

    Example:
        >>> import tempfile
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> folder = Path(tempfile.mkdtemp()) / "fit"
        >>> save(fit, folder)
        >>> load(folder)
        Fit(MetaSSM with DKF, 2 recordings, latent_dim=2, embedding_dim=1, 5 steps)
    """
    neurons = fit.model.neurons
    for what, module in (("model", fit.model), ("guide", fit.guide)):
        check_config(what, module)
    tensors = {f"model.{key}": value for key, value in fit.model.state_dict().items()}
    tensors |= {f"guide.{key}": value for key, value in fit.guide.state_dict().items()}
    # Built anew once, so that a fit that could not be loaded is noticed while it is still there.
    of_modules = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
    specifications = [(type(module), module.config) for module in (fit.model, fit.guide)]
    _match(of_modules, *_build(neurons.names, neurons.num_neurons, specifications), fit.dtype)
    tensors["statistics"] = fit.statistics
    variables = {}
    for name, variable in fit.history.variables.items():
        where = f"history[{name!r}]"
        if variable.dtype.kind not in "fiub":
            raise ValueError(f"{where}: needed numbers to save, got {variable.dtype}; drop it first")
        tensors[f"history.{name}"] = torch.from_numpy(np.array(variable.values))
        entry = {"dims": list(variable.dims), "coordinate": name in fit.history.coords}
        variables[str(name)] = entry | {"attrs": _encode(variable.attrs, where)}
    header = {
        "format": FORMAT,
        "versions": _versions(),
        "model": _encode_class(type(fit.model)) | {"config": _encode(fit.model.config, "model.config")},
        "guide": _encode_class(type(fit.guide)) | {"config": _encode(fit.guide.config, "guide.config")},
        "names": list(neurons.names),
        "num_neurons": list(neurons.num_neurons),
        "dtype": str(fit.dtype).removeprefix("torch."),
        "seed": int(fit.seed),
        "attrs": _encode(fit.attrs, "attrs"),
        "history": {"variables": variables, "attrs": _encode(fit.history.attrs, "history.attrs")},
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Copies: tensors that share memory are saved each on its own.
        data = to_bytes({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()})
        header["sha256"] = hashlib.sha256(data).hexdigest()
        text = json.dumps(header, indent=1, allow_nan=False)
        writing.write_part(folder / TENSORS, data)
        writing.write_part(folder / HEADER, text.encode())
        # Cut off between these two, the folder holds all of the new save, its header under the name of a part.
        writing.commit(folder / TENSORS)
        writing.commit(folder / HEADER)
    except OSError as error:
        if writing.part_of(folder / TENSORS).exists():  # what was there before still is
            for name in (TENSORS, HEADER):
                writing.part_of(folder / name).unlink(missing_ok=True)
        raise OSError(
            f"{folder}: the fit could not be saved: {error}; a fit that was there still is"
        ) from error


def load(
    path: str | os.PathLike[str], *, custom: Iterable[type] = (), device: str | torch.device = "cpu"
) -> Fit:
    """Read a fit that :func:`save` has written.

    Args:
        path: the folder.
        custom: your own classes that the fit is made of (model, guide, likelihood, encoder); those of the
            library are known. They are found by name, so an edited class of the same name takes the place of
            the old one.
        device: where to; "auto" takes a GPU where there is one.

    Returns:
        The fit, as it was saved: bit-equal parameters, in eval mode.

    Raises:
        FileNotFoundError: no fit there.
        ValueError: naming the folder: files that are damaged, of another save, of a newer version of the
            format, or that claim sizes which they do not hold; a class that is neither the library's nor in
            ``custom``.
    """
    folder = Path(path)
    for path in (folder / HEADER, folder / TENSORS):
        if not path.is_file() and not (path.name == HEADER and writing.part_of(path).is_file()):
            raise FileNotFoundError(f"{path}: no such file; needed a folder that fit.save wrote")
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    try:
        return _load(folder, _custom(custom), chosen)
    except Exception as error:  # a header may bring out any error in what it describes
        raise ValueError(f"{folder}: no fit that can be loaded: {said(error)}") from error


def _load(folder: Path, custom: Mapping[str, type], device: torch.device) -> Fit:
    digest, found = _digest(folder / TENSORS), []
    for path in (folder / HEADER, writing.part_of(folder / HEADER)):
        if path.is_file():
            found.append(_read_header(path))
            if _get(found[-1], "sha256", str) == digest:
                break
    else:
        raise ValueError(f"{TENSORS} is damaged, or of another save than {HEADER}; copy the folder again")
    header = found[-1]
    names = [checks.name_of(name) for name in _get(header, "names", list)]
    num_neurons = _get(header, "num_neurons", list)
    if len(set(names)) < len(names) or not all(type(count) is int and count > 0 for count in num_neurons):
        raise ValueError(f"{HEADER}: needed different names and numbers of neurons above 0, got others")
    specifications = []
    for what in ("model", "guide"):
        entry = _get(header, what, dict)
        cls = _decode({key: entry.get(key) for key in ("class", "module")}, custom)
        is_part = issubclass(cls, (likelihoods.Likelihood, encoders.EmbeddingEncoder))
        if is_part or issubclass(cls, models.MetaSSM) != (what == "model"):
            raise ValueError(f"{HEADER}: needed the class of a {what}, got {cls.__name__}: cannot be built")
        specifications.append((cls, _dict(entry, "config", custom)))
    with safe_open(folder / TENSORS, framework="pt", device=str(device)) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        claimed = {key: (tuple(s.get_shape()), DTYPES.get(s.get_dtype())) for key, s in slices.items()}
        budget = SPARE + 8 * sum(math.prod(shape) for shape, _ in claimed.values())
        model, guide = _build(
            names, num_neurons, specifications, budget, MOST_CALLS + 20 * len(claimed) + 50 * len(names)
        )
        dtype = PRECISIONS.get(_get(header, "dtype", str))
        if dtype is None:
            raise ValueError(f"{HEADER}: needed dtype float32 or float64, got {header['dtype']!r}")
        of_modules = {k: v for k, v in claimed.items() if k.startswith(("model.", "guide."))}
        _match(of_modules, model, guide, dtype)
        shape, its_dtype = claimed.get("statistics", ((), None))
        if its_dtype != dtype or shape[:1] != (len(names),):
            raise ValueError(f"{TENSORS}: needed statistics ({len(names)}, ...) of {dtype}, got others")
        for prefix, module in (("model.", model), ("guide.", guide)):
            module.to(device)
            parts = {k.removeprefix(prefix): file.get_tensor(k) for k in of_modules if k.startswith(prefix)}
            module.load_state_dict(parts)
            module.eval()
        history = _history(_get(header, "history", dict), file, custom)
        statistics = file.get_tensor("statistics")
    attrs = _dict(header, "attrs", custom)
    return Fit(model, guide, history, statistics, seed=_get(header, "seed", int), attrs=attrs)


def _read_header(path: Path) -> dict:
    if path.stat().st_size > LARGEST_HEADER:
        raise ValueError(f"{HEADER}: needed at most {LARGEST_HEADER} bytes, got more")
    header = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(header, dict) or type(header.get("format")) is not int:
        raise ValueError(f"{HEADER}: needed an object with a number `format`, got something else")
    if header["format"] > FORMAT:
        raise ValueError(
            f"{HEADER}: needed format {FORMAT} or older, got {header['format']}, written by "
            f"{header.get('versions')}; update pyro-metassm"
        )
    return header


def _history(entry: dict, file: Any, custom: Mapping[str, type]) -> xr.Dataset:
    parts: tuple[dict, dict] = ({}, {})
    for name, variable in _get(entry, "variables", dict).items():
        values = file.get_tensor(f"history.{name}").cpu().numpy()
        attrs = _dict(variable, "attrs", custom)
        parts[bool(variable.get("coordinate"))][name] = (_get(variable, "dims", list), values, attrs)
    return xr.Dataset(*parts, attrs=_dict(entry, "attrs", custom))


# ---- building --------------------------------------------------------------------------------------------


def _build(
    names, num_neurons, specifications, budget: float = math.inf, calls: float = math.inf
) -> tuple[Any, Any]:
    """As :func:`pyro_metassm.rebuilding.build`, within a budget of numbers and of tensors."""
    with Budget(budget, calls):
        return build(specifications, NeuronTable(names, num_neurons))


def _match(claimed: dict[str, tuple], model: nn.Module, guide: nn.Module, dtype: torch.dtype) -> None:
    """Bring the modules to ``dtype`` if need be, and compare every tensor with what is said to be there."""

    def built() -> dict[str, tuple]:
        states = (("model", model.state_dict()), ("guide", guide.state_dict()))
        return {f"{m}.{k}": (tuple(v.shape), v.dtype) for m, state in states for k, v in state.items()}

    if built() != claimed and dtype != torch.float32:
        model.to(dtype), guide.to(dtype)
    expected = built()
    wrong = [key for key in expected.keys() | claimed.keys() if expected.get(key) != claimed.get(key)]
    if wrong:
        key = min(wrong)
        raise ValueError(
            f"the tensors do not fit the configuration: {len(wrong)} of {len(expected)} differ; {key}: needed "
            f"{expected.get(key, 'none')}, got {claimed.get(key, 'none')}; use the classes of the fit, with their "
            "arguments in self.config"
        )


# ---- plain values ----------------------------------------------------------------------------------------


def _encode_class(cls: type) -> dict[str, str]:
    return {"class": cls.__name__, "module": cls.__module__}


def _encode(value: Any, where: str) -> Any:
    """A value as JSON: objects stand for what JSON lacks."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, type) and issubclass(value, likelihoods.Mixed) and value.made_by_of:
        return _encode_class(value.__mro__[1]) | {"of": _encode(value.families, where)}
    if isinstance(value, type):
        return _encode_class(value)
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{where}[{number}]") for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}}
    raise ValueError(f"{where}: needed {PLAIN} to save, got {type(value).__name__}; convert or remove it")


def _decode(value: Any, custom: Mapping[str, type]) -> Any:
    if isinstance(value, list):
        return [_decode(item, custom) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"class": str(name), "module": str(module), "of": dict(families)}:
            cls = _class(name, module, custom)
            if not issubclass(cls, likelihoods.Mixed):
                raise ValueError(f"{HEADER}: needed a Mixed likelihood of families, got {name}")
            return cls.of(_decode(families, custom))
        case {"class": str(name), "module": str(module)}:
            return _class(name, module, custom)
        case {"float": str(text)} if text in ("nan", "inf", "-inf"):
            return float(text)
        case {"tuple": list(items)}:
            return tuple(_decode(items, custom))
        case {"dict": dict(items)}:
            return {key: _decode(item, custom) for key, item in items.items()}
    raise ValueError(f"{HEADER}: needed {PLAIN}, got an object with {checks.some(sorted(value))}")


def _dict(entry: dict, key: str, custom: Mapping[str, type]) -> dict:
    """A dict of the header, decoded."""
    value = _decode(_get(entry, key, dict), custom)
    if not isinstance(value, dict):
        raise ValueError(f"{HEADER}: needed {key!r} as an encoded dict, got {type(value).__name__}")
    return value


def _class(name: str, module: str, custom: Mapping[str, type]) -> type:
    known = {
        key: value
        for namespace in (models, guides, likelihoods, encoders)
        for key, value in vars(namespace).items()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__.startswith("pyro_metassm.")
    }
    if module.startswith("pyro_metassm.") and name in known:
        return known[name]
    if name not in custom:
        raise ValueError(
            f"needed the class {_shown(name)} (from {_shown(module)}), which is not the library's, got "
            f"{checks.some(list(custom)) or 'none'}; {_how_to_have(name, module)} and pass custom=[{_shown(name)}]"
        )
    return custom[name]


def _how_to_have(name: str, module: str) -> str:
    if module == "__main__":
        return "define it as in the notebook or script that made the fit"
    return f"`from {_shown(module)} import {_shown(name)}`"


def _shown(name: str) -> str:
    """A name from a file, for a message: as it is if it can be a name, else as a literal."""
    return name if name.replace(".", "").isidentifier() else repr(name[:100])


def _custom(classes: Iterable[type]) -> dict[str, type]:
    classes = [classes] if isinstance(classes, type) else list(classes)
    found = {cls.__name__: cls for cls in classes if isinstance(cls, type)}
    if len(found) < len(classes):
        raise ValueError(f"custom: needed classes of different names, got {classes}")
    return found


def _get(entry: Any, key: str, kind: type) -> Any:
    """A value of the header, of the type that it must have."""
    if not isinstance(entry, dict) or type(entry.get(key)) is not kind:
        raise ValueError(f"{HEADER}: needed {key!r} as {kind.__name__}, got something else or nothing")
    return entry[key]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__), "numpy": np.__version__}
    for name in ("pyro-metassm", "pyro-ppl"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
            found[name] = "unknown"
    return found
