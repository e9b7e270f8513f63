"""Timings, side by side in one process. `python -m benchmarks.run` runs them all."""
