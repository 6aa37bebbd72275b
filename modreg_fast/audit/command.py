"""``modreg-fast audit``: a model and data that the user's own module makes."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the picture, such as audit.png or audit.pdf")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of the table")


def main(options: argparse.Namespace) -> int:
    """Runs what ``add_arguments`` parsed; 0, or 1 with a message."""
    from modreg_fast.audit.measure import audit

    features = dict(options.features or ()) or None
    here = os.getcwd()
    sys.path.insert(0, here)  # as python -m does
    try:
        metric = None if options.metric is None else _made(*options.metric)
        result = audit(_made(*options.model), _made(*options.data), features, metric=metric, ignore_index=options.ignore_index)
        if options.html is not None:
            result.to_html(options.html)
        if options.plot is not None:
            result.plot().savefig(options.plot, dpi=150)
        print(result.to_json() if options.json else result.table())
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, OSError) as error:
        if not _ours(error):
            raise
        print(f"modreg-fast audit: {error}", file=sys.stderr)
        return 1
    finally:
        sys.path.remove(here)
    return 0


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
    return make()


def _place(text: str) -> tuple[str, str]:
    module, _, name = text.partition(":")
    if not module or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected MODULE:NAME, such as project.models:build, got {text!r}")
    return module, name


def _entries(text: str) -> tuple[str, list[str]]:
    modality, _, names = text.partition("=")
    if not modality or not all(names.split(",")):
        raise argparse.ArgumentTypeError(f"expected MODALITY=MODULE[,MODULE...], such as rgb=encoder.stages.*, got {text!r}")
    return modality, names.split(",")
