"""KL to the base: how far replies have moved from the base model, mean over prompts of mean log-ratio a token.

A sampled estimate of KL(model ‖ base) for replies drawn at temperature 1; for greedy replies it is a log-ratio on the
model's own text, which also tells how far it went but is not an estimate of the divergence.
"""

from equipoise.evaluation.metrics._base import Case, Judged, Metric, Part


def divergence(reply: Judged, _: Case) -> float | None:
    """Nats a token, as its scorer found it."""
    return reply.kl_to_base


METRIC = Metric(
    title="KL to base",
    measures="Mean over replies to all prompts of log p(model) − log p(base), a token.",
    unit="nats a token",
    better="none",
    role="diagnostic",
    kind="mean",
    source="Reward against KL as in arXiv 2210.10760",
    departures="A mean a token instead of a sum over the reply, so that length does not decide.",
    parts=(Part(("helpful", "harmful", "benign"), divergence),),
)
