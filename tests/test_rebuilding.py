"""Models and guides made again for other recordings: what is shared is the same, what is a recording's goes by name."""

import pytest
import torch
from fits import state
from torch import nn

import pyro_metassm as pm
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.rebuilding import for_recordings, joined, tables

TABLE = NeuronTable(["a", "b", "c"], [3, 5, 1])


class Own(pm.models.MetaSSM):
    """With tables of its own: a gain per neuron, a noise per recording, a buffer of each, and what is shared."""

    def __init__(self, recordings, **options):
        super().__init__(recordings, **options)
        total, number = self.neurons.total, len(self.names)
        self.gain = nn.Parameter(torch.ones(total))
        self.noise = nn.Parameter(torch.zeros(number, 2))
        self.shared = nn.Parameter(torch.zeros(7))
        self.register_buffer("kind", torch.zeros(number, dtype=torch.long))
        self.register_buffer("ceiling", torch.zeros(total, 2))


class OwnGuide(pm.guides.DKF):
    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.tilt = nn.Parameter(torch.zeros(len(model.names)))


def pair(table=TABLE, *, model=Own, guide=OwnGuide, seed=0, **options):
    """Every tensor another number, in float32 and eval mode."""
    torch.manual_seed(seed)
    made = model(table, latent_dim=2, embedding_dim=1, hidden_dim=4, **options)
    made = (made, guide(made, hidden_dim=3))
    with torch.no_grad():
        for module in made:
            for value in module.state_dict().values():
                value.copy_(
                    torch.randn(value.shape) if value.is_floating_point() else torch.randint(9, value.shape)
                )
            module.eval()
    return made


PER_NEURON = {
    "model.read_out.weight", "model.read_out.bias", "model.observation.log_sd", "model.gain", "model.ceiling",
    "guide.read_in.weight", "guide.read_in.center", "guide.read_in.scale", "guide.read_in.counts",
}  # fmt: skip
PER_RECORDING = {
    "model.noise", "model.kind", "guide.read_in.bias", "guide.smoothing", "guide.tilt",
}  # fmt: skip


def check_rows(source, target, names):
    """Shared tensors to the bit, and the rows of these recordings."""
    old, new = source[0].neurons, target[0].neurons
    before, after = state(*source), state(*target)
    assert before.keys() == after.keys()
    for key, value in after.items():
        assert value.dtype == before[key].dtype
        if key not in PER_NEURON | PER_RECORDING:
            assert torch.equal(value, before[key]), key
            continue
        for name in names:
            if key in PER_NEURON:
                assert torch.equal(value[new.slice(name)], before[key][old.slice(name)]), (key, name)
            else:
                rows = [table.names.index(name) for table in (old, new)]
                assert torch.equal(value[rows[1]], before[key][rows[0]]), (key, name)


def test_tables_are_told_from_what_is_shared():
    per_model, per_guide = tables(*pair())
    found = {f"model.{k}": v for k, v in per_model.items()} | {f"guide.{k}": v for k, v in per_guide.items()}
    assert found == dict.fromkeys(PER_NEURON, "neuron") | dict.fromkeys(PER_RECORDING, "recording")


@pytest.mark.parametrize(
    "table",
    [
        NeuronTable(["a", "b", "c"], [3, 5, 1]),
        NeuronTable(["c", "x", "a"], [1, 2, 3]),
        NeuronTable(["x"], [4]),
        NeuronTable(["x", "y", "z"], [5, 3, 1]),  # as many recordings and neurons, and none of the same
        NeuronTable(["b", "p", "q"], [5, 2, 2]),  # as many, and one of the same
        NeuronTable(["x", "c", "y", "b", "a", "z"], [9, 1, 1, 5, 3, 2]),
    ],
    ids=lambda table: ",".join(table.names),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_shared_stays_and_rows_go_by_name(table, dtype):
    source = tuple(module.to(dtype) for module in pair())
    before = {key: value.clone() for key, value in state(*source).items()}
    random = torch.get_rng_state()
    made = for_recordings(*source, table)
    assert torch.equal(torch.get_rng_state(), random)
    assert made[0].names == table.names and made[1].model is made[0]
    assert [type(module) for module in made] == [Own, OwnGuide] and not made[0].training
    check_rows(source, made, [name for name in table.names if name in source[0].names])
    with torch.no_grad():  # nothing is shared in memory
        for value in state(*made).values():
            value.zero_()
    assert all(torch.equal(value, before[key]) for key, value in state(*source).items())


def test_fresh_rows_are_as_a_constructor_makes_them():
    made, _ = for_recordings(*pair(), NeuronTable(["x", "a"], [4, 3]))
    assert torch.equal(made.gain[:4], torch.ones(4)) and torch.equal(made.noise[0], torch.zeros(2))
    assert made.read_out.weight[:4].std() > 0


def test_modes_and_flags_are_those_of_a_new_module():
    source = pair()
    source[0].train(), source[0].requires_grad_(False)
    made = for_recordings(*source, NeuronTable(["x"], [4]))
    assert made[0].training and not made[1].training
    assert all(parameter.requires_grad for module in made for parameter in module.parameters())


def test_a_table_of_one_neuron_for_each_recording():
    """As many rows per neuron as per recording."""
    source = pair(NeuronTable(["a", "b"], [1, 1]))
    made = for_recordings(*source, NeuronTable(["x", "b"], [2, 1]))
    check_rows(source, made, ["b"])


def test_pairs_are_joined_and_share_what_the_first_has():
    first, second = pair(), pair(NeuronTable(["x", "y"], [2, 4]), seed=1)
    both = joined(first, second)
    assert both[0].names == ("a", "b", "c", "x", "y") and both[0].neurons.num_neurons == (3, 5, 1, 2, 4)
    check_rows(first, both, ["a", "b", "c"])
    new = state(*second)
    for key, value in state(*both).items():
        if key in PER_NEURON:
            assert torch.equal(value[9:], new[key]), key
        elif key in PER_RECORDING:
            assert torch.equal(value[3:], new[key]), key


def test_a_guide_without_parameters():
    model = pm.models.LinearGaussian(TABLE, latent_dim=2).double()
    made = for_recordings(model, pm.guides.ExactSmoother(model), NeuronTable(["x", "b"], [1, 5]))
    assert type(made[1]) is pm.guides.ExactSmoother and made[0].read_out.weight.dtype == torch.float64


class Sideways(pm.models.MetaSSM):
    """A recording is a column of its table."""

    def __init__(self, recordings, **options):
        super().__init__(recordings, **options)
        self.columns = nn.Parameter(torch.zeros(2, len(self.names)))


class Scalar(pm.models.MetaSSM):
    """A number for one recording, a vector for several."""

    def __init__(self, recordings, **options):
        super().__init__(recordings, **options)
        self.odd = nn.Parameter(torch.zeros(len(self.names)) if len(self.names) > 3 else torch.tensor(0.0))


class Forgetful(pm.models.MetaSSM):
    def __init__(self, recordings, *, width=3, **options):
        super().__init__(recordings, **options)


@pytest.mark.parametrize("kind", [Sideways, Scalar])
def test_other_tables_are_refused_by_name(kind):
    word = "columns" if kind is Sideways else "odd"
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}\.{word}: needed a tensor whose first dimension is the"
    ):
        for_recordings(*pair(model=kind, guide=pm.guides.DKF), NeuronTable(["x"], [4]))


def test_what_cannot_be_built_again_says_so():
    new = NeuronTable(["x"], [4])
    with pytest.raises(ValueError, match=r"model.config: needed every argument .* got no width"):
        for_recordings(*pair(model=Forgetful, guide=pm.guides.DKF), new)
    model, guide = pair(guide=pm.guides.DKF)
    model.added = nn.Parameter(torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"Own cannot be built for other recordings: .*\(added\).* constructor"
    ):
        for_recordings(model, guide, new)
    model, guide = pair(guide=pm.guides.DKF)
    guide.config["hidden_dim"] = 5  # not what it was made with
    with pytest.raises(ValueError, match=r"DKF\.rnn\..* got .*, and .* built from its configuration"):
        for_recordings(model, guide, new)
    model.config["latent_dim"] = 0
    with pytest.raises(ValueError, match=r"Own cannot be built from its configuration .*latent_dim"):
        for_recordings(model, guide, new)
