"""`equipoise data`: look at a data set, turn it into token rows, hand its replies to a scorer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from equipoise.cli._output import Config, Json, Overwrite, Set, emit_json, emit_run, line, state, table, values_of

app = typer.Typer(
    help="Look at a data set (inspect), turn it into token rows (prepare), or hand its replies to a scorer (replies).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Source = Annotated[str | None, typer.Argument(help="hub name, local file or folder, or 'starter'")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="whose tokenizer: asset name, folder, or hub name")]


@app.command()
def inspect(
    source: Source = None,
    model: Model = None,
    samples: Annotated[int, typer.Option("--samples", min=0, help="records to show")] = 2,
    config: Config = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Show rows, roles, lengths, samples and what is dropped and why. With --model also lengths in tokens.

    Example: equipoise data inspect pairs.jsonl.gz --set data.part=dev
    """
    from equipoise.data.summary import summarise

    settings = _settings(source, {"model_name_or_path": model}, config, overrides)
    summary = summarise(settings, _tokenizer(model) if model is not None else None, samples=samples)
    if as_json:
        emit_json(summary)
    else:
        _show(summary)


@app.command()
def prepare(
    source: Source = None,
    model: Model = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="stage folder")] = None,
    roles: Annotated[str | None, typer.Option("--roles", help="reply roles of each row, such as chosen,rejected or gold")] = None,
    config: Config = None,
    overrides: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write token rows for a method's roles, with their accounting. Goes on where an earlier call was stopped.

    Example: equipoise data prepare pairs.jsonl.gz --model smollm2-135m-instruct --set tokenise.max_length=512 -o runs/rows
    """
    from equipoise.data.prepare import prepare as run

    given = {"model_name_or_path": model, "output_dir": output_dir, "roles": None if roles is None else roles.split(",")}
    settings = _settings(source, given, config, overrides)
    done = run(settings, _tokenizer(settings.model_name_or_path), overwrite=overwrite)
    if as_json:
        emit_run(done)
        return
    line(f"{state(done)}: {done.results['rows']} rows, {done.results['tokens']} tokens, from {done.results['rows_in']} rows of the source")
    line(f"{done.folder}/rows, {done.folder}/accounting.json")


@app.command()
def replies(
    source: Source = None,
    model: Model = None,
    output: Annotated[str, typer.Option("--output", "-o", help="file to write")] = "replies.jsonl",
    config: Config = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Write every reply as a line of completions.jsonl for `equipoise score`; `data.verdicts` reads its verdicts back.

    With --model also token ids, which the scorers `implicit` and `kl_to_base` need.

    Example: equipoise data replies pairs.jsonl -o runs/replies.jsonl
    """
    from equipoise.core.files import write_jsonl
    from equipoise.data._encode import Encoder
    from equipoise.data.load import stream
    from equipoise.data.verdicts import completions

    settings = _settings(source, {"model_name_or_path": model}, config, overrides)
    encoder = None if model is None else Encoder(_tokenizer(model), settings.tokenise)
    rows = list(completions(stream(settings.data).records, encoder))
    write_jsonl(output, rows)
    if as_json:
        emit_json({"file": output, "replies": len(rows)})
    else:
        line(f"{output}: {len(rows)} replies")


def _settings(source: str | None, given: Mapping[str, Any], config: str | None, overrides: list[str] | None) -> Any:
    """The settings of a file, then the arguments, then --set."""
    from equipoise.data.settings import PrepareSettings

    values = values_of(config, **given)
    if source is not None:
        values["data"] = {**(values.get("data") or {}), "dataset_name": source}
    return PrepareSettings.make(values, overrides or (), config or "")


def _tokenizer(name: str) -> Any:
    from equipoise.models.load import load_tokenizer

    return load_tokenizer(name)


def _show(summary: Mapping[str, Any]) -> None:
    """The summary as tables."""
    line(f"{summary['source']}: {summary['records']} records in the format {summary['format']}, fingerprint {summary['fingerprint']}")
    parts = ", ".join(f"{part} {count}" for part, count in summary["parts"].items())
    line(f"{summary['clusters']} prompt clusters; by part: {parts}")
    rows = [(unit, name, *spread.values()) for unit, group in summary["lengths"].items() for name, spread in group.items()]
    table("Lengths", ("in", "of", "smallest", "median", "mean", "95 %", "largest"), rows)
    counts = [("replies", role, count) for role, count in summary["roles"].items()]
    counts += [("turns in the prompt", turns, count) for turns, count in summary["turns"].items()]
    counts += [
        (name, f"{role}: {value}", count)
        for name in ("safe", "label")
        for role, values in summary[name].items()
        for value, count in values.items()
    ]
    counts += [(name, value, count) for name, values in summary["facts"].items() for value, count in values.items()]
    table("Counts", ("what", "value", "rows"), counts)
    _show_accounting("Accounting of rows", summary["accounting"])
    if "error" in summary.get("tokenised", {}):
        line(f"Tokenising for {', '.join(summary['tokenised']['roles'])}: {summary['tokenised']['error']}")
    elif "tokenised" in summary:
        title = f"Accounting of tokenising ({', '.join(summary['tokenised']['roles'])}; max_length {summary['tokenised']['max_length']})"
        _show_accounting(title, summary["tokenised"]["accounting"])
    for sample in summary["samples"]:
        line(f"\n--- {sample['id']}")
        for turn in sample["prompt"]:
            line(f"[{turn['role']}] {turn['content']}")
        for reply in sample["replies"]:
            flags = "".join(f", {name} {reply[name]}" for name in ("safe", "label") if reply[name] is not None)
            scores = "".join(f", {name} {value:g}" for name, value in reply["scores"].items())
            line(f"[{reply['role']}{flags}{scores}] {reply['text']}")


def _show_accounting(title: str, accounting: Mapping[str, Any]) -> None:
    rows: list[tuple[Any, ...]] = [("rows in", accounting["rows_in"], "")]
    rows += [(f"dropped: {reason}", entry["count"], ", ".join(entry["rows"])) for reason, entry in accounting["dropped"].items()]
    rows.append(("kept", accounting["kept"], ""))
    names = {"truncated_prompts": "prompts truncated", "replies_cut": "replies cut", "eos_lost": "ends not learned"}
    rows += [(words, accounting[name], "") for name, words in names.items() if accounting[name]]
    rows += [(what, count, "") for what, count in accounting["notes"].items()]
    table(title, ("what", "rows", "first of them"), rows)
