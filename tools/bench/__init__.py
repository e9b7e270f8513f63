"""Timings, side by side in one process. `python -m tools.bench.run` runs them all."""
