"""Benchmarks that compare cases in one process; `python -m tools.bench.run` runs them all."""
