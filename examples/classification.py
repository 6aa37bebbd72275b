"""Attribution on a classifier of two modalities: its penalty moves their shares in the decision to a chosen ratio."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modreg_fast as mrf


def clips(samples: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Both modalities show the class, the video more clearly: a plain network leans on it."""
    label = torch.randint(4, (samples,))
    video = 3 * F.one_hot(label, 4).repeat(1, 8) + 0.3 * torch.randn(samples, 32)
    audio = F.one_hot(label, 4).repeat(1, 4) + 1.5 * torch.randn(samples, 16)
    return video, audio, label


def train(weight: float, steps: int = 200) -> None:
    torch.manual_seed(0)
    video, audio, label = clips()
    video_encoder, audio_encoder = nn.Linear(32, 24), nn.Linear(16, 24)  # stand for pretrained ones
    fusion_and_classifier = nn.Sequential(nn.Linear(48, 32), nn.Softplus(), nn.Linear(32, 4))
    trained = list(fusion_and_classifier.parameters())
    steer = mrf.AttributionLoss(target={"video": 0.5, "audio": 0.5})
    optimizer = torch.optim.Adam(trained, lr=1e-2)

    print(f"weight of the penalty {weight:g}")
    for step in range(steps + 1):
        with torch.no_grad():
            e_video, e_audio = video_encoder(video), audio_encoder(audio)
        # The penalty differentiates the scores by the features, so these take a gradient although the encoders do not.
        e_video.requires_grad_()
        e_audio.requires_grad_()
        scores = fusion_and_classifier(torch.cat([e_video, e_audio], 1))
        penalty, details = steer(scores, {"video": e_video, "audio": e_audio}, return_details=True)
        optimizer.zero_grad()
        F.cross_entropy(scores, label).backward(inputs=trained, retain_graph=True)
        (weight * penalty).backward(inputs=trained)
        optimizer.step()
        if step % 100 == 0:
            accuracy = (scores.argmax(1) == label).float().mean()
            shares = ", ".join(f"{m} {share:.3f}" for m, share in details.share.items())
            print(f"  step {step:3d}: accuracy {accuracy:.3f}, shares {shares}, penalty {penalty.item():.3f}")


train(weight=0.0)
train(weight=1.0)
