"""Third-party models and trainers, tiny and with random weights: forward pass, both losses, optimizer step. ``pip install`` lines are
in docs/install.md; what is absent is skipped."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import modreg_fast as mrf

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


def train_step(network, batch, labels):
    """One step on the task loss and all three penalties of ``network(batch) -> (scores, modality -> scales)``; every encoder and
    the head must have moved."""
    balance = mrf.FunctionalEntropyLoss(1e-4, 1e-4, objective="log")
    steer = mrf.AttributionLoss()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    scores, features = network(batch)
    values = F.cross_entropy(scores, labels, reduction="none")
    last = {m: scales[-1] for m, scales in features.items()}
    penalties = {
        "features": balance(features),
        "prediction": balance.prediction_term(values, last, granularity="sample"),
        "attribution": steer(scores, features),
    }
    for name, penalty in penalties.items():
        found = torch.autograd.grad(penalty, list(last.values()), retain_graph=True)
        assert penalty.isfinite() and all(g.isfinite().all() and g.abs().sum() > 0 for g in found), name
    (values.mean() + sum(penalties.values())).backward()
    optimizer.step()
    after = dict(network.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    moved = {name.split(".")[0] + "." + name.split(".")[1] for name, p in after.items() if not torch.equal(p, before[name])}
    assert {"encoders.rgb", "encoders.depth"} <= moved and any(name.startswith("head") for name in moved)


class TwoStreams(nn.Module):
    """An encoder per modality, of which ``scales`` makes the list of features; their mean goes to the head."""

    def __init__(self, encoder, head, scales):
        super().__init__()
        self.encoders = nn.ModuleDict({"rgb": encoder(), "depth": encoder()})
        self.head, self.scales = head, scales

    def forward(self, batch):
        features = {m: list(self.scales(encoder, batch[m])) for m, encoder in self.encoders.items()}
        fused = [torch.stack(scale).mean(0) for scale in zip(*features.values(), strict=True)]
        return self.head(fused), features


def images(size=32, dims=2, channels=3):
    return {m: torch.randn(2, channels, *[size] * dims) for m in ("rgb", "depth")}


def test_segformer():
    """Early features lead to the scores through later stages, whose SDPA is a wall for the attribution of all scales."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16, num_labels=4,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    head = transformers.models.segformer.modeling_segformer.SegformerDecodeHead(config)
    network = TwoStreams(
        lambda: transformers.SegformerModel(config), head, lambda encoder, x: encoder(x, output_hidden_states=True).hidden_states
    )
    labels = torch.randint(4, (2, 16, 16))
    with pytest.raises(RuntimeError, match="AttributionLoss .*scaled_dot_product.*SDPBackend.MATH"):
        train_step(network, images(64), labels)
    with sdpa_kernel(SDPBackend.MATH):
        train_step(network, images(64), labels)


def test_upernet_convnext():
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=4, use_auxiliary_head=False, pool_scales=[1, 2]
    )
    whole = transformers.UperNetForSemanticSegmentation(config)
    network = TwoStreams(
        lambda: transformers.ConvNextBackbone(backbone), whole.decode_head, lambda encoder, x: encoder(x).feature_maps
    )
    train_step(network, images(64), torch.randint(4, (2, 16, 16)))


class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any module of torchvision, with any name in it: segmentation-models-pytorch and timm import it, but their encoders used here
    compute nothing with it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        class Stub(ModuleType):
            def __getattr__(self, name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return type(name, (nn.Module,), {}) if ".models" in spec.name else MagicMock()  # encoders derive from models

        return Stub(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture
def without_torchvision(monkeypatch):
    if importlib.util.find_spec("torchvision") is None:
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, NoTorchvision()])
    yield
    for name, module in list(sys.modules.items()):
        if isinstance(getattr(module, "__loader__", None), NoTorchvision):
            del sys.modules[name]


@pytest.mark.slow
def test_segmentation_models_pytorch(without_torchvision):
    smp = pytest.importorskip("segmentation_models_pytorch")

    def unet():
        return smp.Unet("tu-resnet18", encoder_weights=None, decoder_channels=(16, 16, 8, 8, 8), classes=4)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            whole = unet()
            self.decoder, self.segmentation_head = whole.decoder, whole.segmentation_head

        def forward(self, features):
            image = features[0].new_zeros(2, 3, 64, 64)  # the decoder skips it
            return self.segmentation_head(self.decoder([image, *features]))

    network = TwoStreams(lambda: unet().encoder, Decoder(), lambda encoder, x: encoder(x)[1:])
    train_step(network, images(64), torch.randint(4, (2, 64, 64)))


@pytest.mark.slow
def test_monai_swin_unetr():
    """Two MRI contrasts in 3D: two Swin encoders, and the decoder of the whole network over their mean."""
    swin = pytest.importorskip("monai.networks.nets.swin_unetr")

    def unetr():
        return swin.SwinUNETR(1, 4, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))

    class Given(nn.Module):
        def forward(self, *_):
            return self.features

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = unetr()
            self.whole.swinViT = Given()

        def forward(self, features):
            self.whole.swinViT.features = features
            return self.whole(torch.zeros(2, 1, 64, 64, 64))

    network = TwoStreams(lambda: unetr().swinViT, Decoder(), lambda encoder, x: encoder(x))
    train_step(network, images(64, 3, 1), torch.randint(4, (2, 64, 64, 64)))


def test_video_and_audio_classification():
    """VideoMAE and AST as in the attribution paper: encoders, which may keep SDPA, and a small fusion on top."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    video = transformers.VideoMAEModel(
        transformers.VideoMAEConfig(image_size=32, patch_size=16, num_frames=4, use_mean_pooling=False, **sizes)
    )
    audio = transformers.ASTModel(transformers.ASTConfig(num_mel_bins=32, max_length=48, **sizes))
    fusion = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 5))
    features = {
        "video": video(torch.randn(2, 4, 3, 32, 32)).last_hidden_state.mean(1),
        "audio": audio(torch.randn(2, 48, 32)).pooler_output,
    }
    scores = fusion(torch.cat(list(features.values()), 1))
    optimizer = torch.optim.AdamW([*video.parameters(), *audio.parameters(), *fusion.parameters()])
    F.cross_entropy(scores, torch.tensor([1, 3])).backward(retain_graph=True)
    balance = mrf.FunctionalEntropyLoss(1e-4)({m: [f] for m, f in features.items()})
    balance.backward(retain_graph=True)
    encoders = [p.grad.clone() for p in (*video.parameters(), *audio.parameters()) if p.grad is not None]
    head = [p.grad.clone() for p in fusion.parameters()]
    penalty, details = mrf.AttributionLoss({"video": 0.2, "audio": 0.8})(scores, features, return_details=True)
    penalty.backward(inputs=list(fusion.parameters()))
    after = [p.grad for p in (*video.parameters(), *audio.parameters()) if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, encoders, strict=True))
    assert any(not torch.equal(p.grad, g) for p, g in zip(fusion.parameters(), head, strict=True))
    assert sum(details.share.values()).item() == pytest.approx(1)
    optimizer.step()


class Classifier(nn.Module):
    """What the trainers train: scores and features of two sensors."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleDict({m: nn.Sequential(nn.Linear(4, 8), nn.Tanh()) for m in "ab"})
        self.head = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, a, b, labels=None):
        features = {"a": self.encoders["a"](a), "b": self.encoders["b"](b)}
        return {"logits": self.head(torch.cat(list(features.values()), 1)), "features": features}


def regularized(outputs, labels):
    balance = mrf.FunctionalEntropyLoss(1e-2, objective="log")
    penalty = mrf.AttributionLoss()(outputs["logits"], outputs["features"])
    return F.cross_entropy(outputs["logits"], labels) + penalty + balance({m: [f] for m, f in outputs["features"].items()})


def samples(count=16):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 2, 4, generator=generator)
    return [{"a": a, "b": b, "labels": (a[0] > 0).long()} for a, b in x]


def by_hand(steps, size, lr):
    """Plain SGD over the same batches, for comparison."""
    torch.manual_seed(3)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    data = torch.utils.data.default_collate(samples())
    for step in range(steps):
        batch = {k: v[step * size : (step + 1) * size] for k, v in data.items()}
        optimizer.zero_grad()
        regularized(model(batch["a"], batch["b"]), batch["labels"]).backward()
        optimizer.step()
    return list(model.parameters())


def start():
    torch.manual_seed(3)
    return Classifier()


def same(model, expected):
    for p, other in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), other.detach(), rtol=1e-5, atol=1e-6)


def test_transformers_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            outputs = model(inputs["a"], inputs["b"])
            loss = regularized(outputs, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

        def _get_train_sampler(self, *_):
            return None  # in order, as by hand

    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, num_train_epochs=1, learning_rate=0.1, optim="sgd", max_grad_norm=0,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    model = start()
    Trainer(model, arguments, train_dataset=samples()).train()
    same(model, by_hand(2, 8, 0.1))


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = start()

        def training_step(self, batch, _):
            return regularized(self.model(batch["a"], batch["b"]), batch["labels"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(samples(), 8))
    same(module.model, by_hand(2, 8, 0.1))


def test_accelerate_with_gradient_accumulation():
    """Two batches are accumulated for each of two steps; the mean of the batch losses is what is trained."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, data = start(), torch.utils.data.DataLoader(samples(), 4)
    model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), data)
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(regularized(model(batch["a"], batch["b"]), batch["labels"]))
            optimizer.step()
            optimizer.zero_grad()
    expected = start()
    plain, batches = torch.optim.SGD(expected.parameters(), 0.1), list(torch.utils.data.DataLoader(samples(), 4))
    for first in (0, 2):
        plain.zero_grad()
        for batch in batches[first : first + 2]:
            (regularized(expected(batch["a"], batch["b"]), batch["labels"]) / 2).backward()
        plain.step()
    same(accelerator.unwrap_model(model), list(expected.parameters()))
