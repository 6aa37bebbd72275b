"""What cannot be differentiated twice is named by the loss, with its cure; the cure works; elsewhere in the model nothing is said."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import modreg_fast as mrf

pytestmark = [
    # torch.compile looks at the .grad of the features; a frozen input of a checkpoint is what one test is about.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


class Attention(nn.Module):
    def forward(self, x):
        heads = x.unsqueeze(1)
        return F.scaled_dot_product_attention(heads, heads, heads).squeeze(1)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Once(torch.autograd.Function):
    """A user's own function, such as a deformable attention, whose backward pass was not written to be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0] ** 2


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def compiled():
    return torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), backend="aot_eager")


# The obstacle, and what the message must say of it and of its cure.
WALLS = {
    "attention": (Attention, "_scaled_dot_product_flash_attention_for_cpu_backward is not implemented", "SDPBackend.MATH"),
    "hardsigmoid": (nn.Hardsigmoid, "hardsigmoid_backward is not implemented", r"relu6\(x \+ 3\) / 6"),
    "compiled": (compiled, "torch.compile does not support double backward", "uncompiled, and compile the encoders"),
    "reentrant": (lambda: Checkpointed(True), "use_reentrant=True, torch.utils.checkpoint", "pass use_reentrant=False"),
    "once": (lambda: Lambda(Once.apply), "marked with @once_differentiable", "replace this operation"),
}
PASSES = {
    "hardswish": nn.Hardswish,  # PyTorch has its second derivative
    "hardsigmoid": lambda: Lambda(lambda x: F.relu6(x + 3) / 6),
    "reentrant": lambda: Checkpointed(False),
    "layer_norm": lambda: nn.LayerNorm(8),
    "recurrent": lambda: Lambda(lambda x: nn.GRU(8, 8, batch_first=True)(x)[0]),
}


def features():
    encoder = nn.Linear(8, 8)
    return encoder, {m: encoder(torch.randn(2, 5, 8)) for m in "ab"}


def penalty(kind, joint, features, backend):
    """A loss of scores ``(B, 3, N)`` that come from the joint features."""
    scores = joint.tanh()[..., :3].movedim(-1, 1)
    if kind == "attribution":
        return mrf.AttributionLoss(channel_dim=-1, backend=backend)(scores, features)
    values = F.cross_entropy(scores, torch.zeros(2, 5, dtype=torch.long), reduction="none")
    loss = mrf.FunctionalEntropyLoss(prediction_weight=1.0, channel_dim=-1, backend=backend)
    return loss.prediction_term(values, features, granularity=kind)


KINDS = ["attribution", "pixel", "sample"]


@pytest.mark.parametrize("wall", WALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_wall_is_named_with_its_cure(backend, kind, wall):
    build, obstacle, cure = WALLS[wall]
    _, x = features()
    function = "AttributionLoss" if kind == "attribution" else "FunctionalEntropyLoss.prediction_term"
    with pytest.raises(RuntimeError, match=rf"(?s)^{function} differentiates twice .*{obstacle}.*Instead, .*{cure}"):
        penalty(kind, build()(x["a"] + x["b"]), x, backend)


@pytest.mark.parametrize("module", PASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_differentiated_twice_passes(backend, kind, module):
    encoder, x = features()
    penalty(kind, PASSES[module]()(x["a"] + 0.5 * x["b"]), x, backend).backward()
    assert encoder.weight.grad.isfinite().all() and encoder.weight.grad.abs().sum() > 0


def test_the_cure_of_attention_works(backend):
    encoder, x = features()
    with sdpa_kernel(SDPBackend.MATH):
        joint = Attention()(x["a"] + 0.5 * x["b"])
    penalty("attribution", joint, x, backend).backward()
    assert encoder.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("wall", WALLS)
@pytest.mark.parametrize("place", ["encoder", "beside", "after", "frozen"])
def test_no_false_alarm(backend, wall, place):
    """A wall before the features, in a branch that does not lead to them, behind the scores or below detached tensors is none."""
    module, (encoder, x) = WALLS[wall][0](), features()
    other = torch.randn(2, 5, 8, requires_grad=True)
    if place == "encoder":
        x = {m: module(y) for m, y in x.items()}
    joint = x["a"] + 0.5 * x["b"]
    if place == "beside":
        joint = joint * module(other)
    if place == "frozen":
        joint = joint * module(x["a"].detach())
    value = penalty("attribution", joint, x, backend)
    if place == "after":
        value = value + module(joint).square().mean()
    value.backward()
    assert encoder.weight.grad.abs().sum() > 0


def test_features_of_a_model_compiled_as_a_whole(backend):
    """Its outputs are siblings: no path leads from one to the other, which must not pass for a share of 0."""

    def model(x, y):
        a, b = x.sin(), y.sin()
        return a, b, (a + b).tanh()

    a, b, scores = torch.compile(model, backend="aot_eager")(*(torch.randn(2, 3, requires_grad=True) for _ in "ab"))
    with pytest.raises(ValueError, match="AttributionLoss: the score must be computed from the given tensors themselves"):
        mrf.AttributionLoss(backend=backend)(scores, {"a": a, "b": b})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_attention(backend, attention):
    """A BERT over the sum of two modalities' tokens: SDPA, which is its default, is named; ``eager`` and the MATH kernel train."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 4}
    sizes |= {"attention_probs_dropout_prob": 0.0}  # with dropout the CPU takes the MATH kernel by itself
    top = transformers.BertModel(transformers.BertConfig(**sizes, attn_implementation=attention))
    x = {m: torch.randn(2, 6, 16, requires_grad=True) for m in "ab"}
    loss = mrf.AttributionLoss(channel_dim=-1, backend=backend)

    def penalty():
        return loss(top(inputs_embeds=x["a"] + 0.5 * x["b"]).pooler_output, x)

    if attention == "sdpa":
        with pytest.raises(RuntimeError, match="scaled_dot_product.*SDPBackend.MATH"):
            penalty()
    with sdpa_kernel(SDPBackend.MATH):
        penalty().backward()
    assert top.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
