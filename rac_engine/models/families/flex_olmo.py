"""FlexOlmo: q k v and gate up of each expert, norms after the blocks and on q and k over all heads."""

from __future__ import annotations

from dataclasses import replace

from rac_engine.models.plans import MIXTURE, POST_NORM, Family

FAMILY = Family("flex_olmo", "FlexOlmo", POST_NORM, mixture=replace(MIXTURE, norm=None, after=POST_NORM[1].after))
