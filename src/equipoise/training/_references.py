"""What a run's policy is compared with: stores filled before it begins, and references that run beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from equipoise.core.errors import NumericsError, UsageError
from equipoise.data.rows import TokenRow
from equipoise.models.attention import NAME, attention_of, register
from equipoise.models.batch import Form
from equipoise.models.identity import forward_fingerprint
from equipoise.models.layers import lean_layers
from equipoise.models.load import adapter_off, load_causal
from equipoise.models.logps import evaluating, unwrapped
from equipoise.objectives._base import Objective
from equipoise.reference.build import build, check
from equipoise.reference.key import Context
from equipoise.reference.live import FollowingReference, LiveReference, frozen_copy
from equipoise.reference.mixture import Mixture
from equipoise.reference.store import ReferenceStore
from equipoise.training._model import dtype_label, four_bit
from equipoise.training._ranks import Ranks
from equipoise.training._streams import Forward, Stream
from equipoise.training.settings import TrainSettings
from equipoise.training.sharding import shard
from equipoise.training.start_check import choose_form

CHECKED_ROWS = 2


def stored_tolerance(report: dict[str, Any]) -> float:
    """Mean nats a token by which log-probs from other batch shapes may differ: twice what the start check allowed, at least 1e-3."""
    return float(max(2 * report["tolerance"], 1e-3))


def reference_identity(model: Any, fresh_adapter: bool) -> tuple[str, str]:
    """Fingerprint of the start model as a reference, and what its adapter is. Read before the model is cut."""
    adapter = "active" if hasattr(model, "peft_config") and not fresh_adapter else "none"
    return forward_fingerprint(model, skip_adapters=fresh_adapter), adapter


class References:
    """The references of one run's streams: identified, then provided, then (where they follow the policy) moved and saved.

    root: folder of the stores. cost: tokens and seconds that filling them took.
    """

    def __init__(self, settings: TrainSettings, streams: Sequence[Stream], root: Path, ranks: Ranks) -> None:
        self.settings, self.root, self.ranks = settings, root, ranks
        self.cost = {"tokens": 0.0, "seconds": 0.0}
        self.following: FollowingReference | None = None
        reading = [stream for stream in streams if stream.objective.needs.reference != "none"]
        self._live = [stream for stream in reading if self._is_live(stream)]
        self._stored = [stream for stream in reading if not self._is_live(stream)]
        self._identity: tuple[str, str] | None = None

    def _is_live(self, stream: Stream) -> bool:
        return self.settings.sync_ref_model or stream.objective.needs.reference == "live"

    def identify(self, policy: Any, fresh: bool) -> None:
        """Name the start weights in the store, where a store will hold them: before the model is cut."""
        if self._stored and self.settings.reference_model is None:
            self._identity = self.ranks.first(lambda: reference_identity(policy, fresh))

    def provide(self, policy: Any, fresh: bool, forward: Forward, tolerance: float) -> None:
        """Give every stream its store, and the forward pass its live reference.

        policy: at its start weights. tolerance: mean nats a token by which log-probs of equal weights may differ.
        """
        if self._live:
            forward.live = self._live_reference(policy, fresh, forward)
        if not self._stored:
            return
        mixture = self.settings.reference_mixture
        names = [self.settings.reference_model, *(mixture.models if mixture else ())]
        stores = [self._fill(name, policy, fresh, forward, tolerance) for name in names]
        for number, stream in enumerate(self._stored):
            mine = [several[number] for several in stores]
            stream.store = Mixture(mine, mixture.weights, mixture.clip) if mixture else mine[0]

    def check_start(self, policy: Any, stream: Stream, forward: Forward, allowed: float) -> float | None:
        """Reference = start weights: the log-ratios of a row must be 0, so that a DPO run begins at ln 2. None: it is another.

        Returns the mean difference, nats a token. Raises NumericsError where it exceeds what is allowed: the store was filled
        from other batches, so low precision leaves the same distance as the start check allowed.
        """
        settings = self.settings
        if stream.objective.needs.reference == "none" or settings.reference_model is not None or settings.reference_mixture is not None:
            return None
        lean = lean_layers(policy, forward.kernels)
        with evaluating(policy), torch.no_grad(), forward.attention(unwrapped(policy)), lean:
            scored = forward.scored(policy, stream, [0])
        assert scored.policy is not None
        assert scored.reference is not None
        off = float(((scored.policy - scored.reference) * scored.mask).abs().sum() / scored.mask.sum())
        if not off <= allowed:
            raise NumericsError(
                f"The policy starts {off:.2g} nats a token away from its reference, which are the same weights (allowed {allowed:.2g})."
            )
        return off

    def callbacks(self) -> list[TrainerCallback]:
        """What moves and saves a reference that follows the policy."""
        if self.following is None:
            return []
        return [FollowPolicy(self.following, self.settings.ref_model_mixup_alpha, self.settings.ref_model_sync_steps)]

    def resume(self, checkpoint: Path) -> None:
        """Put a following reference back to where it was."""
        if self.following is not None:
            self.following.load(checkpoint)

    def _live_reference(self, policy: Any, fresh: bool, forward: Forward) -> LiveReference:
        settings = self.settings
        if settings.sync_ref_model:
            live: LiveReference = FollowingReference(policy)
            assert isinstance(live, FollowingReference)
            self.following = live
        elif settings.reference_model is not None:
            register()
            live = LiveReference(
                load_causal(settings.reference_model, dtype=settings.dtype, device=forward.device, four_bit=four_bit(settings)).eval()
            )
        elif fresh:
            return LiveReference(context=partial(adapter_off, policy))
        else:
            live = LiveReference(frozen_copy(policy))
        if forward.form != "padded":
            unwrapped(live.model).set_attn_implementation(NAME)
        return live

    def _fill(self, name: str | None, policy: Any, fresh: bool, forward: Forward, tolerance: float) -> list[ReferenceStore]:
        """For each stream a store with one reference's log-probs. A model by name is loaded for it and then let go; None: the start model.

        A named model is loaded for its fingerprint even where the store has every row.
        """
        form, device, autocast = forward.form, forward.device, forward.autocast
        off: Callable[[], AbstractContextManager[Any]] = partial(adapter_off, policy) if fresh else nullcontext
        reference, identity = policy, self._identity
        if name is not None:
            register()
            where = torch.device("cpu") if self.settings.fsdp else device
            reference = load_causal(name, dtype=self.settings.dtype, device=where, four_bit=four_bit(self.settings))
            off, identity = nullcontext, self.ranks.first(lambda: reference_identity(reference, fresh_adapter=False))
            if self.settings.fsdp and self.ranks.size > 1:
                shard(reference, device)
            else:
                reference.to(device)
            form, report = choose_form(reference, self._stored[0].rows, self.settings.attention, device, autocast, forward.kernels)
            tolerance = stored_tolerance(report)
        assert identity is not None
        context = Context(*identity, dtype_label(self.settings, reference), f"{form}/{device.type}")
        attention = nullcontext() if form == "padded" else attention_of(unwrapped(reference), NAME)
        # As the training step computes, so that a run's first log-ratios are as near 0 as can be.
        with off(), attention, lean_layers(reference, forward.kernels):
            return [self._fill_stream(reference, stream.rows, context, form, forward, tolerance) for stream in self._stored]

    def _fill_stream(
        self, reference: Any, rows: Sequence[TokenRow], context: Context, form: Form, forward: Forward, tolerance: float
    ) -> ReferenceStore:
        store, ranks = ReferenceStore(self.root, context), self.ranks
        # No rank may start writing before all have listed what is missing: they deal out one and the same list.
        ranks.wait()
        assert isinstance(self.settings.token_budget, int), "decided when the run began"
        # The longest row too: what a window or a rotary scale changes shows in no short one.
        probes = [*rows[:CHECKED_ROWS], max(rows, key=lambda row: row.tokens)]
        known = [row for row in probes if not store.missing([row])]
        if known:
            check(reference, known, store, form, forward.device, forward.autocast, tolerance)
        mine = build(reference, rows, store, form, self.settings.token_budget, forward.device, forward.autocast, ranks.rank, ranks.size)
        everyone = ranks.gather(mine)
        self.cost["tokens"] += sum(cost["tokens"] for cost in everyone)
        self.cost["seconds"] += max(cost["seconds"] for cost in everyone)
        store.reload()
        return store


class FollowPolicy(TrainerCallback):
    """Moves a reference towards the policy every so many steps (TR-DPO), and saves it with every checkpoint."""

    def __init__(self, reference: FollowingReference, mixup: float, steps: int) -> None:
        self._reference, self._mixup, self._steps = reference, mixup, steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After the policy's own update, so that a checkpoint of this step holds both."""
        if state.global_step % self._steps == 0:
            self._reference.move(self._mixup)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before the checkpoint is marked complete."""
        if state.is_world_process_zero and args.output_dir is not None:
            self._reference.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def check_references(settings: TrainSettings, objectives: Sequence[Objective]) -> None:
    """Raise UsageError where the settings name references that cannot be had together, or in this recipe."""
    needs = [objective.needs for objective in objectives]
    live = [type(objective).__name__ for objective in objectives if objective.needs.reference == "live"]
    if settings.sync_ref_model:
        if not any(need.reference != "none" for need in needs):
            raise UsageError("sync_ref_model: no objective of this run reads a reference; leave it out.")
        for name in ("reference_model", "reference_mixture"):
            if getattr(settings, name) is not None:
                raise UsageError(f"sync_ref_model starts from the run's own start weights and follows the policy: leave out {name}.")
    if settings.reference_mixture is not None and live:
        raise UsageError(f"{live[0]} reads the reference's whole vocabulary, and reference_mixture has the log-probs of the replies only.")
    copied = settings.sync_ref_model or (live and (settings.reference_model is not None or not settings.use_peft))
    if settings.fsdp and copied:
        raise UsageError(
            "A second model in memory is not cut over processes: with fsdp, leave out sync_ref_model, and train LoRA where "
            "an objective needs a live reference."
        )
