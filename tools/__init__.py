"""Commands beside training, each run with `python -m tools.<name>`."""
