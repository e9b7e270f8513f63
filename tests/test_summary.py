"""What a run warns of before it starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from config.flags import get_args_parser
from run import summary
from tests.test_engine import make_training
from training import optim


@pytest.mark.parametrize(
    ("opt", "device", "told"), [("lamb", "cuda", 1), ("lamb", "cpu", 0), ("adamw", "cuda", 0)]
)
def test_an_optimizer_that_makes_the_host_wait_is_said(opt: str, device: str, told: int) -> None:
    training = make_training(opt=opt)
    training.processes = replace(training.processes, device=torch.device(device))
    flags = vars(get_args_parser().parse_args(["--opt", opt, "--no-model-ema"]))
    found = [
        line for line in summary.warnings(flags, 100, training, 1.0) if "no fused form" in line
    ]
    assert len(found) == told
    assert all(f"--opt {opt}" in line for line in found)
    assert optim.make_optimizer(training.module, {"opt": opt, "lr": 1.0}).defaults.get("fused") == (
        opt == "adamw" or None
    )


@pytest.mark.parametrize(("share", "told"), [(0.2, 1), (0.89, 1), (0.91, 0), (1.0, 0)])
def test_a_rate_that_stays_below_its_peak_is_said(share: float, told: int) -> None:
    training = make_training()
    peak = optim.largest_rate(training.optimizer)
    line = ["--epochs", "2", "--max-steps", "9", "--no-model-ema"]
    flags = vars(get_args_parser().parse_args(line))
    found = list(summary.warnings(flags, 100, training, share * peak))
    assert len(found) == told
    for text in found:
        assert f"reaches {share * peak:g}, not its peak {peak:g}" in text
        assert "--warmup-epochs 5 with --epochs 2 --max-steps 9" in text
