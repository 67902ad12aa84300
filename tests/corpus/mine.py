"""Models as a user writes them, that files of the corpus are of."""

import pyro.distributions as dist
import torch
from pyro.nn import PyroSample
from torch import nn

import pyro_metassm as pm
from pyro_metassm.guides.encoders import SetEncoder


class Pulled(pm.models.MetaSSM):
    """A hook, an argument and a parameter of its own."""

    def __init__(self, recordings, *, pull=0.5, **options):
        super().__init__(recordings, **options)
        self.config |= {"pull": pull}
        self.pull, self.gain = pull, nn.Parameter(torch.tensor(1.0))

    def transition(self, z, dynamics):
        return dist.Normal(self.gain * dynamics(z) - self.pull * z, self.process_noise()).to_event(1)


class BySubject(pm.models.MetaSSM):
    """Embeddings around one of their subject's."""

    def __init__(self, recordings, *, subjects=None, **options):
        super().__init__(recordings, **options)
        subjects = subjects or {name: r.attrs["subject"] for name, r in recordings.items()}
        self.config["subjects"] = subjects
        known = sorted(set(subjects.values()))
        self.register_buffer("subject", torch.tensor([known.index(subjects[name]) for name in self.names]))
        self.center = PyroSample(dist.Normal(0.0, 1.0).expand([len(known), self.embedding_dim]).to_event(2))
        self.dims["center"], self.coords["subject"] = ("subject", "embedding_dim"), known

    def embedding_prior_of(self, recording):
        center = self.rows(self.center, self.subject[recording].unsqueeze(-1))
        return dist.Normal(center, 0.5).to_event(1)


class Small(SetEncoder):
    """A smaller encoder."""

    def __init__(self, latent_dim, embedding_dim):
        super().__init__(latent_dim, embedding_dim, hidden_dim=6)


CUSTOM = [Pulled, BySubject, Small]
