"""A run under way: its loop, its state, its output folder, its log."""
