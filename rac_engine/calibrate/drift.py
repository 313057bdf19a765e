"""The distance of the pruned model's hidden states from the dense model's, on tokens seen and on tokens held out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rac_engine.calibrate.packing import Packing
from rac_engine.models import Chunk
from rac_kernels import squared_gaps

SEEN, HELD = range(2)


class Drift:
    """‖hidden′ − hidden‖² and ‖hidden‖² over the tokens of a packing, by source and by whether they are held out.

    hidden′ are the pruned model's states and hidden the dense model's in the same place. A token that is not finite in
    either of them is left out, as it is out of a Hessian.
    """

    def __init__(self, packing: Packing, device: str) -> None:
        self._packing = packing
        sources = 1 if packing.sources is None else int(packing.sources.max()) + 1
        self._sums = torch.zeros(sources, 2, 2, dtype=torch.float64, device=device)
        """[source, seen or held out, gap or whole]"""

    def add(self, chunk: Chunk, found: Tensor, wanted: Tensor, weights: Tensor | None) -> None:
        """Count a chunk's states [tokens, hidden] of the pruned model and of the dense one.

        weights: [tokens] fp32; None: 1 each.
        """
        pair = torch.stack(squared_gaps(found, wanted), 1)
        good = pair.isfinite().all(1, keepdim=True)
        if weights is not None:
            good &= weights[:, None] > 0
            pair = pair * weights[:, None]
        pair = torch.where(good, pair, 0)
        sources, side = self._packing.sources, HELD if self._packing.holds_out(chunk) else SEEN
        if sources is None:
            self._sums[0, side] += pair.sum(0)
            return
        own = sources[chunk.start : chunk.stop].to(pair.device)[:, None]
        for source in range(len(self._sums)):
            self._sums[source, side] += torch.where(own == source, pair, 0).sum(0)

    def errors(self) -> tuple[float | None, float | None]:
        """‖hidden′ − hidden‖² / ‖hidden‖² of all tokens seen, and of all held out; None where there are none."""
        seen, held = self._sums.sum(0).tolist()
        return _share(*seen), _share(*held)

    def by_source(self) -> list[tuple[float | None, float | None]]:
        """The same for each source."""
        return [(_share(*seen), _share(*held)) for seen, held in self._sums.tolist()]


def _share(gap: float, whole: float) -> float | None:
    share = gap / whole if whole else math.nan
    return share if math.isfinite(share) else None
