"""Architectures: `interface.py` says what mixing asks of one, each family has a file, `build.py`
finds one by its name."""
