"""Image mixing methods: `interface.py` is their contract, `build.py` finds one by name. SMMix is
`smmix.py`."""
