"""Gradients that are differentiated again, and what stands in the way of that."""

import functools
import itertools
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from modreg_fast import _validate as validate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# A part of what PyTorch says about the obstacle, and the way around it.
_CURES = {
    "scaled_dot_product": "run the forward pass under torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)",
    "hardsigmoid": "write hardsigmoid(x) as torch.nn.functional.relu6(x + 3) / 6",
    "torch.compile": "leave this part uncompiled, and compile the encoders",
    "dist_backward": "write the distance out, such as torch.linalg.vector_norm(x[:, None] - y, dim=-1) for torch.cdist(x, y)",
    "embedding_bag": "look the embeddings up (torch.nn.functional.embedding) and reduce them yourself",
    "uDNN": "run the forward pass under torch.backends.cudnn.flags(enabled=False)",
    "FSDP": "leave what lies between these tensors and the score unsharded, and shard the encoders (docs/guides/distributed.md)",
    "use_reentrant": "pass use_reentrant=False to torch.utils.checkpoint.checkpoint",
    "": "replace this operation, or pass tensors that come after it in the network",
}


def differentiable(
    given: object, function: str, argument: str, batch: int, channel_dim: int, spatial_group: "ProcessGroup | None"
) -> Tensor:
    x = validate.tensor(given, function, argument)
    if x.dim() < 2 or x.shape[0] != batch:
        validate.fail(function, argument, f"of shape (B, C, *spatial) with batch size {batch}", validate.shape(x))
    validate.channels(x, channel_dim, function, argument)
    if x.dim() == 2 and spatial_group is not None:
        validate.fail(function, argument, "a part of a map, (B, C, *spatial), with spatial_group", f"shape {validate.shape(x)}")
    if not x.requires_grad:
        validate.fail(
            function,
            argument,
            "a tensor that requires grad, because the loss is differentiated by it",
            without_graph("one that does not", given),  # type: ignore[arg-type]
        )
    return x


def without_graph(what: str, x: Tensor) -> str:
    """``what``, and why: gradients may be switched off around the call."""
    if torch._C._are_functorch_transforms_active():
        return f"{what}: inside of a transform of torch.func, of which only grad, vjp and jacrev by this very tensor give one"
    if torch.is_inference_mode_enabled():
        return f"{what}: inference mode is on (torch.inference_mode, the default of Lightning's validation)"
    if not torch.is_grad_enabled():
        return f"{what}: gradients are switched off here (torch.no_grad)"
    if not torch.compiler.is_compiling() and x.is_inference():
        return f"{what}: it was made under torch.inference_mode()"
    return what


@torch.compiler.disable(reason="modreg_fast differentiates with create_graph=True, which torch.compile cannot trace")
def gradients(
    score: Tensor, features: Mapping[str, Tensor | Sequence[Tensor]], function: str, present: Tensor | None = None
) -> list[Tensor]:
    """Gradients of a scalar by the tensors of each modality, in their order, zero where it does not depend on one, that can be
    differentiated again. It warns of a modality that some sample has, ``present`` ``(B, M)``, and the score does not depend on at all.

    Raises:
        ValueError: no path from any tensor to ``score``.
        RuntimeError: an operation on the path that PyTorch cannot differentiate twice. The message names it and the cure. Left alone,
            most of them would fail in the outer backward pass, far from here.
    """
    rows = [[x] if isinstance(x, Tensor) else x for x in features.values()]
    inputs = [x for row in rows for x in row]
    if not score.requires_grad:
        expected = "computed from the given tensors with gradients enabled"
        validate.fail(function, "the score", expected, without_graph("one without a graph", score))
    try:
        found = torch.autograd.grad(score, inputs, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        # What cannot be differentiated once with a graph says so here; reentrant checkpointing too.
        if any(part in str(error) for part in ("use_reentrant", "is not implemented", "automatic differentiation")):
            raise _wall(function, str(error).partition(". ")[0]) from error
        raise
    if all(g is None for g in found):
        # As are the features and scores of a model that torch.compile took as a whole.
        validate.fail(function, "the score", "computed from the given tensors themselves", "one that depends on none of them")
    found_of = iter(found)
    for i, (m, row) in enumerate(zip(features, rows, strict=True)):
        unused = all([g is None for g in itertools.islice(found_of, len(row))])
        if unused and (present is None or present[:, i].any()):
            warnings.warn(
                f"{function}: nothing that was computed from the tensors of {m!r} reaches the score, so its gradient is 0 and stays 0. "
                "Pass the tensors that the network goes on with; leave out, or mark with present=, what it does without",
                stacklevel=2,
            )
    obstacle = _obstacle([g for g in found if g is not None], inputs)
    if obstacle is not None:
        raise _wall(function, obstacle)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _wall(function: str, obstacle: str) -> RuntimeError:
    cure = next(cure for part, cure in _CURES.items() if part in obstacle)
    return RuntimeError(
        f"{function} differentiates twice what lies between the given tensors and the score, and PyTorch cannot: {obstacle.rstrip('.')}. "
        f"Instead, {cure} (docs/limits.md#double-differentiation)"
    )


def _obstacle(grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> str | None:
    """What PyTorch will say in the outer backward pass, or None.

    The graph of the gradients holds a node that raises wherever a derivative is missing, or one that raises when it is executed,
    also on gradients that are all undefined, which costs nothing: both are tried. It holds none for what lies before ``inputs`` or
    beside the path to them, for that is differentiated once only; the walk ends at ``inputs`` to be short.
    """
    sharded = "torch.distributed.fsdp" in sys.modules and torch.distributed.is_initialized()
    seen: set[Node | None] = {None, *(x.grad_fn for x in inputs)}
    stack = [g.grad_fn for g in grads]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        assert node is not None
        seen.add(node)
        name = node.name()
        if name == "CompiledFunctionBackwardBackward":
            return "torch.compile does not support double backward"
        if name in ("torch::autograd::NotImplemented", "torch::autograd::Error") or _second_derivative(name, node):
            try:
                node(*[None] * len(node._input_metadata))  # type: ignore[operator]
            except RuntimeError as error:
                return str(error)
        if sharded and any(_freed(node, saved) for saved in _saved(type(node))):
            # Its hooks do not see a second backward pass either: where no freed value is needed, the gradient would be lost in silence.
            return "FSDP has freed the parameters that it gathered there, when the first backward pass was over"
        stack.extend(following for following, _ in node.next_functions)
    return None


@functools.cache
def _saved(kind: type) -> list[str]:
    """The names under which nodes of a kind show the tensors that they have saved, or the parameter whose gradient they take."""
    return [name for name in dir(kind) if name.startswith("_saved_") or name == "variable"]


def _freed(node: Node, saved: str) -> bool:
    try:
        x = getattr(node, saved)
    except RuntimeError as error:
        return "setStorage" in str(error)  # a view of freed memory
    if not isinstance(x, Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return x.numel() > 0 and x.layout == torch.strided and x.untyped_storage().size() == 0


def _second_derivative(name: str, node: Node) -> bool:
    """Whether it is PyTorch's derivative of what itself computes in a backward pass, such as ``CdistBackwardBackward0``."""
    if "BackwardBackward" not in name and "GradBackward" not in name:
        return False
    return ":" not in name and not isinstance(node, BackwardCFunction)  # which are written by others, and may do anything
