"""An op, made from its definition in ``backends/reference/<stem>.py``."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from modreg_fast.backends import implementation
from modreg_fast.backends.measured import chosen
from modreg_fast.ops import _eager
from modreg_fast.ops._autograd import Form, flattened, gradients_of, restored, vector_jacobian_product

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[float]: "float[]",
    float: "float",
    int: "int",
    bool: "bool",
}


class Op:
    """``op(problem, backend) -> result``, for the ``Problem`` and the ``Result`` of a definition.

    Two custom ops, opaque to ``torch.compile`` and computed by a backend, with flat schemas:

    - ``modreg_fast::<stem>`` takes the fields of the problem and the name of the backend;
    - ``modreg_fast::<stem>_backward`` takes the gradients of the differentiable results, the kept results, and the same again. It returns
      the gradients of all tensors of the differentiable inputs. Its own derivative is that of the reference formula.

    Eager calls take a shorter way to the same backend. Under transforms of ``torch.func`` and in forward-mode differentiation, compiled or
    not, the reference computes, which is plain PyTorch: a custom op would lose a tangent without a word."""

    def __init__(self, reference: ModuleType) -> None:
        self.reference = reference
        self.stem = reference.__name__.rpartition(".")[2]
        fields, results = reference.Problem._fields, reference.Result._fields
        self.inputs, self.upstream = len(reference.DIFFERENTIABLE_INPUTS), len(reference.DIFFERENTIABLE_RESULTS)
        self.kept = [results.index(name) for name in reference.KEPT_RESULTS]
        self.fields = len(fields)
        # Among the inputs of the backward pass: where each result is, if it is kept. Of the others there are no gradients.
        self.places = [self.upstream + self.kept.index(i) if i in self.kept else None for i in range(len(results))]
        self.no_upstream = [None] * (len(results) - self.upstream)
        # What is differentiable comes first.
        assert fields[: self.inputs] == reference.DIFFERENTIABLE_INPUTS
        assert results[: self.upstream] == reference.DIFFERENTIABLE_RESULTS

        inputs, outputs = _schema_types(reference.Problem), _schema_types(reference.Result)
        last = [*(f"{kind} {name}" for name, kind in inputs.items()), "str backend"]
        first = [f"{outputs[name]} grad_{name}" for name in reference.DIFFERENTIABLE_RESULTS]
        first += [f"{outputs[name]} {name}" for name in reference.KEPT_RESULTS]
        _register(
            self.stem,
            f"({', '.join(last)}) -> ({', '.join(outputs.values())})",
            self._forward,
            lambda *inputs: tuple(reference.Problem(*inputs[:-1]).flat().empty_result()),
            (self._gradients, self._keep),
        )
        _register(
            f"{self.stem}_backward",
            f"({', '.join(first + last)}) -> Tensor[]",
            self._backward,
            lambda *inputs: [torch.empty_like(x) for x in self._differentiable(self._parted(inputs)[2])],
            (self._second_gradients, self._keep_all),
        )
        self.custom, self.custom_backward = (getattr(torch.ops.modreg_fast, self.stem + end).default for end in ("", "_backward"))

    def __call__(self, problem: Any, backend: str) -> Any:
        if torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
                return self.reference.forward(problem)
        else:
            tensors, form = flattened(problem)
            if _eager.is_transformed(tensors):
                return self.reference.forward(problem)
            if not _eager.is_seen(tensors):
                return _eager.call(self, problem, backend, tensors, form)
        return self.reference.Result(*self.custom(*problem, backend))

    def scalar(
        self, problem: Any, backend: str, scalar: Callable[[Any], Tensor], with_slope: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """``scalar(op(problem, backend))``. Eager calls take one node of autograd for both, by way of ``with_slope``: of the first result,
        the scalar and its derivative by it without the last dimension, along which that is one."""
        if not torch.compiler.is_compiling():
            tensors, form = flattened(problem)
            if _eager.is_plain(tensors):
                return _eager.scalar(self, problem, backend, tensors, form, with_slope, scalar)
        return scalar(self(problem, backend))

    # ---- what all ways run ----

    def run(self, problem: Any, backend: str) -> Any:
        return implementation(chosen(backend, self.stem, "forward", problem), self.stem).forward(problem)

    def run_backward(self, inputs: Sequence[Any], backend: str) -> list[Tensor]:
        upstream, result, problem = self._parted(inputs)
        computing = implementation(chosen(backend, self.stem, "backward", problem), self.stem)
        gradients: list[Tensor] = computing.backward(problem, result, upstream)
        return gradients

    def second_gradients(self, inputs: Sequence[Tensor], form: Form, upstream: Sequence[Tensor]) -> list[Tensor | None]:
        """Of the flattened inputs of the backward op."""

        def gradients(*tensors: Tensor) -> list[Tensor]:
            up, result, problem = self._parted(restored(tensors, form))
            found: list[Tensor] = self.reference.backward(problem, result, up)
            return found

        return vector_jacobian_product(gradients, inputs, upstream)

    def _parted(self, inputs: Sequence[Any]) -> tuple[Any, Any, Any]:
        """The inputs of the backward op as the upstream gradients, the kept results, and the problem."""
        result, first = self.reference.Result, self.upstream + len(self.kept)
        return (
            result._make([*inputs[: self.upstream], *self.no_upstream]),
            result._make([None if k is None else inputs[k] for k in self.places]),
            self.reference.Problem._make(inputs[first : first + self.fields]),
        )

    # ---- the custom ops ----

    def _forward(self, *inputs: Any) -> tuple[Any, ...]:
        *problem, backend = inputs
        return tuple(self.run(self.reference.Problem(*problem), backend))

    def _backward(self, *inputs: Any) -> list[Tensor]:
        return self.run_backward(inputs, inputs[-1])

    def _differentiable(self, problem: Any) -> list[Tensor]:
        return [x for inputs in problem[: self.inputs] for x in inputs]

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        tensors, ctx.form = flattened(inputs)
        ctx.mark_non_differentiable(*output[self.upstream :])
        ctx.save_for_backward(*(output[i] for i in self.kept), *tensors)

    def _gradients(self, ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: checkpointing counts
        kept, tensors = saved[: len(self.kept)], saved[len(self.kept) :]
        gradients = self.custom_backward(*upstream[: self.upstream], *kept, *restored(tensors, ctx.form))
        return gradients_of([*gradients, *[None] * (len(tensors) - len(gradients))], ctx.form)

    def _keep_all(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, ctx.form = flattened(inputs)
        ctx.save_for_backward(*tensors)

    def _second_gradients(self, ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
        return gradients_of(self.second_gradients(ctx.saved_tensors, ctx.form, upstream), ctx.form)


def _register(
    name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: tuple[Callable[..., Any], ...]
) -> None:
    """Piece by piece: the wrapper that ``torch.library.custom_op`` puts around a kernel takes as long as a tenth of a small call."""
    name = f"modreg_fast::{name}"
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default")(kernel)
    torch.library.register_fake(name)(fake)
    gradients, keep = autograd
    torch.library.register_autograd(name, gradients, setup_context=keep)


def _schema_types(fields: type) -> dict[str, str]:
    """By field of a named tuple."""
    return {name: _SCHEMA_TYPES[kind] for name, kind in get_type_hints(fields).items()}
