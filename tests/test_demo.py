"""The demo: honest split, fallback scene, files, and the command line."""

import json
import subprocess
import sys

import pytest
import torch

from modreg_fast import cli

for package in ("rich", "matplotlib", "torchmetrics"):
    pytest.importorskip(package)

from modreg_fast.demo import data, report, training  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> None:
    torch.set_num_threads(1)  # as the demo does


def scenes() -> list[data.Scene]:
    return [data.generated_scene(), *([data.load_scene()] if data.load_scene().real else [])]


@pytest.fixture(params=scenes(), ids=lambda scene: scene.name)
def scene(request: pytest.FixtureRequest) -> data.Scene:
    return request.param


def covered(shape: torch.Size, corners: list[tuple[int, int]]) -> torch.Tensor:
    image = torch.zeros(shape, dtype=torch.int64)
    for y, x in corners:
        image[y : y + data.BLOCK, x : x + data.BLOCK] += 1
    return image


def test_split_keeps_a_guard_band(scene: data.Scene) -> None:
    split = data.split_blocks(scene.labels, len(scene.classes))
    images = {part: covered(scene.labels.shape, corners) for part, corners in split.items()}
    assert sum(images.values()).max() == 1
    for part, image in images.items():
        with_guard = torch.nn.functional.max_pool2d(image[None].float(), 5, 1, 2)[0] > 0  # two pixels around each block
        for other, pixels in images.items():
            assert other == part or not (with_guard & (pixels > 0)).any(), (part, other)


def test_split_covers_the_classes(scene: data.Scene) -> None:
    classes = len(scene.classes)
    split = data.split_blocks(scene.labels, classes)
    assert split == data.split_blocks(scene.labels.clone(), classes)
    parts = data.cut(scene, split)
    pixels = {part: data.pixels_per_class(blocks, classes) for part, blocks in parts.items()}
    assert (pixels["train"] > 0).all()
    assert (pixels["test"] > 0).sum() >= classes - 2  # two classes of Indian Pines lie in one block each
    for part, share in data.PARTS.items():
        assert abs(pixels[part].sum() / sum(p.sum() for p in pixels.values()) - share) < 0.1


def test_normalisation_sees_training_blocks_only(scene: data.Scene) -> None:
    split = data.split_blocks(scene.labels, len(scene.classes))
    parts = data.cut(scene, split)
    for x in parts["train"].sensors.values():
        torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(x.shape[1]), atol=1e-3, rtol=0)
        torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(x.shape[1]), atol=1e-3, rtol=0)
    training_pixels = covered(scene.labels.shape, split["train"]) > 0
    spoilt = data.Scene(
        scene.name,
        scene.source,
        {name: torch.where(training_pixels, x, torch.nan) for name, x in scene.sensors.items()},
        torch.where(training_pixels, scene.labels, 0),
        scene.classes,
        scene.picture,
        scene.real,
    )
    again = data.cut(spoilt, split)["train"]
    assert torch.equal(again.labels, parts["train"].labels)
    for name, x in parts["train"].sensors.items():
        assert torch.equal(again.sensors[name], x)


def test_network_does_not_look_beyond_a_block(scene: data.Scene) -> None:
    """What it predicts for a block is a function of that block; in evaluation not even of the others in the batch."""
    parts = data.cut(scene, data.split_blocks(scene.labels, len(scene.classes)))
    blocks = parts["test"]
    torch.manual_seed(0)
    model = training.TwoStream({name: x.shape[1] for name, x in blocks.sensors.items()}, len(scene.classes)).eval()
    with torch.no_grad():
        alone = model({name: x[:1] for name, x in blocks.sensors.items()})
        together = model(blocks.sensors)[:1]
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)


def test_batches_are_crops_of_training_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "GAIN", 0.0)
    monkeypatch.setattr(training, "NOISE", 0.0)
    numbers = torch.arange(3 * data.BLOCK**2).reshape(3, data.BLOCK, data.BLOCK)
    batch = training.sample(data.Blocks({"a": numbers[:, None].float()}, numbers), torch.Generator().manual_seed(1))
    assert torch.equal(batch.sensors["a"][:, 0].long(), batch.labels)  # image and labels are turned alike
    assert all(len(set((crop // data.BLOCK**2).flatten().tolist())) == 1 for crop in batch.labels)


def test_attribution_updates_the_head_only() -> None:
    scene = data.generated_scene()
    parts = data.cut(scene, data.split_blocks(scene.labels, len(scene.classes)))
    batch = training.sample(parts["train"], torch.Generator().manual_seed(0))
    grads = {}
    for method in training.METHODS:
        torch.manual_seed(0)
        model = training.TwoStream({name: x.shape[1] for name, x in batch.sensors.items()}, len(scene.classes), own=True)
        training._backward(model, training.Regularizer(method), batch)
        grads[method] = {name: p.grad for name, p in model.named_parameters()}

    def changed(method: str, module: str) -> bool:
        plain = grads["plain"]
        return any(not torch.allclose(g, plain[name]) for name, g in grads[method].items() if name.startswith(f"{module}."))

    assert changed("attribution", "head") and not changed("attribution", "encoders")
    assert changed("functional entropy", "head") and changed("functional entropy", "encoders")
    assert changed("own heads", "encoders") and not changed("own heads", "head")
    own = {name: g for name, g in grads["own heads"].items() if name.startswith("heads.heads.")}
    assert own and all(g is not None for g in own.values())


def test_own_heads_speak_where_the_other_sensor_is_lost() -> None:
    scene = data.generated_scene()
    blocks = data.cut(scene, data.split_blocks(scene.labels, len(scene.classes)))["test"]
    model = training.TwoStream({name: x.shape[1] for name, x in blocks.sensors.items()}, len(scene.classes), own=True).eval()
    assert model.heads is not None
    predicted = training.predict(model, blocks)
    with torch.no_grad():
        features = model.encode(blocks.sensors)
        assert torch.equal(predicted["both sensors"], model.head(features).argmax(1))
        for name, head in model.heads.heads.items():
            assert torch.equal(predicted[f"{name} only"], head(features[name]).argmax(1))


def test_scene_without_tensorly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorly", None)
    monkeypatch.setitem(sys.modules, "tensorly.datasets", None)
    scene = data.load_scene()
    assert not scene.real and "tensorly" in scene.source and list(scene.sensors) == ["camera", "depth"]
    assert all(torch.equal(x, y) for x, y in zip(scene.sensors.values(), data.generated_scene().sensors.values(), strict=True))
    assert (scene.labels == data.IGNORE).any()


@pytest.mark.parametrize("real", [True, False])
def test_quick_demo(real: bool, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    if not real:
        monkeypatch.setitem(sys.modules, "tensorly.datasets", None)
    elif not data.load_scene().real:
        pytest.skip("tensorly is not installed")
    monkeypatch.setattr(training, "QUICK_STEPS", 4)
    output = tmp_path / "deep" / "folder"
    seeds = 2 if real else 1
    arguments = ["demo", "--quick", "--output", str(output), *(["--seeds", "2"] if real else ["--json"])]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    results = json.loads((output / "results.json").read_text())
    assert {path.name for path in output.iterdir()} == {"maps.png", "results.json", "robustness.png", "shares.png"}
    assert all((output / name).read_bytes().startswith(b"\x89PNG") for name in ("maps.png", "robustness.png", "shares.png"))
    assert results["real"] is real and results["quick"]
    assert list(results["methods"]) == ["plain", "functional entropy", "attribution", "own heads"]
    for runs in results["methods"].values():
        assert [run["seed"] for run in runs] == list(range(seeds))
        for run in runs:
            assert len(run["miou"]) == 3 and all(0 <= x <= 1 for x in run["miou"].values())
            assert sum(run["share"].values()) == pytest.approx(1)
    text = " ".join(printed.out.split())
    if real:
        assert "Mean IoU, %" in text and "the numbers mean nothing" in " ".join(results["happened"]).replace("its", "the")
    else:
        assert json.loads(printed.out) == results
        assert "generated" in results["happened"][0] and any("One seed is no evidence" in x for x in results["happened"])


def results_of(plain: list[float], other: list[float]) -> dict:
    def runs(values: list[float]) -> list[dict]:
        return [
            {"miou": {"both sensors": v, "a only": v / 2}, "miou_mean": v * 0.75, "share": {"a": 0.6, "b": 0.4}} for v in values
        ]

    return {"methods": {"plain": runs(plain), "attribution": runs(other)}}


def test_sentences_follow_the_numbers() -> None:
    text = report._effect(results_of([0.4, 0.5], [0.5, 0.7]), "attribution", "a only")
    assert "the worst subset (a only) by +7.5" in text and "both sensors by +15.0" in text and "disagree" not in text
    text = report._effect(results_of([0.4, 0.5], [0.3, 0.4]), "attribution", "a only")
    assert "both sensors by -10.0 ± 0.0 (up in 0 of 2 seeds)" in text
    text = report._effect(results_of([0.4, 0.5], [0.5, 0.4]), "attribution", "a only")
    assert "No evidence where the seeds disagree: " in text


def test_output_that_is_a_file(tmp_path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--quick", "--output", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err


def test_without_extras() -> None:
    """Importing the package and `info` need no extra; `demo` names what to install."""
    code = """
import sys
for name in ("rich", "matplotlib", "torchmetrics", "tensorly"):
    sys.modules[name] = None
import modreg_fast
from modreg_fast import cli
assert "modreg_fast.demo" not in sys.modules
assert cli.main(["info", "--json"]) == 0
sys.exit(cli.main(["demo"]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'modreg_fast[examples]'" in done.stderr, done.stderr
    assert json.loads(done.stdout)["backends"]
