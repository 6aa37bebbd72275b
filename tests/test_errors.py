"""Every error: its type, and a message with the function, the argument, what was expected and what came."""

import re

import pytest
import torch
import torch.distributed as dist

import modreg_fast as mrf
from modreg_fast.functional import (
    balance_penalty,
    functional_entropy,
    gradient_statistics,
    modality_share,
    resize_mask,
    softmax_fisher_information,
)

X = torch.randn(2, 3, 4, 5)
OTHER = torch.randn(2, 3, 4, 6)
MASK = torch.ones(2, 4, 5, dtype=torch.bool)
PRESENT = torch.ones(2, 2, dtype=torch.bool)
FEATURES = [[X], [X]]
DTYPES = "float32 or float64 or bfloat16 or float16"


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def raises(error, *parts):
    """The parts of the message, in their order."""
    return pytest.raises(error, match=".*".join(re.escape(part) for part in parts))


def information(features=FEATURES, **options):
    return softmax_fisher_information(features, **options)


def statistics(grads=(X,), **options):
    return gradient_statistics(list(grads), **({"features": [X]} | options))


def fisher_loss(features=None, settings=None, **options):
    features = {"rgb": [X], "depth": [X]} if features is None else features
    return mrf.FunctionalEntropyLoss(**(settings or {}))(features, **options)


def prediction(values="graph", inputs=None, shape=(2, 3, 4, 5), **options):
    z = {m: leaf(*shape) for m in ("rgb", "depth")}
    values = sum(z.values()).square().sum(1) if isinstance(values, str) else values
    return mrf.FunctionalEntropyLoss().prediction_term(values, z if inputs is None else inputs, **options)


def attribution(target=None, features=None, scores="graph", settings=None, **options):
    x = {m: leaf(2, 3, 4, 5) for m in ("video", "audio")}
    scores = sum(x.values()) * 2 if isinstance(scores, str) else scores
    return mrf.AttributionLoss(target, **(settings or {}))(scores, x if features is None else features, **options)


SFI, GS, FEL, AL = "softmax_fisher_information: ", "gradient_statistics: ", "FunctionalEntropyLoss: ", "AttributionLoss: "
BAD_TENSORS = {
    "complex": (X.to(torch.complex64), DTYPES, "torch.complex64"),
    "integer": (torch.ones(2, 3, 4, 5, dtype=torch.int64), DTYPES, "torch.int64"),
    "bool": (torch.ones(2, 3, 4, 5, dtype=torch.bool), DTYPES, "torch.bool"),
    "float8": (X.to(torch.float8_e5m2), DTYPES, "torch.float8_e5m2"),
    "sparse": (X.to_sparse(), "a strided tensor", "torch.sparse_coo"),
    "none": (None, "a tensor", "NoneType"),
    "array": (X.numpy(), "a tensor", "ndarray"),
}
TENSOR_ARGUMENTS = {
    "softmax_fisher": (lambda x: information([[X], [x]]), SFI + "features[1][0] must be"),
    "grads": (lambda x: statistics([x]), GS + "grads[0] must be"),
    "features": (lambda x: statistics(features=[x]), GS + "features[0] must be"),
    "values": (lambda x: statistics(values=[x]), GS + "values[0] must be"),
    "entropy": (lambda x: functional_entropy(x, 0), "functional_entropy: f must be"),
    "share": (modality_share, "modality_share: attribution must be"),
    "penalty": (balance_penalty, "balance_penalty: information must be"),
    "loss": (lambda x: fisher_loss({"rgb": [X], "depth": [x]}), FEL + "features['depth'][0] must be"),
    "prediction_values": (prediction, "FunctionalEntropyLoss.prediction_term: values must be"),
    "prediction_inputs": (
        lambda x: prediction(inputs={"rgb": x}),
        "FunctionalEntropyLoss.prediction_term: inputs['rgb'] must be",
    ),
    "scores": (lambda x: attribution(scores=x), AL + "scores must be"),
    "attribution_features": (
        lambda x: attribution(features={"video": leaf(2, 3), "audio": [x]}),
        AL + "features['audio'][0] must be",
    ),
}


@pytest.mark.parametrize("bad", BAD_TENSORS.values(), ids=BAD_TENSORS)
@pytest.mark.parametrize("call, message", TENSOR_ARGUMENTS.values(), ids=TENSOR_ARGUMENTS)
def test_not_a_tensor_that_is_accepted(call, message, bad):
    x, expected, got = bad
    with raises(TypeError, message, expected, "got", got):
        call(x)


@pytest.fixture(scope="module")
def distributed_tensor(tmp_path_factory):
    """A real DTensor, on a mesh of one rank."""
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda x: DTensor.from_local(x, mesh, [Replicate()])
    dist.destroy_process_group()


@pytest.mark.parametrize("call, message", TENSOR_ARGUMENTS.values(), ids=TENSOR_ARGUMENTS)
def test_distributed_tensor(distributed_tensor, call, message):
    with raises(TypeError, message, "a plain tensor", "to_local", "process_group", "got a DTensor"):
        call(distributed_tensor(X))


DTENSOR_MASKS = {
    "mask": lambda x: information(mask=x(MASK)),
    "masks": lambda x: information(mask=[x(MASK)]),
    "present": lambda x: information(present=x(PRESENT)),
    "statistics": lambda x: statistics(mask=x(MASK)),
    "prediction": lambda x: prediction(mask=x(MASK)),
    "attribution": lambda x: attribution(mask=x(MASK)),
    "attribution_present": lambda x: attribution(present=x(PRESENT)),
    "index": lambda x: attribution(index=x(torch.zeros(2, 4, 5, dtype=torch.int64))),
}


@pytest.mark.parametrize("call", DTENSOR_MASKS.values(), ids=DTENSOR_MASKS)
def test_distributed_mask(distributed_tensor, call):
    with raises(TypeError, "must be a plain tensor", "got a DTensor"):
        call(distributed_tensor)


V, T = ValueError, TypeError
CASES = {
    # ---- softmax_fisher_information: structure and shapes
    "features_tensor": (lambda: information(X), T, SFI, "features must be a list or tuple", "got Tensor (of one alone: [x])"),
    "features_text": (lambda: information("rgb"), T, SFI, "features must be a list or tuple", "got str"),
    "features_empty": (lambda: information([]), V, SFI, "features must be non-empty"),
    "row_empty": (lambda: information([[X], []]), V, SFI, "features[1] must be non-empty"),
    "row_tensor": (lambda: information([[X], X]), T, SFI, "features[1] must be a list or tuple", "got Tensor"),
    "ragged": (lambda: information([[X, X], [X]]), V, SFI, "features[1] must be a list of 2 scales", "got 1"),
    "shapes": (
        lambda: information([[X], [OTHER]]),
        V,
        SFI,
        "features[1][0]",
        "(2, 3, 4, 5)",
        "features[0][0]",
        "got (2, 3, 4, 6)",
    ),
    "batch": (lambda: information([[X, X[:1]], [X, X[:1]]]), V, SFI, "features[0][1]", "batch size 2", "got 1"),
    "one_dimension": (lambda: information([[X[0, 0, 0]]] * 2), V, SFI, "features[0][0]", "(B, C, *spatial)", "got (5,)"),
    "no_channels": (lambda: information([[X[:, :0]]] * 2), V, SFI, "features[0][0] must be non-empty", "(2, 0, 4, 5)"),
    "no_pixels": (lambda: information([[X[..., :0]]] * 2), V, SFI, "features[0][0] must be non-empty", "(2, 3, 4, 0)"),
    "channel_dim": (lambda: information(channel_dim=4), V, SFI, "channel_dim", "(2, 3, 4, 5)", "got 4"),
    "channel_dim_batch": (lambda: information(channel_dim=0), V, SFI, "channel_dim", "other than the batch", "got 0"),
    "channel_dim_batch_from_the_end": (lambda: information(channel_dim=-4), V, SFI, "channel_dim", "got -4"),
    "channel_dim_text": (lambda: information(channel_dim="last"), T, SFI, "channel_dim", "got"),
    # ---- mask and present
    "mask_dtype": (lambda: information(mask=MASK.float()), T, SFI, "mask must be bool", "got torch.float32"),
    "mask_batch": (lambda: information(mask=MASK[:1]), V, SFI, "mask", "batch 2", "got (1, 4, 5)"),
    "mask_rank": (lambda: information(mask=MASK[..., 0]), V, SFI, "mask", "2 spatial dimensions", "got (2, 4)"),
    "mask_channel": (lambda: information(mask=MASK[:, None]), V, SFI, "mask", "2 spatial dimensions", "got (2, 1, 4, 5)"),
    "mask_empty": (lambda: information(mask=MASK[..., :0]), V, SFI, "mask", "got (2, 4, 0)"),
    "mask_count": (lambda: information(mask=[MASK, MASK]), V, SFI, "one per scale (1)", "got 2 tensors"),
    "mask_of_scale": (lambda: information(mask=[MASK[..., :3]]), V, SFI, "mask[0]", "(4, 5)", "got (4, 3)"),
    "mask_number": (lambda: information(mask=1), T, SFI, "mask must be a list or tuple", "got int"),
    "present_dtype": (lambda: information(present=PRESENT.int()), T, SFI, "present must be bool", "got torch.int32"),
    "present_shape": (lambda: information(present=PRESENT[:, :1]), V, SFI, "present", "(2, 2)", "got (2, 1)"),
    "present_list": (lambda: information(present=[[True, True]] * 2), T, SFI, "present must be a tensor", "got list"),
    # ---- numbers
    "sigma_negative": (lambda: information(sigma=-0.1), V, SFI, "sigma", "at least 0", "got -0.1"),
    "sigma_one_negative": (lambda: information(sigma=[0.1, -1]), V, SFI, "sigma", "at least 0", "got -1"),
    "sigma_nan": (lambda: information(sigma=float("nan")), V, SFI, "sigma", "a finite number", "got nan"),
    "sigma_inf": (lambda: information(sigma=float("inf")), V, SFI, "sigma", "a finite number", "got inf"),
    "sigma_count": (lambda: information(sigma=[0.1]), V, SFI, "sigma", "one per modality (2)", "got 1"),
    "sigma_text": (lambda: information(sigma="0.1"), (T, V), SFI, "sigma must be"),
    "sigma_tensor": (lambda: information(sigma=torch.tensor(0.1)), T, SFI, "sigma must be a number", "got Tensor"),
    "samples_zero": (lambda: information(samples=0), V, SFI, "samples must be an integer of at least 1", "got 0"),
    "samples_float": (lambda: information(samples=2.0), (T, V), SFI, "samples must be an integer", "got"),
    "samples_bool": (lambda: information(samples=True), (T, V), SFI, "samples must be an integer", "got"),
    "seed_negative": (lambda: information(sigma=1.0, seed=-1), V, SFI, "seed must be an integer in [0, 2^63)", "got -1"),
    "seed_large": (lambda: information(sigma=1.0, seed=2**63), V, SFI, "seed must be an integer in [0, 2^63)"),
    "seed_float": (lambda: information(sigma=1.0, seed=1.5), (T, V), SFI, "seed must be an integer", "got 1.5"),
    "seed_twice": (
        lambda: information(sigma=1.0, seed=1, generator=torch.Generator()),
        V,
        SFI,
        "seed must be None when generator",
    ),
    "detach": (lambda: information(detach_reference=1), T, SFI, "detach_reference must be True or False", "got 1"),
    "generator": (lambda: information(sigma=1.0, generator=7), T, SFI, "generator", "got int"),
    "eps": (lambda: information(eps=-1.0), V, SFI, "eps", "at least 0", "got -1"),
    "eps_text": (lambda: information(eps="1"), T, SFI, "eps must be a number", "got str"),
    "backend": (lambda: information(backend="gpu"), V, SFI, "backend must be one of", "'reference'", "got 'gpu'"),
    "use_backend": (lambda: mrf.use_backend("gpu").__enter__(), V, "use_backend: backend must be one of", "got 'gpu'"),
    # ---- gradient_statistics
    "statistics_of_nothing": (lambda: gradient_statistics([X]), V, GS, "features or values must be given", "got neither"),
    "grads_tensor": (lambda: gradient_statistics(X, features=[X]), T, GS, "grads must be a list or tuple", "got Tensor"),
    "grads_empty": (lambda: gradient_statistics([], features=[]), V, GS, "grads must be non-empty"),
    "grads_batch": (lambda: statistics([X, X[:1]], features=[X, X]), V, GS, "grads[1]", "batch size 2", "got 1"),
    "grads_no_elements": (lambda: statistics([X[:, :0]]), V, GS, "grads[0] must be non-empty", "(2, 0, 4, 5)"),
    "features_count": (lambda: statistics(features=[X, X]), V, GS, "features must be a list of 1 tensors", "got 2"),
    "features_shape": (
        lambda: statistics(features=[OTHER]),
        V,
        GS,
        "features[0]",
        "(2, 3, 4, 5)",
        "grads[0]",
        "got (2, 3, 4, 6)",
    ),
    "values_count": (lambda: statistics(values=[]), V, GS, "values must be non-empty"),
    "values_shape": (lambda: statistics(values=[X[:, 0, :, :2]]), V, GS, "values[0]", "(2, 4, 5)", "got (2, 4, 2)"),
    "values_channel": (lambda: statistics(values=[X[:, :1]]), V, GS, "values[0]", "(2, 4, 5)", "got (2, 1, 4, 5)"),
    "statistics_mask": (lambda: statistics(mask=MASK.byte()), T, GS, "mask must be bool", "got torch.uint8"),
    "statistics_mask_count": (lambda: statistics(mask=[MASK, MASK]), V, GS, "one per", "(1)", "got 2 tensors"),
    "statistics_maps": (lambda: statistics(maps="no"), T, GS, "maps must be True or False", "got 'no'"),
    "statistics_eps": (lambda: statistics(eps=float("nan")), V, GS, "eps", "got nan"),
    "statistics_backend": (lambda: statistics(backend="tpu"), V, GS, "backend must be one of", "got 'tpu'"),
    # ---- penalties and masks
    "penalty_shape": (lambda: balance_penalty(X), V, "balance_penalty: information", "(M, S, B) or (M, B)", "got (2, 3, 4, 5)"),
    "penalty_objective": (
        lambda: balance_penalty(X[0], objective="max"),
        V,
        "balance_penalty: objective",
        "'inverse'",
        "got 'max'",
    ),
    "penalty_weights": (
        lambda: balance_penalty(X[0], weights=[1.0]),
        V,
        "balance_penalty: weights",
        "one number per scale (4)",
        "(1,)",
    ),
    "penalty_eps": (lambda: balance_penalty(X[0], eps=-1), V, "balance_penalty: eps", "got -1"),
    "penalty_valid": (lambda: balance_penalty(X[0], valid=X[0]), T, "balance_penalty: valid must be bool", "got torch.float32"),
    "penalty_valid_shape": (lambda: balance_penalty(X[0], valid=MASK), V, "balance_penalty: valid", "(3, 4, 5)", "got (2, 4, 5)"),
    "resize_number": (lambda: resize_mask(MASK, 3), T, "resize_mask: spatial must be a sequence of sizes", "got int"),
    "resize_rank": (lambda: resize_mask(torch.ones(1, 2, 2, 2, 2, dtype=torch.bool), (1,) * 4), V, "resize_mask: ", "got"),
    # ---- FunctionalEntropyLoss
    "loss_list": (lambda: fisher_loss([[X], [X]]), T, FEL, "features must be a mapping", "got list"),
    "loss_empty": (lambda: fisher_loss({}), V, FEL, "features must be a mapping with at least one modality"),
    "loss_row": (
        lambda: fisher_loss({"rgb": [X], "depth": X}),
        T,
        FEL,
        "features['depth'] must be a list or tuple",
        "got Tensor",
    ),
    "loss_shapes": (lambda: fisher_loss({"rgb": [X], "depth": [OTHER]}), V, FEL, "features['depth'][0]", "features['rgb'][0]"),
    "loss_scales": (lambda: fisher_loss({"rgb": [X], "depth": [X, X]}), V, FEL, "features['depth']", "1 scales", "got 2"),
    "loss_mask": (lambda: fisher_loss(mask=MASK.long()), T, FEL, "mask must be bool", "got torch.int64"),
    "loss_present": (lambda: fisher_loss(present=PRESENT[:1]), V, FEL, "present", "(2, 2)", "got (1, 2)"),
    "loss_detach": (lambda: fisher_loss(settings={"detach_reference": "no"}), T, FEL, "detach_reference must be True or False"),
    "loss_samples": (lambda: fisher_loss(settings={"samples": 0}), V, FEL, "samples", "got 0"),
    "loss_objective": (
        lambda: fisher_loss(settings={"objective": "sum"}),
        V,
        FEL,
        "objective must be 'inverse', 'norm' or 'log'",
        "'sum'",
    ),
    "loss_weight": (lambda: fisher_loss(settings={"feature_weight": -1}), V, FEL, "feature_weight", "at least 0", "got -1"),
    "loss_weight_text": (lambda: fisher_loss(settings={"prediction_weight": "1"}), T, FEL, "prediction_weight must be a number"),
    "loss_sigma": (lambda: fisher_loss(settings={"sigma": -1.0}), V, FEL, "sigma", "at least 0", "got -1"),
    "loss_eps": (lambda: fisher_loss(settings={"eps": float("inf")}), V, FEL, "eps", "a finite number", "got inf"),
    "loss_scale_weights": (
        lambda: fisher_loss(settings={"scale_weights": [1, 2]}),
        V,
        "FunctionalEntropyLoss.scale_weights",
        "(1)",
        "(2,)",
    ),
    "loss_scale_weight": (lambda: fisher_loss(settings={"scale_weights": [-1]}), V, FEL, "scale_weights", "at least 0", "got -1"),
    "loss_scale_weights_number": (
        lambda: fisher_loss(settings={"scale_weights": 1.0}),
        T,
        FEL,
        "scale_weights must be",
        "got float",
    ),
    "loss_backend": (lambda: fisher_loss(settings={"backend": "tpu"}), V, FEL, "backend must be one of", "got 'tpu'"),
    # ---- prediction_term
    "prediction_inputs": (lambda: prediction(inputs=[X]), T, "prediction_term: inputs must be a mapping", "got list"),
    "prediction_empty": (lambda: prediction(inputs={}), V, "prediction_term: inputs", "at least one modality"),
    "prediction_leaf": (lambda: prediction(inputs={"rgb": X}), V, "prediction_term: inputs['rgb']", "requires grad", "does not"),
    "prediction_no_graph": (lambda: prediction(X[:, 0].abs()), V, "prediction_term", "with gradients enabled", "without a graph"),
    "prediction_granularity": (
        lambda: prediction(granularity="image"),
        V,
        "granularity must be 'pixel' or 'sample'",
        "got 'image'",
    ),
    "prediction_mask": (lambda: prediction(mask=MASK.float()), T, "prediction_term: mask must be bool", "got torch.float32"),
    "prediction_mask_shape": (
        lambda: prediction(mask=MASK[..., :2]),
        V,
        "prediction_term: mask",
        "(2, 4, 5)",
        "values",
        "got (2, 4, 2)",
    ),
    "prediction_scalar": (lambda: prediction(leaf(1).sum()), V, "prediction_term: values", "(B, *spatial)", "got ()"),
    "prediction_scalar_sample": (lambda: prediction(leaf(1).sum(), granularity="sample"), V, "prediction_term: values", "got ()"),
    "prediction_batch": (lambda: prediction(leaf(3, 4, 5).square()), V, "prediction_term", "batch", "got"),
    "prediction_rank": (
        lambda: prediction((z := leaf(2, 3, 4, 5)).square().sum((1, 3)), {"rgb": z}),
        V,
        "prediction_term: inputs",
        "1 spatial dimensions like values",
    ),
    # ---- AttributionLoss
    "target_sum": (lambda: attribution({"video": 0.0, "audio": 0.0}), V, AL, "target must be weights with a positive sum", "got"),
    "target_negative": (lambda: attribution({"video": 1.0, "audio": -0.5}), V, AL, "target['audio']", "at least 0", "got -0.5"),
    "target_nan": (lambda: attribution({"video": float("nan")}), V, AL, "target['video']", "a finite number", "got nan"),
    "target_text": (lambda: attribution({"video": "half"}), T, AL, "target['video'] must be a number", "got str"),
    "target_list": (lambda: attribution([0.5, 0.5]), T, AL, "target must be a mapping", "got list"),
    "target_empty": (lambda: attribution({}), V, AL, "target must be a mapping with at least one modality"),
    "target_missing": (lambda: attribution({"video": 1.0}), V, AL, "features", "the modalities of target, ['video']", "'audio'"),
    "target_unknown": (lambda: attribution({"video": 1, "audio": 1, "text": 1}), V, AL, "modalities of target", "'text'", "got"),
    "norm": (lambda: attribution(settings={"norm": "linf"}), V, AL, "norm must be 'l1' or 'l2'", "got 'linf'"),
    "attribution_list": (lambda: attribution(features=[X]), T, AL, "features must be a mapping", "got list"),
    "attribution_empty": (lambda: attribution(features={}), V, AL, "features", "at least one modality"),
    "attribution_no_scales": (lambda: attribution(features={"video": []}), V, AL, "features['video'] must be non-empty"),
    "attribution_leaf": (lambda: attribution(features={"video": X}), V, AL, "features['video'][0]", "requires grad", "does not"),
    "attribution_other_graph": (
        lambda: attribution(scores=leaf(2, 3, 4, 5)),
        V,
        AL,
        "the given tensors themselves",
        "depends on none",
    ),
    "attribution_no_graph": (lambda: attribution(scores=X), V, AL, "with gradients enabled", "without a graph"),
    "attribution_batch": (
        lambda: attribution(features={"video": leaf(2, 3), "audio": leaf(3, 3)}),
        V,
        AL,
        "features['audio']",
        "batch",
    ),
    "attribution_channels": (
        lambda: attribution(settings={"channel_dim": 7}),
        V,
        AL,
        "channel_dim must be a dimension of features['video'][0]",
        "got 7",
    ),
    "scores_rank": (lambda: attribution(scores=leaf(5)), V, AL, "scores must be of shape (B, K, *spatial)", "got (5,)"),
    "attribution_mask": (lambda: attribution(mask=MASK.int()), T, AL, "mask must be bool", "got torch.int32"),
    "attribution_mask_shape": (lambda: attribution(mask=MASK[..., 0]), V, AL, "mask", "(2, 4, 5)", "scores", "got (2, 4)"),
    "index_dtype": (lambda: attribution(index=MASK.float()), T, AL, "index must be int64 or int32 or int16", "got torch.float32"),
    "index_shape": (lambda: attribution(index=torch.zeros(2, dtype=torch.int64)), V, AL, "index", "(2, 4, 5)", "got (2,)"),
    "attribution_present": (lambda: attribution(present=PRESENT.float()), T, AL, "present must be bool", "got torch.float32"),
    "attribution_present_shape": (lambda: attribution(present=PRESENT[:1]), V, AL, "present", "(2, 2)", "got (1, 2)"),
    "attribution_backend": (lambda: attribution(settings={"backend": "tpu"}), V, "backend must be one of", "got 'tpu'"),
}


@pytest.mark.parametrize("call, error, parts", [(c[0], c[1], c[2:]) for c in CASES.values()], ids=CASES)
def test_message(call, error, parts):
    with raises(error, *parts):
        call()


@pytest.mark.parametrize(
    "off, why", [(torch.no_grad, "gradients are switched off here"), (torch.inference_mode, "inference mode is on")]
)
def test_gradients_switched_off(off, why):
    """The message names the cause: where gradients are off, and where the tensors were made while they were."""
    x = {m: leaf(2, 3) for m in ("video", "audio")}
    adaptive = mrf.AdaptiveWeight()
    with off():
        made = {m: 2 * y for m, y in x.items()}
        for features in (x, made):
            with raises(ValueError, AL, "with gradients enabled" if features is x else "requires grad", why):
                mrf.AttributionLoss()(sum(features.values()), features)
            with raises(ValueError, "prediction_term", why):
                mrf.FunctionalEntropyLoss().prediction_term(made["video"].square().sum(1), features)
        with raises(ValueError, "AdaptiveWeight: task", why):
            adaptive(sum(x.values()).sum(), x["video"].sum(), [x["video"]])
    with raises(ValueError, AL, "requires grad", "one that does not" + (": it was made under" if "inference" in why else "")):
        mrf.AttributionLoss()(sum(made.values()), made)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors():
    parts = [torch.ones(3, 4), torch.ones(3, 2)]
    x = torch.nested.nested_tensor(parts, requires_grad=True)
    with raises(TypeError, SFI, "features[0][0] must be a plain tensor (pad the samples and pass a mask)", "a nested tensor"):
        information([[x]] * 2)
    with raises(TypeError, AL, "features['video'][0] must be a plain tensor"):
        mrf.AttributionLoss()(leaf(2, 3), {"video": x})
    with raises(TypeError, AL, "features['video'][0] must be a strided tensor", "jagged"):
        mrf.AttributionLoss()(leaf(2, 3), {"video": torch.nested.nested_tensor(parts, layout=torch.jagged)})


def test_index_out_of_range_is_an_error():
    """In eager code on the CPU; nothing is read outside of the scores."""
    x = {m: leaf(2, 3) for m in ("video", "audio")}
    for index in (-1, 3, 255):
        with raises(ValueError, AL, f"index must be in [0, 3) where mask does not leave it out, got {index}"):
            mrf.AttributionLoss()(sum(x.values()), x, index=torch.tensor([0, index]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_that_give_no_gradient(distributed_tensor):
    """func.grad by the tensor itself works, also beside FSDP2 and a group, where the graph is searched for freed parameters; the rest
    says what it is inside of."""
    import torch.distributed.fsdp  # noqa: F401

    a, b = torch.randn(4, 3), torch.randn(4, 3)

    def penalty(a):
        other = (2 * a).sin()
        return mrf.AttributionLoss()((a * b).exp() + other, {"video": a, "audio": other})

    assert torch.func.grad(penalty)(a).isfinite().all()
    with raises(ValueError, AL, "requires grad", "inside of a transform of torch.func"):
        torch.func.jvp(penalty, (a,), (b,))


def test_unavailable_backend_says_why(monkeypatch):
    import sys

    statuses = sys.modules["modreg_fast.backends"]._STATUS
    monkeypatch.setitem(statuses, "cpu", mrf.BackendStatus(False, "no compiler was found"))
    for call in (lambda: information(backend="cpu"), lambda: mrf.use_backend("cpu").__enter__()):
        with raises(RuntimeError, "backend 'cpu' is not usable here", "no compiler was found"):
            call()
    assert information().shape == (2, 1, 2)  # the next best takes over


def test_backend_of_another_device():
    if mrf.backends()["cpu"].available:
        meta = [[torch.empty(2, 3, 4, device="meta")] for _ in range(2)]
        with raises(ValueError, SFI, "backend 'cpu' takes tensors on cpu", "got one on meta"):
            information(meta, backend="cpu")


def test_devices_must_agree():
    meta = torch.empty(2, 3, 4, 5, device="meta")
    with raises(ValueError, SFI, "features[1][0]", "on the device cpu", "got meta"):
        information([[X], [meta]])
    with raises(ValueError, GS, "features[0]", "on the device cpu", "got meta"):
        statistics(features=[meta])
    with raises(ValueError, SFI, "mask", "on cpu", "on meta"):
        information(mask=MASK.to("meta"))
    with raises(ValueError, SFI, "present", "on cpu", "on meta"):
        information(present=PRESENT.to("meta"))


@pytest.mark.parametrize("explicit", [False, True])
def test_too_many_modalities_for_a_backend(backend, explicit):
    """More than any kernel holds at once: computed or refused with a message, never a crash."""
    features = [[torch.randn(1, 2, 3)] for _ in range(65)]
    with mrf.use_backend(backend):
        try:
            assert information(features, backend=backend if explicit else None).shape == (65, 1, 1)
        except ValueError as error:
            assert "64 modalities, got 65" in str(error)


def test_errors_leave_the_library_usable(backend):
    expected = information(backend=backend)
    for call in (lambda: information([[X], [OTHER]], backend=backend), lambda: information(sigma=-1, backend=backend)):
        with pytest.raises(ValueError):
            call()
    assert torch.equal(information(backend=backend), expected)
