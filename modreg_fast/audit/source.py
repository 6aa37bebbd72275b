"""Where the measurement takes place: the inputs of a model, or what modules of it return, and then the inputs beside them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modreg_fast import _validate as validate
from modreg_fast._evaluation import Model, check_model, copied
from modreg_fast.capture import Entry, capture

Features = dict[str, list[Tensor]]
Entries = Mapping[str, Entry | Sequence[Entry]]
Inputs = dict[str, Any]


class Traced(NamedTuple):
    """A pass of the model, traced from its scores back to the features and, where these are those of modules, to the inputs."""

    scores: Tensor
    features: Features  # of the modalities that the inputs hold
    inputs: dict[str, Tensor]  # those that autograd can trace


Forward = Callable[[Inputs], Traced]


def source(model: Model, features: Entries | None) -> contextlib.AbstractContextManager[Forward]:
    """``inputs -> Traced``."""
    check_model(model, "audit")
    if features is not None:
        if not isinstance(model, nn.Module):
            validate.fail("audit", "model", "a torch.nn.Module when features are named", type(model).__name__, TypeError)
        return _modules(model, features)
    return contextlib.nullcontext(lambda inputs: _inputs(model, inputs))


def _run(model: Model, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The scores, and the inputs that autograd traces them back to. The model gets copies."""
    leaves = {m: x.requires_grad_() for m, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    scores = model(copied(inputs))
    if not isinstance(scores, Tensor) or scores.dim() < 2 or not scores.requires_grad:
        kind = f"shape {validate.shape(scores)}" if isinstance(scores, Tensor) else type(scores).__name__
        without = " without a gradient" if isinstance(scores, Tensor) and not scores.requires_grad else ""
        expected = "class scores (B, K, *spatial) with a gradient"
        validate.fail("audit", "what the model returns", expected, kind + without, TypeError)
    return scores, leaves


def _inputs(model: Model, inputs: Inputs) -> Traced:
    given = {name: x for name, x in inputs.items() if x is not None}
    for name, x in given.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            validate.fail("audit", f"inputs[{name!r}]", "a floating point tensor, or name modules with features=", got, TypeError)
    scores, leaves = _run(model, inputs)
    return Traced(scores, {name: [leaves[name]] for name in given}, {})


@contextlib.contextmanager
def _modules(model: nn.Module, features: Entries) -> Iterator[Forward]:
    validate.modalities(features, "audit", "features", "module names")
    groups: dict[str, list[str]] = {}  # the modalities that name the same modules
    for name, entries in features.items():
        groups.setdefault(repr(entries if isinstance(entries, list) else [entries]), []).append(name)
    owners: dict[tuple[str, ...], list[str]] = {}
    with capture(model, {group[0]: features[group[0]] for group in groups.values()}) as captured:

        def forward(inputs: Inputs) -> Traced:
            scores, leaves = _run(model, inputs)
            found: Features = {}
            for first, *others in groups.values():
                group = [name for name in (first, *others) if inputs.get(name) is not None]
                runs = captured[first]
                key = (first, *group)
                if others and len(owners.get(key, ())) != len(runs):
                    owners[key] = [_owner(run, {name: inputs[name] for name in group}, first) for run in runs]
                owner = owners[key] if others else [first] * len(runs)
                found |= {name: [run for run, by in zip(runs, owner, strict=True) if by == name] for name in group}
            return Traced(scores, {name: found[name] for name in features if name in found}, leaves)

        yield forward


def _owner(run: Tensor, inputs: dict[str, Any], first: str) -> str:
    """The modality from whose input a run of a shared module was computed."""
    leaves = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad(run.sum(), list(leaves.values()), retain_graph=True, allow_unused=True) if leaves else ()
    found = [name for name, g in zip(leaves, grads, strict=True) if g is not None]
    if len(found) != 1:
        expected = f"modules of their own, or a shared one that takes one of {', '.join(map(repr, inputs))} in each run"
        validate.fail(
            "audit", f"features[{first!r}]", expected, f"a run that depends on {', '.join(map(repr, found)) or 'none of them'}"
        )
    return found[0]
