"""Frozen encoders, as in arXiv:2404.02359: audit the model, choose ratios, train fusion and classifier towards them, compare."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modreg_fast as mrf

CLASSES, STEPS = 6, 300
Batch = tuple[dict[str, Tensor], Tensor]
FEATURES = {"video": "encoders.video", "audio": "encoders.audio"}


class AudioVideo(nn.Module):
    """Two encoders, and what fuses and classifies their embeddings. It knows nothing of this library."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        sizes = {"video": 48, "audio": 30}
        self.encoders = nn.ModuleDict({m: nn.Sequential(nn.Linear(n, width), nn.Tanh()) for m, n in sizes.items()})
        self.fusion = nn.Sequential(nn.Linear(2 * width, 32), nn.Softplus(), nn.Linear(32, CLASSES))

    def forward(self, clips: dict[str, Tensor]) -> Tensor:
        scores: Tensor = self.fusion(torch.cat([encoder(clips[m]) for m, encoder in self.encoders.items()], 1))
        return scores


def clips(samples: int, seed: int, video_noise: float = 0.7) -> list[Batch]:
    """Batches of 64. Both modalities show the class; video clearly by day, and with three times the noise hardly at night."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (samples,), generator=generator)
    shown = F.one_hot(label, CLASSES).float()
    video = shown.repeat(1, 8) + video_noise * torch.randn(samples, 48, generator=generator)
    audio = shown.repeat(1, 5) + 1.2 * torch.randn(samples, 30, generator=generator)
    return [({"video": v, "audio": a}, y) for v, a, y in zip(video.split(64), audio.split(64), label.split(64), strict=True)]


def accuracy(scores: Tensor, label: Tensor) -> float:
    return float((scores.argmax(1) == label).float().mean())


def fit(loss: Callable[[dict[str, Tensor], Tensor], None], parameters: list[nn.Parameter], data: list[Batch]) -> None:
    """``STEPS`` of Adam; ``loss`` fills the gradients."""
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(*data[step % len(data)])
        optimizer.step()


class Probe(nn.Module):
    """An encoder alone, with a linear classifier."""

    def __init__(self, modality: str, encoder: nn.Module, width: int = 24) -> None:
        super().__init__()
        self.modality, self.encoder, self.classify = modality, encoder, nn.Linear(width, CLASSES)

    def forward(self, clips: dict[str, Tensor]) -> Tensor:
        scores: Tensor = self.classify(self.encoder(clips[self.modality]))
        return scores


def pretrain(probe: Probe, train: list[Batch], validation: list[Batch]) -> float:
    """Trains an encoder with its probe, then freezes it. Returns their accuracy on validation clips."""
    fit(lambda x, y: F.cross_entropy(probe(x), y).backward(), list(probe.parameters()), train)
    probe.encoder.requires_grad_(False)
    return mrf.evaluate_missing(probe, validation, accuracy, modalities=[probe.modality], progress=False).full


def train_fusion(model: AudioVideo, data: list[Batch], target: dict[str, float] | None, weight: float = 1.0) -> AudioVideo:
    """Task loss, and with a ``target`` the attribution penalty; both update fusion and classifier only."""
    model = copy.deepcopy(model)
    fusion = list(model.fusion.parameters())
    steer = mrf.AttributionLoss(target)
    with mrf.capture(model, FEATURES) as features:

        def loss(x: dict[str, Tensor], y: Tensor) -> None:
            scores = model(x)
            task = F.cross_entropy(scores, y)
            penalty = 0.0 if target is None else weight * steer(scores, features)
            (task + penalty).backward(inputs=fusion)

        fit(loss, fusion, data)
    return model


def main() -> None:
    torch.manual_seed(0)
    train, validation, test = clips(2048, seed=1), clips(1024, seed=2), clips(1024, seed=3)
    night = clips(1024, seed=4, video_noise=2.1)
    model = AudioVideo()
    skill = {m: pretrain(Probe(m, encoder), train, validation) for m, encoder in model.encoders.items()}
    print("Probes:", ", ".join(f"{m} alone is right in {100 * x:.0f} %" for m, x in skill.items()))

    plain = train_fusion(model, train, None)
    print("\nThe plain model:", mrf.audit(plain, validation, FEATURES, metric=accuracy, progress=False).table())

    above_chance = {m: x - 1 / CLASSES for m, x in skill.items()}  # a modality that only guesses gets no share
    trained = {
        "plain": plain,
        "by skill": train_fusion(model, train, above_chance),
        "equal": train_fusion(model, train, {"video": 0.5, "audio": 0.5}),
    }
    print("\ntarget     video's share   accuracy by day   video only   audio only   at night")
    for name, fused in trained.items():
        found = mrf.audit(fused, test, FEATURES, metric=accuracy, progress=False)
        scores = [*found.missing.scores.values(), mrf.evaluate_missing(fused, night, accuracy, progress=False).full]
        day, video, audio, dark = (f"{100 * x:.1f} %" for x in scores)
        print(f"{name:<10} {100 * found.share['video'].mean:11.0f} % {day:>17} {video:>12} {audio:>12} {dark:>10}")


if __name__ == "__main__":
    main()
