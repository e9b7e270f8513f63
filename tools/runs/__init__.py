"""Rows of the tables, folders of runs, and which run belongs to which row."""
