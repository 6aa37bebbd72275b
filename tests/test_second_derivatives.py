"""Every differentiable function of torch.nn.functional, and modules: what PyTorch cannot differentiate twice is refused when a loss is
called, and nothing else is. What is let through has the second derivative of finite differences. On a GPU too, where there is one."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modreg_fast.double_backward import gradients

pytestmark = pytest.mark.filterwarnings("ignore")  # of functions that are deprecated or of a prototype
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MAP, TOKENS, VECTORS, LINE, VOLUME = (2, 4, 6, 6), (2, 5, 8), (4, 6), (2, 4, 6), (2, 4, 4, 4, 4)


def fixed(x, *shape):
    """A tensor that is the same in every call."""
    generator = torch.Generator().manual_seed(len(shape) + 7)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(x)


def labels(x, *shape, classes):
    return (torch.arange(torch.Size(shape).numel(), device=x.device) % classes).reshape(shape)


def like(function, *others, **options):
    """``function`` of ``x`` and of tensors like it."""
    return lambda x: function(x, *(kind(fixed(x, *x.shape)) for kind in others), **options)


def unpooled(function, pool):
    return lambda x: function(*pool(x, 2, return_indices=True), 2)


def attention(x, kernel=None):
    heads = x.unsqueeze(1)
    return F.scaled_dot_product_attention(heads, heads, heads)


def multi_head(x):
    w = fixed(x, 24, 8)
    return F.multi_head_attention_forward(x, x, x, 8, 2, w, None, None, None, False, 0.0, w[:8], None, need_weights=False)[0]


def ctc(x):
    targets, lengths = torch.ones(2, 2, dtype=torch.long, device=x.device), torch.full((2,), 5)
    return F.ctc_loss(x.log_softmax(2).transpose(0, 1), targets, lengths, torch.full((2,), 2), reduction="none")


def same(x):
    return x


POSITIVE, SIGN = lambda y: y.square() + 0.1, torch.sign
NORMS = {
    "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), MAP),
    "batch_norm of eval": (lambda x: F.batch_norm(x * x, fixed(x, 4), fixed(x, 4).square() + 1), MAP),
    "group_norm": (lambda x: F.group_norm(x, 2), MAP),
    "instance_norm": (F.instance_norm, MAP),
    "layer_norm": (lambda x: F.layer_norm(x, (8,), fixed(x, 8), fixed(x, 8)), TOKENS),
    "local_response_norm": (lambda x: F.local_response_norm(x, 2), MAP),
    "normalize": (F.normalize, MAP),
    "rms_norm": (lambda x: F.rms_norm(x, (8,), fixed(x, 8)), TOKENS),
}
SHAPES = {
    "affine_grid": (lambda x: F.affine_grid(x.square(), [2, 3, 4, 4]), (2, 2, 3)),
    "native_channel_shuffle": (lambda x: F.native_channel_shuffle(x * x, 2), MAP),
    "channel_shuffle": (lambda x: F.channel_shuffle(x * x, 2), MAP),
    "fold": (lambda x: F.fold(x * x, (4, 4), 2), (2, 8, 9)),
    "unfold": (lambda x: F.unfold(x * x, 2), MAP),
    "pad": (lambda x: F.pad(x * x, (1, 1)), MAP),
    "pad reflect": (lambda x: F.pad(x * x, (1, 1, 1, 1), "reflect"), MAP),
    "pad replicate": (lambda x: F.pad(x * x, (1, 1, 1, 1), "replicate"), MAP),
    "pad circular": (lambda x: F.pad(x * x, (1, 1, 1, 1), "circular"), MAP),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x * x, 2), MAP),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x * x, 2), MAP),
    "grid_sample": (lambda x: F.grid_sample(x, x[:, :2, :5].movedim(1, -1).tanh(), align_corners=False), MAP),
    "grid_sample border": (lambda x: F.grid_sample(x, x[:, :2].movedim(1, -1), padding_mode="border", align_corners=True), MAP),
    "grid_sample bicubic": (lambda x: F.grid_sample(x * x, fixed(x, 2, 3, 3, 2).tanh(), "bicubic", align_corners=False), MAP),
    "grid_sample 3d": (lambda x: F.grid_sample(x * x, x[:, :3].movedim(1, -1).tanh(), align_corners=False), VOLUME),
    "upsample": (lambda x: F.upsample(x * x, scale_factor=2), MAP),
    "upsample_bilinear": (lambda x: F.upsample_bilinear(x * x, scale_factor=2), MAP),
    "upsample_nearest": (lambda x: F.upsample_nearest(x * x, scale_factor=2), MAP),
    "interpolate": (lambda x: F.interpolate(x * x, scale_factor=2, mode="bicubic"), MAP),
    "interpolate area": (lambda x: F.interpolate(x * x, size=4, mode="area"), MAP),
    "interpolate antialias": (lambda x: F.interpolate(x * x, size=4, mode="bilinear", antialias=True), MAP),
    "interpolate trilinear": (lambda x: F.interpolate(x * x, size=6, mode="trilinear"), VOLUME),
    "interpolate linear": (lambda x: F.interpolate(x * x, size=9, mode="linear"), LINE),
}
POOLS = {
    f"{kind}_pool{n}d": (
        lambda x, kind=kind, n=n: getattr(F, f"{kind}_pool{n}d")(x * x, *((2, 2) if kind == "lp" else (2,))),
        shape,
    )
    for n, shape in enumerate((LINE, MAP, VOLUME), 1)
    for kind in ("avg", "max", "lp")
}
ADAPTIVE = {
    f"adaptive_{kind}_pool{n}d": (lambda x, kind=kind, n=n: getattr(F, f"adaptive_{kind}_pool{n}d")(x * x, 2), shape)
    for n, shape in enumerate((LINE, MAP, VOLUME), 1)
    for kind in ("avg", "max")
}
FRACTIONAL = {
    f"fractional_max_pool{n}d": (lambda x, n=n: getattr(F, f"fractional_max_pool{n}d")(x * x, 2, 2), shape)
    for n, shape in ((2, MAP), (3, VOLUME))
}
WITH_INDICES = {
    f"{name}_with_indices": (
        lambda x, name=name: getattr(F, f"{name}_with_indices")(x * x, *((2, 2) if "fractional" in name else (2,)))[0],
        shape,
    )
    for name, (_, shape) in {**POOLS, **ADAPTIVE, **FRACTIONAL}.items()
    if "max" in name
}
UNPOOLS = {
    f"max_unpool{n}d": (unpooled(getattr(F, f"max_unpool{n}d"), getattr(F, f"max_pool{n}d")), shape)
    for n, shape in enumerate((LINE, MAP, VOLUME), 1)
}
PRODUCTS = {
    "bilinear": (lambda x: F.bilinear(x, x, fixed(x, 3, 6, 6)), VECTORS),
    "linear": (lambda x: F.linear(x * x, fixed(x, 3, 6)), VECTORS),
    "linear by itself": (lambda x: F.linear(x, x), VECTORS),
    "conv1d": (lambda x: F.conv1d(x, x[:, :, :3]), LINE),
    "conv2d": (lambda x: F.conv2d(x, x[:, :, :3, :3]), MAP),
    "conv2d grouped": (lambda x: F.conv2d(x, x[:, :2, :3, :3], stride=2, groups=2), MAP),
    "conv3d": (lambda x: F.conv3d(x, x[:, :, :2, :2, :2]), VOLUME),
    "conv_tbc": (lambda x: F.conv_tbc(x, fixed(x, 3, 8, 4) + x.mean(), x.sum((0, 1))[:4]), TOKENS),
    "conv_transpose1d": (lambda x: F.conv_transpose1d(x, x[0, :, None, :2].expand(4, 2, 2)), LINE),
    "conv_transpose2d": (lambda x: F.conv_transpose2d(x, x[:1, :, :2, :2].transpose(0, 1)), MAP),
    "conv_transpose3d": (lambda x: F.conv_transpose3d(x, x[:1, :, :2, :2, :2].transpose(0, 1)), VOLUME),
    "cosine_similarity": (lambda x: F.cosine_similarity(x, fixed(x, 4, 6)), VECTORS),
    "pairwise_distance": (lambda x: F.pairwise_distance(x, fixed(x, 4, 6)), VECTORS),
    "pdist": (F.pdist, VECTORS),
    "cdist": (lambda x: torch.cdist(x, fixed(x, 3, 6)), VECTORS),
    "cdist of both": (lambda x: torch.cdist(x[:2], x[2:]), VECTORS),
    "cdist p=1": (lambda x: torch.cdist(x * x, fixed(x, 3, 6), p=1.0), VECTORS),
    "embedding": (lambda x: F.embedding(torch.tensor([0, 2, 2], device=x.device), x * x), VECTORS),
    "embedding_bag": (lambda x: F.embedding_bag(torch.tensor([[0, 2, 2]], device=x.device), x * x), VECTORS),
    "embedding_bag max": (lambda x: F.embedding_bag(torch.tensor([[0, 2, 1]], device=x.device), x * x, mode="max"), VECTORS),
    "embedding_bag of both": (
        lambda x: F.embedding_bag(labels(x, 4, 6, classes=4), x, per_sample_weights=x * x, mode="sum"),
        VECTORS,
    ),
    "embedding_bag weights": (
        lambda x: F.embedding_bag(labels(x, 4, 6, classes=6), fixed(x, 6, 3), per_sample_weights=x * x, mode="sum"),
        VECTORS,
    ),
    "scaled_dot_product_attention": (attention, TOKENS),
    "multi_head_attention_forward": (multi_head, TOKENS),
}
POINTWISE = (
    "celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_softmax logsigmoid mish relu relu6 selu sigmoid silu "
    "softmax softmin softplus softshrink softsign tanh tanhshrink"
)
ACTIVATIONS = {name: (like(getattr(F, name), **({"dim": 1} if "softm" in name else {})), VECTORS) for name in POINTWISE.split()}
ACTIVATIONS |= {
    f"{name}_": (lambda x, name=name: getattr(F, f"{name}_")(x * x - 0.3), VECTORS)
    for name in ("celu", "elu", "hardtanh", "leaky_relu", "relu", "selu")
}
ACTIVATIONS |= {
    "prelu": (lambda x: F.prelu(x, x[0]), VECTORS),
    "rrelu": (lambda x: F.rrelu(x * x * x, training=True), VECTORS),
    "rrelu_": (lambda x: F.rrelu_(x * x * x, training=True), VECTORS),
    "threshold": (lambda x: F.threshold(x * x, 0.3, 0.1), VECTORS),
    "threshold_": (lambda x: F.threshold_(x * x, 0.3, 0.1), VECTORS),
    "gumbel_softmax": (lambda x: F.gumbel_softmax(x, dim=1), VECTORS),
}
DROPOUTS = {
    name: (lambda x, name=name: getattr(F, name)(x * x, 0.3), VOLUME if "3d" in name else LINE if "1d" in name else MAP)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
}
LOSSES = {
    "binary_cross_entropy": (lambda x: F.binary_cross_entropy(x.sigmoid(), fixed(x, 4, 6).sigmoid()), VECTORS),
    "binary_cross_entropy_with_logits": (like(F.binary_cross_entropy_with_logits, torch.sigmoid), VECTORS),
    "cosine_embedding_loss": (lambda x: F.cosine_embedding_loss(x, fixed(x, 4, 6), fixed(x, 4).sign()), VECTORS),
    "cross_entropy": (lambda x: F.cross_entropy(x, labels(x, 2, 6, 6, classes=4), label_smoothing=0.1, reduction="none"), MAP),
    "ctc_loss": (ctc, TOKENS),
    "gaussian_nll_loss": (lambda x: F.gaussian_nll_loss(x, fixed(x, 4, 6), x.square() + 0.1), VECTORS),
    "hinge_embedding_loss": (lambda x: F.hinge_embedding_loss(x * x, fixed(x, 4, 6).sign()), VECTORS),
    "huber_loss": (like(F.huber_loss, same), VECTORS),
    "kl_div": (lambda x: F.kl_div(x.log_softmax(1), fixed(x, 4, 6).softmax(1)), VECTORS),
    "l1_loss": (lambda x: F.l1_loss(x * x, fixed(x, 4, 6)), VECTORS),
    "linear_cross_entropy": (lambda x: F.linear_cross_entropy(x, fixed(x, 3, 6), labels(x, 4, classes=3)), VECTORS),
    "margin_ranking_loss": (lambda x: F.margin_ranking_loss(x * x, fixed(x, 4, 6), fixed(x, 4, 6).sign()), VECTORS),
    "mse_loss": (like(F.mse_loss, same), VECTORS),
    "multi_margin_loss": (lambda x: F.multi_margin_loss(x * x, labels(x, 4, classes=6)), VECTORS),
    "multilabel_margin_loss": (lambda x: F.multilabel_margin_loss(x * x, labels(x, 4, 6, classes=6)), VECTORS),
    "multilabel_soft_margin_loss": (lambda x: F.multilabel_soft_margin_loss(x, (fixed(x, 4, 6) > 0).to(x)), VECTORS),
    "nll_loss": (lambda x: F.nll_loss(x * x, labels(x, 4, classes=6)), VECTORS),
    "nll_loss 2d": (lambda x: F.nll_loss(x * x, labels(x, 2, 6, 6, classes=4), reduction="none"), MAP),
    "poisson_nll_loss": (like(F.poisson_nll_loss, POSITIVE), VECTORS),
    "smooth_l1_loss": (like(F.smooth_l1_loss, same), VECTORS),
    "soft_margin_loss": (like(F.soft_margin_loss, SIGN), VECTORS),
    "triplet_margin_loss": (lambda x: F.triplet_margin_loss(x, x.flip(0), fixed(x, 4, 6)), VECTORS),
    "triplet_margin_with_distance_loss": (lambda x: F.triplet_margin_with_distance_loss(x, x.flip(0), fixed(x, 4, 6)), VECTORS),
}
OTHERS = {
    "segment_reduce": (lambda x: torch.segment_reduce(x * x, "mean", lengths=torch.tensor([1, 3], device=x.device)), VECTORS),
    "scatter_reduce prod": (lambda x: torch.ones_like(x).scatter_reduce(1, labels(x, 4, 6, classes=3), x, "prod"), VECTORS),
    "scatter_reduce amax": (lambda x: torch.ones_like(x).scatter_reduce(1, labels(x, 4, 6, classes=3), x * x, "amax"), VECTORS),
    "gamma": (lambda x: torch.distributions.Gamma(x.square() + 0.5, 1.0).rsample(), VECTORS),
    "svdvals": (torch.linalg.svdvals, VECTORS),
    "eigvalsh": (lambda x: torch.linalg.eigvalsh(x @ x.T), VECTORS),
    "inverse": (lambda x: torch.linalg.inv(x @ x.T + torch.eye(4).to(x)), VECTORS),
    "fft": (lambda x: torch.fft.rfft2(x).abs(), MAP),
    "einsum": (lambda x: torch.einsum("bij,bkj->bik", x, x), TOKENS),
    "logsumexp": (lambda x: x.logsumexp(1), VECTORS),
    "cumprod": (lambda x: x.cumprod(1), VECTORS),
    "sort": (lambda x: (x * x).sort(1).values, VECTORS),
    "topk": (lambda x: (x * x).topk(2).values, VECTORS),
    "norm": (lambda x: x.norm(dim=1), VECTORS),
    "atan2": (lambda x: torch.atan2(x, fixed(x, 4, 6)), VECTORS),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(4, 3, 2)) ** 2), VECTORS),
}
NN = {
    "LSTM": (lambda: nn.LSTM(8, 8, 2, bidirectional=True, batch_first=True), TOKENS),
    "LSTM projected": (lambda: nn.LSTM(8, 8, proj_size=4), TOKENS),
    "GRU": (lambda: nn.GRU(8, 8, batch_first=True), TOKENS),
    "RNN": (lambda: nn.RNN(8, 8), TOKENS),
    "LSTMCell": (lambda: nn.LSTMCell(6, 5), VECTORS),
    "GRUCell": (lambda: nn.GRUCell(6, 5), VECTORS),
    "RNNCell": (lambda: nn.RNNCell(6, 5), VECTORS),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), TOKENS),
    "TransformerEncoderLayer without dropout": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), TOKENS),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), MAP),
    "SyncBatchNorm in one process": (lambda: nn.SyncBatchNorm(4), MAP),
    "Softmax2d": (nn.Softmax2d, MAP),
    "CrossMapLRN2d": (lambda: nn.CrossMapLRN2d(2), MAP),
    "Hardsigmoid": (nn.Hardsigmoid, VECTORS),
}
MODULES = {f"nn.{name}": (build, shape) for name, (build, shape) in NN.items()}
FUNCTIONS = {
    **NORMS,
    **SHAPES,
    **POOLS,
    **ADAPTIVE,
    **FRACTIONAL,
    **WITH_INDICES,
    **UNPOOLS,
    **PRODUCTS,
    **ACTIVATIONS,
    **DROPOUTS,
    **LOSSES,
    **OTHERS,
}
# No derivative, or only in low precision on GPUs of their own.
WITHOUT = {"one_hot", "grouped_mm", "scaled_grouped_mm", "scaled_mm"}
# What PyTorch 2.13 cannot differentiate twice, with a part of the cure; on the CPU and beyond it.
REFUSED = {
    "hardsigmoid": "relu6",
    "nn.Hardsigmoid": "relu6",
    "pdist": "vector_norm",
    "cdist": "vector_norm",
    "cdist of both": "vector_norm",
    "cdist p=1": "vector_norm",
    "embedding_bag of both": "reduce them yourself",
    "scaled_dot_product_attention": "SDPBackend.MATH",
    "nn.TransformerEncoderLayer without dropout": "SDPBackend.MATH",
    "multi_head_attention_forward": "SDPBackend.MATH",
}


def differentiated(function, x, gradients):
    """The sum of the squares of the gradient at ``x`` of what the function returns, differentiable: as in the losses."""
    torch.manual_seed(3)
    feature = x * 1.0
    found = torch.utils._pytree.tree_leaves(function(feature))
    score = sum((y * fixed(y, *y.shape)).sum() for y in found if y.is_floating_point() and y.requires_grad)
    return gradients(score, feature).square().sum()


def squares(function, x):
    return differentiated(function, x, lambda score, x: gradients(score, {"x": x}, "loss")[0])


def squares_without_a_look(function, x):
    return differentiated(function, x, lambda score, x: torch.autograd.grad(score, x, create_graph=True)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_refused_when_called_or_right(name, device):
    if name in MODULES:
        build, shape = MODULES[name]
        torch.manual_seed(1)
        function = build().to(device, torch.float64)
    else:
        function, shape = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    try:
        value = squares(function, x)
    except RuntimeError as error:
        assert "loss differentiates twice" in str(error) and "Instead, " in str(error), error
        if device == "cpu":
            assert REFUSED.get(name, "replace this operation") in str(error)
        with pytest.raises(RuntimeError):  # no false alarm
            squares_without_a_look(function, x).backward()
        return
    assert device != "cpu" or name not in REFUSED
    found = torch.zeros_like(x)
    if value.requires_grad:  # not where the function is linear
        (found,) = torch.autograd.grad(value, x, allow_unused=True, materialize_grads=True)
    direction = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    step = 1e-6
    ends = [squares(function, (x + s * step * direction).detach().requires_grad_()).item() for s in (1, -1)]
    assert (found * direction).sum().item() == pytest.approx(
        (ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-5 * value.item() + 1e-7
    )


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the list is that of one version")
def test_every_function_is_here():
    inspected = [(name, getattr(F, name)) for name in dir(F) if not name.startswith("_")]
    public = {
        name for name, x in inspected if callable(x) and not inspect.isclass(x) and "torch" in getattr(x, "__module__", "torch")
    }
    public -= {"boolean_dispatch", "handle_torch_function", "has_torch_function", "assert_int_or_pair"}
    public -= {"has_torch_function_unary", "has_torch_function_variadic", "Optional"}
    assert public - {name.split()[0] for name in FUNCTIONS} == WITHOUT
