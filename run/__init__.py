"""The parts of a run: its loop, its state, its output folder, its log."""
