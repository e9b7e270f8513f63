"""Lists and runs the rows of `recipes/tables.yaml`."""
