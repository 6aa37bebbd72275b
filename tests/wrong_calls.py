"""Wrong calls of every public function and of the raw ops, made in a process of its own: ``python wrong_calls.py FIRST LAST SEED``.

A call is a right one with one argument made wrong. Its name is printed before it is made, so that the last line names what crashed;
a line ``! name: what happened`` tells of a call that went through, or that ended in an exception that is none for users."""

import faulthandler
import random
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from wrong_values import SPECIAL, bools, floats, wrong

import modreg_fast as mrf
from modreg_fast import functional

B, M, S, C, P = 3, 2, 2, 5, 6


class Target(NamedTuple):
    """A function, what makes right arguments for it, and the kind of each argument that is made wrong."""

    function: Callable
    arguments: Callable[[], dict]
    kinds: dict[str, str]
    public: bool = True


# ---- right calls ----


def raw_features():
    return [floats(B, C + s, P + s) for _ in range(M) for s in range(S)]


def raw_masks():
    return [bools(B, P + s) for s in range(S)]


def raw_softmax_fisher():
    options = {"features": raw_features(), "masks": raw_masks(), "present": bools(B, M), "sigma": [0.5, 0.0], "samples": 2}
    return {**options, "seed": torch.tensor(3), "detach_reference": False, "eps": 1e-8, "channel_dim": 1}


def raw_softmax_fisher_backward():
    upstream = {"grad_information": floats(M, S, B), "counts": torch.ones(S, B, dtype=torch.int64)}
    return {**upstream, **raw_softmax_fisher()}


def raw_statistics():
    tensors = {name: [floats(B, C + s, P + s) for s in range(S)] for name in ("grads", "features")}
    values = [floats(B, P + s).abs() for s in range(S)]
    return {**tensors, "values": values, "masks": raw_masks(), "eps": 1e-8, "maps": True, "channel_dim": 1}


def raw_statistics_backward():
    upstream = {name: floats(S, B) for name in ("grad_fisher", "grad_attribution", "attribution")}
    maps = {f"grad_{name}_maps": [floats(B, P + s) for s in range(S)] for name in ("fisher", "attribution")}
    return {**upstream, **maps, **raw_statistics()}


def raw_cross_entropy():
    logits, target = [floats(B, C, P) for _ in range(M)], torch.randint(C, (B, P))
    options = {"weight": floats(C).abs(), "present": bools(B, M), "ignore_index": -100, "label_smoothing": 0.1}
    return {"logits": logits, "target": target, **options, "eps": 1e-8, "channel_dim": 1}


def raw_cross_entropy_backward():
    upstream = {"grad_cross_entropy": floats(M, B), "grad_joint": floats(B), "grad_information": floats(M, B)}
    return {**upstream, **raw_cross_entropy()}


CROSS_ENTROPY = {"target": "labels", "weight": "optional", "present": "optional", "label_smoothing": "number", "eps": "number"}
OPTIONS = {"present": "optional", "sigma": "sigma", "eps": "number"}
FISHER = {
    **OPTIONS,
    "features": "tensors",
    "masks": "tensors",
    "samples": "integer",
    "seed": "noise_seed",
    "channel_dim": "raw_dim",
}
STATISTICS = {**dict.fromkeys(("grads", "features", "values", "masks"), "tensors"), "eps": "number", "channel_dim": "raw_dim"}
RAW_CROSS_ENTROPY = {**CROSS_ENTROPY, "logits": "tensors", "channel_dim": "raw_dim"}


def maps_of(shape=(B, 4, 6)):
    return {"rgb": floats(B, C, *shape[1:]), "depth": floats(B, C, *shape[1:])}


def prediction():
    inputs = {m: x.requires_grad_() for m, x in maps_of().items()}
    return {"values": sum(inputs.values()).square().sum(1), "inputs": inputs, "mask": bools(B, 4, 6), "granularity": "pixel"}


def scored():
    features = {m: x.requires_grad_() for m, x in maps_of().items()}
    return {"scores": sum(features.values()) * 2, "features": features, "mask": bools(B, 4, 6), "present": bools(B, M)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rgb, self.depth = nn.Linear(5, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.rgb(x["rgb"]) + self.depth(x["depth"])


def batch():
    return {"rgb": floats(4, 5), "depth": floats(4, 4)}, torch.randint(3, (4,))


def accuracy(scores, target):
    return (scores.argmax(1) == target).float().mean()


def captured(model, modules):
    with mrf.capture(model, modules) as features:
        model(batch()[0])
    return features


def used(name):
    with mrf.use_backend(name):
        pass


def modules_of():
    return {"rgb": ["rgb"], "depth": ["depth"]}


def loss_features():
    return {m: [floats(B, C, 4, 6), floats(B, 7, 2, 3)] for m in ("rgb", "depth")}


def targets() -> dict[str, Target]:
    native, custom = torch.ops.modreg_fast_native, torch.ops.modreg_fast
    found = {
        "native.softmax_fisher_forward": Target(native.softmax_fisher_forward, raw_softmax_fisher, FISHER, public=False),
        "native.softmax_fisher_backward": Target(
            native.softmax_fisher_backward,
            raw_softmax_fisher_backward,
            {**FISHER, "grad_information": "tensor", "counts": "tensor"},
            public=False,
        ),
        "native.gradient_statistics_forward": Target(
            native.gradient_statistics_forward, raw_statistics, STATISTICS, public=False
        ),
        "native.gradient_statistics_backward": Target(
            native.gradient_statistics_backward,
            raw_statistics_backward,
            {
                **STATISTICS,
                **dict.fromkeys(("grad_fisher", "grad_attribution", "attribution"), "tensor"),
                **dict.fromkeys(("grad_fisher_maps", "grad_attribution_maps"), "tensors"),
            },
            public=False,
        ),
        "native.modality_cross_entropy_forward": Target(
            native.modality_cross_entropy_forward, raw_cross_entropy, RAW_CROSS_ENTROPY, public=False
        ),
        "native.modality_cross_entropy_backward": Target(
            native.modality_cross_entropy_backward,
            raw_cross_entropy_backward,
            {**RAW_CROSS_ENTROPY, **dict.fromkeys(("grad_cross_entropy", "grad_joint", "grad_information"), "tensor")},
            public=False,
        ),
        "native.balance_penalty": Target(
            native.balance_penalty,
            lambda: {"information": floats(M, S, B).abs(), "logarithm": True, "eps": 1e-8, "scale": 1.0},
            {"information": "alone"},
            public=False,
        ),
        "modality_cross_entropy": Target(
            functional.modality_cross_entropy,
            lambda: {
                **{"logits": list(maps_of().values()), "target": torch.randint(C, (B, 4, 6)), "present": bools(B, M)},
                **{"weight": floats(C).abs(), "ignore_index": 255, "label_smoothing": 0.1, "channel_dim": 1, "eps": 1e-8},
            },
            {**CROSS_ENTROPY, "logits": "tensors", "ignore_index": "none", "channel_dim": "dim"},
        ),
        "ModalityCrossEntropy": Target(
            lambda logits, target, joint, present, **options: mrf.ModalityCrossEntropy(**options)(
                logits, target, joint=joint, present=present
            ),
            lambda: {
                **{"logits": maps_of(), "target": torch.randint(C, (B, 4, 6)), "joint": floats(B, C, 4, 6)},
                **{"present": bools(B, M), "weight": 1.0, "label_smoothing": 0.1, "objective": "log", "eps": 1e-8},
            },
            {
                **{"logits": "mapping", "target": "labels", "joint": "optional", "present": "optional", "weight": "weight"},
                **{"label_smoothing": "number", "objective": "choice", "eps": "number"},
            },
        ),
        "each_alone": Target(
            mrf.each_alone,
            lambda: {"head": Model(), "features": batch()[0], "absent": batch()[0]},
            {"head": "callable", "features": "named", "absent": "absent"},
        ),
        "ModalityHeads": Target(
            lambda joint, heads, features, present: mrf.ModalityHeads(joint, heads).eval()(features, present=present),
            lambda: {
                **{"joint": Model(), "heads": {"rgb": nn.Linear(5, 3), "depth": nn.Linear(4, 3)}},
                **{"features": batch()[0], "present": bools(4, M)},
            },
            {"joint": "object", "heads": "heads", "features": "named", "present": "optional"},
        ),
        "softmax_fisher_information": Target(
            functional.softmax_fisher_information,
            lambda: {
                "features": list(loss_features().values()),
                "mask": bools(B, 4, 6),
                "present": bools(B, M),
                **{"sigma": 0.5, "samples": 2, "seed": 1, "channel_dim": 1, "eps": 1e-8, "backend": "cpu"},
            },
            {"features": "nested", **OPTIONS, "mask": "resizable", "samples": "integer", "seed": "seed", "channel_dim": "dim"},
        ),
        "gradient_statistics": Target(
            functional.gradient_statistics,
            lambda: {
                **{name: [floats(B, C, 4, 6), floats(B, 7, 2, 3)] for name in ("grads", "features")},
                "values": [floats(B, 4, 6).abs(), floats(B, 2, 3).abs()],
                "mask": bools(B, 4, 6),
                **{"channel_dim": 1, "eps": 1e-8, "backend": "cpu"},
            },
            {
                **dict.fromkeys(("grads", "features", "values"), "tensors"),
                "mask": "resizable",
                **{"eps": "number", "channel_dim": "dim", "backend": "name"},
            },
        ),
        "functional_entropy": Target(
            functional.functional_entropy, lambda: {"f": floats(B, P).abs(), "dim": 0}, {"f": "alone", "dim": "any_dim"}
        ),
        "modality_share": Target(
            functional.modality_share, lambda: {"attribution": floats(M, B).abs()}, {"attribution": "alone"}
        ),
        "balance_penalty": Target(
            functional.balance_penalty,
            lambda: {
                "information": floats(M, S, B).abs(),
                **{"objective": "log", "eps": 1e-8, "weights": [1.0, 2.0], "valid": bools(M, S, B)},
            },
            {"information": "alone", "objective": "choice", "eps": "number", "valid": "valid", "weights": "weights"},
        ),
        "resize_mask": Target(
            functional.resize_mask, lambda: {"mask": bools(B, 4, 6), "spatial": (2, 3)}, {"mask": "mask", "spatial": "spatial"}
        ),
        "FunctionalEntropyLoss": Target(
            lambda features, mask, present, **options: mrf.FunctionalEntropyLoss(**options)(features, mask=mask, present=present),
            lambda: {
                **{"features": loss_features(), "mask": bools(B, 4, 6), "present": bools(B, M)},
                **{"feature_weight": 1.0, "objective": "log", "sigma": 0.5, "samples": 2, "eps": 1e-8, "channel_dim": 1},
            },
            {
                **{"features": "mapping", "mask": "resizable", "present": "optional", "objective": "choice", "sigma": "number"},
                **{"samples": "integer", "eps": "number", "channel_dim": "dim", "feature_weight": "weight"},
            },
        ),
        "prediction_term": Target(
            lambda **arguments: mrf.FunctionalEntropyLoss().prediction_term(**arguments),
            prediction,
            {"values": "tensor", "inputs": "mapping", "mask": "resizable", "granularity": "choice"},
        ),
        "AttributionLoss": Target(
            lambda target, norm, **arguments: mrf.AttributionLoss(target, norm)(**arguments),
            lambda: {"target": {"rgb": 0.5, "depth": 0.5}, "norm": "l1", **scored()},
            {
                "scores": "tensor",
                "features": "mapping",
                "mask": "resizable",
                "present": "optional",
                "norm": "choice",
                "target": "target",
            },
        ),
        "AdaptiveWeight": Target(
            lambda **options: mrf.AdaptiveWeight(**options),
            lambda: {"ratio": 0.1, "decay": 0.9, "maximum": 10.0},
            {"ratio": "number", "decay": "number", "maximum": "number"},
        ),
        "QualityTarget": Target(
            lambda modalities, classes, scores, labels, mask, present: mrf.QualityTarget(modalities, classes)(
                scores, labels, mask=mask, present=present
            ),
            lambda: {
                **{"modalities": ["rgb", "depth"], "classes": C, "scores": maps_of(), "labels": torch.randint(C, (B, 4, 6))},
                **{"mask": bools(B, 4, 6), "present": bools(B, M)},
            },
            {"scores": "mapping", "labels": "labels", "classes": "integer", "mask": "resizable", "present": "optional"},
        ),
        "use_backend": Target(used, lambda: {"name": "cpu"}, {"name": "choice"}),
        "capture": Target(
            captured, lambda: {"model": Model(), "modules": modules_of()}, {"model": "object", "modules": "entries"}
        ),
        "evaluate_missing": Target(
            mrf.evaluate_missing,
            lambda: {"model": Model(), "data": [batch()], "metric": accuracy, "drop": "zeros", "progress": False},
            {"model": "object", "data": "data", "metric": "object", "drop": "choice"},
        ),
        "audit": Target(
            mrf.audit,
            lambda: {"model": Model(), "data": [batch()], "features": modules_of(), "maps": 0, "progress": False},
            {"model": "object", "data": "data", "features": "entries", "ignore_index": "none", "channel_dim": "dim"},
        ),
        "custom.softmax_fisher": Target(
            custom.softmax_fisher,
            lambda: {**raw_softmax_fisher(), "backend": "cpu"},
            {"sigma": "sigma", "eps": "number", "samples": "integer", "backend": "custom_backend"},
            public=False,
        ),
        "custom.modality_cross_entropy": Target(
            custom.modality_cross_entropy,
            lambda: {**raw_cross_entropy(), "backend": "cpu"},
            {"label_smoothing": "number", "eps": "number", "backend": "custom_backend"},
            public=False,
        ),
        "custom.gradient_statistics": Target(
            custom.gradient_statistics,
            lambda: {**raw_statistics(), "backend": "cpu"},
            {"eps": "number", "backend": "custom_backend"},
            public=False,
        ),
    }
    return found


OURS = (ValueError, TypeError, RuntimeError, NotImplementedError)


def make(index: int, seed: int, all_targets: dict[str, Target]):
    """The call of that number: its name, its function, its arguments, and whether users make it."""
    rng = random.Random(f"{seed} {index}")
    torch.manual_seed(rng.randrange(2**31))
    name = sorted(all_targets)[index % len(all_targets)]
    target = all_targets[name]
    arguments, argument = target.arguments(), rng.choice(sorted(target.kinds))
    kind = target.kinds[argument]
    if kind in SPECIAL:
        how = rng.choice(sorted(SPECIAL[kind]))
        arguments[argument] = SPECIAL[kind][how]
    else:
        how, arguments[argument] = wrong(kind, arguments[argument], rng, raw=name.startswith("native"))
    return f"{index} {name}({argument}: {how})", target.function, arguments, target.public


def main(first: int, last: int, seed: int) -> None:
    faulthandler.enable()
    all_targets = targets()
    for name, target in all_targets.items():
        target.function(**target.arguments())  # right calls are right
        print("right:", name, flush=True)
    for index in range(first, last):
        name, function, arguments, public = make(index, seed, all_targets)
        print(name, flush=True)
        try:
            function(**arguments)
        except Exception as error:
            if public and not isinstance(error, OURS) or "INTERNAL ASSERT" in str(error):
                print(f"! {name}: {type(error).__name__}: {error}"[:300].replace("\n", " "), flush=True)
        else:
            print(f"! {name}: went through", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    print("done", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
