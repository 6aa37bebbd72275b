"""The short way of an eager call: autograd Functions straight to the backend. The way through a custom op takes longer than the kernels of
a small call."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from modreg_fast.ops._autograd import Form, flattened, restored, vector_jacobian_product

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


def is_plain(tensors: list[Tensor]) -> bool:
    """Neither: the short way may be taken."""
    return not is_transformed(tensors) and not is_seen(tensors)


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


class _Scalar(Function):
    """A scalar function of the first result of a problem, in one node with it (``Op.scalar``)."""

    @staticmethod
    def forward(ctx: Any, call: _Call, problem: Any, with_slope: Any, scalar: Any, *tensors: Tensor) -> Tensor:
        op = call.op
        result = op.run(problem, call.backend)
        value, slope = with_slope(result[0])
        ctx.save_for_backward(slope, *[result[i] for i in op.kept], *tensors)
        ctx.call, ctx.scalar, ctx.shape = call, scalar, result[0].shape
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        call, (slope, *inputs) = ctx.call, ctx.saved_tensors
        op = call.op
        if torch.is_grad_enabled():  # to be differentiated again

            def value(*tensors: Tensor) -> Any:
                return ctx.scalar(op(op.reference.Problem(*restored(tensors, call.form)), call.backend))

            gradients: Sequence[Tensor | None] = vector_jacobian_product(value, inputs[len(op.kept) :], [upstream])
        else:
            pulled = (upstream * slope)[..., None].expand(ctx.shape)
            gradients = op.run_backward(restored([pulled, *inputs], [Tensor] * (1 + len(op.kept)) + call.form), call.backend)
        return *[None] * 4, *gradients, *[None] * (len(ctx.needs_input_grad) - 4 - len(gradients))


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


# ``Function.apply`` less what it does for transforms: there are none.
_apply_forward = super(Function, _Forward).apply
_apply_scalar = super(Function, _Scalar).apply


def scalar(op: "Op", problem: Any, backend: str, tensors: list[Tensor], form: Form, with_slope: Any, scalar: Any) -> Tensor:
    """``scalar`` of the result of a problem, flattened to ``tensors`` and ``form``."""
    if not torch.is_grad_enabled() or not any([x.requires_grad for x in tensors]):
        value: Tensor = with_slope(op.run(problem, backend)[0])[0]
        return value
    return _apply_scalar(_Call(op, backend, form), problem, with_slope, scalar, *tensors)


def call(op: "Op", problem: Any, backend: str, tensors: list[Tensor], form: Form) -> Any:
    """The result of a problem, flattened to ``tensors`` and ``form``."""
    if not torch.is_grad_enabled() or not any([x.requires_grad for x in tensors]):  # a list: a generator takes longer
        return op.run(problem, backend)
    made = _Call(op, backend, form)
    outputs = _apply_forward(made, problem, *tensors)
    return op.reference.Result(*restored(outputs, made.output_form), *made.others)
