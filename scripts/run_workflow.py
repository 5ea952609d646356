#!/usr/bin/env python3
"""Run any ComfyUI workflow without a browser: with progress, cancel, and the paths of what it made.

    python scripts/run_workflow.py workflows/i2v_a14b.json --help
    python scripts/run_workflow.py workflows/i2v_a14b.json --set image=cat.png --set prompt="a cat" --set steps=20

Exit codes: 0 done; 1 a node failed; 2 wrong usage, workflow or setting; 3 no server; 130 cancelled (Ctrl-C or SIGTERM).
Paths of the files made go to standard output, one a line; everything else goes to standard error.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - whoever runs this may have any Python
    sys.exit("This needs Python 3.11 or later: run it with one, for example 'python3.12 scripts/run_workflow.py'.")

import contextlib
import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import environments
import host

if any(importlib.util.find_spec(name) is None for name in ("typer", "rich", "websocket")):
    try:  # whichever Python this was started with, carry on in one that has what it takes
        _python = str(environments.client_python())
    except host.HostError as _error:
        sys.exit(f"{_error}")
    os.execv(_python, [_python, *sys.argv])

import typer
from comfy_server import start_server
from headless.client import Client, Output
from headless.convert import to_prompt
from headless.errors import Cancelled, RunError, ServerUnreachable, WorkflowError
from headless.progress import progress_for
from headless.settings import Setting, apply, settings, shortest_name, unique_names
from rich.console import Console
from rich.table import Table

OUTPUT = host.PACK / "output"
OWN_FOLDERS = host.HOST_DIR / "demo"
"""Models, inputs and settings of the pinned host when it is started from here; ``make demo`` puts its checkpoint
there."""
console = Console(stderr=True, highlight=False)


@contextlib.contextmanager
def start(
    comfyui: Path | None, base: Path | None, output: Path | None, models: Path | None
) -> Iterator[tuple[Client, Path]]:
    """Start a ComfyUI for this run: the one in ``comfyui`` or ``COMFYUI_DIR`` with its own models and packs, else the
    pinned one, built first if need be. Gives a client of it and the folder its outputs appear in."""
    try:
        chosen = host.adopt(comfyui) if comfyui is not None else host.ensure()
        if chosen.pinned:
            base, output = base or OWN_FOLDERS, output or OUTPUT
        with contextlib.ExitStack() as stack:
            with console.status("starting ComfyUI ..."):
                running = stack.enter_context(start_server(chosen, base=base, output=output, models=models))
            yield Client(running.url), running.output
    except host.HostError as error:
        raise ServerUnreachable(str(error)) from None


def load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WorkflowError(f"{path} cannot be read as a workflow: {error}") from None


def describe(path: Path, available: list[Setting]) -> Table:
    """Every setting of a workflow: its shortest name, value, what it accepts, and the node it belongs to."""
    names = unique_names(available)
    table = Table(title=f"--set names of {path.name}", title_justify="left", show_lines=False)
    table.add_column("name", no_wrap=True)
    for column in ("value", "accepts", "node"):
        table.add_column(column, overflow="fold")
    for setting in available:
        value = "" if setting.value is None else str(setting.value)
        value = value if len(value) <= 60 else value[:57] + "..."
        table.add_row(shortest_name(setting, names), value, setting.allowed(), setting.title)
    return table


def save(client: Client, made: list[Output], local: Path | None, folder: Path) -> list[Path]:
    """Paths of the files made: where the server put them if that is here, else downloaded into ``folder``."""
    paths = []
    for output in made:
        path = local / output.subfolder / output.filename if local is not None and output.kind == "output" else None
        paths.append(path if path is not None and path.is_file() else client.download(output, folder))
    return paths


def run(workflow: Path, assignments: list[str], client: Client, local: Path | None, folder: Path) -> list[Path]:
    """Convert, set, queue, follow; returns the paths of the files made. RunError says what went wrong."""
    content, info = load(workflow), client.object_info()
    prompt = to_prompt(content, info)
    apply(prompt, info, assignments, client.upload)
    with progress_for(prompt.nodes, console) as progress:
        made = client.run(prompt.nodes, progress.event)
    return save(client, made, local, folder)


app = typer.Typer(add_completion=False, context_settings={"help_option_names": []})


@app.command()
def main(
    context: typer.Context,
    workflow: Annotated[
        Path | None,
        typer.Argument(help="A workflow file, as the editor saves it or in API format.", show_default=False),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Set an input; repeatable. A local file given for an image, a video or a sound is uploaded.",
        ),
    ] = None,
    server: Annotated[str | None, typer.Option(metavar="URL", help="Use a server that runs already.")] = None,
    comfyui: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Start this ComfyUI for the run, with its models and packs. Default: COMFYUI_DIR, else a pinned one.",
        ),
    ] = None,
    base_directory: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Start it on this folder of models, inputs, settings and packs instead of its own.",
        ),
    ] = None,
    models: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Another models folder to search, laid out like ComfyUI's.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where files go. Default: the output folder of --comfyui, else 'output' in this pack.",
        ),
    ] = None,
    show_help: Annotated[
        bool, typer.Option("--help", help="With a workflow: list everything that --set can change in it.")
    ] = False,
) -> None:
    """Run a ComfyUI workflow without a browser.

    Exit codes: 0 done, 1 a node failed, 2 wrong usage, workflow or setting, 3 no server, 130 cancelled.
    """
    if workflow is None:
        typer.echo(context.get_help())
        raise typer.Exit(0 if show_help else WorkflowError.exit_code)
    try:
        if server is not None and any((comfyui, base_directory, models)):
            raise WorkflowError("--server names a ComfyUI that runs already: leave out the options for starting one.")
        load(workflow)  # a file that cannot be read is told before a server is started
        own = start(comfyui, base_directory, output, models)
        with own if server is None else contextlib.nullcontext((Client(server), None)) as (client, local):
            if show_help:
                info = client.object_info()
                Console().print(describe(workflow, settings(to_prompt(load(workflow), info), info)))
                return
            for path in run(workflow, assignments or [], client, local, output or OUTPUT):
                print(path)
    except RunError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        console.print("Cancelled.", style="red")
        raise typer.Exit(Cancelled.exit_code) from None


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _as_interrupt)  # a supervisor that ends us cancels the prompt too
    app()
