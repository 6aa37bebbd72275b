"""Is the library right and fast on this GPU? ``python -m benchmarks.gpu_validate``, in a clone, writes ``report.json``, ``report.html`` and
pictures.

``steps`` says what is done. ``runner`` runs each step in a process of its own, because a fault on a GPU ends every later call of its
process: side by side, so that compilers and checks use all cores, then alone what is timed. ``page`` shows the outcomes, anew after each
step. On one GPU and 16 cores ``--minutes 4`` is meant to do for all; ``--only parity speed`` runs some steps. With ``--dry-run`` the same
steps run on the CPU: Triton in its interpreter, the CUDA kernels as PTX in ``tests/ptx`` (``interpreted``), the benchmark on the cpu
backend."""
