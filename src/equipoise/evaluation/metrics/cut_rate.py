"""Cut-off replies: the share, on all prompts, of replies that the length limit stopped.

Beside the other figures wherever a study reads only the first so many tokens of a reply: they are then figures of
openings, not of whole replies.
"""

from equipoise.evaluation.metrics._base import Case, Judged, Metric, Part


def cut(reply: Judged, _: Case) -> float | None:
    """1 for a reply stopped by the length limit, 0 for one that ended itself; None where nobody checked."""
    return None if reply.cut is None else float(reply.cut)


METRIC = Metric(
    title="Cut-off replies",
    measures="Share of all prompts with a reply stopped by the length limit, whether or not the study counts it as invalid.",
    unit="%",
    better="none",
    role="diagnostic",
    kind="rate",
    source="Ours",
    departures="",
    parts=(Part(("helpful", "harmful", "benign"), cut),),
)
