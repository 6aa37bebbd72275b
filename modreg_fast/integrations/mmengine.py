"""A hook for MMEngine's ``Runner``."""

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from modreg_fast.audit import Audit
from modreg_fast.integrations.measuring import PICTURE, Measure, Measuring, scalars

__all__ = ["ModalityHook"]


class ModalityHook(Hook):
    """Measures the model every few epochs and logs what it finds, by the runner's ``visualizer``: scalars, and the picture of an audit.

    Every rank measures; with the data of its own, give ``audit`` the ``process_group``.

    Args:
        measure: ``model -> result`` of :func:`modreg_fast.audit` or :func:`modreg_fast.evaluate_missing`; called at the end of the
            training epoch with the model, without the wrapper of a distributed run, in ``eval()`` mode.
        every_n_epochs: after how many epochs, again and again.

    Attributes:
        results: epoch -> what was measured after it, counted from 1 as in the log and in the names of checkpoints (``epoch_5.pth``).

    Raises:
        ValueError, TypeError: arguments that do not fit, a ``measure`` that returns something else.

    Example:
        >>> def measure(model):
        ...     return mrf.audit(model.net, validation, {"rgb": "rgb", "depth": "depth"}, progress=False)
        >>> hook = HOOKS.build(dict(type="ModalityHook", measure=measure, every_n_epochs=5))  # as custom_hooks of a configuration does
        >>> hook.results  # after runner.train(): {5: Audit(...), 10: Audit(...)}
        {}
    """

    def __init__(self, measure: Measure, every_n_epochs: int = 1) -> None:
        self.measuring = Measuring("ModalityHook", measure, every_n_epochs)
        self.results: dict[int, Any] = {}

    def after_train_epoch(self, runner: Any) -> None:
        epoch = runner.epoch + 1
        if not self.measuring.due(epoch):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        result = self.results[epoch] = self.measuring(model)
        if is_main_process():
            runner.visualizer.add_scalars(scalars(result), step=epoch)
            if isinstance(result, Audit):
                canvas = FigureCanvasAgg(result.plot())
                canvas.draw()
                picture = np.array(canvas.buffer_rgba())[..., :3]
                # A slash would name a folder, and a file in a folder that is missing is not written, without a word.
                runner.visualizer.add_image(PICTURE.replace("/", "_"), picture, step=epoch)


HOOKS.register_module(module=ModalityHook)
