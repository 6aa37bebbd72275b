"""Does it help? Trains small networks on four data sets with every method, and writes docs/study.md. ``python -m benchmarks.study``."""
