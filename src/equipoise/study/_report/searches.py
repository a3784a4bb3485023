"""What every arm's search for a learning rate tried and found, as a table."""

from __future__ import annotations

from equipoise.study._report import numbers
from equipoise.study._report.read import StudyFiles, listing, mapping
from equipoise.study.tables import Cell, Column, Row, Table

_SCORES = {
    "reward": "the judge's mean reward, where an invalid reply counts as the worst any candidate gave",
    "right_refusals": "the share of harmful dev prompts validly refused and of others validly answered, axes weighing the same",
}


def search_table(files: StudyFiles) -> Table | None:
    """Arms by learning rates: each candidate's score on the dev prompts, the chosen one marked. None where nothing was searched."""
    searches = [mapping(item) for item in listing(mapping(files.search).get("searches"))]
    if not searches:
        return None
    rates = sorted({float(one["learning_rate"]) for item in searches for one in map(mapping, listing(item.get("candidates")))})
    arms = {arm.name: arm for arm in files.arms}
    rows = []
    for item in searches:
        tried = {float(one["learning_rate"]): one for one in map(mapping, listing(item.get("candidates")))}
        cells = []
        for rate in rates:
            score, far = (mapping(tried.get(rate)).get(name) for name in ("score", "kl_to_base"))
            if not isinstance(score, (int, float)):
                cells.append(Cell("failed"))
            else:
                chosen = "chosen" if rate == item.get("chosen") else ""
                detail = (chosen, f"KL {numbers.plain(far)}" if numbers.finite(far) is not None else "")
                cells.append(Cell(f"{score:.3f}".replace("-", "−"), tuple(filter(None, detail)), float(score), chosen))
        rows.append(Row(str(item.get("arm")), cells, arm=arms.get(str(item.get("arm")))))
    by, prompts = str(searches[0].get("by")), searches[0].get("prompts")
    notes = [
        f"Score: {_SCORES.get(by, by)}, on {prompts} dev prompts that the evaluation does not ask. Higher is better; of equals the "
        "smallest learning rate was chosen. The best of several is a little lucky: a chosen score overstates what it will reach elsewhere."
    ]
    cap = searches[0].get("max_kl_to_base")
    if isinstance(cap, (int, float)):
        notes.append(
            f"Only candidates within {cap:g} nats a token of the base were chosen from (KL: mean log π/π_base of their replies): far from "
            "it, a judge rewards what no reader would."
        )
    columns = [Column(f"{rate:g}") for rate in rates]
    return Table("search", "Search for the learning rate", "Arm", columns, [("", rows)], notes)
