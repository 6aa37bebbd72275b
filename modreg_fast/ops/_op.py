"""An op, made from its definition in ``backends/reference/<stem>.py``."""

from collections.abc import Iterable
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor

from modreg_fast.backends import implementation
from modreg_fast.ops._autograd import flattened, gradients_of, laid_out_like, restored, vector_jacobian_product

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
      the gradients of all tensors of the differentiable inputs. Its own derivative is that of the reference formula."""

    def __init__(self, reference: ModuleType) -> None:
        self.reference = reference
        self.stem = reference.__name__.rpartition(".")[2]
        fields, results = reference.Problem._fields, reference.Result._fields
        assert fields[: len(reference.DIFFERENTIABLE_INPUTS)] == reference.DIFFERENTIABLE_INPUTS  # the formulas below count on it
        self._upstream = [name for name in results if name in reference.DIFFERENTIABLE_RESULTS]
        self._kept = [name for name in results if name in reference.KEPT_RESULTS]

        inputs, outputs = _schema_types(reference.Problem), _schema_types(reference.Result)
        last = [*(f"{kind} {name}" for name, kind in inputs.items()), "str backend"]
        first = [f"{outputs[name]} grad_{name}" for name in self._upstream] + [f"{outputs[name]} {name}" for name in self._kept]
        name = f"modreg_fast::{self.stem}"
        forward = torch.library.custom_op(
            name, self._forward, mutates_args=(), schema=f"({', '.join(last)}) -> ({', '.join(outputs.values())})"
        )
        forward.register_fake(lambda *inputs: tuple(reference.Problem(*inputs[:-1]).empty_result()))
        forward.register_autograd(self._gradients, setup_context=self._keep)
        backward = torch.library.custom_op(
            f"{name}_backward", self._backward, mutates_args=(), schema=f"({', '.join(first + last)}) -> Tensor[]"
        )
        backward.register_fake(lambda *inputs: [torch.empty_like(x) for x in self._differentiable(self._parted(inputs)[2])])
        backward.register_autograd(self._second_gradients, setup_context=self._keep_all)
        self.custom, self.custom_backward = (getattr(torch.ops.modreg_fast, self.stem + end).default for end in ("", "_backward"))

    def __call__(self, problem: Any, backend: str) -> Any:
        return self.reference.Result(*self.custom(*problem, backend))

    # ---- what the custom ops run ----

    def _forward(self, *inputs: Any) -> tuple[Any, ...]:
        *problem, backend = inputs
        return tuple(implementation(backend, self.stem).forward(self.reference.Problem(*problem)))

    def _backward(self, *inputs: Any) -> list[Tensor]:
        upstream, result, problem = self._parted(inputs)
        gradients = implementation(inputs[-1], self.stem).backward(problem, result, upstream)
        return laid_out_like(gradients, self._differentiable(problem))

    def _parted(self, inputs: Iterable[Any]) -> tuple[Any, Any, Any]:
        """The inputs of the backward op as the upstream gradients, the kept results, and the problem."""
        rest = iter(inputs)
        results = self.reference.Result._fields
        upstream = self.reference.Result(*(next(rest) if name in self._upstream else None for name in results))
        result = self.reference.Result(*(next(rest) if name in self._kept else None for name in results))
        return upstream, result, self.reference.Problem(*(next(rest) for _ in self.reference.Problem._fields))

    def _differentiable(self, problem: Any) -> list[Tensor]:
        return [x for inputs in problem[: len(self.reference.DIFFERENTIABLE_INPUTS)] for x in inputs]

    def _named(self, names: list[str], results: tuple[Any, ...]) -> list[Any]:
        return [x for name, x in zip(self.reference.Result._fields, results, strict=True) if name in names]

    # ---- their autograd formulas ----

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        tensors, ctx.form = flattened(inputs)
        kept, ctx.kept_form = flattened(self._named(self._kept, output))
        ctx.mark_non_differentiable(*(x for x in kept if not x.is_floating_point()))
        ctx.save_for_backward(*kept, *tensors)
        ctx.kept = len(kept)

    def _gradients(self, ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        kept, tensors = ctx.saved_tensors[: ctx.kept], ctx.saved_tensors[ctx.kept :]
        results = (*self._named(self._upstream, upstream), *restored(kept, ctx.kept_form))
        gradients = self.custom_backward(*results, *restored(tensors, ctx.form))
        return gradients_of([*gradients, *[None] * (len(tensors) - len(gradients))], ctx.form)

    def _keep_all(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, ctx.form = flattened(inputs)
        ctx.save_for_backward(*tensors)

    def _second_gradients(self, ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
        def gradients(*tensors: Tensor) -> list[Tensor]:
            up, result, problem = self._parted(restored(tensors, ctx.form))
            return self.reference.backward(problem, result, up)

        return gradients_of(vector_jacobian_product(gradients, ctx.saved_tensors, upstream), ctx.form)


def _schema_types(fields: type) -> dict[str, str]:
    """By field of a named tuple."""
    return {name: _SCHEMA_TYPES[kind] for name, kind in get_type_hints(fields).items()}
