"""Features of a model whose code cannot be changed, by forward hooks that are gone when the block ends."""

import contextlib
import copy
import dataclasses
import difflib
import operator
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from threading import get_ident
from types import FrameType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from modreg_fast import _validate as validate
from modreg_fast.ops._eager import is_transformed

__all__ = ["capture"]

Entry = str | tuple[str | int | slice, ...]  # the name of a module, or the name and the steps to a tensor in its output

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # in DDP, torch.compile and so on
COMPILED = "modreg_fast.capture reads features between compiled graphs: leave out fullgraph=True"
HOOKS = ("_forward_hooks", "_forward_hooks_always_called", "_forward_pre_hooks")  # where a module keeps hooks, by number


class _Source(NamedTuple):
    modality: str
    name: str
    module: nn.Module
    steps: tuple[str | int | slice, ...]
    run: int | None  # which of its runs in a pass, None for all


@contextlib.contextmanager
def capture(model: nn.Module, modules: Mapping[str, Entry | Sequence[Entry]]) -> Iterator[dict[str, list[Tensor]]]:
    """Records what chosen modules return, as ``{modality: [tensor, ...]}``: what the losses and :func:`modreg_fast.audit` take.

    The dict is filled when a forward pass of ``model`` ends, and anew by each further pass; lists taken out of it before stay as
    they are. It holds the very tensors that the model goes on with, so ``torch.autograd.grad(score, features["rgb"])`` reaches them;
    tokens ``(B, N, C)`` stay tokens (``channel_dim=-1`` in the losses). Only calls of ``model`` itself count: not of its parts alone
    or of what it wraps, not in other threads (where such a run has gradients, a warning says so once), not the passes of
    :func:`modreg_fast.each_alone`, and not the recomputation of a checkpointed part (``use_reentrant=False``) in a backward pass.

    A frozen encoder (``requires_grad_(False)``, gradients enabled) is made to return a tensor of the same memory that requires a
    gradient, so that attribution works; what came out of it, which may be a tensor of yours, stays as it is.

    Copies of the model that are made in the block (``copy.deepcopy``, an EMA teacher, ``torch.save``) have no hooks.

    Args:
        model: any module, also wrapped by ``DistributedDataParallel``, ``torch.compile`` or checkpointing; the names are those of the
            unwrapped model, or the full ones. A compiled model must be captured from its first call on (or after
            ``torch.compiler.reset()``), and breaks its graph at each captured module.
        modules: modality -> entry or list of entries, each the name of a module as in ``model.named_modules()``. ``*``, ``?`` and
            ``[...]`` stand for characters within one part of a dotted name; matches come in the order of ``named_modules()``. Where a
            module returns no tensor, the entry is a tuple of the name and of indices, keys or attributes: ``("backbone", 0)``,
            ``("encoder", "hidden_states", 3)``; indices are those of tuples and lists, never of a tensor. What picks several tensors,
            such as ``("backbone", slice(None))``, gives them all. A module that runs several times in a pass gives all its runs, or
            the one whose number, from 0, is put behind its name: ``{"rgb": "encoder#0", "event": "encoder#1"}``.

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
    recorder = _Recorder(_select(model, modules), {modality: [] for modality in modules})
    with contextlib.ExitStack() as stack:

        def hook(module: nn.Module, register: Callable[..., Any], act: Callable[..., Any], **options: bool) -> None:
            def on_its_own_module(this: nn.Module, _inputs: object, output: object = None) -> Any:
                return act(output) if this is module else None

            # Eager code between compiled graphs: inside of one, a recorded tensor would not lie on the way to the scores.
            handle = register(torch.compiler.disable(on_its_own_module, reason=COMPILED), **options)
            stack.callback(_remove, module, handle)
            _numbers.add(handle.id)
            module.__dict__["__getstate__"] = MethodType(_state_without_hooks, module)

        hook(model, model.register_forward_pre_hook, recorder.start)
        for i, source in enumerate(recorder.sources):
            hook(source.module, source.module.register_forward_hook, lambda output, i=i: recorder.record(i, output))
        hook(model, model.register_forward_hook, recorder.finish)
        hook(model, model.register_forward_hook, recorder.end, always_call=True)
        yield recorder.features


class _Pass(NamedTuple):
    """A forward pass of the model that is under way."""

    depth: int  # of the Python stack: a pass inside of another is deeper
    with_gradients: bool
    before: list[int]  # runs of each source that are not of this pass


class _Recorder:
    """What the hooks share."""

    def __init__(self, sources: list[_Source], features: dict[str, list[Tensor]]) -> None:
        self.sources, self.features = sources, features
        self.runs: list[list[list[Tensor]]] = [[] for _ in sources]
        self.passes: list[_Pass] = []  # more than one where the model calls itself
        self.inside = [False] * len(sources)  # whether the latest run with gradients was in a pass
        self.warned = False
        self.thread = get_ident()  # others may run the model meanwhile
        self.pauses = _pauses()  # of which this capture is a part

    def start(self, _: object) -> None:
        if self._rests():
            return
        depth = _depth()
        while self.passes and self.passes[-1].depth >= depth:  # it never came to its end
            self.passes.pop()
        if not self.passes:
            self.runs = [[] for _ in self.sources]
        self.features.update({modality: [] for modality in self.features})
        self.passes.append(_Pass(depth, torch.is_grad_enabled(), [len(runs) for runs in self.runs]))

    def record(self, i: int, output: object) -> object:
        """What takes the place of the output; None for itself."""
        if _pauses() > self.pauses:
            return None
        source, with_gradients, recomputing = self.sources[i], torch.is_grad_enabled(), _recomputing()
        if not recomputing:
            here = get_ident() == self.thread
            if with_gradients and here:
                self.inside[i] = bool(self.passes)
            if not self.passes or not here:
                self._outside(source)
                return None
        elif not self.inside[i]:  # a recomputation has to do as the run that it repeats
            return None
        tensors = _pick(output, source)
        grown: dict[int, Tensor] = {}
        if with_gradients:
            grown = {id(x): _with_gradient(x) for x in tensors if _may_grow(x)}
        if grown:
            output = _replaced(output, grown)
            tensors = _pick(output, source)
            for x in tensors:
                if _may_grow(x):
                    x.requires_grad_()  # does so already, unless it stands in a container that cannot be built anew
        if not recomputing:
            if self.passes[-1].with_gradients and not with_gradients and _trained(source.module):
                raise RuntimeError(
                    f"capture: module {source.name!r} ran without gradients although its parameters require them: "
                    "use_reentrant=False where it is checkpointed, requires_grad_(False) on its parameters where it is frozen"
                )
            self.runs[i].append(tensors)
        return output if grown else None

    def finish(self, _: object) -> None:
        if self._rests():
            return
        features: dict[str, list[Tensor]] = {modality: [] for modality in self.features}
        for source, runs, before in zip(self.sources, self.runs, self.passes[-1].before, strict=True):
            runs = runs[before:]
            if len(runs) <= (source.run or 0):
                often = f"ran {len(runs)} times only" if runs else "did not run"
                raise RuntimeError(
                    f"capture: module {_label(source)} (for {source.modality!r}) {often} in this forward pass. "
                    "Hooks do not run in a model that was compiled before: enter capture first, or call torch.compiler.reset()"
                )
            for tensors in runs if source.run is None else [runs[source.run]]:
                features[source.modality] += tensors
        self.features.update(features)

    def end(self, _: object) -> None:
        """Also of a pass that fails."""
        if not self._rests() and self.passes:
            self.passes.pop()

    def _rests(self) -> bool:
        """Whether a pass of the model is none that counts."""
        return _recomputing() or get_ident() != self.thread or _pauses() > self.pauses

    def _outside(self, source: _Source) -> None:
        if torch.is_grad_enabled() and _trained(source.module) and not self.warned:
            self.warned = True
            warnings.warn(
                f"capture: module {source.name!r} ran outside of a forward pass of the captured model. Only calls of that model itself, "
                "model(...), in the thread that entered capture, are recorded: the features stay those of its latest pass",
                stacklevel=2,
            )


_numbers: set[int] = set()  # of the hooks in place
_paused: list[int] = []  # the thread of each block of unrecorded()


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """What this thread runs here is recorded by no ``capture`` around it: the features stay those of the pass before."""
    thread = get_ident()
    _paused.append(thread)
    try:
        yield
    finally:
        _paused.remove(thread)


def _pauses() -> int:
    """The blocks of unrecorded() that this thread is in."""
    return _paused.count(get_ident())


def _remove(module: nn.Module, handle: Any) -> None:
    handle.remove()
    _numbers.discard(handle.id)
    if not any(number in _numbers for hooks in HOOKS for number in getattr(module, hooks)):
        module.__dict__.pop("__getstate__", None)


def _state_without_hooks(module: nn.Module) -> Any:
    """What copies and pickles of a captured module are made from: its state as ever, without what ``capture`` has put there."""
    getstate = getattr(type(module), "__getstate__", None)  # object has it from Python 3.11 on
    state = module.__dict__ if getstate is None else getstate(module)
    if not isinstance(state, dict):
        return state
    state = {name: value for name, value in state.items() if name != "__getstate__"}
    for name in state.keys() & set(HOOKS):
        state[name] = OrderedDict((number, x) for number, x in state[name].items() if number not in _numbers)
    return state


def _recomputing() -> bool:
    """In a backward pass, where checkpointing runs the forward pass of its part once more."""
    return torch._C._current_graph_task_id() != -1


def _depth() -> int:
    frame: FrameType | None = sys._getframe()
    depth = 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _label(source: _Source) -> str:
    return repr(source.name if source.run is None else f"{source.name}#{source.run}")


def _may_grow(x: Tensor) -> bool:
    """Whether it lacks a gradient and can be given one: not under a transform, whose tangent would be lost."""
    return not x.requires_grad and x.is_floating_point() and not is_transformed([x])


def _with_gradient(x: Tensor) -> Tensor:
    """The same values in a tensor that requires and keeps a gradient; in the same memory, unless autograd refuses it. No leaf, for the
    model may go on by an operation in place."""
    grown: Tensor = _Same.apply((x.clone() if x.is_inference() else x.detach()).requires_grad_())
    grown.retain_grad()
    return grown


class _Same(Function):
    """The identity, in the same memory but no view of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream


def _replaced(output: Any, tensors: Mapping[int, Tensor]) -> Any:
    """``output`` with other tensors, by ``id``, in its tuples, lists, mappings and dataclasses; containers are copied, not changed."""
    if isinstance(output, Tensor):
        return tensors.get(id(output), output)
    items: Any
    put: Callable[[Any, Any, Any], Any]
    if isinstance(output, list | tuple):
        items = [_replaced(x, tensors) for x in output]
        if all(a is b for a, b in zip(items, output, strict=True)):
            return output
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if isinstance(output, Mapping):
        items, put = output.items(), operator.setitem
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        items, put = vars(output).items(), object.__setattr__  # also where it is frozen
    else:
        return output
    changed = [(key, new) for key, x in items if (new := _replaced(x, tensors)) is not x]
    output = copy.copy(output) if changed else output
    for key, new in changed:
        put(output, key, new)
    return output


def _select(model: nn.Module, modules: Mapping[str, Entry | Sequence[Entry]]) -> list[_Source]:
    if not isinstance(model, nn.Module):
        validate.fail("capture", "model", "a torch.nn.Module", type(model).__name__, TypeError)
    if isinstance(model, nn.DataParallel):
        validate.fail("capture", "model", "on one device or in DistributedDataParallel", "DataParallel, which runs in threads")
    validate.modalities(modules, "capture", "modules", "module names")
    names = _names(model)
    sources: list[_Source] = []
    for modality, entries in modules.items():
        argument = f"modules[{modality!r}]"
        for entry in [entries] if isinstance(entries, str | tuple) else validate.sequence(entries, "capture", argument):
            name, *steps = entry if isinstance(entry, tuple) and entry else (entry,)
            if not isinstance(name, str) or not all(isinstance(x, str | int | slice) and not isinstance(x, bool) for x in steps):
                validate.fail(
                    "capture", argument, "module names, or tuples of a name and indices or attributes", entry, TypeError
                )
            numbered = None if name in names else re.fullmatch(r"(.+)#(\d+)", name)
            pattern, run = (name, None) if numbered is None else (numbered[1], int(numbered[2]))
            for found in _matches(pattern, names, argument):
                source = _Source(modality, found, names[found], tuple(steps), run)
                taken = next((other for other in sources if _overlap(source, other)), source)
                if (taken.modality, taken.run) != (modality, run):
                    other = (
                        f"{_label(source)}, as modules[{taken.modality!r}]; capture a shared module once and split its list by run, "
                        f"or name the runs: '{found}#0', '{found}#1'"
                    )
                    validate.fail("capture", argument, "outputs of its own", other)
                if taken is source:
                    sources.append(source)
    return sources


def _overlap(a: _Source, b: _Source) -> bool:
    return a.module is b.module and a.steps == b.steps and (a.run == b.run or a.run is None or b.run is None)


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
        if isinstance(output, Tensor):
            raise TypeError(
                f"capture: module {source.name!r} returned a tensor where {step!r} is to be picked: indices are those of tuples and "
                f"lists, so leave it out. Of several runs in a pass, '{source.name}#1' is the second"
            )
        if not isinstance(step, str) and not isinstance(output, Sequence | Mapping):
            raise TypeError(f"capture: module {source.name!r} returned {_kind(output)}, of which {step!r} is no item")
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
