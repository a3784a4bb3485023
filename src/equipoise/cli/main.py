"""`equipoise`: one verb per file of this folder. Starting up imports neither torch nor transformers."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from equipoise.core.catalog import names
from equipoise.core.errors import EquipoiseError
from equipoise.core.printable import printable

# typer carries its own copy of click in some releases and depends on click in others; its public errors lead to either.
ClickError: type[Any] = typer.BadParameter.__mro__[2]

INTERRUPTED = 130
"""128 and the number of SIGINT: what shells expect, so that a script's loop ends too."""


class Verbs(TyperGroup):
    """Finds the verbs by listing the folder and imports a verb's file only when it is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Every module beside this one is a verb."""
        return [name for name in names("cli") if name != "main"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import `cli/<verb>.py` and build its command from `app` (a group) or `run` (a single command)."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"equipoise.cli.{cmd_name}")
        app = getattr(module, "app", None)
        if app is None:
            app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            app.command(name=cmd_name)(module.run)
        command = typer.main.get_command(app)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=Verbs,
    name="equipoise",
    help="Align language models to be helpful and harmless, and know whether it worked.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Align language models to be helpful and harmless, and know whether it worked."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 1 failed, 2 bad use, 130 stopped by Ctrl-C."""
    # Tokenizers warn about forking once data workers start; we never fork them in mid-use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        result = app(args=arguments, standalone_mode=False)
        code = int(result) if isinstance(result, int) else 0
    except EquipoiseError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except typer.Exit as stop:
        code = int(stop.exit_code)
    except ClickError as error:
        error.show()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    # typer makes this code of Ctrl-C itself, and the exception never comes here.
    if code == INTERRUPTED:
        print("stopped; run the same command again to continue", file=sys.stderr)
    return code


def entry() -> None:
    """The console script."""
    raise SystemExit(main())
