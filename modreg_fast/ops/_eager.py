"""The short way of an eager call: autograd Functions straight to the backend. The way through a custom op takes longer than the kernels of
a small call."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from modreg_fast.ops._autograd import Form, flattened, restored

if TYPE_CHECKING:
    from modreg_fast.ops._op import Op

_PLAIN = {Tensor, torch.nn.Parameter}


def is_transformed(tensors: list[Tensor]) -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is at work."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def is_seen(tensors: list[Tensor]) -> bool:
    """Whether someone has to see the op: a mode (a FLOP counter, fake tensors, selective checkpointing, ...), a tracer, a subclass of
    Tensor."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._is_tracing()
        or not _PLAIN.issuperset(map(type, tensors))
    )


class _Call:
    """What the Functions need beside the tensors. ``form``: of the problem; the forward pass adds that of the differentiable results, and
    the other results."""

    __slots__ = ("backend", "form", "op", "others", "output_form")

    output_form: Form
    others: Any

    def __init__(self, op: "Op", backend: str, form: Form) -> None:
        self.op, self.backend, self.form = op, backend, form


class _Forward(Function):
    """The differentiable results of a problem, flat. ``tensors``: those of the problem, for autograd."""

    @staticmethod
    def forward(ctx: Any, call: _Call, problem: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        op = call.op
        result = op.run(problem, call.backend)
        outputs, call.output_form = flattened(result[: op.upstream])
        call.others = result[op.upstream :]
        ctx.save_for_backward(*[result[i] for i in op.kept], *tensors)
        ctx.op, ctx.backend, ctx.form = op, call.backend, call.output_form + [Tensor] * len(op.kept) + call.form
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        inputs = (*upstream, *ctx.saved_tensors)
        if torch.is_grad_enabled():
            gradients = _Backward.apply(ctx.op, ctx.backend, ctx.form, *inputs)
        else:
            gradients = ctx.op.run_backward(restored(inputs, ctx.form), ctx.backend)
        # The inputs: call and problem, then those that have a gradient, then the others.
        return None, None, *gradients, *[None] * (len(ctx.needs_input_grad) - 2 - len(gradients))


class _Backward(Function):
    """The gradients of a problem, where they are to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, op: "Op", backend: str, form: Form, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        ctx.op, ctx.form = op, form
        return tuple(op.run_backward(restored(inputs, form), backend))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        return *[None] * 3, *ctx.op.second_gradients(ctx.saved_tensors, ctx.form, upstream)


def call(op: "Op", problem: Any, backend: str, tensors: list[Tensor], form: Form) -> Any:
    """The result of a problem, flattened to ``tensors`` and ``form``."""
    if not torch.is_grad_enabled() or not any([x.requires_grad for x in tensors]):  # a list: a generator takes longer
        return op.run(problem, backend)
    made = _Call(op, backend, form)
    outputs = _Forward.apply(made, problem, *tensors)
    return op.reference.Result(*restored(outputs, made.output_form), *made.others)
