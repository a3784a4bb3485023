"""Length of replies: judges tend to like longer ones, so a difference in reward is read beside the difference in length."""

from equipoise.evaluation.metrics._base import Case, Judged, Metric, Part


def tokens(reply: Judged, _: Case) -> float | None:
    """Tokens of the reply."""
    return reply.length


METRIC = Metric(
    title="Length",
    measures="Mean length of replies to all prompts.",
    unit="tokens",
    better="none",
    role="diagnostic",
    kind="mean",
    source="Length bias of judges: arXiv 2310.03716, arXiv 2404.04475",
    departures="",
    parts=(Part(("helpful", "harmful", "benign"), tokens),),
)
