"""Functional entropy on a tiny two-stream segmentation network: one more term in the loss, unlabelled pixels left out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modreg_fast as mrf

CLASSES, UNLABELLED = 3, 255


class TwoStreams(nn.Module):
    """Per modality one convolution at each of two scales; the prediction comes from the sum of the streams."""

    def __init__(self, channels: dict[str, int], width: int = 16) -> None:
        super().__init__()
        self.fine = nn.ModuleDict({m: nn.Conv2d(c, width, 3, padding=1) for m, c in channels.items()})
        self.coarse = nn.ModuleDict({m: nn.Conv2d(width, width, 3, stride=2, padding=1) for m in channels})
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, images: dict[str, Tensor]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        features = {}
        for m, image in images.items():
            fine = self.fine[m](image)
            features[m] = [fine, self.coarse[m](F.relu(fine))]
        fine, coarse = (sum(scale[1:], scale[0]) for scale in zip(*features.values(), strict=True))
        return self.head(F.relu(fine) + F.interpolate(coarse, scale_factor=2)), features


def scene(samples: int = 8, size: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    """The camera sees class 1 well, the depth sensor class 2; a quarter of the pixels has no label."""
    target = torch.randint(CLASSES, (samples, size // 8, size // 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    camera = (target == 1).float().unsqueeze(1) + 0.3 * torch.randn(samples, 3, size, size)
    depth = (target == 2).float().unsqueeze(1) + 0.6 * torch.randn(samples, 1, size, size)
    return {"camera": camera, "depth": depth}, target.masked_fill(torch.rand(target.shape) < 0.25, UNLABELLED)


def train(weight: float, steps: int = 100) -> None:
    torch.manual_seed(0)
    images, target = scene()
    model = TwoStreams({m: x.shape[1] for m, x in images.items()})
    balance = mrf.FunctionalEntropyLoss(feature_weight=weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    print(f"feature_weight={weight:g}")
    for step in range(steps + 1):
        logits, features = model(images)
        task = F.cross_entropy(logits, target, ignore_index=UNLABELLED)
        penalty, details = balance(features, mask=target != UNLABELLED, return_details=True)
        optimizer.zero_grad()
        (task + penalty).backward()
        optimizer.step()
        if step in (0, steps):
            information = ", ".join(f"{m} {values[0]:.4f} {values[1]:.4f}" for m, values in details.information.items())
            print(f"  step {step:3d}: cross entropy {task:.3f}, penalty {penalty:.3f}, information per scale: {information}")


train(weight=0.0)
train(weight=1e-3)
