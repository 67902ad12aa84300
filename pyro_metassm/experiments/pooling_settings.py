"""What decides the numbers of a study of pooling: who is pooled with whom, and how models are fitted and scored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Which recordings are pooled, and which are unseen until they are adapted to."""

    name: str
    pooled: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """What decides the numbers besides the data; the defaults were chosen on validation trials of reaches.

    Attributes:
        latent_dim, embedding_dim, rank, hidden_dim: of the model. With twelve latents (and half of the neurons hidden)
            pools of reaches predict held-out neurons of validation trials .005 bits per spike better, and forecast
            worse: .049 in place of .057.
        neuron_dropout, newton_step: of the guide. With the step pools predict validation trials better, of reaches by
            .005 bits per spike, of mice by .001 to .003.
        num_steps, warm_start_steps, trials_per_step, learning_rate: of fits to all trials, pooled and alone. The rate
            is high and the steps are many because what is shared learns slowly: at a quarter of the rate, or in half
            of the steps, the pooled model has learned less of its training trials than the others have.
        kl_warmup: share of the steps, of these fits and of those from scratch, in which divergences get their weight.
            Without, half of the latents of mice in bins of 10 ms end up saying nothing; with four fifths of the steps,
            those of Chewie's days learn their training trials by heart.
        update_penalty: of what recordings of a pool differ in, per observed number: of finer bins there are more.
        tune_steps, tune_learning_rate: of a last cycle with one recording: from the pooled fit, and from its own.
        scratch_steps, scratch_learning_rate: of fits to few trials, pooled, alone and from an adapted fit: more of them
            learn these by heart (on validation trials, fits from 16 trials are best after one to two hundred).
        adapt_steps, adapt_learning_rate, num_starts, search_steps: of adaptations. With the few counts of real trials
            read-ins have farther to go than in the usual steps, at the usual rate; trials of mice are learned by heart
            in more than half as many.
        shots: numbers of trials to adapt with.
        context, horizon: of forecasts, bins.
        held_out_neurons: share of the neurons of every recording that the guide does not see.
        test_fraction: share of the trials of every recording that scores are of.
        validate: score a quarter of the training trials, left out of them, in place of the test trials: for choices.
        num_samples: draws behind means.
    """

    latent_dim: int = 8
    embedding_dim: int = 2
    rank: int = 1
    hidden_dim: int = 64
    neuron_dropout: float = 0.3
    newton_step: bool = True
    num_steps: int = 1200
    warm_start_steps: int = 300
    trials_per_step: int = 32
    learning_rate: float = 2e-2
    kl_warmup: float = 0.25
    update_penalty: float = 1e-4
    tune_steps: int = 400
    tune_learning_rate: float = 2e-2
    scratch_steps: int = 200
    scratch_learning_rate: float = 5e-3
    adapt_steps: int = 500
    adapt_learning_rate: float = 2e-2
    num_starts: int = 256
    search_steps: int = 150
    shots: tuple[int, ...] = (8, 16, 32, 64)
    context: int = 2
    horizon: int = 6
    held_out_neurons: float = 0.25
    test_fraction: float = 0.25
    validate: bool = False
    num_samples: int = 25
