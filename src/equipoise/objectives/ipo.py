"""Identity preference optimization: a margin to reach, not to grow for ever."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise.objectives._base import Losses, Needs, Objective, Scored
from equipoise.objectives._parts import Reduction, ratio_pair


class IPO(Objective):
    """L = (h − 1/(2β))², h = the difference of the log-ratios log π_θ/π_ref of chosen and rejected reply.

    `reduction` says whether log-ratios are means per token [nats/token] or sums [nats]; with sums, one β does not fit replies of
    different lengths.
    """

    paper: ClassVar[str] = "arXiv 2310.12036, eq. 17 (its τ is beta here)"
    departures: ClassVar[str] = (
        "The paper writes whole-reply log-ratios. The default is the mean per token, which its authors confirmed to TRL; "
        "`reduction='sum'` is the formula as printed."
    )
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    beta: float = Field(default=0.1, gt=0, description="τ: the margin to reach is 1/(2β)")
    reduction: Reduction = Field(default="mean", description="log-ratios per token (mean) or per reply (sum)")

    def __call__(self, scored: Scored) -> Losses:
        """[U] losses of pairs."""
        pair = ratio_pair(scored, self.beta, self.reduction)
        gap = pair.margin / self.beta - 1 / (2 * self.beta)
        return pair.losses(gap.square())
