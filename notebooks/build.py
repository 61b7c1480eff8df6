"""Run the notebooks from a clean kernel, and refuse what must not be committed.

python notebooks/build.py run            # all, in full mode, in place; prints minutes
python notebooks/build.py run 02 14
python notebooks/build.py check          # one line per finding, exit code 1 where there is one
"""

import argparse
import ast
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
CELL_SECONDS = 1800
LARGEST_BYTES = 1_000_000
LONGEST_CELL = 20  # lines that are not blank
LONGEST_FUNCTION = 10
VIEW = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"^[^\n]*\d+%\|")
MACHINE_PATH = re.compile(
    r"/(?:home|Users)/\w|(?<!/data/local)/tmp/|/var/folders/|\b[A-Z]:\\+Users\\|site-packages|dist-packages"
    + "".join(f"|{re.escape(str(path))}/" for path in (Path.home(), HERE.parent) if len(path.parts) > 1)
)


def run(path: Path) -> float:
    """Execute a notebook in place from a clean kernel and keep its outputs; returns the minutes it took.

    Nothing is written where a cell fails. Raises CellExecutionError.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    start = time.monotonic()
    NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(HERE)}},
        record_timing=False,
    ).execute()
    minutes = (time.monotonic() - start) / 60
    notebook.metadata.language_info.pop("version", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress bars that have gone leave their first line behind
            cell.outputs = [one for one in cell.outputs if not is_progress(one)]
    drop_hidden_widgets(notebook)
    notebook.metadata.edgelab = {"minutes": round(minutes, 1)}
    draft = path.with_suffix(".part")
    nbformat.write(notebook, draft)
    draft.replace(path)
    return minutes


def is_progress(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a progress bar: its text is the bar, which may be cut off, and not that of a widget."""
    data = output.get("data", {})
    is_bar = VIEW in data and not re.match(r"\w+\(", "".join(data.get("text/plain", "")))
    return is_bar or any(map(PROGRESS.search, _texts(output)))


def drop_hidden_widgets(notebook: nbformat.NotebookNode) -> None:
    """Forget, in place, the states of widgets that no output shows: progress bars leave a dozen behind each."""
    for kept in notebook.metadata.get("widgets", {}).values():
        states = kept["state"]
        outputs = [one for cell in notebook.cells for one in cell.get("outputs", ())]
        views = [one.get("data", {}).get(VIEW) for one in outputs]
        reached, found = set(), [view["model_id"] for view in views if view]
        while found:
            name = found.pop()
            if name in states and name not in reached:
                reached.add(name)
                found += re.findall(r"IPY_MODEL_(\w+)", str(states[name]["state"]))
        kept["state"] = {name: state for name, state in states.items() if name in reached}


def findings(path: Path) -> Iterator[str]:
    """What must not be committed in a notebook: one line each, with the number of the cell (from 1)."""
    size = path.stat().st_size
    if size > LARGEST_BYTES:
        yield f"is {size / 1e6:.1f} MB; {LARGEST_BYTES / 1e6:.0f} MB is the limit"
    try:
        notebook = nbformat.read(path, as_version=4)
    except (ValueError, nbformat.ValidationError) as error:
        yield f"is not a notebook: {str(error).splitlines()[0]}"
        return
    if "name" not in notebook.metadata.get("kernelspec", {}):
        yield "names no kernel in its metadata, so that it opens with a dialog"
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(counts) + 1)):
        yield f"was not run once from top to bottom: execution counts are {counts}"
    for number, cell in enumerate(notebook.cells, 1):
        yield from (f"cell {number} {finding}" for finding in _cell_findings(cell))
    widgets = str(notebook.metadata.get("widgets", ""))
    yield from (f"in its widgets {finding}" for finding in _shown_findings(widgets))


def _cell_findings(cell: nbformat.NotebookNode) -> Iterator[str]:
    if found := MACHINE_PATH.search(cell.source):
        yield f"holds a path of one machine in its source ({found.group()})"
    if cell.cell_type != "code":
        return
    lines = sum(1 for line in cell.source.splitlines() if line.strip())
    if lines > LONGEST_CELL:
        yield f"has {lines} lines; {LONGEST_CELL} is the limit"
    yield from _long_functions(cell.source)
    for output in cell.outputs:
        if output.output_type == "error":
            yield f"ended in an error: {output.ename}"
    yield from _shown_findings("\n".join(text for output in cell.outputs for text in _texts(output)))


def _shown_findings(shown: str) -> Iterator[str]:
    if found := MACHINE_PATH.search(shown):
        yield f"shows a path of one machine ({found.group()})"
    if re.search(r"\bFAST\b", shown):
        yield "was run in fast mode: its output is stamped FAST"


def _long_functions(source: str) -> Iterator[str]:
    # Magics are no Python; a comment keeps the number of lines.
    python = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)
    try:
        tree = ast.parse(python)
    except SyntaxError as error:
        yield f"is not Python: {error.msg}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield f"defines {node.name}() of {lines} lines; over {LONGEST_FUNCTION} it belongs in edgelab"


def _texts(output: nbformat.NotebookNode) -> Iterator[str]:
    """Everything in an output that is text; pictures in base64 are left out."""
    yield output.get("text", "")
    yield from output.get("traceback", ())
    for kind, data in output.get("data", {}).items():
        if kind == "image/svg+xml" or not kind.startswith(("image/", "application/pdf")):
            yield str(data)


def _notebooks(names: list[str]) -> list[Path]:
    """The notebooks of those names: paths or beginnings of file names; all of them where none is given."""
    everything = sorted(HERE.glob("*.ipynb"))
    if not names:
        return everything
    chosen = []
    for name in names:
        matching = [path for path in everything if path.name.startswith(name)]
        found = [Path(name)] if Path(name).is_file() else matching
        if not found:
            sys.exit(f"There is no notebook {name}; there are {', '.join(path.stem for path in everything)}.")
        chosen += found
    return chosen


def main() -> int:
    """The command line; returns the exit code."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("what", choices=["run", "check"])
    parser.add_argument("names", nargs="*", help="paths or beginnings of file names; default: all notebooks")
    arguments = parser.parse_args()
    paths = _notebooks(arguments.names)
    if arguments.what == "check":
        lines = [f"{path.name} {finding}" for path in paths for finding in findings(path)]
        print("\n".join([*lines, f"{len(paths)} notebooks checked, {len(lines)} findings"]))
        return 1 if lines else 0
    os.environ.pop("EDGELAB_FAST", None)  # what is committed is run in full
    for path in paths:
        print(path.name, end=" ", flush=True)
        try:
            print(f"{run(path):.1f} min", flush=True)
        except CellExecutionError as error:
            print(f"failed and was left as it was\n{error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
