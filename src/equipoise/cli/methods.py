"""`equipoise methods`: every objective with its paper, its departures, what it needs, and its settings."""

from __future__ import annotations

from typing import Any

from equipoise.cli._output import Json, emit_json, table


def run(as_json: Json = False) -> None:
    """List the training methods: paper, departures, what each needs, hyper-parameters with range and default."""
    rows = catalogue()
    if as_json:
        emit_json({"methods": rows})
        return
    shown = [
        (
            row["name"],
            row["paper"],
            row["departures"],
            _needs(row["needs"]),
            "\n".join(f"{item['name']} = {item['default']} {item['range']}".rstrip() for item in row["settings"]),
        )
        for row in rows
    ]
    table("Methods", ("name", "paper", "departures", "needs", "settings"), shown)


def catalogue() -> list[dict[str, Any]]:
    """One mapping per method, from the objectives themselves: nothing is written down twice."""
    from equipoise.core.catalog import module, names
    from equipoise.objectives._base import objective_class

    rows = []
    for name in names("objectives"):
        kind = objective_class(module("objectives", name))
        needs = kind.needs
        rows.append(
            {
                "name": name,
                "summary": (kind.__doc__ or "").strip().split("\n")[0],
                "paper": kind.paper,
                "departures": kind.departures,
                "needs": {
                    "roles": list(needs.roles),
                    "reference": needs.reference,
                    "stats": sorted(needs.stats),
                    "facts": list(needs.facts),
                    "readout": needs.readout,
                    "coupled": needs.coupled,
                    "many": needs.many,
                },
                "settings": [_setting(key, field) for key, field in kind.model_fields.items()],
            }
        )
    return rows


def _setting(name: str, field: Any) -> dict[str, Any]:
    """One hyper-parameter: its type, default, range and description."""
    bounds = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    parts = [f"{sign} {getattr(item, key)}" for item in field.metadata for key, sign in bounds.items() if hasattr(item, key)]
    kind = getattr(field.annotation, "__name__", None) or str(field.annotation).replace("typing.", "")
    if "[" in str(field.annotation):
        kind = str(field.annotation).replace("typing.", "")
    return {"name": name, "type": kind, "default": field.default, "range": ", ".join(parts), "description": field.description or ""}


def _needs(needs: dict[str, Any]) -> str:
    """What a method needs, in a few words."""
    words = ["replies: " + ", ".join(needs["roles"])]
    words += [f"reference: {needs['reference']}"] if needs["reference"] != "none" else []
    words += [f"facts: {', '.join(needs['facts'])}"] if needs["facts"] else []
    words += [f"statistics: {', '.join(needs['stats'])}"] if needs["stats"] else []
    words += ["a score head"] if needs["readout"] == "score" else []
    return "\n".join(words)
