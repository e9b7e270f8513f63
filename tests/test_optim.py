"""Learning rates by update, as Swin trains, and going on in the middle of either kind of
schedule."""

from __future__ import annotations

import math

import pytest
import torch
from timm.optim import optimizer_kwargs
from timm.scheduler.scheduler_factory import scheduler_kwargs

from config import build
from config.flags import get_args_parser
from config.resolve import peak_rate, resolve
from training import optim

EPOCHS, STEPS, WARMUP = 6, 4, 2
PEAK, LOW, END = 1e-3, 1e-6, 1e-5
BY_UPDATE = f"--epochs {EPOCHS} --warmup-epochs {WARMUP} --sched-on-updates --lr {PEAK}"


def rates(line: str, done_epochs: int = 0) -> list[float]:
    """The rate of each update from `done_epochs` on, stepped as `main.py` and `engine.py` do."""
    args = get_args_parser().parse_args(line.split())
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    schedule = optim.Schedule(
        optimizer, scheduler_kwargs(args), STEPS, done_epochs, done_epochs * STEPS
    )
    seen = []
    for epoch in range(done_epochs, args.epochs):
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            seen.append(float(optimizer.param_groups[0]["lr"]))
            schedule.after_update(step)
        schedule.after_epoch(epoch)
    return seen


def test_by_update_the_rate_is_warmup_then_cosine_one_update_late() -> None:
    def at(update: int) -> float:
        if update < WARMUP * STEPS:
            return LOW + update * (PEAK - LOW) / (WARMUP * STEPS)
        return END + (PEAK - END) * (1 + math.cos(math.pi * update / (EPOCHS * STEPS))) / 2

    expected = [LOW] + [at(update) for update in range(EPOCHS * STEPS - 1)]
    assert rates(BY_UPDATE) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("line", [BY_UPDATE, BY_UPDATE.replace("--sched-on-updates", "")])
@pytest.mark.parametrize("done", [1, 3, 5])
def test_going_on_continues_the_sequence(line: str, done: int) -> None:
    assert [rate.hex() for rate in rates(line, done)] == [
        rate.hex() for rate in rates(line)[done * STEPS :]
    ]


def test_the_whole_schedule_scales_when_asked() -> None:
    line = "--batch-size 128 --warmup-lr 5e-7 --min-lr 5e-6 --scale-schedule"
    args = get_args_parser().parse_args([*line.split(), "--input-size", "224"])
    settings = build.schedule_settings(resolve(args, 8, "cpu"))
    assert (settings["warmup_lr"], settings["min_lr"]) == pytest.approx((1e-6, 1e-5))
    assert peak_rate(resolve(args, 8, "cpu")) == pytest.approx(1e-3)
    args.scale_schedule = False
    assert build.schedule_settings(resolve(args, 8, "cpu"))["min_lr"] == pytest.approx(5e-6)


def test_swins_tables_and_one_dimensional_parameters_are_not_decayed() -> None:
    """Weight decay is split by dimension, by `.bias`, and by the model's own list."""
    model = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4), "linear": torch.nn.Linear(4, 4)})
    model.no_weight_decay = lambda: {"linear.weight"}  # type: ignore[assignment]
    args = get_args_parser().parse_args([])
    groups = optim.make_optimizer(model, optimizer_kwargs(args)).param_groups
    assert all(group["weight_decay"] == 0 for group in groups)
    model.no_weight_decay = set  # type: ignore[assignment]
    decayed = [
        p
        for group in optim.make_optimizer(model, optimizer_kwargs(args)).param_groups
        if group["weight_decay"] > 0
        for p in group["params"]
    ]
    assert [tuple(p.shape) for p in decayed] == [(4, 4)]


@pytest.mark.parametrize("opt", ["momentum", "adamw", "lion"])  # fused, fused, not fused
def test_each_layer_has_its_share_of_every_update(opt: str) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(3)))
    model.group_matcher = lambda coarse: lambda name: int(name[0])  # type: ignore[assignment]
    line = f"{BY_UPDATE} --opt {opt} --layer-decay 0.5 --weight-decay 0"
    args = get_args_parser().parse_args(line.split())
    optimizer = optim.make_optimizer(model, optimizer_kwargs(args))
    schedule = optim.Schedule(optimizer, scheduler_kwargs(args), STEPS)
    for step, rate in enumerate(rates(BY_UPDATE)[:12]):  # of the warm-up and after it
        assert optim.largest_rate(optimizer) == rate
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.after_update(step)
        changes = [float(parameter.detach().mean()) for parameter in model.parameters()]
        assert changes[2] < 0
        assert changes == pytest.approx([changes[2] / 4, changes[2] / 2, changes[2]], rel=1e-5)


@pytest.mark.parametrize("name", ["momentum", "sgd", "adamw"])
def test_the_very_first_update_may_be_left_out(name: str) -> None:
    """As fp16's first ones are: torch's fused SGD then goes on with momentum that nobody has
    set."""
    model = torch.nn.Linear(200, 200)
    start = model.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    optimizer = optim.make_optimizer(
        model, {"opt": name, "lr": 1.0, "weight_decay": 0.0, "momentum": 0.9}
    )
    rubbish = [torch.full((200, 200), 1e30) for _ in range(20)]
    del rubbish  # what the allocator gives next is not zero
    for gradient in (math.inf, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update(1.0)
        assert torch.equal(model.weight, start) == (gradient == math.inf)
    change = 1.9 if name == "sgd" else 1.0  # Nesterov's
    torch.testing.assert_close(model.weight, start - change, atol=1e-5, rtol=0)
