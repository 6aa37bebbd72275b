"""Random calls of the ops: hypothesis draws a description, ``call_<op>`` makes it. ``test_fuzz.py`` holds the results to the oracle.

Descriptions are plain dictionaries of small values, so that a failure prints what it takes to repeat it."""

import math
import os

import helpers
import oracle
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from modreg_fast.functional import gradient_statistics, modality_cross_entropy, softmax_fisher_information

# The same cases at every run, unless MODREG_FAST_FUZZ_SEED says otherwise; pytest's header and a failure name it.
SEED = int(os.environ.get("MODREG_FAST_FUZZ_SEED", "0"))
NAN, INF = float("nan"), float("inf")


def fuzz(examples, *strategies, shrink=True):
    """A test over that many random descriptions, reproducible from its seed."""
    options = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.generate, *[Phase.shrink] * shrink],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(SEED)(options(given(*strategies)(test)))


# ---- descriptions ----

VALUES = {
    "normal": 8,
    "small": 2,
    "spread_10": 2,
    "agree_1e-2": 1,
    "agree_1e-4": 1,
    "agree_1e-6": 1,
    "equal": 1,
    "saturated_80": 2,
    "one_hot_80": 1,
    "wide": 1,
    "huge": 1,
    "offset": 1,
    "denormal": 1,
    "constant": 1,
    "nan": 1,
    "inf": 1,
    "-inf": 1,
    "-inf_pixel": 1,
}
CHANNELS = [1, 2, 2, 3, 3, 4, 5, 7, 8, 13, 16, 17, 19, 31, 32, 33, 64, 127, 150, 256, 257, 511, 1021, 1024]
SIZES = [1, 1, 2, 3, 4, 5, 7, 8, 11, 16, 17, 31, 32, 33, 61, 64, 127, 128, 257, 300, 1031]
ELEMENTS = 2500  # of a tensor at most, so that a case takes milliseconds


def weighted(choices):
    return st.sampled_from([name for name, times in choices.items() for _ in range(times)])


@st.composite
def shapes(draw, batch, spatial_dims=None, elements=ELEMENTS):
    channels = draw(st.sampled_from(CHANNELS))
    room, spatial = max(1, elements // (batch * channels)), []
    for _ in range(draw(st.integers(0, 3)) if spatial_dims is None else spatial_dims):
        spatial.append(draw(st.sampled_from([n for n in SIZES if n <= room])))
        room //= spatial[-1]
    return batch, channels, *draw(st.permutations(spatial))


@st.composite
def layouts(draw, dims):
    """Order of the dimensions in memory, steps, elements in front, and a dimension of stride 0."""
    plain = draw(st.integers(0, 2)) == 0
    return {
        "order": list(range(dims)) if plain else draw(st.permutations(range(dims))),
        "steps": [1] * dims if plain else [draw(st.sampled_from([1, 1, 1, 1, 2, 3])) for _ in range(dims)],
        "offset": draw(st.sampled_from([0, 0, 1, 2, 3])),
        "expanded": draw(st.sampled_from([None] * 5 + list(range(dims)))),
    }


dtypes = st.sampled_from([torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
densities = st.sampled_from([None, None, 0.0, 0.1, 0.5, 0.9])
upstreams = weighted({"normal": 6, "expanded": 1, "transposed": 1, "zero": 1, "some_zero": 1, "large": 1, "inf": 1})


@st.composite
def softmax_fisher_calls(draw):
    batch, modalities, scales = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.sampled_from([1, 1, 2, 3]))
    spatial_dims = draw(st.sampled_from([None, 1, 2, 3]))
    sizes = [draw(shapes(batch, spatial_dims)) for _ in range(scales)]
    return {
        "shapes": sizes,
        "modalities": modalities,
        "dtypes": [draw(dtypes) for _ in range(scales)],
        "values": [draw(weighted(VALUES)) for _ in range(scales)],
        "layouts": [[draw(layouts(len(shape))) for shape in sizes] for _ in range(modalities)],
        "mask": draw(densities),
        "one_mask": spatial_dims is not None and draw(st.booleans()),
        "present": draw(densities),
        "sigma": [draw(st.sampled_from([0.0, 0.0, 0.0, 0.5, 3.0])) for _ in range(modalities)],
        "samples": draw(st.sampled_from([1, 1, 2, 3])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "detach": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-8, 1e-8, 1e-3, 1.0])),
        "channels_last": draw(st.booleans()),
        "upstream": draw(upstreams),
        "numbers": draw(st.integers(0, 10**9)),
    }


@st.composite
def gradient_statistics_calls(draw):
    batch, count = draw(st.integers(1, 4)), draw(st.sampled_from([1, 1, 2, 3]))
    sizes = [draw(shapes(batch)) for _ in range(count)]
    given = draw(st.sampled_from(["both", "both", "features", "values"]))
    return {
        "shapes": sizes,
        "dtypes": [[draw(dtypes)] * 3 if draw(st.booleans()) else [draw(dtypes) for _ in range(3)] for _ in range(count)],
        "values": [draw(weighted(STATISTICS_VALUES)) for _ in range(count)],
        "layouts": [[draw(layouts(n)) for n in (len(s), len(s), len(s) - 1)] for s in sizes],
        "features": given != "values",
        "divisors": given != "features",
        "mask": draw(densities),
        "maps": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-8, 1e-8, 1e-3])),
        "channels_last": draw(st.booleans()),
        "upstream": draw(upstreams),
        "numbers": draw(st.integers(0, 10**9)),
    }


@st.composite
def modality_cross_entropy_calls(draw):
    batch, modalities = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    shape = draw(shapes(batch, elements=900))  # the oracle goes pixel by pixel
    classes = shape[1]
    integers = [x for x in INTEGERS if torch.iinfo(x).max >= classes]
    return {
        "shape": shape,
        "dtypes": [draw(dtypes)] * modalities if draw(st.booleans()) else [draw(dtypes) for _ in range(modalities)],
        "values": draw(weighted(VALUES)),
        "layouts": [draw(layouts(len(shape))) for _ in range(modalities)],
        "integers": draw(st.sampled_from(integers)),
        "strided": draw(st.booleans()),
        "ignored": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])),
        "ignore_index": draw(st.sampled_from([-100, 0, classes - 1, classes, 255])),
        "weight": draw(st.sampled_from([None, None, 1.0, 0.5])),  # part of the classes that have one above 0
        "smoothing": draw(st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.5, 1.0])),
        "present": draw(densities),
        "eps": draw(st.sampled_from([1e-8, 1e-8, 1e-3, 1.0])),
        "channels_last": draw(st.booleans()),
        "upstream": draw(upstreams),
        "numbers": draw(st.integers(0, 10**9)),
    }


INTEGERS = [torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16]
STATISTICS_VALUES = {"normal": 6, "small": 2, "wide": 1, "zeros": 1, "sparse": 2, "denormal": 1, "nan": 1, "inf": 1, "f_0": 1}


# ---- tensors ----


def laid_out(x, layout):
    """The values of ``x`` (those of its first entry along an expanded dimension) in other strides; between its elements lies NaN."""
    shape, expanded = x.shape, layout["expanded"]
    if expanded is not None:
        x = x.narrow(expanded, 0, 1)
    order = list(layout["order"])
    x = x.permute(order)
    sizes = [n * step for n, step in zip(x.shape, layout["steps"], strict=True)]
    memory = torch.full((layout["offset"] + math.prod(sizes),), NAN, dtype=x.dtype)
    view = memory[layout["offset"] :].view(sizes)[tuple(slice(step - 1, None, step) for step in layout["steps"])]
    view.copy_(x)
    return view.permute([order.index(i) for i in range(len(order))]).expand(shape)


def softmax_fisher_values(kind, shape, modalities, dtype):
    """Features ``[m]`` of a scale, in float64 before they are rounded to the dtype."""
    x = [torch.randn(shape, dtype=torch.float64) for _ in range(modalities)]
    if kind in ("spread_10", "wide", "huge", "small"):
        x = [{"spread_10": 10, "wide": 100, "huge": 1e4, "small": 0.1}[kind] * y for y in x]
    elif kind.startswith("agree"):
        x = [x[0] + float(kind[6:]) * y for y in x]
    elif kind == "equal":
        x = [x[0]] * modalities
    elif kind == "saturated_80":
        x = [80 * y.sign() for y in x]
    elif kind == "one_hot_80":
        x = [160.0 * (y == y.amax(1, True)) - 80 for y in x]
    elif kind == "offset":
        x = [y + 1e4 * (-1) ** m for m, y in enumerate(x)]
    elif kind == "denormal":
        x = [y * torch.finfo(dtype).tiny / 8 for y in x]
    elif kind == "constant":
        x = [torch.full_like(y, m) for m, y in enumerate(x)]
    elif kind in ("nan", "inf", "-inf"):
        x[0].view(-1)[torch.randint(x[0].numel(), ())] = float(kind)
    elif kind == "-inf_pixel":
        x[0].view(*shape[:2], -1)[0, :, 0] = -INF
    return [y.to(dtype) for y in x]


def upstream_of(kind, like):
    u = torch.randn_like(like)
    if kind == "expanded":
        return u.flatten()[:1].view([1] * u.dim()).expand_as(u)
    if kind == "transposed":
        return u.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "zero":
        return torch.zeros_like(u)
    if kind == "some_zero":
        return u * (torch.rand_like(u) < 0.5)
    if kind == "large":
        return 1e6 * u
    if kind == "inf":
        u.view(-1)[:1] = INF
    return u


def call_softmax_fisher(call, backend):
    """The tensors of a description, and what the backend makes of them."""
    torch.manual_seed(call["numbers"])
    sizes, modalities = call["shapes"], call["modalities"]
    columns = [softmax_fisher_values(call["values"][s], sizes[s], modalities, call["dtypes"][s]) for s in range(len(sizes))]
    features = [
        [laid_out(columns[s][m], layout).requires_grad_() for s, layout in enumerate(row)]
        for m, row in enumerate(call["layouts"])
    ]
    masks, density = None, call["mask"]
    if density is not None:
        masks = [torch.rand(s[0], *s[2:]) < density for s in sizes]
    mask = masks
    if masks is not None and call["one_mask"]:
        mask = masks[0]
        masks = [torch.from_numpy(oracle.resize_mask(masks[0].numpy(), s[2:])) for s in sizes]
    present = None if call["present"] is None else torch.rand(sizes[0][0], modalities) < call["present"]
    options = {name: call[name] for name in ("sigma", "samples", "seed", "eps")}
    last = call["channels_last"]
    information = softmax_fisher_information(
        [[x.movedim(1, -1) for x in row] if last else row for row in features],
        mask=mask,
        present=present,
        detach_reference=call["detach"],
        channel_dim=-1 if last else 1,
        backend=backend,
        **options,
    )
    upstream = upstream_of(call["upstream"], information)
    gradients = helpers.gradients(information, features, upstream)
    exact = {"masks": helpers.wide(masks), "present": helpers.wide(present), "detach": call["detach"], **options}
    return features, exact, information, upstream, gradients


def statistics_values(kind, shape, types):
    """Gradient, feature and divisor of one tensor."""
    g, e = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    f = torch.rand(shape[0], *shape[2:], dtype=torch.float64) + 0.01
    if kind == "small":
        g = 1e-6 * g
    elif kind == "wide":
        g, e = 100 * g, 100 * e
    elif kind == "zeros":
        g = torch.zeros_like(g)
    elif kind == "sparse":
        g, e = g * (torch.rand_like(g) < 0.2), e * (torch.rand_like(e) < 0.5)
    elif kind == "denormal":
        g = g * torch.finfo(types[0]).tiny / 8
    elif kind in ("nan", "inf"):
        x = g if torch.rand(()) < 0.5 else e
        x.view(-1)[torch.randint(x.numel(), ())] = float(kind)
    elif kind == "f_0":
        f = f * (torch.rand_like(f) < 0.5)
    return [x.to(dtype) for x, dtype in zip((g, e, f), types, strict=True)]


def call_gradient_statistics(call, backend):
    """The tensors ``(g, e, f)`` of every entry, the masks, and what the backend makes of them: the result, its outputs with their
    upstream gradients, and the gradients by the inputs."""
    torch.manual_seed(call["numbers"])
    used = (True, call["features"], call["divisors"])
    entries = []
    for kind, shape, types, layout in zip(call["values"], call["shapes"], call["dtypes"], call["layouts"], strict=True):
        tensors = zip(statistics_values(kind, shape, types), layout, used, strict=True)
        entries.append([laid_out(x, how).requires_grad_() if wanted else None for x, how, wanted in tensors])
    masks = None if call["mask"] is None else [torch.rand(s[0], *s[2:]) < call["mask"] for s in call["shapes"]]
    g, e, f = zip(*entries, strict=True)
    last = call["channels_last"]

    def given(tensors):
        return None if tensors[0] is None else [x.movedim(1, -1) if last else x for x in tensors]

    result = gradient_statistics(
        given(g),
        given(e),
        list(f) if call["divisors"] else None,  # (B, *spatial), wherever the channels are
        mask=masks,
        maps=call["maps"],
        channel_dim=-1 if last else 1,
        eps=call["eps"],
        backend=backend,
    )
    outputs = [x for part in result if part is not None for x in ([part] if isinstance(part, torch.Tensor) else part)]
    upstream = {id(x): upstream_of(call["upstream"], x) for x in outputs}
    inputs = [x for entry in entries for x in entry if x is not None]
    gradients = dict(zip(map(id, inputs), helpers.gradients(outputs, inputs, [upstream[id(x)] for x in outputs]), strict=True))
    return entries, masks, result, upstream, gradients


def call_modality_cross_entropy(call, backend):
    """The logits of a description, the arguments of the oracle, and what the backend makes of them: sums, upstream and gradients."""
    torch.manual_seed(call["numbers"])
    shape, modalities = call["shape"], len(call["dtypes"])
    values = softmax_fisher_values(call["values"], shape, modalities, call["dtypes"][0])
    logits = [laid_out(x.to(t), how) for x, t, how in zip(values, call["dtypes"], call["layouts"], strict=True)]
    logits = [x.requires_grad_() for x in logits]
    ignore_index = call["ignore_index"]
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    limits = torch.iinfo(call["integers"])
    if limits.min <= ignore_index <= limits.max:
        target[torch.rand(target.shape) < call["ignored"]] = ignore_index
    target = target.to(call["integers"])
    weight = None if call["weight"] is None else torch.rand(shape[1]) * (torch.rand(shape[1]) < call["weight"])
    present = None if call["present"] is None else torch.rand(shape[0], modalities) < call["present"]
    last = call["channels_last"]
    sums = modality_cross_entropy(
        [x.movedim(1, -1) for x in logits] if last else logits,
        torch.stack([target, target], -1)[..., 0] if call["strided"] else target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=call["smoothing"],
        present=present,
        channel_dim=-1 if last else 1,
        eps=call["eps"],
        backend=backend,
    )
    upstream = [upstream_of(call["upstream"], x) for x in sums[:3]]
    gradients = helpers.gradients(list(sums[:3]), logits, upstream)
    exact = {"ignore_index": ignore_index, "smoothing": call["smoothing"], "eps": call["eps"]}
    exact |= {"weight": helpers.wide(weight), "present": helpers.wide(present)}
    return logits, target.to(torch.int64).numpy(), exact, sums, upstream, gradients
