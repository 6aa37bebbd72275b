"""Cross entropy of every modality's own logits and of their mean."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modreg_fast import _validate as validate
from modreg_fast import ops
from modreg_fast.backends import resolve
from modreg_fast.backends.reference.modality_cross_entropy import Problem
from modreg_fast.functional.masks import spatial_shape


class ModalitySums(NamedTuple):
    """Result of :func:`modality_cross_entropy`: sums over the valid pixels of each sample.

    Example:
        >>> sums = modality_cross_entropy([torch.zeros(2, 3, 4)], torch.zeros(2, 4, dtype=torch.int64))
        >>> sums.weights
        tensor([4., 4.])
    """

    cross_entropy: Tensor  # (M, B)
    joint: Tensor  # (B,)
    information: Tensor  # (M, B)
    weights: Tensor  # (B,)


def modality_cross_entropy(
    logits: Sequence[Tensor],
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    present: Tensor | None = None,
    channel_dim: int = 1,
    eps: float = 1e-8,
    backend: str | None = None,
) -> ModalitySums:
    r"""Cross entropy of every modality's own logits and of their mean, and each modality's functional Fisher information, in one pass.

    Per pixel with the target :math:`y`, class weights :math:`w` and label smoothing :math:`s`, with the logits :math:`X_m` of
    modality :math:`m`,

    .. math::
        t_c = (1 - s)\, w_y\, [c = y] + \tfrac{s}{C} w_c, \qquad T = \sum_c t_c, \qquad p_m = \operatorname{softmax}_c X_m, \\
        \text{ce}_m = -\sum_c t_c \log p_{mc}, \qquad
        \text{ce} = -\sum_c t_c \log \operatorname{softmax}_c (\operatorname{mean}_m X_m), \qquad
        I_m = \frac{\sum_c (T p_{mc} - t_c)^2}{\text{ce}_m + \text{eps}}

    :math:`I_m` is :math:`\lVert \nabla f \rVert^2 / f` of :math:`f = \text{ce}_m`, for :math:`\nabla_{X_m} \text{ce}_m = T p_m - t`. The
    cross entropies are those of :func:`torch.nn.functional.cross_entropy` with the same options: its ``reduction="sum"`` is the sum of
    ``cross_entropy[m]``, its ``"mean"`` that divided by the sum of ``weights``. Sources: the losses of each modality beside the joint
    one of arXiv:2405.17730 (ICML 2024); the prediction-level information of arXiv:2505.06635, with its gradient written out.

    Args:
        logits: M tensors ``(B, C, *spatial)``, spatial shape of any rank, also none; all of one shape. float32, float64, bfloat16 or
            float16; where dtypes differ, the promoted one. Pixels contiguous or channels last are read in place.
        target: classes in ``[0, C)``, or ``ignore_index``: ``(B, *spatial)`` of any integer dtype.
        weight: of each class, at least 0: ``(C,)``. Not differentiated.
        ignore_index: pixels with this target do not count.
        label_smoothing: in ``[0, 1]``.
        present: ``(B, M)`` bool; an absent modality is not read and counts neither for itself nor in the mean.
        channel_dim: dimension of the channels in ``logits``: 1, or -1 for tokens ``(B, N, C)``.
        eps: added to the denominator of the information.
        backend: name of a backend; default: the best for the tensors (see :func:`modreg_fast.use_backend`).

    Returns:
        :class:`ModalitySums` ``(cross_entropy (M, B), joint (B,), information (M, B), weights (B,))``, sums over the valid pixels;
        ``weights`` sums :math:`w_y`, the number of valid pixels where no weights are given. float64 if any logits are, else float32.
        All are 0, with zero gradient, where a sample has no valid pixel or no modality.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message says which and why. A target that is neither a class nor
            ``ignore_index`` is an error; on a GPU, where to look at it would be to wait for it, by an assertion on the device, as in
            :func:`torch.nn.functional.cross_entropy`.

    Example:
        >>> rgb, depth = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
        >>> sums = modality_cross_entropy([rgb, depth], torch.randint(5, (2, 4, 4)), ignore_index=255)
        >>> mean = sums.cross_entropy.sum(1) / sums.weights.sum()
        >>> mean.shape
        torch.Size([2])
    """
    return modality_sums(logits, target, weight, ignore_index, label_smoothing, present, channel_dim, eps, backend)


def modality_sums(
    logits: Sequence[Tensor],
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    present: Tensor | None,
    channel_dim: int,
    eps: float,
    backend: str | None,
    *,
    function: str = "modality_cross_entropy",
    names: Sequence[str] | None = None,
) -> ModalitySums:
    """:func:`modality_cross_entropy`. ``names``: of the modalities, for messages."""
    checked, target = _checked(logits, target, channel_dim, function, names)
    batch, classes, device = len(checked[0]), checked[0].shape[channel_dim], checked[0].device
    if target.dtype in validate.INTEGERS[5:]:  # of which PyTorch can do little
        target = target.to(torch.int64)
    if weight is not None:
        weight = validate.tensor(weight, function, "weight")
        if tuple(weight.shape) != (classes,) or weight.device != device or weight.requires_grad:
            got = f"{validate.shape(weight)} on {weight.device}{' that requires grad' * weight.requires_grad}"
            validate.fail(function, "weight", f"of shape {(classes,)} on {device} without gradient", got)
    if present is not None:
        present = validate.present(present, batch, len(checked), device, function)
    validate.ignore_index(ignore_index, function)
    validate.fraction(label_smoothing, function, "label_smoothing")
    validate.number(eps, function, "eps")
    # No kernel runs over nothing.
    name = resolve(backend, checked[0], function, "modality_cross_entropy") if batch else "reference"
    target = target.flatten(1) if target.dim() > 1 else target.unsqueeze(1)
    problem = Problem(checked, target, weight, present, ignore_index, float(label_smoothing), float(eps), channel_dim)
    try:
        sums = ModalitySums(*ops.modality_cross_entropy(problem, name))
    except ValueError as error:
        raise ValueError(str(error).replace("modality_cross_entropy", function, 1)) from None
    compiled = torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if device.type != "cpu" and (compiled or validate.readable(sums.weights)):
        # To look would be to wait; the kernels make the sums NaN, and the device stops, as in torch.nn.functional.cross_entropy.
        message = f"{function}: target must be a class in [0, {classes}) or ignore_index ({ignore_index}), and weight not NaN"
        torch._assert_async((sums.weights >= 0).all(), message)
    return sums


def _checked(
    logits: Sequence[Tensor], target: Tensor, channel_dim: int, function: str, names: Sequence[str] | None
) -> tuple[list[Tensor], Tensor]:
    """The logits, of one dtype, and the target."""
    signature = validate.signature(function, channel_dim, logits, [target])
    if validate.accepted(signature):
        return list(logits), target
    logits = validate.sequence(logits, function, "logits")
    labels = [f"logits[{m if names is None else names[m]!r}]" for m in range(len(logits))]
    checked = [validate.feature(x, function, label, channel_dim) for label, x in zip(labels, logits, strict=True)]
    for label, x in zip(labels, logits, strict=True):
        validate.same(x, logits[0], function, label, labels[0])
    checked = validate.promoted(checked)
    if names is not None and checked[0].shape[channel_dim] == 1:
        expected = "of at least two classes (of one logit z: torch.cat([torch.zeros_like(z), z], 1))"
        validate.fail(function, labels[0], expected, f"shape {validate.shape(logits[0])}")
    checked_target = validate.tensor(target, function, "target", dtypes=validate.INTEGERS)
    spatial = (len(checked[0]), *spatial_shape(logits[0], channel_dim))
    if tuple(checked_target.shape) != spatial or checked_target.device != checked[0].device:
        expected = f"of shape {spatial} on {checked[0].device} like {labels[0]} without its channels"
        validate.fail(function, "target", expected, f"{validate.shape(checked_target)} on {checked_target.device}")
    if checked_target is target and all(a is b for a, b in zip(checked, logits, strict=True)):
        validate.accept(signature)
    return checked, checked_target
