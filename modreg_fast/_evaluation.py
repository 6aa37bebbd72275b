"""What evaluate_missing and audit share: a model in evaluation, batches on its device, packages that are not always there."""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import length_hint
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from modreg_fast import _validate as validate

if TYPE_CHECKING:
    from rich.console import RenderableType

Model = nn.Module | Callable[[Mapping[str, Tensor]], Tensor]
Data = Iterable[tuple[Mapping[str, Tensor], Any]]


@contextlib.contextmanager
def extra(function: str) -> Iterator[None]:
    """Around the import of a package that only the extra ``audit`` brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{function}: needs the package {error.name}: pip install 'modreg_fast[audit]'"
        raise ModuleNotFoundError(message, name=error.name) from error


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """``model.eval()``; afterwards each module is again in the mode it was in."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(training[model])  # some modules do more here than to set the flag
        for module, mode in training.items():
            module.training = mode


def batches(model: Model, data: Data, function: str, progress: bool) -> Iterator[tuple[dict[str, Any], Any]]:
    """The pairs ``(inputs, target)`` of ``data``, on the device of the model's parameters, under a progress bar on stderr."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    shown: Iterable[Any] = data
    if not isinstance(data, Iterable):
        validate.fail(function, "data", "an iterable of pairs (inputs, target)", type(data).__name__, TypeError)
    if progress:
        with extra(f"{function}(progress=True)"):
            from rich.console import Console
            from rich.progress import track
        console = Console(stderr=True)
        total = length_hint(data) or None
        shown = track(data, function, total=total, console=console, transient=True, disable=not console.is_terminal)
    empty = True
    for batch in shown:
        empty = False
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Mapping):
            expected = "pairs (inputs, target) with inputs a mapping from modality to tensor"
            kinds = f" of {', '.join(type(x).__name__ for x in batch)}" if isinstance(batch, tuple | list) else ""
            validate.fail(function, "data", expected, f"a {type(batch).__name__}{kinds}", TypeError)
        inputs, target = batch
        yield (dict(inputs), target) if parameter is None else (_moved(dict(inputs), parameter), _moved(target, parameter))
    if empty:
        validate.fail(function, "data", "at least one batch", "none (an iterator that was used before?)")


def _moved(x: Any, parameter: Tensor) -> Any:
    if isinstance(x, Mapping):
        return {key: _moved(value, parameter) for key, value in x.items()}
    return x.to(parameter.device) if isinstance(x, Tensor) else x


def name_of(x: object, otherwise: str) -> str:
    """Of a function or of a class; ``otherwise`` for a lambda."""
    name = str(getattr(x, "__name__", type(x).__name__))
    return otherwise if name == "<lambda>" else name


def rendered(*parts: "RenderableType") -> str:
    """Tables and text of rich as plain text."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=1000, color_system=None, highlight=False)
    console.print(*parts, sep="\n")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")  # type: ignore[attr-defined]
