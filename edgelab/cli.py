"""The command line: fetch, doctor, list, devices, measure, compare, export, plan, serve, report, ledger, cache, lab."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgelab.errors import EdgeLabError

Listed = Literal[
    "techniques", "runtimes", "measurements", "fields", "protocols", "corpora", "models", "devices"
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Compare techniques for running a small language model at the edge.",
)
ledger_app = typer.Typer(
    no_args_is_help=True, help="Look at the rows, export them. Example: `edgelab ledger show`"
)
cache_app = typer.Typer(
    no_args_is_help=True, help="Look at what is cached, empty it. Example: `edgelab cache show`"
)
app.add_typer(ledger_app, name="ledger")
app.add_typer(cache_app, name="cache")
out, err = Console(), Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line, and nothing else.")]
Recipes = Annotated[
    list[str], typer.Argument(help="Recipes, e.g. none or 'quantize.rtn:bits=4,group_size=64'.")
]
Model = Annotated[
    str, typer.Option(help="'embedded', a Hub id, a folder with weights and tokenizer, or a .gguf file.")
]
Corpus = Annotated[
    str, typer.Option(help="Text to evaluate on: a name of `edgelab list corpora`, or a text file.")
]
ProtocolName = Annotated[str, typer.Option("--protocol", help="A name of `edgelab list protocols`.")]
Windows = Annotated[
    int | None, typer.Option(help="How many windows score (default 32; 4 with EDGELAB_FAST=1).")
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Threads = Annotated[
    int | None, typer.Option(help="Threads of the measured process (default: physical cores).")
]
PromptTokens = Annotated[
    int | None, typer.Option("--prompt-tokens", help="Tokens of the timed prompt (default 128).")
]
PowerW = Annotated[
    float | None,
    typer.Option(
        "--power-w", help="Watts of this device while decoding, to estimate energy where RAPL is closed."
    ),
]
Only = Annotated[
    str | None,
    typer.Option(
        help="Measure these parts, joined by commas: quality, speed, memory, tasks, or one of your own."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done and how long it may take, and do nothing.")
]
Force = Annotated[bool, typer.Option("--force", help="Measure again although the ledger has the row.")]


@app.callback()
def _main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on standard error.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(message)s")
    logging.captureWarnings(True)


@app.command(epilog="Example: `edgelab fetch`")
def fetch(force: Annotated[bool, typer.Option("--force", help="Fetch and decode again.")] = False) -> None:
    """Fetch the embedded model and texts (97 MB, once), verify them, decode the model."""
    from edgelab import assets

    err.print(f"Model and texts are ready in {assets.fetch(force)}.", highlight=False, soft_wrap=True)


@app.command(epilog="Example: `edgelab measure none quantize.rtn:bits=4 --windows 8 --json`")
def measure(
    context: typer.Context,
    recipes: Recipes,
    model: Model = "embedded",
    corpus: Corpus = "wiki",
    protocol: ProtocolName = "edgelab-512",
    windows: Windows = None,
    seed: Seed = 0,
    threads: Threads = None,
    prompt_tokens: PromptTokens = None,
    power_w: PowerW = None,
    only: Only = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Measure recipes, each by itself, and record the rows."""
    from edgelab import lab

    if dry_run:
        _print_plan(lab.planned(recipes, interleave=False, **_settings(context)), as_json)
    else:
        _stream(lab.stream(recipes, interleave=False, **_settings(context)), as_json)


@app.command(epilog="Example: `edgelab compare none quantize.bf16 --report results/report.html`")
def compare(
    context: typer.Context,
    recipes: Annotated[list[str] | None, typer.Argument(help="Recipes; without any, a first set.")] = None,
    model: Model = "embedded",
    corpus: Corpus = "wiki",
    protocol: ProtocolName = "edgelab-512",
    windows: Windows = None,
    seed: Seed = 0,
    threads: Threads = None,
    prompt_tokens: PromptTokens = None,
    power_w: PowerW = None,
    only: Only = None,
    force: Force = False,
    dry_run: DryRun = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report of these rows here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure recipes beside the baseline, print a table, record the rows."""
    from edgelab import lab

    recipes = recipes or list(lab.DEFAULT_SET)
    if dry_run:
        _print_plan(lab.planned(recipes, **_settings(context)), as_json)
        return
    rows = lab.stream(recipes, **_settings(context))
    _stream(rows, as_json, (lambda done: _report(done, report, model)) if report else None)


@app.command(epilog="Example: `edgelab export quantize.rtn:bits=4,group_size=32 model.gguf --to gguf`")
def export(
    recipe: Annotated[str, typer.Argument(help="A recipe; where it runs is what --to says.")],
    path: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Where to write; for onnx a folder, which has several files."),
    ],
    to: Annotated[
        Literal["gguf", "onnx", "litertlm"],
        typer.Option(
            help="gguf for llama.cpp and what is built on it, onnx for ONNX Runtime GenAI, litertlm for LiteRT-LM."
        ),
    ],
    model: Model = "embedded",
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier file at this place.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a recipe as a file that other programs open, with the integers that our techniques chose."""
    from dataclasses import asdict

    from edgelab.lab import export as write

    before = signal.signal(signal.SIGTERM, _end)  # so that what is half-written goes
    try:
        done = write(recipe, to, path, model=model, seed=seed, force=force)
    finally:
        signal.signal(signal.SIGTERM, before)
    if as_json:
        _print([asdict(done)], True)
        return
    predicted = "" if done.predicted_mb is None else f" (predicted {done.predicted_mb:,.1f} MB)"
    fast = " EDGELAB_FAST had its recipe calibrate on less and train shorter." if done.fast else ""
    said = f"{done.path}: {done.file_mb:,.1f} MB{predicted}, {done.recipe} of {done.model}.{fast}"
    _say([said, done.then, *filter(None, [done.notes])])


def _end(*_: object) -> None:
    raise SystemExit(143)


@app.command(
    epilog="Example: `edgelab plan 'quantize.rtn:bits=4 @ partition:fleet=laptop_and_pis' --save plan.json`"
)
def plan(
    recipe: Annotated[
        str, typer.Argument(help="A recipe @ partition:fleet=..., which says how to plan.")
    ] = "",
    model: Model = "embedded",
    profile: Annotated[
        Path | None, typer.Option(help="A profile: read if it is there, else measured here and written.")
    ] = None,
    published: Annotated[
        str | None,
        typer.Option(
            help="Plan for a model of `edgelab list models`, counted from its shape instead of timed."
        ),
    ] = None,
    bits: Annotated[float, typer.Option(help="With --published: bits of a stored weight.")] = 32,
    efficiency: Annotated[
        float,
        typer.Option(help="With --published: share of a device's memory bandwidth that decoding reaches."),
    ] = 0.6,
    save: Annotated[
        Path | None, typer.Option(help="Write the plan here; partition:plan=FILE runs it.")
    ] = None,
    read: Annotated[Path | None, typer.Option(help="Print a saved plan instead of making one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Plan which layers run on which device of a fleet, beside what other planners would do."""
    from edgelab.deployments.partition import planning
    from edgelab.deployments.partition.planners import explained
    from edgelab.lab import plans
    from edgelab.recipes import parse

    if read is not None:
        saved = planning.read_plan(read)
        _print(saved["stages"], as_json)
        if not as_json:
            _say(saved["explained"])
        return
    recipe = recipe or "none @ partition"
    if published is not None:
        found = plans.plan_from_shape(recipe, published, bits=bits, efficiency=efficiency)
        formats = planning.over_formats(found)
    else:
        found = plans.plan(recipe, model=model, timings=profile)
        formats = plans.formats(found, recipe, model)
    if save is not None:
        found.save(save, str(parse(recipe)), formats)
    _print(found.stages(), as_json)
    if not as_json:
        _say(explained(found.problem, found.plan, found.profile.names))
        predicted = found.predicted
        _say(
            [
                f"Predicted: {predicted.tpot_ms:,.1f} ms per token, {predicted.ttft_ms:,.0f} ms to the first token of "
                f"{planning.PROMPT}, {predicted.tok_s:,.1f} tokens/s with {predicted.requests} requests in flight."
            ]
        )
        _print(planning.against(found), as_json)
        _print(formats, as_json)


def _say(sentences: list[str]) -> None:
    for sentence in sentences:
        out.print(sentence, highlight=False, soft_wrap=True)


@app.command(epilog="Example: `edgelab report results/report.html`")
def report(
    path: Annotated[
        Path, typer.Argument(help="Where to write: an .html page, or a .png of the trade-off.")
    ] = Path("results/report.html"),
    model: Model = "embedded",
    reference: Annotated[bool, typer.Option("--reference", help="The project's rows alone.")] = False,
) -> None:
    """Write an HTML report, or the trade-off plot, of the project's reference rows and your own."""
    from edgelab import ledger, plots
    from edgelab.rows import small_embedding

    rows = ledger.frame(ledger.reference(), "reference") if reference else ledger.frame()
    if path.suffix == ".png":
        path.parent.mkdir(parents=True, exist_ok=True)
        plots.tradeoff(small_embedding(rows)).savefig(path, dpi=120)
    else:
        _report(rows, path, model)


@app.command(name="list", epilog="Example: `edgelab list techniques`")
def list_(
    what: Annotated[Listed, typer.Argument()],
    model: Annotated[
        str | None,
        typer.Option(
            help="With runtimes: ask about this model, a folder, Hub id or .gguf file. Its configuration is read alone."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what a recipe, an option or a plot can name; of runtimes, which recipe runs on which, and why not."""
    from edgelab.listing import listing

    rows = listing(what, model)
    if what == "runtimes" and not as_json:
        _print_support(rows)
        if model is not None:
            said = "The configuration alone was asked; weights and tokenizer may yet be refused when they are loaded."
            out.print(said, highlight=False, soft_wrap=True)
    else:
        _print(rows, as_json)


def _print_support(rows: list[dict[str, Any]]) -> None:
    """A column for each runtime, numbers where a recipe does not run, and what they stand for."""
    reasons = list(dict.fromkeys(row["reason"] for row in rows if row["reason"]))
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        mark = str(reasons.index(row["reason"]) + 1) if row["reason"] else "✓"
        name = ", ".join(filter(None, (row["recipe"], row["alike"])))
        table.setdefault(name, {"recipe": name})[row["runtime"]] = mark
    _print(list(table.values()), False)
    for number, reason in enumerate(reasons, 1):
        out.print(f"{number:>3}  {reason}", highlight=False, soft_wrap=True)
    if absent := list(dict.fromkeys(row["runtime"] for row in rows if not row["installed"])):
        named = f"Not installed here: {', '.join(absent)}; `edgelab doctor` says how to get them."
        out.print(named, highlight=False, soft_wrap=True)


@app.command(epilog="Example: `edgelab devices 'My phone' --memory-gb 8 --bandwidth-gb-s 51.2`")
def devices(
    name: Annotated[str, typer.Argument(help="A device of your own, to keep; without one, list all.")] = "",
    memory_gb: Annotated[float | None, typer.Option(help="As sold.")] = None,
    bandwidth_gb_s: Annotated[
        float | None, typer.Option(help="Peak of its memory, in GB/s, from a data sheet.")
    ] = None,
    usable_gb: Annotated[float | None, typer.Option(help="What it leaves to a model.")] = None,
    gflop_s: Annotated[float | None, typer.Option(help="Its arithmetic, in GFLOP/s.")] = None,
    runs_on: Annotated[
        str, typer.Option(help="phone, CPU or GPU: whose published rates it is expected to reach.")
    ] = "phone",
    as_json: AsJson = False,
) -> None:
    """List the devices that plans, the picker and notebooks know, or keep one of your own among them."""
    from edgelab.devices import own
    from edgelab.listing import listing

    if not name:
        shown = ("name", "memory_gb", "usable_gb", "memory_bandwidth_gb_s", "float32_gflop_s", "runs_on")
        _print([{key: row[key] for key in shown} for row in listing("devices")], as_json)
        return
    if memory_gb is None or bandwidth_gb_s is None:
        raise EdgeLabError(f"{name} needs --memory-gb and --bandwidth-gb-s; its data sheet has both.")
    file = own.keep_device(
        own.own_device(name, bandwidth_gb_s, memory_gb, gflop_s=gflop_s, usable_gb=usable_gb, runs_on=runs_on)
    )
    err.print(f"{name} is kept in {file}.", highlight=False, soft_wrap=True)


@ledger_app.command("show", epilog="Example: `edgelab ledger show --last 5 --json`")
def ledger_show(
    last: Annotated[int, typer.Option(help="How many rows, newest last.")] = 20,
    reference: Annotated[
        bool, typer.Option("--reference", help="The project's rows instead of yours.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the newest rows."""
    from edgelab import ledger

    rows = ledger.reference()[-last:] if reference else ledger.own(last)
    _print_rows([row.flat() for row in rows], as_json)


@ledger_app.command("export", epilog="Example: `edgelab ledger export rows.parquet`")
def ledger_export(path: Annotated[Path, typer.Argument(help="A .csv, .parquet or .jsonl file.")]) -> None:
    """Write all your rows to a file."""
    from edgelab import ledger

    rows = ledger.own()
    ledger.export(rows, path)
    err.print(f"{len(rows)} rows in {path}.", highlight=False)


@cache_app.command("show", epilog="Example: `edgelab cache show`")
def cache_show(as_json: AsJson = False) -> None:
    """Show what is cached and what it takes: variants, hidden states, sensitivities, compiled code."""
    from edgelab.storage import cache

    found = [
        {
            "kind": one.path.parent.name,
            "name": one.path.name,
            "what": one.what,
            "mb": round(one.n_bytes / 1e6, 1),
        }
        for one in cache.entries()
    ]
    _print(found, as_json)


@cache_app.command("clear", epilog="Example: `edgelab cache clear`")
def cache_clear() -> None:
    """Empty the cache; model, texts and ledger stay."""
    from edgelab.storage import cache

    err.print(f"{cache.clear() / 1e6:.0f} MB freed.", highlight=False)


@app.command(epilog="Example: `edgelab serve 'quantize.rtn:bits=4' --port 8000 --token-file token`")
def serve(
    recipe: Annotated[str, typer.Argument(help="A recipe, with its engine after the @.")] = "none",
    model: Model = "embedded",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for a free one.")] = 0,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Write the token here, for its owner alone to read; else it is printed."),
    ] = None,
    certificate: Annotated[str, typer.Option(help="PEM file, for TLS.")] = "",
    key: Annotated[str, typer.Option(help="Its key, in PEM.")] = "",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without TLS.")
    ] = False,
    cut: Annotated[int | None, typer.Option(help="Layers that the edge runs, for split inference.")] = None,
    name: Annotated[str, typer.Option(help="What clients call the model (default: model and recipe).")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 512,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a prompt, at most (default: as many as the model and a quarter of the free memory hold)."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Of a request, at most, from its turn on; longer answers take more.")
    ] = 60.0,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Serve a recipe over HTTP, as OpenAI's servers do, until Ctrl-C.

    Prints its URL, the name of the model, and the token.
    """
    from edgelab.deployments.hybrid.server import serving
    from edgelab.deployments.hybrid.server.limits import Limits

    def announce(url: str, token: str) -> None:
        if token_file is not None:
            serving.write_token(token_file, token)
        _say([url, settings.called, *([token] if token_file is None else [])])

    prompt = {} if prompt_tokens is None else {"prompt_tokens": prompt_tokens}
    limits = Limits(
        max_tokens=max_tokens, request_s=seconds, waiting_s=max(seconds, Limits.waiting_s), **prompt
    )
    given = {"certificate": certificate, "key": key, "insecure": insecure, "cut": cut, "threads": threads}
    settings = serving.Settings(
        recipe=recipe, model=model, seed=seed, host=host, port=port, name=name, limits=limits,
        whole_context=prompt_tokens is None, **given,
    )  # fmt: skip
    if token_file is not None:
        serving.check_token_file(token_file)
    serving.serve(settings, announce)


@app.command(epilog="Example: `edgelab lab`")
def lab() -> None:
    """Open JupyterLab on the first notebook."""
    notebooks = Path(__file__).parent.parent / "notebooks"
    if not notebooks.is_dir():
        raise EdgeLabError(
            "The notebooks are not part of the installed package; open them from a clone of the project."
        )
    sys.exit(subprocess.call([sys.executable, "-m", "jupyterlab", "00_start_here.ipynb"], cwd=notebooks))


@app.command(epilog="Example: `edgelab doctor`")
def doctor(as_json: AsJson = False) -> None:
    """Look at machine, versions, assets, extras and notebook settings, and say how to mend what is amiss."""
    from edgelab.doctor import checks as look

    checks = list(look())
    if as_json:
        _print([dict(zip(("check", "state", "finding", "mend"), one, strict=True)) for one in checks], True)
    else:
        for name, state, finding, mend in checks:
            colour = {"ok": "green", "note": "yellow", "broken": "red"}[state]
            out.print(
                f"[{colour}]{state:>6}[/]  {name}: {finding}"
                + (f"\n        mend: {escape(mend)}" if mend else ""),
                highlight=False,
                soft_wrap=True,
            )
    raise typer.Exit(1 if any(state == "broken" for _, state, _, _ in checks) else 0)


NO_SETTINGS = ("recipes", "report", "dry_run", "as_json")


def _settings(context: typer.Context) -> dict[str, Any]:
    """The options of `measure` and `compare` that are settings of a measurement, under the same names."""
    return {name: v for name, v in context.params.items() if name not in NO_SETTINGS}


def _stream(rows: Any, as_json: bool, finish: Callable[[Any], None] | None = None) -> None:
    """Print rows as they come; Ctrl-C keeps what is there. Exits with 1 where a row failed."""
    from edgelab import ledger

    done = []
    try:
        for row in rows:
            done.append(row)
            if as_json:
                sys.stdout.write(ledger.strict_json(row.flat()) + "\n")
                sys.stdout.flush()
            elif row.status == "ok":
                err.print(f"{len(done)}: {row.recipe} done in {row.duration_s:.0f} s", highlight=False)
    except KeyboardInterrupt:
        rows.close()
        err.print(
            f"Interrupted; {len(done)} rows so far are kept in the ledger, and the same command goes on from there."
        )
        raise typer.Exit(130) from None
    finally:
        if done and not as_json:
            _print_rows([row.flat() for row in done], False)
    if finish:
        finish(ledger.frame(done))
    failed = [row for row in done if row.status != "ok"]
    for row in failed:
        err.print(f"{row.recipe}: {row.error}", style="red", highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _report(rows: Any, path: Path, model: str) -> None:
    from edgelab import reference, report

    report.write(rows, path, notes=reference.EMBEDDED_NOTES if model == reference.EMBEDDED else "")
    err.print(f"Report in {path}.", highlight=False)


def _print_plan(steps: list[Any], as_json: bool) -> None:
    """What would be done, and about how long it takes."""
    rows = [step.described() for step in steps]
    _print(rows, as_json)
    if not as_json:
        err.print(f"About {sum(row['seconds'] for row in rows):.0f} s.", highlight=False)


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """The fields that have a heading; those that no row fills are left out."""
    from edgelab.ledger import every_field

    headed = {name: one.heading for name, one in every_field().items() if one.heading}
    shown = [name for name in headed if any(row.get(name) is not None for row in rows)]
    _print(rows if as_json else [{headed[name]: row.get(name) for name in shown} for row in rows], as_json)


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        from edgelab.ledger import strict_json

        sys.stdout.writelines(strict_json(row) + "\n" for row in rows)
        return
    if not rows:
        err.print("Nothing yet; `edgelab compare` measures a first set of recipes.")
        return
    table = Table()
    for name in rows[0]:
        numeric = any(isinstance(row[name], int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    wide = Console(width=max(out.width, 150)) if not out.is_terminal else out
    wide.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the command line; what the user can mend is one sentence on standard error and exit code 1."""
    try:
        app()
    except EdgeLabError as error:
        err.print(f"edgelab: {error}", style="red", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
