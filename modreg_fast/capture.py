"""Features of a model whose code cannot be changed, by forward hooks that are gone when the block ends."""

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modreg_fast import _validate as validate

__all__ = ["capture"]

Entry = str | tuple[str | int | slice, ...]  # the name of a module, or the name and the steps to a tensor in its output

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # in DDP, torch.compile and so on
COMPILED = "modreg_fast.capture reads features between compiled graphs: leave out fullgraph=True"


class _Source(NamedTuple):
    modality: str
    name: str
    module: nn.Module
    steps: tuple[str | int | slice, ...]


@contextlib.contextmanager
def capture(model: nn.Module, modules: Mapping[str, Entry | Sequence[Entry]]) -> Iterator[dict[str, list[Tensor]]]:
    """Records what chosen modules return, as ``{modality: [tensor, ...]}``: what the losses and :func:`modreg_fast.audit` take.

    The dict is filled when a forward pass of ``model`` ends, and anew by each further pass; lists taken out of it before stay as
    they are. It holds the very tensors that the model goes on with, so ``torch.autograd.grad(score, features["rgb"])`` reaches them;
    tokens ``(B, N, C)`` stay tokens (``channel_dim=-1`` in the losses). Only calls of ``model`` itself count: not of its parts alone,
    and not the recomputation of a checkpointed part (``use_reentrant=False``) in a backward pass.

    A frozen encoder's output (``requires_grad_(False)``, gradients enabled) is made to require a gradient, so that attribution works.

    Args:
        model: any module, also wrapped by ``DistributedDataParallel``, ``torch.compile`` or checkpointing; the names are those of the
            unwrapped model, or the full ones. A compiled model must be captured from its first call on (or after
            ``torch.compiler.reset()``), and breaks its graph at each captured module.
        modules: modality -> entry or list of entries, each the name of a module as in ``model.named_modules()``. ``*``, ``?`` and
            ``[...]`` stand for characters within one part of a dotted name; matches come in the order of ``named_modules()``. Where a
            module returns no tensor, the entry is a tuple of the name and of indices, keys or attributes: ``("backbone", 0)``,
            ``("encoder", "hidden_states", 3)``. What picks several tensors, such as ``("backbone", slice(None))``, gives them all,
            and a module that runs several times in a pass gives all its runs.

    Raises:
        ValueError, TypeError: on entry, for a name that matches nothing (the message lists close ones) or an entry that does not fit;
            in the forward pass, for an output that is no tensor.
        RuntimeError: in the forward pass, where a module did not run, or ran without gradients although its parameters need them.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with capture(model, {"rgb": "0", "all": ["[12]"]}) as features:
        ...     scores = model(torch.randn(5, 3))
        >>> [x.shape for x in features["all"]]
        [torch.Size([5, 4]), torch.Size([5, 2])]
    """
    sources = _select(model, modules)
    runs: list[list[Tensor]] = [[] for _ in sources]
    features: dict[str, list[Tensor]] = {modality: [] for modality in modules}
    with_gradients = False

    def start(*_: object) -> None:
        nonlocal with_gradients
        if _recomputing():
            return
        with_gradients = torch.is_grad_enabled()
        for run in runs:
            run.clear()
        features.update({modality: [] for modality in features})

    def record(i: int, output: object) -> None:
        source = sources[i]
        tensors = _pick(output, source)
        if torch.is_grad_enabled():
            for x in tensors:
                if not x.requires_grad and x.is_floating_point():
                    x.requires_grad_()
        if _recomputing():
            return
        if with_gradients and not torch.is_grad_enabled() and any(p.requires_grad for p in source.module.parameters()):
            raise RuntimeError(
                f"capture: module {source.name!r} ran without gradients although its parameters require them: use_reentrant=False "
                "where it is checkpointed, requires_grad_(False) on its parameters where it is frozen"
            )
        runs[i] += tensors

    def finish(*_: object) -> None:
        if _recomputing():
            return
        for source, run in zip(sources, runs, strict=True):
            if not run:
                raise RuntimeError(
                    f"capture: module {source.name!r} (for {source.modality!r}) did not run in this forward pass. "
                    "Hooks do not run in a model that was compiled before: enter capture first, or call torch.compiler.reset()"
                )
            features[source.modality] += run

    with contextlib.ExitStack() as hooks:
        # Eager code between compiled graphs: inside of one, a recorded tensor would not lie on the way to the scores.
        hooks.callback(model.register_forward_pre_hook(_eager(start)).remove)
        for i, source in enumerate(sources):
            hook = _eager(lambda _module, _inputs, output, i=i: record(i, output))
            hooks.callback(source.module.register_forward_hook(hook).remove)
        hooks.callback(model.register_forward_hook(_eager(finish)).remove)
        yield features


def _eager(hook: Any) -> Any:
    return torch.compiler.disable(hook, reason=COMPILED)


def _recomputing() -> bool:
    """In a backward pass, where checkpointing runs the forward pass of its part once more."""
    return torch._C._current_graph_task_id() != -1


def _select(model: nn.Module, modules: Mapping[str, Entry | Sequence[Entry]]) -> list[_Source]:
    if not isinstance(model, nn.Module):
        validate.fail("capture", "model", "a torch.nn.Module", type(model).__name__, TypeError)
    if isinstance(model, nn.DataParallel):
        validate.fail("capture", "model", "on one device or in DistributedDataParallel", "DataParallel, which runs in threads")
    validate.modalities(modules, "capture", "modules", "module names")
    names = _names(model)
    sources: dict[tuple[int, str], _Source] = {}
    for modality, entries in modules.items():
        argument = f"modules[{modality!r}]"
        for entry in [entries] if isinstance(entries, str | tuple) else validate.sequence(entries, "capture", argument):
            name, *steps = entry if isinstance(entry, tuple) and entry else (entry,)
            if not isinstance(name, str) or not all(isinstance(step, str | int | slice) for step in steps):
                validate.fail(
                    "capture", argument, "module names, or tuples of a name and indices or attributes", entry, TypeError
                )
            for found in _matches(name, names, argument):
                source = _Source(modality, found, names[found], tuple(steps))
                taken = sources.setdefault((id(source.module), str(steps)), source)
                if taken.modality != modality:
                    other = f"{found!r}, as modules[{taken.modality!r}]; capture a shared module once and split its list by run"
                    validate.fail("capture", argument, "outputs of its own", other)
    return list(sources.values())


def _names(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name. What only wraps another module (DDP, torch.compile, checkpointing) stands for it, under its name."""
    names: dict[str, nn.Module] = {}
    short: dict[str, str] = {}  # by full name
    wraps = {"": False}
    for full, module in model.named_modules(remove_duplicate=False):
        parent, _, last = full.rpartition(".")
        short[full] = short[parent] if wraps[parent] else ".".join(filter(None, (short.get(parent), last)))
        wraps[full] = [name for name, _ in module.named_children()] in [[wrapper] for wrapper in WRAPPERS]
        names.setdefault(short[full], module)
    return names


def _matches(pattern: str, names: Mapping[str, nn.Module], argument: str) -> list[str]:
    unwrapped = ".".join(part for part in pattern.split(".") if part not in WRAPPERS)
    found = [name for name in names if _fits(name, pattern)] or [name for name in names if _fits(name, unwrapped)]
    if not found:
        known = [name for name in names if name]
        close = difflib.get_close_matches(unwrapped, known, n=4, cutoff=0.4) or [name for name in known if "." not in name]
        validate.fail("capture", argument, "names of modules", f"{pattern!r}, which matches none; close: {', '.join(close)}")
    return found


def _fits(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _pick(output: Any, source: _Source) -> list[Tensor]:
    """The tensors that the steps lead to."""
    for step in source.steps:
        try:
            output = getattr(output, step) if isinstance(step, str) and not isinstance(output, Mapping) else output[step]
        except (AttributeError, LookupError, TypeError):
            message = f"capture: the output of module {source.name!r} has no {step!r}: it is {_kind(output)}"
            raise TypeError(f"{message} (several modules go in a list, not in a tuple)") from None
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, list | tuple) and output and all(isinstance(x, Tensor) for x in output):
        if source.steps or len(output) == 1:
            return list(output)
    choice = f"({source.name!r}, {', '.join(map(repr, (*source.steps, 0)))}), or slice(None) in place of 0 for all"
    raise TypeError(f"capture: module {source.name!r} returned {_kind(output)}, pick tensors out of it, such as {choice}")


def _kind(output: object) -> str:
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with {', '.join(map(repr, output))}"
    if isinstance(output, list | tuple):
        return f"a {type(output).__name__} of {len(output)}: {', '.join(type(x).__name__ for x in output)}"
    return f"a {type(output).__name__}"
