"""Commands beside training, each started with `python -m tools.<name>`."""
