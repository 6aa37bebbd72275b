"""``modreg-fast audit``: a model and data that the user's own module makes."""

import argparse
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modreg_fast import _output
from modreg_fast._evaluation import extra

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=_place, metavar="MODULE:NAME", help="a function that returns the model")
    parser.add_argument(
        "--data", required=True, type=_place, metavar="MODULE:NAME", help="a function that returns a loader of (inputs, target)"
    )
    parser.add_argument(
        "--features",
        action="append",
        type=_entries,
        metavar="MODALITY=MODULE[,MODULE...]",
        help="modules of the model whose outputs to attribute to, as names or globs; once per modality (default: the inputs)",
    )
    parser.add_argument(
        "--metric", type=_place, metavar="MODULE:NAME", help="a function that returns a metric (default: accuracy)"
    )
    parser.add_argument(
        "--ignore-index", type=int, default=-100, metavar="N", help="target that does not count (default %(default)s)"
    )
    parser.add_argument("--baseline", choices=("zero", "mean"), default="zero", help="of the attribution (default %(default)s)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page")
    parser.add_argument("--plot", type=_picture, metavar="FILE", help="write the picture, such as audit.png or audit.pdf")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of the table")


def main(options: argparse.Namespace) -> int:
    """Runs what ``add_arguments`` parsed; 0, 1 with a message, or 2 for arguments that do not fit each other."""
    from modreg_fast.audit.measure import audit

    names = [name for name, _ in options.features or ()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        print(f"modreg-fast audit: --features {twice}= is given twice; the modules of a modality go in one: a,b", file=sys.stderr)
        return 2
    if options.html is not None and options.html == options.plot:
        print(f"modreg-fast audit: --html and --plot are both {options.html}", file=sys.stderr)
        return 2
    here = os.getcwd()
    sys.path.insert(0, here)  # as python -m does
    try:
        _check(options)
        result = audit(
            _made(*options.model),
            _made(*options.data),
            dict(options.features or ()) or None,
            metric=None if options.metric is None else _made(*options.metric),
            ignore_index=options.ignore_index,
            baseline=options.baseline,
        )
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, OSError) as error:
        if not _ours(error):
            raise
        print(f"modreg-fast audit: {error}", file=sys.stderr)
        return 1
    finally:
        sys.path.remove(here)
    steps: list[Callable[[], object]] = [lambda: print(result.to_json() if options.json else result.table(), flush=True)]
    if options.html is not None:
        steps.append(lambda: result.to_html(options.html))
    if options.plot is not None:
        steps.append(lambda: _output.save_figure(result.plot(), options.plot, dpi=150))
    return _output.deliver("modreg-fast audit", *steps)


def _check(options: argparse.Namespace) -> None:
    """What would fail when all is measured fails before."""
    with extra("modreg-fast audit"):
        import rich  # noqa: F401

        if options.html is not None:
            import jinja2  # noqa: F401
            import matplotlib  # noqa: F401
        if options.plot is not None:
            from matplotlib.figure import Figure
    for path in filter(None, (options.html, options.plot)):
        _output.writable(path)
    if options.plot is not None:  # some formats need a program that may not be there
        Figure().savefig(io.BytesIO(), format=options.plot.suffix[1:])


def _ours(error: BaseException) -> bool:
    """Raised by this package or by the search for a module: the message says all. Else the user needs the traceback."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, OSError) or where.startswith((str(Path(__file__).parent.parent), "<frozen importlib"))


def _made(module: str, name: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that the user's module imports
        raise ModuleNotFoundError(f"no module {error.name!r} here or among the installed ones", name=error.name) from None
    make: Callable[[], Any] | None = getattr(found, name, None)
    if not callable(make):
        raise AttributeError(f"module {module!r} has no function {name!r}")
    made = make()
    if made is None:
        raise TypeError(f"{module}:{name} returned None")
    return made


def _place(text: str) -> tuple[str, str]:
    module, _, name = text.partition(":")
    if not module or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected MODULE:NAME, such as project.models:build, got {text!r}")
    return module, name


def _picture(text: str) -> Path:
    path = Path(text)
    if not path.suffix:
        path = path.with_name(f"{path.name}.png")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return path  # which the command says by itself
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise argparse.ArgumentTypeError(f"expected a name that ends in .{', .'.join(known)}, got {text!r}")
    return path


def _entries(text: str) -> tuple[str, list[str]]:
    modality, _, names = text.partition("=")
    if not modality or not all(names.split(",")):
        raise argparse.ArgumentTypeError(f"expected MODALITY=MODULE[,MODULE...], such as rgb=encoder.stages.*, got {text!r}")
    return modality, names.split(",")
