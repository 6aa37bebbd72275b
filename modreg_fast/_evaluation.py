"""What evaluate_missing and audit share: a model in evaluation, batches on its device, packages that are not always there."""

import contextlib
import inspect
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import length_hint
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

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


def check_model(model: object, function: str) -> None:
    """A module or a function that can be called with one mapping."""
    if not callable(model):
        validate.fail(function, "model", "a module or a function", type(model).__name__, TypeError)
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except ValueError:  # of what is written in C
        return
    try:
        signature.bind({})
    except TypeError:
        expected = "called with one mapping {modality: tensor}; wrap another in a function or a module that calls it (lambda x: model(**x))"
        validate.fail(function, "model", expected, f"one called as {signature}", TypeError)


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """``model.eval()``; afterwards each module is again in the mode it was in."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
    except NotImplementedError:  # an exported program is in one mode for ever
        yield
        return
    try:
        yield
    finally:
        model.train(training[model])  # some modules do more here than to set the flag
        for module, mode in training.items():
            module.training = mode


def batches(
    model: Model,
    data: Data,
    function: str,
    progress: bool,
    modalities: Sequence[str] | None = None,
    *,
    target: Callable[[Any], Any] | None = None,
    argument: str = "modalities",
    allow_absent: bool = False,
) -> Iterator[tuple[dict[str, Any], Any]]:
    """The pairs ``(inputs, target)`` of ``data`` that hold a sample, on the device of the model's parameters, under a progress bar on
    stderr. Every batch lists its keys in the order of the first, and has all of ``modalities`` (default: all keys) unless
    ``allow_absent``; ``target`` picks what counts out of the targets. The tensors are detached: what is done to them as autograd sees
    it is not done to those of the user."""
    if target is not None and not callable(target):
        validate.fail(function, "target", "a function of what the data holds as target", type(target).__name__, TypeError)
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    shown: Iterable[Any] = data
    if not isinstance(data, Iterable):
        validate.fail(function, "data", "an iterable of pairs (inputs, target)", type(data).__name__, TypeError)
    if progress:
        with contextlib.suppress(ModuleNotFoundError):  # no bar without rich
            from rich.console import Console
            from rich.progress import track

            console = Console(stderr=True)
            total = length_hint(data) or None
            shown = track(data, function, total=total, console=console, transient=True, disable=not console.is_terminal)
    device = None if parameter is None else parameter.device
    order: dict[str, None] = {}  # of all keys, as they first came
    seen: set[str] = set()
    empty = True
    for i, batch in enumerate(shown):
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Mapping):
            expected = "pairs (inputs, target) with inputs a mapping from modality to tensor"
            kinds = f" of {', '.join(type(x).__name__ for x in batch)}" if isinstance(batch, tuple | list) else ""
            validate.fail(function, "data", expected, f"a {type(batch).__name__}{kinds}", TypeError)
        inputs, held = batch
        if odd := [name for name in inputs if not isinstance(name, str)]:
            validate.fail(function, "inputs", "a mapping from names to tensors", f"the name {odd[0]!r}", TypeError)
        given = {name for name, x in inputs.items() if x is not None}
        names = modalities or tuple(order or inputs)
        if not names:
            validate.fail(function, "inputs", "a mapping with at least one modality", "an empty one")
        if not allow_absent and (lacking := [name for name in names if name not in given]):
            if i == 0 and modalities is not None:
                validate.fail(
                    function, argument, f"keys of the inputs, {_listed(inputs)}", f"{lacking[0]!r}, which batch 0 lacks"
                )
            expected = f"batches with {_listed(names)} each (else allow_absent=True)"
            validate.fail(function, "data", expected, f"batch {i} without {lacking[0]!r}")
        if not allow_absent and modalities is None and (more := [name for name in inputs if name not in names]):
            validate.fail(function, "data", f"batches with {_listed(names)} each, as batch 0", f"batch {i} with {more[0]!r}")
        order |= dict.fromkeys(inputs)
        seen |= given
        sizes = [len(x) for x in inputs.values() if isinstance(x, Tensor) and x.dim() > 0]
        if sizes and max(sizes) == 0:
            continue
        empty = False
        held = prepared(held, device)
        yield {name: prepared(inputs[name], device) for name in order if name in inputs}, held if target is None else target(held)
    if empty:
        validate.fail(function, "data", "at least one batch", "none with a sample (an iterator that was used before?)")
    if modalities is not None and (unseen := [name for name in modalities if name not in seen]):
        validate.fail(function, argument, f"keys of the inputs, {_listed(sorted(seen))}", f"{unseen[0]!r}, which no batch has")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def prepared(x: Any, device: torch.device | None) -> Any:
    """The tensors of ``x``, also in mappings, lists and tuples, detached and on the device. Those that were made in inference mode are
    copied where gradients are wanted, which may not be traced through them."""
    if isinstance(x, Tensor):
        x = x.detach().to(device)
        return x.clone() if x.is_inference() and torch.is_grad_enabled() else x
    if isinstance(x, Mapping):
        return {key: prepared(value, device) for key, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(prepared(value, device) for value in x))
    if isinstance(x, tuple | list):
        return type(x)(prepared(value, device) for value in x)
    return x


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """For a model, which may write into what it is given."""
    copies: dict[str, Any] = tree_map_only(Tensor, torch.clone, inputs)
    return copies


def name_of(x: object, otherwise: str) -> str:
    """Of a function or of a class; ``otherwise`` for a lambda."""
    name = str(getattr(x, "__name__", type(x).__name__))
    return otherwise if name == "<lambda>" else name


def rendered(*parts: "RenderableType") -> str:
    """Tables and text of rich as plain text. Names are shown as they are: no markup, no emoji."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=1000, color_system=None, highlight=False, markup=False, emoji=False)
    console.print(*parts, sep="\n")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")  # type: ignore[attr-defined]
