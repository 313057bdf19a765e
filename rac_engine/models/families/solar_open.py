"""Solar Open: q k v and gate up of each expert, norms before the blocks; shared experts, routing in groups."""

from __future__ import annotations

from rac_engine.models.plans import MIXTURE, PRE_NORM, Family

FAMILY = Family("solar_open", "SolarOpen", PRE_NORM, mixture=MIXTURE)
