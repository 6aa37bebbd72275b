"""A callback for the ``Trainer`` of transformers."""

from math import ceil
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from modreg_fast.audit import Audit
from modreg_fast.integrations.measuring import PICTURE, Measure, Measuring, scalars

__all__ = ["ModalityCallback"]


class ModalityCallback(TrainerCallback):
    """Measures the model every few epochs and logs what it finds.

    Scalars go to ``trainer.log``, so to ``state.log_history`` and whatever ``report_to`` names; the picture of an audit to TensorBoard.
    Every rank measures; with the data of its own, give ``audit`` the ``process_group``.

    Args:
        trainer: whose log is written. The callback is added to it: ``trainer.add_callback(ModalityCallback(trainer, measure))``.
        measure: ``model -> result`` of :func:`modreg_fast.audit` or :func:`modreg_fast.evaluate_missing`; called at the end of the epoch
            with the trainer's ``model``, in ``eval()`` mode.
        every_n_epochs: after how many epochs, again and again.

    Attributes:
        results: epoch -> what was measured after it, counted from 1 as ``epoch`` in the log.

    Raises:
        ValueError, TypeError: arguments that do not fit, a ``measure`` that returns something else.

    Example:
        >>> def measure(model):
        ...     return mrf.evaluate_missing(lambda x: model(**x).logits, validation, accuracy, progress=False)
        >>> trainer = Trainer(nn.Linear(2, 2), TrainingArguments(num_train_epochs=10, report_to="none", use_cpu=True))
        >>> callback = ModalityCallback(trainer, measure, every_n_epochs=5)
        >>> trainer.add_callback(callback)
        >>> callback.results  # after trainer.train(): {5: MissingModalities(...), 10: MissingModalities(...)}
        {}
    """

    def __init__(self, trainer: Trainer, measure: Measure, *, every_n_epochs: int = 1) -> None:
        self.trainer, self.measuring = trainer, Measuring("ModalityCallback", measure, every_n_epochs)
        self.results: dict[int, Any] = {}

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        epochs = ceil((state.epoch or 0) - 1e-3)  # the number of the epoch that ends, also before its last batch by max_steps
        if not self.measuring.due(epochs):
            return
        result = self.results[epochs] = self.measuring(self.trainer.model)
        self.trainer.log(scalars(result))
        if isinstance(result, Audit):
            for callback in self.trainer.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                    callback.tb_writer.add_figure(PICTURE, result.plot(), state.global_step)
