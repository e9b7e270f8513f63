"""Model families: `interface.py` says what mixing needs, `build.py` finds a model by its name."""
