"""Who computes a case: inputs, and one function from inputs to outputs per provider. Everything else treats providers alike."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modreg_fast import functional
from modreg_fast.backends.reference import gradient_statistics, softmax_fisher
from modreg_fast.bench.cases import DTYPES, Case

Function = Callable[[Sequence[Tensor]], list[Tensor]]

_EPS = 1e-8


def make_inputs(case: Case, device: str = "cpu") -> list[Tensor]:
    """Leaves that require grad. ``softmax_fisher``: the features, modality first; ``gradient_statistics``: gradients,
    features and values, in this order."""
    generator = torch.Generator(device).manual_seed(0)

    def random(size: tuple[int, ...]) -> Tensor:
        x = torch.randn(size, generator=generator, device=device).to(DTYPES[case.dtype])
        return x.contiguous(memory_format=torch.channels_last) if case.layout == "channels" and x.dim() == 4 else x

    shape = case.shape
    leaves = [random(size) for _ in range(shape.modalities) for size in shape.sizes]
    if case.op == "gradient_statistics":
        leaves += [random(size) for _ in range(shape.modalities) for size in shape.sizes]
        spatial = [shape.spatial(size) for _ in range(shape.modalities) for size in shape.sizes]
        leaves += [torch.rand(size, generator=generator, device=device) + 0.1 for size in spatial]
    return [x.requires_grad_() for x in leaves]


def make_upstream(case: Case, device: str = "cpu") -> list[Tensor]:
    """Positive weights in the shapes of the outputs."""
    generator = torch.Generator(device).manual_seed(1)
    m, s, b = case.shape.modalities, len(case.shape.sizes), case.shape.batch
    shapes: dict[str, list[tuple[int, ...]]] = {
        "softmax_fisher": [(m, s, b)],
        "gradient_statistics": [(m * s, b)] * 2,
        "modality_cross_entropy": [(m, b), (b,)],
    }
    return [torch.rand(shape, generator=generator, device=device) + 0.5 for shape in shapes[case.op]]


def make_target(case: Case, device: str | torch.device = "cpu") -> Tensor:
    """A class for every pixel."""
    shape, generator = case.shape, torch.Generator(device).manual_seed(2)
    classes = shape.sizes[0][shape.channel_dim]
    return torch.randint(classes, shape.spatial(shape.sizes[0]), generator=generator, device=device)


def build(provider: str, case: Case, device: str = "cpu") -> Function:
    """The function of a provider: a baseline, or a backend of this package. ``device``: of its inputs."""
    if provider == "eager":
        return _plain_formula(case, device) if case.op == "modality_cross_entropy" else public(case, "reference", device)
    if provider == "compile":
        torch.compiler.reset()  # one set of static shapes at a time, or the limit of recompilations strikes
        return torch.compile(_plain_formula(case, device), fullgraph=True, dynamic=False)
    if provider == "gat":
        return _gat(case)
    return public(case, provider, device)


def public(case: Case, backend: str, device: str | torch.device = "cpu") -> Function:
    """The public function on a backend."""
    shape = case.shape
    noise = {"sigma": 1.0, "samples": case.samples, "seed": 0} if case.samples else {}

    def softmax_fisher_information(leaves: Sequence[Tensor]) -> list[Tensor]:
        features = _rows(leaves, len(shape.sizes))
        return [
            functional.softmax_fisher_information(features, channel_dim=shape.channel_dim, eps=_EPS, backend=backend, **noise)  # type: ignore[arg-type]
        ]

    def statistics(leaves: Sequence[Tensor]) -> list[Tensor]:
        result = functional.gradient_statistics(
            *_rows(leaves, len(leaves) // 3), channel_dim=shape.channel_dim, eps=_EPS, backend=backend
        )
        assert result.fisher is not None and result.attribution is not None
        return [result.fisher, result.attribution]

    if case.op == "modality_cross_entropy":
        target = make_target(case, device)

        def modality_cross_entropy(leaves: Sequence[Tensor]) -> list[Tensor]:
            sums = functional.modality_cross_entropy(
                leaves, target[: len(leaves[0])], channel_dim=shape.channel_dim, eps=_EPS, backend=backend
            )
            return [sums.cross_entropy, sums.joint]

        return modality_cross_entropy
    return softmax_fisher_information if case.op == "softmax_fisher" else statistics


def _plain_formula(case: Case, device: str) -> Function:
    """The definition in plain PyTorch without the custom op: the compiler sees through it and derives the backward pass."""
    shape = case.shape

    def softmax_fisher_information(leaves: Sequence[Tensor]) -> list[Tensor]:
        features = [_pixels_last(x, shape.channel_dim) for x in leaves]
        problem = softmax_fisher.Problem(features, [], None, [0.0] * shape.modalities, 1, None, False, _EPS)
        return [softmax_fisher.forward(problem).information]

    def statistics(leaves: Sequence[Tensor]) -> list[Tensor]:
        grads, features, values = _rows(leaves, len(leaves) // 3)
        grads, features = ([_pixels_last(x, shape.channel_dim) for x in tensors] for tensors in (grads, features))
        values = [f.reshape(f.shape[0], -1) for f in values]
        return list(gradient_statistics.forward(gradient_statistics.Problem(grads, features, values, [], _EPS, False))[:2])

    if case.op == "modality_cross_entropy":
        target = make_target(case, device)

        def cross_entropies(leaves: Sequence[Tensor]) -> list[Tensor]:
            """One call more than there are modalities, as everybody writes it."""
            logits = [x.movedim(shape.channel_dim, 1) for x in leaves]
            logits.append(sum(logits[1:], logits[0]) / len(logits))
            maps = [F.cross_entropy(x.float(), target, reduction="none") for x in logits]
            *own, joint = (x.reshape(len(x), -1).sum(1) for x in maps)
            return [torch.stack(own), joint]

        return cross_entropies
    return softmax_fisher_information if case.op == "softmax_fisher" else statistics


def _gat(case: Case) -> Function:
    """The public formula of Gat et al. (NeurIPS 2020) for the same quantity: the gradient inside it by autograd."""
    shape = case.shape

    def information(leaves: Sequence[Tensor]) -> list[Tensor]:
        training = torch.is_grad_enabled()
        scales = []
        for s in range(len(shape.sizes)):
            xs = [_pixels_last(x, shape.channel_dim).float() for x in leaves[s :: len(shape.sizes)]]
            q = torch.softmax(sum(xs[1:], xs[0]) / len(xs), 1)
            scales.append(torch.stack([_gat_term(x, q, training) for x in xs]))
        return [torch.stack(scales, 1)]

    return information


def _gat_term(x: Tensor, q: Tensor, training: bool) -> Tensor:
    with torch.enable_grad():
        own = x.view_as(x) if training else x.detach().requires_grad_()  # not through q
        f = -(q * torch.log_softmax(own, 1)).sum(1)
        (g,) = torch.autograd.grad(f.sum(), own, create_graph=training)
    f = f if training else f.detach()
    return (g.square().sum(1) / (f + _EPS)).mean(1)


def _pixels_last(x: Tensor, channel_dim: int) -> Tensor:
    """``(B, C, P)``."""
    x = x.movedim(channel_dim, 1)
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def _rows(tensors: Sequence[Tensor], length: int) -> list[list[Tensor]]:
    return [list(tensors[i : i + length]) for i in range(0, len(tensors), length)]
