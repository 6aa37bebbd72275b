"""Custom ops: one file per op with its schema, fake kernel and autograd formula. Opaque to torch.compile, computed by a backend."""

from modreg_fast.ops.gradient_statistics import gradient_statistics
from modreg_fast.ops.softmax_fisher import softmax_fisher

__all__ = ["gradient_statistics", "softmax_fisher"]
