"""The start check: our log-probs against the model's own, on the run's weights and rows, before anything is trained.

Ours must equal plain, unshared, unpadded forwards under the model's native attention: no token further off than 1e-4 nats
in float32. In bfloat16 no further off, on average over tokens, than the model's own ways of computing them are from each
other: another batch shape, and eager attention (twice the larger is allowed: these are means of a few hundred draws, and a
largest difference would be one draw). One shape alone will not do, since it may happen to run the very same kernels.
On failure the next simpler form is tried: packed, separate rows, padded plain rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from equipoise.core.errors import NumericsError, UsageError
from equipoise.core.progress import say
from equipoise.data.rows import TokenRow
from equipoise.models._elementwise import EAGER, Kernels
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import Form, pack
from equipoise.models.layers import lean_layers, watching
from equipoise.models.logps import evaluating, policy_logps, scores, token_logps, unwrapped
from equipoise.models.quantised import in_low_precision

Tensor = torch.Tensor
FLOAT32_TOLERANCE = 1e-4
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings)$")
FORMS: tuple[Form, ...] = ("packed", "separate", "padded")
Autocast = Callable[[], AbstractContextManager[Any]]


def probe_rows(rows: Sequence[TokenRow], window: int | None) -> list[TokenRow]:
    """Rows to check on: the longest (past the window where there is one), the shortest, the middle one, the longest prompt."""
    order = sorted(range(len(rows)), key=lambda row: rows[row].tokens)
    picked = {order[0], order[len(order) // 2], order[-1], max(order, key=lambda row: len(rows[row].prompt))}
    if window is not None:
        # The shortest of those that reach past the window shows a wrong window as well as the longest, and costs less.
        beyond = [row for row in order if _reach(rows[row]) > window]
        picked |= set(beyond[:1])
    return [rows[row] for row in sorted(picked)]


def choose_form(
    model: Any,
    rows: Sequence[TokenRow],
    wanted: Literal["auto", "packed", "separate", "padded"],
    device: torch.device,
    autocast: Autocast = nullcontext,
    kernels: Kernels = EAGER,
) -> tuple[Form, dict[str, Any]]:
    """The first form whose log-probs, computed as in training, agree with the model's own; and a report of what was measured.

    kernels: what norms, gates, rotations and the head's softmax compute with.

    Raises NumericsError where none agrees, or where the one form that was asked for does not; UsageError for an encoder.
    """
    register()
    with evaluating(model):
        probes = probe_rows(rows, _window(model))
        native = _native(model, probes, device, autocast)
        low = in_low_precision(model) or autocast is not nullcontext
        distance, tolerance = _furthest, FLOAT32_TOLERANCE
        if low:
            distance = _typical
            tolerance = max(FLOAT32_TOLERANCE, *(2 * _typical(other, native) for other in _native_ways(model, probes, device, autocast)))
        _check_causal(model, min(probes, key=_reach), device, autocast, tolerance)
        report: dict[str, Any] = {"tolerance": tolerance, "rows": [row.id for row in probes], "tried": {}}
        for form in FORMS if wanted == "auto" else (wanted,):
            if form == "packed" and wanted == "auto" and max(len(row.branches) for row in rows) == 1:
                continue  # nothing to share: separate rows are the same thing
            difference, problem = _difference(model, probes, native, form, device, autocast, distance, kernels)
            report["tried"][form] = {"difference": difference, "problem": problem}
            if problem is None and difference is not None and difference <= tolerance:
                report["form"] = form
                return form, report
            reason = problem or f"its log-probs are {difference:.2g} nats off (allowed {tolerance:.2g})"
            if wanted == "auto" and form != "padded":
                say(f"start check: {_family(model)} cannot run {form} rows: {reason}; trying a simpler layout")
        hint = _switching(model, rows)
        raise NumericsError(
            f"The start check failed for {_family(model)}: {report['tried']}. No layout gives the model's own log-probs.{hint}"
        )


def check_positions(model: Any, longest: int) -> None:
    """Raise UsageError where a row of `longest` tokens does not fit a table of learned positions: it would end in an index error."""
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, torch.nn.Embedding) and _POSITIONS.search(name):
            # Some tables begin with entries that are no positions: OPT's offset, RoBERTa's padding.
            unused = getattr(module, "offset", 0) + (0 if module.padding_idx is None else module.padding_idx + 1)
            room = module.num_embeddings - unused
            if longest > room:
                raise UsageError(
                    f"A row has {longest} tokens, and {_family(model)} knows {room} positions: set tokenise.max_length={room}."
                )


def check_scores(model: Any, rows: Sequence[TokenRow], device: torch.device, autocast: Autocast = nullcontext) -> dict[str, Any]:
    """The same for a sequence classifier: a padded batch must score replies as each alone does (1e-3 of their spread).

    Raises NumericsError where padding changes a score (a missing pad token, a head that reads the wrong position).
    """
    with evaluating(model):
        probes = probe_rows(rows, None)
        with torch.no_grad(), autocast():
            together = scores(model, pack(probes, "padded", _pad(model)).to(device))
            alone = torch.cat(
                [
                    scores(model, pack([TokenRow(f"{row.id}/{number}", row.prompt, (branch,))], "padded", _pad(model)).to(device))
                    for row in probes
                    for number, branch in enumerate(row.branches)
                ]
            )
    difference = _furthest(together, alone)
    low = in_low_precision(model) or autocast is not nullcontext
    tolerance = 5e-2 if low else 1e-3
    if not difference <= tolerance:
        raise NumericsError(
            f"The start check failed for {_family(model)}: padding moves a score by {difference:.2g} (allowed {tolerance:.2g})."
        )
    return {
        "tolerance": tolerance,
        "rows": [row.id for row in probes],
        "tried": {"padded": {"difference": difference, "problem": None}},
        "form": "padded",
    }


def _difference(
    model: Any,
    rows: Sequence[TokenRow],
    native: Tensor,
    form: Form,
    device: torch.device,
    autocast: Autocast,
    distance: Callable[[Tensor, Tensor], float],
    kernels: Kernels,
) -> tuple[float | None, str | None]:
    try:
        attention = nullcontext() if form == "padded" else attention_of(unwrapped(model), NAME)
        batch = pack(rows, form, _pad(model)).to(device)
        with torch.no_grad(), autocast(), attention:
            if autocast is not nullcontext:  # who reads what, before anything is computed as it will be in training
                with watching(model):
                    policy_logps(model, batch)
            with lean_layers(model, kernels):
                ours = policy_logps(model, batch).float()
    # A family may fail in any way when its attention is replaced; whatever it raises, the answer is the next form.
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    difference = distance(ours, native)
    return (difference, None) if difference == difference else (None, "its log-probs are not finite")


def _native(model: Any, rows: Sequence[TokenRow], device: torch.device, autocast: Autocast) -> Tensor:
    """[N, T] log-probs from one plain forward per reply under the model's own attention."""
    branches = [(row, branch) for row in rows for branch in row.branches]
    values = torch.zeros(len(branches), max(len(branch.ids) for _, branch in branches), device=device)
    for number, (row, branch) in enumerate(branches):
        ids = torch.tensor([*row.prompt.tolist(), *branch.ids.tolist()], device=device)[None]
        with torch.no_grad(), autocast():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1]
        values[number, : len(branch.ids)] = token_logps(logits, ids[0, len(row.prompt) :]).float()
    return values


def _check_causal(model: Any, row: TokenRow, device: torch.device, autocast: Autocast, tolerance: float) -> None:
    """Raise UsageError where a prediction changes with the token it predicts: an encoder's would be of what it has read."""
    ids = torch.tensor([*row.prompt.tolist(), *row.branches[0].ids.tolist()], device=device)[None]
    with torch.no_grad(), autocast():
        said = model(input_ids=ids, use_cache=False).logits[0, -2].float().log_softmax(-1)
        ids[0, -1] = ids[0, 0] if ids[0, 0] != ids[0, -1] else said.argmin()
        other = model(input_ids=ids, use_cache=False).logits[0, -2].float().log_softmax(-1)
    if _typical(said, other) > tolerance:
        raise UsageError(
            f"{_family(model)} reads a whole text at once: what it says of a token changes with that token, so it is no language model "
            "to train on replies. As the backbone of a reward model (objective bradley_terry) it serves."
        )


def _native_ways(model: Any, rows: Sequence[TokenRow], device: torch.device, autocast: Autocast) -> list[Tensor]:
    """The same log-probs the model's own other ways: padded together, and under eager attention where the family has it."""
    with torch.no_grad(), autocast():
        ways = [policy_logps(model, pack(rows, "padded", _pad(model)).to(device)).float()]
    try:
        with attention_of(unwrapped(model), "eager"):
            ways.append(_native(model, rows, device, autocast))
    except (ValueError, NotImplementedError):  # the family cannot switch
        pass
    return ways


def _furthest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _typical(one: Tensor, other: Tensor) -> float:
    """Mean distance over the tokens there are: padding is 0 in both."""
    return float((one - other).abs().sum() / (other != 0).sum())


def _reach(row: TokenRow) -> int:
    return len(row.prompt) + max(len(branch.ids) for branch in row.branches)


def _switching(model: Any, rows: Sequence[TokenRow]) -> str:
    """A way out for models whose rotary frequencies depend on the longest row of a batch, where rows lie on both sides of the limit."""
    config = unwrapped(model).config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    limit = limit or config.max_position_embeddings if kind in ("longrope", "dynamic") else None
    if not limit or not min(map(_reach, rows)) <= limit < max(map(_reach, rows)):
        return ""
    return f" Its positions ({kind} RoPE) change for all of a batch once a row has over {limit} tokens: set tokenise.max_length={limit}."


def _window(model: Any) -> int | None:
    window = getattr(unwrapped(model).config, "sliding_window", None)
    return int(window) if window else None


def _pad(model: Any) -> int:
    return int(getattr(unwrapped(model).config, "pad_token_id", None) or 0)


def _family(model: Any) -> str:
    return str(getattr(unwrapped(model).config, "model_type", type(model).__name__))
