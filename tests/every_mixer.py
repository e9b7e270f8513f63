"""Trains with every mixer, one after the other, on each process that torchrun starts.

    torchrun --standalone --nproc_per_node=2 tests/every_mixer.py OUTPUT TEACHER FLAG...

Each run is one call of `main.main` with the flags given and the mixer's own; its folder is
OUTPUT/<mixer>. Starting processes costs more than these runs do, so they share theirs.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main
from config.mixing_flags import METHODS
from tests.runs import SMALL, split
from utils import run_command


def train_with_all(output: str, teacher: str, *flags: str) -> None:
    for mixer in METHODS:
        own = ["--attentive-teacher", teacher] if mixer == "attentivemix" else []
        main.main(
            [*split(SMALL), *flags, "--mixer", mixer, *own, "--output-dir", f"{output}/{mixer}"]
        )
    flags = (*flags, "--relabel", "transmix")
    main.main([*split(SMALL), *flags, "--output-dir", f"{output}/smmix_transmix"])


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: train_with_all(*sys.argv[1:])))
