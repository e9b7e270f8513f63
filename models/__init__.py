"""Architectures: `interface.py` says what SMMix asks of one, each family has a file, `build.py`
finds one by name."""
