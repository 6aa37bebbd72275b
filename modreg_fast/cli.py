"""The command ``modreg-fast``. Exit codes: 0 done, 1 failed (the message says why), 2 wrong arguments."""

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import modreg_fast
from modreg_fast import _output, bench, parity
from modreg_fast.audit import command as audit

NEXT = """what next:
  with a model of yours    modreg-fast audit --help     who does it listen to, and what is left without each modality?
  without one              modreg-fast demo             trains on a real scene of two sensors, prints a table; minutes
  in your training loop    import modreg_fast as mrf    the recipe of README.md, FunctionalEntropyLoss, AttributionLoss
  on this machine          modreg-fast info             what computes here; also: bench (how fast), parity (how exact)
  everything else          modreg-fast --help           and, in a clone, docs/quickstart.md, or `make docs` for the site"""

EXAMPLES = {
    "": """examples:
  modreg-fast info                       what computes here, and why the rest does not
  modreg-fast demo                       train on a real scene, print a table, save pictures
  modreg-fast audit --help               who does my model listen to?
  modreg-fast bench --quick              how fast it is here
  modreg-fast parity                     how exact it is here
  modreg-fast demo --help                what can be set""",
    "info": """examples:
  modreg-fast info
  modreg-fast info --json | python3 -m json.tool""",
    "demo": """examples:
  modreg-fast demo                       three seeds, pictures in demo_output/
  modreg-fast demo --seeds 5 --output runs/demo
  modreg-fast demo --quick               a few steps: does everything run?
  modreg-fast demo --json > out.json     the results on stdout, the progress on stderr""",
    "audit": """MODULE:NAME names a function without arguments in a module that python can import from here:

  # project/check.py
  def build():                           # the trained model, called with {"rgb": ..., "depth": ...}, returns scores (B, K, ...)
      model = TwoStream()
      model.load_state_dict(torch.load("best.pt"))
      return model

  def loader():                          # batches of (inputs, target), read twice
      return DataLoader(Validation(), batch_size=8)

examples:
  modreg-fast audit --model project.check:build --data project.check:loader
  modreg-fast audit --model project.check:build --data project.check:loader --ignore-index 255 \\
      --features 'rgb=encoders.rgb.stages.*' --features 'depth=encoders.depth.stages.*' --html audit.html
  modreg-fast audit --model project.check:build --data project.check:loader --json > audit.json""",
    "bench": """examples:
  modreg-fast bench --output runs/today  the default set, under five minutes on two cores
  modreg-fast bench --only square        everything of one shape
  modreg-fast bench --quick --compare runs/today/results.json
  modreg-fast bench --quick --json > bench.json""",
    "parity": """examples:
  modreg-fast parity                     of the backend that is taken by itself
  modreg-fast parity --backend triton    without a GPU in Triton's interpreter
  modreg-fast parity --json > parity.json""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    with _output.any_terminal():
        try:
            if not (sys.argv[1:] if arguments is None else arguments):
                usable = ", ".join(name for name, status in modreg_fast.backends().items() if status.available)
                print(f"modreg_fast {modreg_fast.__version__}, torch {torch.__version__}; usable here: {usable}\n\n{NEXT}")
                return 0
            options = _parser().parse_args(arguments)
            return int(options.run(options))
        except KeyboardInterrupt:
            print("modreg-fast: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # of stdout, such as by head
            _output.silence(sys.stdout)
            return 1


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("modreg-fast", description=modreg_fast.__doc__, epilog=EXAMPLES[""], formatter_class=form)
    parser.add_argument("--version", action="version", version=f"modreg_fast {modreg_fast.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    info = commands.add_parser(
        "info",
        help="versions, and the backends with their status",
        description="Prints the versions and every backend: usable here and on what, or why it is not.",
        epilog=EXAMPLES["info"],
        formatter_class=form,
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo",
        help="train on a real scene of two sensors, compare the losses",
        description="""Trains a two-stream segmentation network on the Indian Pines scene, four times per seed: plainly, with
functional entropy, with attribution, and with a head of its own for each sensor. Prints mean IoU with both sensors and
with each alone, the share of each sensor, and what the losses cost. Saves pictures and results.json. Takes a few
minutes on two cores.""",
        epilog=EXAMPLES["demo"],
        formatter_class=form,
    )
    demo.add_argument("--seeds", type=_positive, metavar="N", help="trainings per method (default 3, with --quick 1)")
    demo.add_argument(
        "--output", type=Path, default=Path("demo_output"), metavar="DIR", help="folder for the files (default %(default)s)"
    )
    demo.add_argument("--quick", action="store_true", help="a few steps only; the numbers mean nothing")
    demo.add_argument("--json", action="store_true", help="print the results as JSON on stdout instead of the table")
    demo.set_defaults(run=_demo)

    listens = commands.add_parser(
        "audit",
        help="who does a model listen to: shares, information, missing modalities",
        description="""Measures the share of each modality in a model's decisions and its functional Fisher information, with 95 %
intervals over the samples, and the accuracy with every subset of the modalities. Prints a table.""",
        epilog=EXAMPLES["audit"],
        formatter_class=form,
    )
    audit.add_arguments(listens)
    listens.set_defaults(run=audit.main)

    measure = commands.add_parser(
        "bench",
        help="time and memory against eager PyTorch and torch.compile",
        description="""Times the ops on shapes of real models, every provider in turns with a plain copy of memory, and prints ratios,
the share of the copy's bandwidth, peak memory and errors.""",
        epilog=EXAMPLES["bench"],
        formatter_class=form,
    )
    bench.add_arguments(measure)
    measure.set_defaults(run=bench.main)

    compare = commands.add_parser(
        "parity",
        help="errors of a backend against float64",
        description="""Computes the ops and their gradients on a backend and in float64, for every dtype and kind of shape, and prints the
relative errors and what is allowed. Exit code 1 where one is larger.""",
        epilog=EXAMPLES["parity"],
        formatter_class=form,
    )
    parity.add_arguments(compare)
    compare.set_defaults(run=parity.main)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _info(options: argparse.Namespace) -> int:
    versions = {"modreg_fast": modreg_fast.__version__, "torch": torch.__version__, "python": platform.python_version()}
    backends = modreg_fast.backends()
    if options.json:
        statuses = {name: {"available": status.available, "detail": status.detail} for name, status in backends.items()}
        print(_output.to_json({**versions, "threads": torch.get_num_threads(), "backends": statuses}), end="")
        return 0
    for name, version in versions.items():
        print(f"{name:<12} {version}")
    print(f"{'threads':<12} {torch.get_num_threads()}\n\nbackends")
    for name, status in backends.items():
        print(f"  {name:<10} {'usable' if status.available else 'not usable':<11} {status.detail}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        from rich.console import Console

        from modreg_fast import demo
    except ModuleNotFoundError as error:
        print(f"modreg-fast demo: needs the package {error.name}: pip install 'modreg_fast[examples]'", file=sys.stderr)
        return 1
    try:
        _output.folder(options.output)
    except OSError as error:
        print(f"modreg-fast demo: {error}", file=sys.stderr)
        return 1
    measured = demo.run(seeds=options.seeds or (1 if options.quick else 3), quick=options.quick)

    def show() -> None:
        if options.json:
            print(_output.to_json(measured.results), end="", flush=True)
        else:
            demo.report.show(measured.results, console)

    def save() -> None:
        measured.save(options.output)
        if not options.json:
            told = f"\n{measured.results['seconds']:.0f} seconds. The pictures and results.json are in {options.output}/"
            console.print(told, highlight=False, markup=False, emoji=False)

    console = Console()
    return _output.deliver("modreg-fast demo", show, save)


if __name__ == "__main__":
    sys.exit(main())
