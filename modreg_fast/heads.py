"""Logits of each modality alone: from the joint head with the others absent, or from a head of its own."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from modreg_fast import _validate as validate
from modreg_fast.capture import unrecorded

Features = Tensor | Sequence[Tensor]  # of one modality: at one scale, or at several


@torch.compiler.disable(recursive=False)
def each_alone(
    head: Callable[[dict[str, Any]], Any],
    features: Mapping[str, Features],
    absent: Mapping[str, Features] | None = None,
    *,
    batched: bool = True,
) -> dict[str, Any]:
    """What a head says to each modality alone, the others as their encoders see nothing.

    For heads of any fusion, and for whole models that take their inputs by name. The encoders run once, the head once more, on
    ``M`` times the batch.

    The joint pass is not disturbed: features that :func:`modreg_fast.capture` has recorded stay, and layers with running statistics
    (batch norm) normalise by them as at inference, in which a sensor is lost, and do not update them, so that they stay those of the
    joint pass. Dropout stays active with numbers of its own; call this after the joint pass, and that draws the same numbers as without
    it. A head that checkpoints such layers would run them again later, in training mode: checkpoint the call of ``each_alone`` instead.

    Args:
        head: module or function, called with ``{modality: features}``; for another signature a function, such as
            ``lambda f: head(torch.cat([f["rgb"], f["depth"]], 1))``.
        features: modality -> a tensor ``(B, ...)``, or a list of them, one per scale.
        absent: what takes their place, of the same form; with a batch of one it serves every sample. Default zeros. For a model whose
            encoders have biases: ``encode({m: torch.zeros_like(x[:1]) for m, x in inputs.items()})``.
        batched: False calls the head once per modality, where it takes no other batch than ``B``.

    Returns:
        modality -> what the head returns (a tensor, or any structure of tensors whose first dimension is the batch).

    Raises:
        ValueError, TypeError: features or absent that do not fit; a head whose result is not of the batch that it was given.

    Example:
        >>> linear = torch.nn.Linear(6, 5)
        >>> features = {"rgb": torch.randn(2, 3), "depth": torch.randn(2, 3)}
        >>> alone = each_alone(lambda f: linear(torch.cat([f["rgb"], f["depth"]], 1)), features)
        >>> {m: x.shape for m, x in alone.items()}
        {'rgb': torch.Size([2, 5]), 'depth': torch.Size([2, 5])}
    """
    names = list(validate.modalities(features, "each_alone", "features"))
    if not callable(head):
        validate.fail("each_alone", "head", "a module or a function", type(head).__name__, TypeError)
    batch = _batch(features, "each_alone")
    nothing = _nothing(features, absent, batch)
    given = [{m: features[m] if m == alone else nothing[m] for m in names} for alone in names]
    with unrecorded(), _running_statistics_as_they_are(head):
        if not batched:  # copies, as one batch is one: a head may write into what it gets
            return {m: head(tree_map(torch.clone, x)) for m, x in zip(names, given, strict=True)}
        together = head(tree_map(lambda *xs: torch.cat(xs), *given))

    def parts(x: Any) -> Sequence[Any]:
        if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != batch * len(names):
            got = f"shape {validate.shape(x)}" if isinstance(x, Tensor) else type(x).__name__
            expected = f"a head that returns tensors of the batch that it is given ({batch * len(names)}), or batched=False"
            validate.fail("each_alone", "head", expected, got)
        return x.tensor_split(len(names))  # not split(batch), which cannot be 0

    leaves, form = tree_flatten(together)
    return {m: tree_unflatten(list(x), form) for m, x in zip(names, zip(*map(parts, leaves), strict=True), strict=True)}


def _batch(features: Mapping[str, Features], function: str) -> int:
    batch = None
    for m, value in features.items():
        scales = [value] if isinstance(value, Tensor) else validate.sequence(value, function, f"features[{m!r}]")
        for x in scales:
            if not isinstance(x, Tensor) or x.dim() == 0:
                got = "a scalar" if isinstance(x, Tensor) else type(x).__name__
                validate.fail(function, f"features[{m!r}]", "a tensor (B, ...) or a list of them", got, TypeError)
            if batch is not None and len(x) != batch:
                validate.fail(function, f"features[{m!r}]", f"of batch size {batch} like the first", len(x))
            batch = len(x)
    assert batch is not None
    return batch


def _nothing(features: Mapping[str, Features], absent: Mapping[str, Features] | None, batch: int) -> dict[str, Any]:
    if absent is None:
        return {m: tree_map(torch.zeros_like, x) for m, x in features.items()}
    validate.modalities(absent, "each_alone", "absent")
    found = {}
    for m, value in features.items():
        if m not in absent:
            validate.fail(
                "each_alone", "absent", f"with the modalities of features, {', '.join(map(repr, features))}", list(absent)
            )
        (xs, form), (ys, other) = tree_flatten(value), tree_flatten(absent[m])
        if form != other or any(
            not isinstance(y, Tensor) or y.shape[1:] != x.shape[1:] or len(y) not in (1, batch)
            for x, y in zip(xs, ys, strict=True)
        ):
            expected = f"of the form of features[{m!r}], with a batch of 1 or {batch}"
            validate.fail("each_alone", f"absent[{m!r}]", expected, tree_map(lambda y: tuple(getattr(y, "shape", ())), absent[m]))
        found[m] = tree_unflatten([y.to(x.dtype).expand_as(x) for x, y in zip(xs, ys, strict=True)], form)
    return found


@contextlib.contextmanager
def _running_statistics_as_they_are(head: Callable[..., Any]) -> Iterator[None]:
    """What ``head`` runs uses its running statistics, where it has any, and leaves them."""
    changed: list[nn.Module] = []
    thread = get_ident()  # others may train another model meanwhile

    def to_inference(module: nn.Module, _: Any = None) -> None:
        here = torch.compiler.is_compiling() or get_ident() == thread
        if here and isinstance(module, _NormBase) and module.track_running_stats and module.training:
            module.training = False
            changed.append(module)

    with contextlib.ExitStack() as stack:
        if isinstance(head, nn.Module):
            for module in head.modules():
                to_inference(module)
        else:  # whichever modules a function calls
            stack.callback(register_module_forward_pre_hook(to_inference).remove)
        try:
            yield
        finally:
            for module in changed:
                module.training = True


class ModalityLogits(NamedTuple):
    """What :class:`ModalityHeads` returns in training.

    Example:
        >>> ModalityLogits(torch.zeros(2, 3), {"rgb": torch.zeros(2, 3)}).joint.shape
        torch.Size([2, 3])
    """

    joint: Tensor
    alone: dict[str, Tensor]  # modality -> its own logits


class ModalityHeads(nn.Module):
    """A head for all modalities, and one for each that speaks where others are lost.

    In training ``heads(features)`` returns ``ModalityLogits(joint, alone)`` for ``ModalityCrossEntropy()(alone, target, joint=joint)``. In
    evaluation it returns logits: for a sample with all modalities, or with none, those of the joint head, which is all that runs where no
    modality is left out and ``present`` is None; for another the logarithm of the mean probability over the heads of the modalities that
    it has (where it has none of those that are given, over all of these), in the dtype of the logits.
    A lost modality is left out, not set to zeros, which the joint head would take for an input:
    ``evaluate_missing(model, data, metric, drop=lambda m, x: None)``.

    Args:
        joint: called with ``{modality: features}``, returns logits ``(B, C, *spatial)``.
        heads: modality -> module, called with the features of that modality (a tensor, or a list of scales), returns logits of the same
            shape; or a function that makes the module for a name.
        modalities: the names, where ``heads`` is a function; default the keys of ``heads``.
        channel_dim: dimension of the classes in the logits.

    Raises:
        ValueError, TypeError: heads that are no modules, a function without names, features of other modalities; in evaluation, logits of
            different shapes or without ``channel_dim``.

    Example:
        >>> class Concatenation(torch.nn.Linear):
        ...     def forward(self, features):
        ...         return super().forward(torch.cat(list(features.values()), 1))
        >>> heads = ModalityHeads(Concatenation(6, 5), lambda m: torch.nn.Linear(3, 5), ["rgb", "depth"])
        >>> features = {"rgb": torch.randn(2, 3), "depth": torch.randn(2, 3)}
        >>> joint, alone = heads(features)
        >>> heads.eval()({"rgb": features["rgb"]}).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        joint: nn.Module,
        heads: Mapping[str, nn.Module] | Callable[[str], nn.Module],
        modalities: Sequence[str] | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(heads, Mapping):
            if not callable(heads):
                validate.fail(name, "heads", "a mapping from modality to module, or a function", type(heads).__name__, TypeError)
            if modalities is None:
                validate.fail(name, "modalities", "the names that heads is to be called with", "None")
            heads = {m: heads(m) for m in validate.different(modalities, name, "modalities")}
        elif modalities is not None:
            validate.fail(name, "modalities", "None where heads is a mapping", list(modalities))
        for m, head in validate.modalities(heads, name, "heads", "modules").items():
            if not isinstance(head, nn.Module):
                validate.fail(name, f"heads[{m!r}]", "a module", type(head).__name__, TypeError)
            if not isinstance(m, str) or not m or "." in m or hasattr(nn.ModuleDict, m):
                expected = "names that torch.nn.ModuleDict takes (no dot, and not one of its methods, such as 'values' or 'type')"
                validate.fail(name, "heads", expected, repr(m))
        if not isinstance(joint, nn.Module):
            validate.fail(name, "joint", "a module", type(joint).__name__, TypeError)
        self.joint = joint
        self.heads = nn.ModuleDict(heads)
        self.channel_dim = channel_dim

    def forward(self, features: Mapping[str, Features], *, present: Tensor | None = None) -> Any:
        """Logits; in training :class:`ModalityLogits`.

        Args:
            features: modality -> tensor, or list of scales. In evaluation modalities may be left out, which no sample then has.
            present: ``(B, M)`` bool in the order of the heads: which sample has which modality. In training the loss takes it.
        """
        name = type(self).__name__
        validate.modalities(features, name, "features")
        unknown = [m for m in features if m not in self.heads]
        missing = [m for m in self.heads if m not in features]
        if unknown or (missing and self.training):
            validate.fail(name, "features", f"of the modalities {', '.join(map(repr, self.heads))}", list(features))
        features = {m: features[m] for m in self.heads if m in features}  # a head may go by their order
        if self.training:
            return ModalityLogits(self.joint(features), {m: head(features[m]) for m, head in self.heads.items()})
        if present is None and not missing:
            return self.joint(features)
        held = None
        if present is not None:
            batch = _batch(features, name)
            present = validate.present(present, batch, len(self.heads), tree_flatten(features)[0][0].device, name)
            held = torch.stack([present[:, i] for i, m in enumerate(self.heads) if m in features], 1)
            held = held | ~held.any(1, keepdim=True)  # of nothing, the heads take what stands there
            features = {m: _held(x, held[:, i]) for i, (m, x) in enumerate(features.items())}
        own = self._mean({m: self.heads[m](x) for m, x in features.items()}, held)
        if missing or held is None:
            return own
        joint = self.joint(features)
        validate.same(joint, own, name, "the joint logits", "those of a modality")
        return torch.where(held.all(1).view(-1, *[1] * (own.dim() - 1)), joint, own)

    def _mean(self, logits: dict[str, Tensor], held: Tensor | None) -> Tensor:
        """Logarithm of the mean probability over the modalities that a sample has, in the dtype of the logits; ``held`` ``(B, M)``."""
        name, first = type(self).__name__, next(iter(logits))
        for m, x in logits.items():
            said = f"the logits of {m!r}"
            validate.same(validate.tensor(x, name, said), logits[first], name, said, repr(first))
        validate.channels(logits[first], self.channel_dim, name, f"the logits of {first!r}")
        xs = validate.promoted(list(logits.values()))
        precise = torch.promote_types(xs[0].dtype, torch.float32)
        log_p = torch.stack([x.log_softmax(self.channel_dim, precise) for x in xs], 1)
        if held is None:
            held = log_p.new_ones(log_p.shape[:2], dtype=torch.bool)
        held = held.view(*held.shape, *[1] * (log_p.dim() - 2))
        mean = torch.where(held, log_p, -torch.inf).logsumexp(1) - held.sum(1).to(precise).log()
        return mean.to(xs[0].dtype)


def _held(features: Features, samples: Tensor) -> Features:
    """0 where a sample lacks the modality: what stands there, such as NaN, is not to reach a head, nor its gradient."""
    return tree_map(lambda x: torch.where(samples.view(-1, *[1] * (x.dim() - 1)), x, 0), features)
