"""Files on disk: atomic writing, checked reading, plain data only."""
