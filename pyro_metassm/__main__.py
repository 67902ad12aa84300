"""``python -m pyro_metassm`` is the console script ``metassm``."""

from pyro_metassm.cli import main

raise SystemExit(main())
