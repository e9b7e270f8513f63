"""Mixing methods, one file each; `interface.py` is their contract. SMMix is `smmix.py`."""
