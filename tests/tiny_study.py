"""A study that takes seconds, and a reader of the pages that studies write."""

import html.parser

from pyro_metassm.experiments.methods import Steps
from pyro_metassm.experiments.scores import Scoring
from pyro_metassm.experiments.settings import Settings
from pyro_metassm.experiments.systems import Bifurcations

NUMBERS = {"num_train": 5, "num_test": 4, "num_adapt": 3, "num_bins": 24, "num_neurons": (5, 8)}
TINY = Settings(
    family=Bifurcations(
        damping=(-0.6, 0.0), stiffness=(-1.0, 1.0), mu=(-0.5, 0.5), unseen_duffing=2, unseen_hopf=1, **NUMBERS
    ),
    steps=Steps(
        warm_start_steps=6,
        num_steps=2,
        trials_per_step=2,
        num_starts=6,
        search_steps=4,
        adapt_steps=2,
        plain_steps=3,
        plain_adapt_steps=3,
    ),
    scoring=Scoring(context=8, horizon=6, k=4, num_samples=3),
    shots=(1, 2),
    draws=(2, 1),
    shown=2,
)
NAMES = ["meta", "meta-revised", "single", "shared-plain", "odd"]
ODD = "<b>odd</b> & \"quoted\" 'é'"
TIMED = {"seconds.csv", "metrics.json", "index.html"}  # hold how long it took


def quiet(text: str) -> None:
    pass


class Texts(html.parser.HTMLParser):
    """The texts, tags and addresses of a page."""

    def __init__(self):
        super().__init__()
        self.texts, self.tags, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)
