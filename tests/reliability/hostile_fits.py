"""Hostile folders of saved fits, of running ones, and of studies."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import mutations
import numpy as np
import torch
from hostile import Target
from safetensors.torch import load, save

import pyro_metassm as pm
from pyro_metassm import checkpoints, saving
from pyro_metassm.experiments.settings import Settings
from pyro_metassm.guides.encoders import RecurrentEncoder


class Fits(Target):
    """Folders of saved fits: the header, the tensors, and the header of these."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=4, num_steps=8, num_neurons=(3, 4))
        quick = {"num_steps": 2, "warm_start": False, "progress": False}
        small = {"latent_dim": 2, "embedding_dim": 1, "hidden_dim": 4}
        mixed = pm.likelihoods.Mixed.of({"w=2*": pm.likelihoods.Gaussian, "*": pm.likelihoods.Gaussian})
        self.made = []
        for family, encoder in ((pm.likelihoods.Gaussian, None), (mixed, RecurrentEncoder)):
            model = pm.models.MetaSSM(recs, **small, likelihood=family)
            guide = pm.guides.DKF(model, hidden_dim=4, **({"embedding_encoder": encoder} if encoder else {}))
            fit = pm.fit(model, guide, recs, **quick)
            fit.attrs["note"] = {"sizes": (1, 2.5, None), "nan": float("nan")}
            fit.save(self.path)
            data = (self.path / saving.TENSORS).read_bytes()
            self.made.append((json.loads((self.path / saving.HEADER).read_text()), data))

    @property
    def path(self) -> Path:
        return self.folder / "fit"

    def write(self, rng: Random) -> None:
        header, data = rng.choice(self.made)
        kind = rng.randrange(10)
        if kind >= 7:
            data = safetensors(rng, data)
        elif kind == 6:
            data = mutations.some_bytes(rng, data)
        (self.path / saving.TENSORS).write_bytes(data)
        if rng.random() < 0.98:
            header = header | {"sha256": saving._digest(self.path / saving.TENSORS)}
        text = json.dumps(header).encode() if kind >= 6 else mutations.json_text(rng, header)
        if kind < 6 and rng.random() < 0.5:  # a change deep within, of what constructors are given
            what = rng.choice(("model", "guide", "history", "names", "num_neurons", "attrs"))
            text = json.dumps(header | {what: mutations.json_value(rng, header[what])}).encode()
        (self.path / saving.HEADER).write_bytes(text)

    def read(self) -> Any:
        return pm.load(self.path)

    def unsound(self, result: Any) -> str | None:
        if not isinstance(result, pm.Fit) or not isinstance(result.model, pm.models.MetaSSM):
            return f"a {type(result).__name__}"
        return None if result.statistics.shape[0] == len(result.names) else "statistics of other recordings"


def safetensors(rng: Random, data: bytes) -> bytes:
    """Tensors announced as others: names, kinds, shapes and places."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    keys = [key for key in header if key != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(keys)
        match rng.randrange(6):
            case 0:
                header[key] = mutations.json_value(rng, header[key])
            case 1:
                header[key]["dtype"] = rng.choice((*saving.DTYPES, "F8_E4M3", "C64", "O", ""))
            case 2:
                header[key]["shape"] = rng.choice(
                    ([], [2**40], [0, 2**62], [-1], [1] * 70, [2**32, 2**32], [10**30])
                )
            case 3:
                header[key]["data_offsets"] = [rng.choice((0, 1, 2**40, 2**64 - 1)) for _ in range(2)]
            case 4:
                header[rng.choice(("../x", "model.", "history.x", "statistics", "guide.a.b", "\0"))] = (
                    header.pop(key)
                )
                keys = [key for key in header if key != "__metadata__"]
            case 5:
                header["__metadata__"] = rng.choice(({"a": "b"}, {}, {"checkpoint": "[" * 100_000}))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 7, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + text + data[8 + size :]


class Checkpoints(Target):
    """Folders of running fits."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=3, num_steps=5, num_neurons=(2, 3))
        self.model = pm.models.MetaSSM(self.recs, latent_dim=1, embedding_dim=1, hidden_dim=3)
        self.guide = pm.guides.DKF(self.model, hidden_dim=3, read_in_dim=2)
        self.read()
        self.file = min(self.path.glob("*.safetensors"))
        self.data = self.file.read_bytes()
        (size,) = struct.unpack("<Q", self.data[:8])
        self.metadata = json.loads(self.data[8 : 8 + size])["__metadata__"]
        self.header = json.loads(self.metadata["checkpoint"])
        self.tensors = load(self.data)

    @property
    def path(self) -> Path:
        return self.folder / "run"

    def write(self, rng: Random) -> None:
        for other in self.path.glob("*"):
            if other != self.file:
                other.unlink()
        kind = rng.randrange(10)
        if kind == 0:
            self.file.write_bytes(mutations.some_bytes(rng, self.data))
            return
        if kind == 1:
            self.file.write_bytes(safetensors(rng, self.data))
            return
        header, tensors = self.header, dict(self.tensors)
        if kind <= 4:
            for _ in range(rng.choice((1, 1, 3))):
                key = rng.choice(list(tensors))
                match rng.randrange(4):
                    case 0:
                        del tensors[key]
                    case 1:
                        shape = rng.choice(((), (1,), (3, 2), (0,), (5056,)))
                        tensors[key] = torch.from_numpy(np.zeros(shape, rng.choice(("f4", "f8", "u1", "i8"))))
                    case 2:
                        tensors[key] = torch.full_like(tensors[key], rng.choice((0, 1, 127)))
                    case 3:
                        others = ("optimizer.x.y", "optimizer.99.step", "history.elbo", "model.x", "rng")
                        tensors[rng.choice(others)] = tensors[key]
                if not tensors:
                    break
            text = json.dumps(header)
        elif kind <= 7:  # deep within, past the comparison of specifications
            what = rng.choice([key for key in header if key not in ("specification", "format")])
            text = json.dumps(header | {what: mutations.json_value(rng, header[what])})
        else:
            text = mutations.json_text(rng, header).decode("utf-8", "replace")
        metadata = dict(self.metadata) | {"checkpoint": text}
        if "digest" in metadata:
            metadata["digest"] = checkpoints._digest(text, tensors)
        self.file.write_bytes(save({key: value.clone() for key, value in tensors.items()}, metadata))

    def read(self) -> Any:
        return pm.fit(
            self.model, self.guide, self.recs, num_steps=2, warm_start=False, progress=False, checkpoint=self.path,
            checkpoint_every=1,
        )  # fmt: skip

    def unsound(self, result: Any) -> str | None:
        steps = result.history.sizes["step"]
        return None if isinstance(result, pm.Fit) and steps == 2 else f"a history of {steps} steps"


class Studies(Target):
    """The settings that a study finds in its folder."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.settings = Settings()
        self.settings.claim(folder)

    @property
    def path(self) -> Path:
        return self.folder

    def write(self, rng: Random) -> None:
        text = mutations.json_text(rng, self.settings.as_json())
        (self.folder / "settings.json").write_bytes(text)

    def read(self) -> Any:
        return self.settings.claim(self.folder)

    def unsound(self, result: Any) -> str | None:
        return None if result is None else "something"
