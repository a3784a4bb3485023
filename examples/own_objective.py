"""A method of your own in one file, used from the command line:

    equipoise train --objective-file examples/own_objective.py --set model_name_or_path=smollm2-135m-instruct \\
        --set use_peft=true --set streams.0.data.dataset_name=starter --set output_dir=runs/squared
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from equipoise import Losses, Needs, Objective, Scored


class Squared(Objective):
    """L = (h − 1/(2τ))²: the squared link of IPO on summed log-ratios. One number per pair, never a mean."""

    paper: ClassVar[str] = "arXiv 2310.12036, equation 17"
    departures: ClassVar[str] = "none"
    needs: ClassVar[Needs] = Needs(roles=("chosen", "rejected"), reference="stored")

    tau: float = Field(default=0.1, gt=0, description="strength of the pull to the reference (1/nats)")

    def __call__(self, scored: Scored) -> Losses:
        margin = scored.side("chosen").logratios() - scored.side("rejected").logratios()
        return Losses((margin - 1 / (2 * self.tau)) ** 2, {"margin": margin.detach()})
