"""The examples and the code of the guides run, and what they claim is so."""

import re
import runpy
from datetime import timedelta
from pathlib import Path

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import modreg_fast as mrf

pytest.importorskip("torchmetrics")
pytest.importorskip("rich")

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)


def run(name: str, capsys) -> str:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_segmentation(capsys):
    """The regularized network carries more information at every scale."""
    printed = run("segmentation", capsys)
    plain, balanced = (
        [[float(x) for x in re.findall(r"\d\.\d{4}", line)] for line in part.splitlines() if "step 149" in line][0]
        for part in printed.split("feature_weight")[1:]
    )
    assert len(plain) == 4 and all(b > 2 * a for a, b in zip(plain, balanced, strict=True))
    assert printed.count("worst: ") == 2


def test_classification(capsys):
    """The penalty of weight 1 brings the shares to one half."""
    last = [line for line in run("classification", capsys).splitlines() if "step 200" in line]
    plain, steered = (float(re.search(r"video (0\.\d+)", line)[1]) for line in last)
    assert plain > 0.6 and abs(steered - 0.5) < 0.02


def test_audio_video(capsys):
    """Shares go where they are sent, and what the guide says of the scores holds."""
    printed = run("audio_video", capsys)
    rows = {}
    for name in ("plain", "by skill", "equal"):
        line = next(line for line in printed.splitlines() if re.match(rf"{name} .*%", line))
        rows[name] = [float(x) for x in re.findall(r"[\d.]+(?= %)", line)]
    share, day, _, _, night = zip(*rows.values(), strict=True)
    assert share[0] > share[1] > share[2] and abs(share[2] - 50) <= 2
    assert night[2] > night[0] + 2 and min(day) > 97
    assert re.search(r"The plain model: video carries \d\d % \[\d\d, \d\d\] of the decision", printed)


def each_block(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def blocks(path: str) -> str:
    return "\n".join(each_block(path))


def example(name: str) -> dict:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def test_readme(capsys, tmp_path, monkeypatch):
    from modreg_fast.demo.model import TwoStream

    monkeypatch.chdir(tmp_path)
    exec(blocks("README.md"), {"model": TwoStream({"rgb": 3, "depth": 1}, classes=5)})
    assert (
        re.search("carries .* at the (inputs|features)", capsys.readouterr().out)
        and "TwoStream" in (tmp_path / "audit.html").read_text()
    )


def test_quick_start(capsys):
    """It runs as it stands, and what the page shows of it holds: the second sensor alone is worth more after the recipe."""
    exec(blocks("docs/quickstart.md"), {})
    joint, recipe = ([float(x) for x in re.findall(r"[\d.]+(?=[,}])", line)] for line in capsys.readouterr().out.splitlines())
    assert min(joint[:2] + recipe[:2]) > 0.95 and recipe[2] > joint[2] + 0.02


def test_guide_to_segmentation(capsys):
    given = example("segmentation")
    model = given["TwoStreams"]({"camera": 3, "depth": 1})
    names = {
        "model": model,
        "loader": [given["scene"](4) for _ in range(3)],
        "validation": [given["scene"](4)],
        "optimizer": torch.optim.Adam(model.parameters()),
    }
    exec(blocks("docs/guides/segmentation.md"), names)
    printed = capsys.readouterr().out
    assert "{'camera': [(4, 16, 32, 32), (4, 16, 16, 16)], 'depth': " in printed and "mean over the subsets: 0." in printed


def test_guide_to_audio_and_video(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = example("audio_video")
    data = given["clips"](256, seed=0)
    names = {"model": given["AudioVideo"](), "loader": data, "validation": data, "night": data}
    exec(blocks("docs/guides/audio_video.md"), names)
    assert (tmp_path / "before.html").exists() and set(names["target"]) == {"video", "audio"}
    assert re.search("carries .* at the (inputs|features)", capsys.readouterr().out)


class WithFeatures(nn.Module):
    """What the guide to distributed runs has for a model: scores and features."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleDict({"rgb": nn.Conv2d(3, 4, 3, padding=1), "depth": nn.Conv2d(1, 4, 3, padding=1)})
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, batch):
        features = {m: [encoder(batch[m])] for m, encoder in self.encoders.items()}
        return self.head(features["rgb"][0].tanh() + features["depth"][0]), features


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = WithFeatures()

    def forward(self, batch):
        return self.net(batch)[0]


def distributed_guide(rank, folder):
    """Its blocks one after the other on two ranks, each with the model that its section is about."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    start, ddp, fsdp, rows, strength, audit = each_block("docs/guides/distributed.md")
    batch, labels = {m: torch.randn(2, c, 8, 8) for m, c in (("rgb", 3), ("depth", 1))}, torch.randint(5, (2, 8, 8))
    names = {"mrf": mrf, "F": F, "batch": batch, "labels": labels, "mesh": dist.init_device_mesh("cpu", (2,))}
    exec(start, names)
    names["model"] = DistributedDataParallel(WithFeatures())
    exec(ddp, names)
    names["model"] = WithFeatures()
    fsdp, averaging = fsdp.split("# model.head")
    exec(fsdp, names)
    scores, features = names["model"](batch)
    task = F.cross_entropy(scores, labels)
    (task + names["balance"](features) + names["steer"](scores, features)).backward()
    exec(f"#{averaging}", names)
    scores, features = names["model"](batch)
    exec(strength, {**names, "features": features, "task": F.cross_entropy(scores, labels)})
    exec(rows.replace('"cuda"', '"cpu"'), names)
    assert names["steer"](scores, features).isfinite()
    names |= {"model": Scores(), "FEATURES": {m: f"net.encoders.{m}" for m in batch}, "my_part_of_validation": [(batch, labels)]}
    exec(audit.replace("group)", "group, progress=False)"), names)
    torch.save((names["audit"].samples, names["mesh"].shape), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_guide_to_distributed_runs(tmp_path):
    helpers.run_ranks(distributed_guide, 2, str(tmp_path))
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [(4, (1, 2))] * 2


def test_guide_for_kernel_engineers():
    names = {}
    exec(blocks("docs/guides/kernels.md"), names)
    assert names["difference"] < 1e-5


def test_indian_pines_for_the_audit_command(monkeypatch, capsys):
    from modreg_fast import cli
    from modreg_fast.demo import training

    monkeypatch.setattr(training, "STEPS", 3)
    monkeypatch.chdir(ROOT)
    place = "examples.indian_pines"
    sensors = list(runpy.run_path(str(ROOT / "examples" / "indian_pines.py"))["loader"]()[0][0])
    features = [x for m in sensors for x in ("--features", f"{m}=encoders.{m}.stages.*")]
    assert cli.main(["audit", "--model", f"{place}:build", "--data", f"{place}:loader", "--ignore-index", "255", *features]) == 0
    assert "4 (2 x 2)" in capsys.readouterr().out
