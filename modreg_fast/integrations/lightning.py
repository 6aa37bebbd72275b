"""A callback for Lightning's ``Trainer``, of the package ``lightning`` or, where that is not installed, ``pytorch_lightning``."""

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    from pytorch_lightning import Callback, LightningModule, Trainer

from modreg_fast.audit import Audit
from modreg_fast.integrations.measuring import PICTURE, Measure, Measuring, scalars

__all__ = ["ModalityCallback"]


class ModalityCallback(Callback):
    """Measures the module every few epochs and logs what it finds.

    Scalars go to ``module.log_dict``, so to all loggers of the trainer and to callbacks that watch a value, such as ``ModelCheckpoint`` or
    ``EarlyStopping`` with ``monitor="modalities/accuracy/worst"``. The picture of an audit goes to loggers that take one: TensorBoard,
    Weights & Biases. Every rank measures; with the data of its own, give ``audit`` the ``process_group``.

    Args:
        measure: ``module -> result`` of :func:`modreg_fast.audit` or :func:`modreg_fast.evaluate_missing`; called at the end of the
            training epoch, the module in ``eval()`` mode.
        every_n_epochs: after how many epochs, again and again.

    Attributes:
        results: epoch -> what was measured after it, counted from 0 as in the log and in the names of checkpoints (``epoch=4``).

    Raises:
        ValueError, TypeError: arguments that do not fit, a ``measure`` that returns something else.

    Example:
        >>> def measure(module):
        ...     return mrf.audit(module.net, validation, {"rgb": "rgb", "depth": "depth"}, progress=False)
        >>> callback = ModalityCallback(measure, every_n_epochs=5)
        >>> trainer = Trainer(max_epochs=10, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> callback.results  # after trainer.fit(module, batches): {4: Audit(...), 9: Audit(...)}
        {}
    """

    def __init__(self, measure: Measure, *, every_n_epochs: int = 1) -> None:
        self.measuring = Measuring("ModalityCallback", measure, every_n_epochs)
        self.results: dict[int, Any] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if not self.measuring.due(epoch + 1):
            return
        result = self.results[epoch] = self.measuring(pl_module)
        pl_module.log_dict(scalars(result))
        if isinstance(result, Audit) and trainer.is_global_zero:
            for logger in trainer.loggers:
                if hasattr(logger.experiment, "add_figure"):
                    logger.experiment.add_figure(PICTURE, result.plot(), trainer.global_step)
                elif hasattr(logger, "log_image"):
                    logger.log_image(PICTURE, [result.plot()], trainer.global_step)
