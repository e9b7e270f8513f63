"""Learning rates by update, as Swin trains, and going on in the middle of either kind of
schedule."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from timm.optim import list_optimizers, optimizer_kwargs
from timm.scheduler.scheduler_factory import scheduler_kwargs

from config import build
from config.flags import get_args_parser
from config.resolve import peak_rate, resolve
from errors import InputError
from storage.checkpoints import load_checkpoint, save_checkpoint
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


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("--epochs 300", 0.9993),
        ("--epochs 2", 1e-3),  # within the warm-up: each epoch has the rate of the one before
        ("--epochs 2 --sched-on-updates", 0.3),
        ("--epochs 10 --warmup-epochs 3", 0.8),  # the cosine has begun to fall by then
        ("--epochs 10 --sched tanh --warmup-epochs 9", 0.025),
        ("--epochs 1", 1e-3),
        ("--epochs 40 --sched multistep --warmup-epochs 0 --decay-milestones 10 20", 1.0),
        ("--epochs 40 --sched poly --decay-rate 1", 0.875),
        ("--epochs 40 --sched poly --decay-rate 1 --sched-on-updates", 0.95),  # before it falls
    ],
)
def test_the_highest_rate_that_comes(line: str, share: float) -> None:
    line = f"{line} --lr {PEAK}"
    args = get_args_parser().parse_args(line.split())
    highest = optim.highest_rate(scheduler_kwargs(args), PEAK, STEPS, STEPS * args.epochs)
    assert highest == max(rates(line))
    assert highest / PEAK == pytest.approx(share, rel=0.02)


def test_the_milestones_are_those_of_the_flag() -> None:
    line = "--sched multistep --epochs 8 --warmup-epochs 0 --lr 1 --decay-milestones 2 5"
    expected = [1.0] * 2 + [0.1] * 3 + [0.01] * 3
    assert rates(line)[::STEPS] == pytest.approx(expected)


def test_the_power_of_poly_is_the_decay_rate() -> None:
    line = "--sched poly --epochs 8 --warmup-epochs 0 --lr 1 --min-lr 0 --decay-rate 2"
    expected = [1.0] + [(1 - epoch / 8) ** 2 for epoch in range(7)]
    assert rates(line)[::STEPS] == pytest.approx(expected)


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


# ------------------------------------------------------------------------------ every one of timm's

REFUSED = ("adahessian", "kron", "kronw", "kronc")  # besides those of other packages


def make_net(opt: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A network with parameters of one, two and four dimensions."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 2, 2), torch.nn.Flatten(), torch.nn.LayerNorm(16), torch.nn.GELU()
    ).append(torch.nn.Linear(16, 3))
    settings = {**optimizer_kwargs(get_args_parser().parse_args(["--opt", opt])), "lr": 1e-2}
    return model, optim.make_optimizer(model, settings)


def take_steps(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, end: int
) -> None:
    for step in range(first, end):
        images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def wrong_after_resuming(opt: str, folder: Path) -> list[int]:
    """The steps after which a saved and resumed run ends with other weights."""
    whole, optimizer = make_net(opt)
    begun, saved = 0, {}
    for done in (0, 1, 7):  # 0: every step so far was skipped
        take_steps(whole, optimizer, begun, done)
        begun = done
        save_checkpoint(folder / f"{done}.pth", {"optimizer": optimizer.state_dict()})
        saved[done] = copy.deepcopy(whole.state_dict())
    take_steps(whole, optimizer, begun, 10)
    wrong = []
    for done, weights in saved.items():
        resumed, optimizer = make_net(opt)
        state = load_checkpoint(folder / f"{done}.pth")["optimizer"]
        optim.load_optimizer(optimizer, state, "a file")
        resumed.load_state_dict(weights)
        take_steps(resumed, optimizer, done, 10)
        pairs = list(zip(whole.parameters(), resumed.parameters(), strict=True))
        assert all(parameter.isfinite().all() for parameter, _ in pairs)
        wrong += [done] if not all(torch.equal(one, other) for one, other in pairs) else []
    return wrong


@pytest.mark.parametrize("opt", list_optimizers())
def test_every_optimizer_resumes_bit_for_bit_or_is_refused(opt: str, tmp_path: Path) -> None:
    if opt in REFUSED or opt.startswith(("bnb", "fused")):
        with pytest.raises(
            InputError, match=rf"--opt {opt}: .*; use adamw, sgd, .*list_optimizers"
        ):
            make_net(opt)
        return
    assert wrong_after_resuming(opt, tmp_path) == []


def test_a_state_that_no_file_holds_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hidden(torch.optim.SGD):
        """Its rate depends on a count of its own, as Kron's updates do on a generator."""

        count = 0

        def step(self, closure: None = None) -> None:  # type: ignore[override]
            self.count += 1
            self.param_groups[0]["weight_decay"] = 0.1 * (self.count % 4)
            super().step()

    make = lambda model, **settings: Hidden(model.parameters(), settings["lr"])  # noqa: E731
    monkeypatch.setattr(optim, "create_optimizer_v2", make)
    assert 7 in wrong_after_resuming("sgd", tmp_path)


@pytest.mark.parametrize(
    ("opt", "fragment"),
    [
        ("adanv", "timm has no such optimizer; did you mean adan"),
        ("q", "timm has no such optimizer; use adamw"),
        ("old_adamw", "timm has no such optimizer; did you mean"),  # timm ignores such a prefix
        ("lookahead_adamw", "leave the prefix out"),
    ],
)
def test_an_unknown_optimizer_is_refused_with_what_to_use(opt: str, fragment: str) -> None:
    with pytest.raises(InputError, match=f"^--opt {opt}: ") as caught:
        make_net(opt)
    assert fragment in str(caught.value)
