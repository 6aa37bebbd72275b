"""The callbacks of modreg_fast.integrations in real trainings: when they measure, what the loggers got, and that they leave no trace."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from auditing import Vectors, vectors

import modreg_fast as mrf
from modreg_fast.integrations.measuring import Measuring, scalars

# The trainers' own.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


def accuracy(scores, labels):
    return (scores.argmax(1) == labels).double().mean()


def samples(count=16):
    generator = torch.Generator().manual_seed(2)
    rgb, depth = torch.randn(count, 5, generator=generator), torch.randn(count, 4, generator=generator)
    return [{"rgb": rgb[i], "depth": depth[i], "labels": rgb[i, :3].argmax()} for i in range(count)]


def start():
    torch.manual_seed(3)
    return Vectors()


class Seen:
    """``measure`` that keeps the mode of each module and its result; the data are the same at every call."""

    def __init__(self, kind, of=lambda model: model):
        self.kind, self.of, self.data, self.seen = kind, of, vectors(), []

    def __call__(self, model):
        assert not any(module.training for module in model.modules())
        net = self.of(model)
        if self.kind == "audit":
            result = mrf.audit(net, self.data, {"rgb": "rgb", "depth": "depth"}, progress=False)
        else:
            result = mrf.evaluate_missing(net, self.data, accuracy, progress=False)
        self.seen.append(result)
        return result


def test_scalars_are_what_was_measured():
    result = mrf.audit(start(), vectors(), {"rgb": "rgb", "depth": "depth"}, progress=False)
    found = scalars(result)
    assert found["modalities/share/rgb"] == result.share["rgb"].mean
    assert found["modalities/share/rgb"] + found["modalities/share/depth"] == pytest.approx(1)
    assert found["modalities/information/depth/0"] == result.information["depth"][0].mean
    assert found["modalities/accuracy/rgb+depth"] == result.missing.full
    assert found["modalities/accuracy/depth"] == result.missing.scores["depth",]
    assert found["modalities/accuracy/worst"] == min(result.missing.scores.values())
    assert found["modalities/accuracy/mean"] == pytest.approx(np.mean(list(result.missing.scores.values())))
    assert len(found) == 2 + 2 + 3 + 2 and scalars(result.missing) == {k: v for k, v in found.items() if "accuracy" in k}


@pytest.mark.parametrize("every, message", [(0, "at least 1, got 0"), (True, "got True"), (1.5, "got 1.5")])
def test_a_bad_number_of_epochs(every, message):
    with pytest.raises(ValueError, match=f"ModalityCallback: every_n_epochs must be a number of epochs, .*{message}"):
        Measuring("ModalityCallback", Seen("audit"), every)


def test_a_bad_measure():
    with pytest.raises(TypeError, match="ModalityCallback: measure must be a function of the model, got Vectors|got str"):
        Measuring("ModalityCallback", "audit", 1)
    with pytest.raises(TypeError, match="measure must be a function that returns an Audit or MissingModalities, got dict"):
        Measuring("ModalityCallback", lambda model: {}, 1)(start())


def test_modes_are_restored_and_inference_mode_does_not_reach_the_measurement():
    model, measuring = start(), Measuring("ModalityCallback", Seen("audit"), 1)
    model.depth.eval()
    with torch.inference_mode():
        measuring(model)
    assert [m.training for m in model.modules()] == [True, True, False]


def test_the_package_imports_no_trainer():
    code = "import sys, modreg_fast\nassert not {'lightning', 'pytorch_lightning', 'transformers', 'mmengine'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def events(folder):
    """What TensorBoard finds below a folder: tag -> [(step, value)], and the tags of pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found, pictures = {}, set()
    for path, _, files in os.walk(folder):
        if any("tfevents" in file for file in files):
            log = EventAccumulator(path)
            log.Reload()
            found |= {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
            pictures |= set(log.Tags()["images"])
    return found, pictures


# ---- Lightning ----


def lightning_training(package, tmp_path, callbacks, **options):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = start()

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch), batch["labels"])

        def validation_step(self, batch, _):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    trainer = package.Trainer(
        max_epochs=4, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        log_every_n_steps=1, callbacks=callbacks, **options,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(samples(), 8)
    trainer.fit(module, data, data)
    return trainer, module


@pytest.mark.parametrize("kind", ["audit", "missing"])
@pytest.mark.parametrize("name", ["lightning", "pytorch_lightning"])
def test_lightning(name, kind, tmp_path):
    package = pytest.importorskip(name)
    pytest.importorskip("tensorboard")
    from modreg_fast.integrations.lightning import ModalityCallback

    measure = Seen(kind, of=lambda module: module.net)
    callback = ModalityCallback(measure, every_n_epochs=2)
    loggers = importlib.import_module({"lightning": "lightning.pytorch.loggers"}.get(name, f"{name}.loggers"))
    logger = loggers.TensorBoardLogger(tmp_path)
    trainer, module = lightning_training(package, tmp_path, [callback], logger=logger, enable_checkpointing=False)
    assert list(callback.results) == [1, 3] and list(callback.results.values()) == measure.seen
    assert trainer.callback_metrics["modalities/accuracy/worst"] == pytest.approx(
        scalars(measure.seen[-1])["modalities/accuracy/worst"]
    )
    logged, pictures = events(tmp_path)
    for tag, value in scalars(measure.seen[0]).items():
        assert [step for step, _ in logged[tag]] == [3, 7] and logged[tag][0][1] == pytest.approx(value)
    assert pictures == ({"modalities/audit"} if kind == "audit" else set())
    _, undisturbed = lightning_training(package, tmp_path, [], logger=False, enable_checkpointing=False)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), undisturbed.parameters(), strict=True))


def test_lightning_keeps_the_best_checkpoint_by_the_worst_subset(tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from modreg_fast.integrations.lightning import ModalityCallback

    callback = ModalityCallback(Seen("missing", of=lambda module: module.net), every_n_epochs=2)
    checkpoint = ModelCheckpoint(monitor="modalities/accuracy/worst", mode="max", every_n_epochs=2, save_on_train_epoch_end=True)
    lightning_training(lightning, tmp_path, [checkpoint, callback], logger=False)
    worst = [scalars(result)["modalities/accuracy/worst"] for result in callback.results.values()]
    assert float(checkpoint.best_model_score) == pytest.approx(max(worst))


def test_a_logger_with_images_gets_the_picture(tmp_path):
    """As WandbLogger has it: ``log_image(key, images, step)``."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.loggers import CSVLogger

    from modreg_fast.integrations.lightning import ModalityCallback

    images = []

    class Images(CSVLogger):
        def log_image(self, key, images_, step=None):
            images.append((key, len(images_), step))

    callback = ModalityCallback(Seen("audit", of=lambda module: module.net), every_n_epochs=3)
    lightning_training(lightning, tmp_path, [callback], logger=Images(tmp_path), enable_checkpointing=False)
    assert images == [("modalities/audit", 1, 6)]


# ---- transformers ----


def transformers_training(transformers, tmp_path, add, report_to, max_steps=-1):
    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            labels = inputs.pop("labels")
            scores = model(inputs)
            loss = F.cross_entropy(scores, labels)
            return (loss, scores) if return_outputs else loss

    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, num_train_epochs=4, learning_rate=0.1, optim="sgd", report_to=report_to, seed=3,
        save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_strategy="no", max_steps=max_steps,
    )  # fmt: skip
    trainer = Trainer(start(), arguments, train_dataset=samples())
    add(trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["audit", "missing"])
def test_transformers(kind, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    from modreg_fast.integrations.transformers import ModalityCallback

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    measure, callbacks = Seen(kind), []

    def add(trainer):
        callbacks.append(ModalityCallback(trainer, measure, every_n_epochs=2))
        trainer.add_callback(callbacks[0])

    trainer = transformers_training(transformers, tmp_path, add, ["tensorboard"])
    assert list(callbacks[0].results) == [2, 4] and list(callbacks[0].results.values()) == measure.seen
    history = [entry for entry in trainer.state.log_history if "modalities/accuracy/mean" in entry]
    assert [entry["step"] for entry in history] == [4, 8]
    assert all(history[i].items() >= scalars(measure.seen[i]).items() for i in range(2))
    logged, pictures = events(tmp_path)
    means = [(result.missing if kind == "audit" else result).mean for result in measure.seen]
    assert logged["train/modalities/accuracy/mean"] == list(zip((4, 8), map(pytest.approx, means), strict=True))
    assert pictures == ({"modalities/audit"} if kind == "audit" else set())
    undisturbed = transformers_training(transformers, tmp_path, lambda trainer: None, [])
    for a, b in zip(trainer.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_transformers_stopped_within_an_epoch(tmp_path):
    """By max_steps, after the first half of the first epoch."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from modreg_fast.integrations.transformers import ModalityCallback

    callbacks = []

    def add(trainer):
        callbacks.append(ModalityCallback(trainer, Seen("missing")))
        trainer.add_callback(callbacks[0])

    trainer = transformers_training(transformers, tmp_path, add, [], max_steps=1)
    assert trainer.state.epoch == 0.5 and list(callbacks[0].results) == [1]


# ---- MMEngine ----


@pytest.mark.parametrize("kind", ["audit", "missing"])
def test_mmengine(kind, tmp_path):
    pytest.importorskip("mmengine")
    from mmengine.model import BaseModel
    from mmengine.optim import OptimWrapper
    from mmengine.runner import Runner

    from modreg_fast.integrations.mmengine import ModalityHook

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.net = start()

        def forward(self, labels, mode="loss", **inputs):
            return {"loss": F.cross_entropy(self.net(inputs), labels)}

    measure, model = Seen(kind, of=lambda model: model.net), Model()
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader(samples(), 8),
        train_cfg={"by_epoch": True, "max_epochs": 4},
        optim_wrapper=OptimWrapper(torch.optim.SGD(model.parameters(), 0.1)),
        custom_hooks=[{"type": "ModalityHook", "measure": measure, "every_n_epochs": 2}],
        visualizer={"type": "Visualizer", "vis_backends": [{"type": "LocalVisBackend"}]},
        experiment_name=f"modalities_{kind}",
        log_level="ERROR",
    )
    runner.train()
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, ModalityHook))
    assert list(hook.results) == [2, 4] and list(hook.results.values()) == measure.seen
    (file,) = tmp_path.rglob("scalars.json")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = [line for line in lines if "modalities/accuracy/mean" in line]
    assert [line["step"] for line in found] == [2, 4]
    assert all(found[i].items() >= {k: pytest.approx(v) for k, v in scalars(measure.seen[i]).items()}.items() for i in range(2))
    assert len(list(tmp_path.rglob("modalities_audit_[24].png"))) == (2 if kind == "audit" else 0)


class Named(Vectors):
    """As a model of transformers."""

    device = torch.device("cpu")

    def forward(self, **x):
        return SimpleNamespace(logits=super().forward(x))


def test_guide(monkeypatch, tmp_path):
    """The code of docs/guides/trainers.md, with the trainers' parts that it takes as given."""
    for package in ("lightning", "transformers", "accelerate", "mmengine"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs/guides/trainers.md").read_text(encoding="utf-8")
    lightning, transformers, mmengine = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names, added = {"validation": vectors(), "accuracy": accuracy}, []
    exec(lightning, names)
    assert names["measure"](SimpleNamespace(net=start())).share
    names["trainer"] = SimpleNamespace(add_callback=added.append)
    exec(transformers, names)
    assert set(added.pop().measuring(Named()).scores) == {("rgb", "depth"), ("rgb",), ("depth",)}
    names["runner"] = SimpleNamespace(register_hook=added.append)
    exec(mmengine, names)
    assert [hook.measuring.every_n_epochs for hook in added] == [5]
