"""The step's promises that no other file tests: no hidden read, finiteness, precision, exact
evaluation."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import utils
from errors import InputError
from losses import SMMixLoss
from mixers.registry import METHODS
from mixers.switch import Choice, Switch
from models.build import build_model
from models.interface import ImageModel
from pipeline.samples import Batch
from samplers import EvalShard
from smmix import Drawn, SMMix
from tests.mixing import fake_teacher, make_switch
from training import optim, precision
from training.meters import Meters
from training.nonfinite import NonFiniteLoss

CLASSES = 5
CPU = utils.Processes(0, 1, torch.device("cpu"))


def make_training(amp: str = "none", opt: str = "adamw", **settings: Any) -> engine.Training:
    utils.seed_globals("init", 0)
    model = build_model(
        "vit_nano_patch4_32", CLASSES, input_size=(16, 16), embed_dim=16, depth=2, num_heads=2
    )
    autocast = precision.make_autocast(CPU.device, amp)
    mixer = make_switch(CLASSES, model.grid_size)
    return engine.Training(
        module=model,
        model=model,
        criterion=SMMixLoss(),
        mixer=mixer,
        guide=engine.make_guide(model, autocast),
        optimizer=optim.make_optimizer(model, {"opt": opt, "lr": 1e-3}),
        scaler=precision.make_scaler(CPU.device, amp),
        autocast=autocast,
        processes=CPU,
        fixed_scale=amp != "fp16",
        **settings,
    )


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        torch.randn(4, 3, 16, 16, generator=generator),
        torch.arange(4),
        torch.arange(4) + 10 * step,
    )


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def epoch_of(training: engine.Training, steps: int, **settings: Any) -> dict[str, float]:
    """The means of an epoch of so many steps."""
    batches, meters = [batch_of(step) for step in range(steps)], Meters()
    defaults: dict[str, Any] = {
        "first_step": 0,
        "on_log": lambda step, means, trouble: None,
        "meters": meters,
    }
    engine.train_one_epoch(training, batches, **{**defaults, **settings})
    return meters.read()


class CountReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device value."""

    READS = (
        "aten._local_scalar_dense",
        "aten.is_nonzero",
        "aten.nonzero",
        "aten.equal",
        "aten.masked_select",
    )

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        if name in self.READS:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_step_reads_nothing_back(monkeypatch: pytest.MonkeyPatch, first: bool, amp: str) -> None:
    """Draws come from CPU generators and may be read; everything else would stall a GPU."""
    training = make_training(amp, clip_grad=1.0)
    training.model.train()
    meters = Meters()
    engine.train_step(
        training, [batch_of(0)], 0, meters
    )  # the optimizer's state exists from now on
    monkeypatch.setattr(Switch, "draw", lambda self, generator: Choice(True, first))
    monkeypatch.setattr(SMMix, "draw", lambda self, count, *args: Drawn([(2, 1)] * count))
    monkeypatch.setattr("mixers.mixup.Mixup.draw", lambda self, count, *args: [0.3] * count)
    with CountReads() as counter:
        engine.train_step(training, [batch_of(1)], 1, meters)
    assert not counter.reads
    with CountReads() as counter:  # the control
        assert float(training.nonfinite.skipped) == 0
    assert counter.reads


STUDIED: list[dict[str, Any]] = [
    {"source_region": "random"},
    {"target_region": "corr"},
    {"score": "random"},
    {"mixer": "cutmix", "con_weight": 1.0},
]


@pytest.mark.parametrize(
    "flags", [*({"mixer": name} for name in METHODS if name != "smmix"), *STUDIED], ids=str
)
def test_no_mixer_reads_the_device(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    switch = make_switch(CLASSES, (4, 4), fake_teacher, mix_protocol="single", **flags)
    training = make_training()
    training.mixer = switch
    training.model.train()
    engine.train_step(training, [batch_of(0)], 0, meters := Meters())
    drawn = switch.first.draw(4, (16, 16), training.random(1, 0).own)
    monkeypatch.setattr(type(switch.first), "draw", lambda *args: drawn)
    monkeypatch.setattr(Switch, "draw", lambda self, generator: Choice(True, True))
    with CountReads() as counter:
        engine.train_step(training, [batch_of(1)], 1, meters)
    assert not counter.reads


def test_an_optimizer_without_a_fused_form_still_skips_a_failed_step() -> None:
    training = make_training(opt="lamb")
    before = weights_of(training.module)
    training.nonfinite.poison += float("nan")
    engine.train_step(training, [batch_of(0)], 0, Meters())
    assert torch.equal(weights_of(training.module), before)


def planted_loss(training: engine.Training, term: str, bad_calls: set[int]) -> list[Tensor]:
    """Turns a term into NaN on some calls of the loss; returns the list of the weights that each
    call meets."""
    good = SMMixLoss()
    kept: list[Tensor] = []

    def planted(output: Any, batch: Any) -> Any:
        terms = good(output, batch)
        if len(kept) in bad_calls:
            terms[term] = terms[term] * float("nan")
        kept.append(weights_of(training.module))
        return {**terms, "total": terms["cls"] + terms["fine"] + terms["con"]}

    training.criterion = planted
    return kept


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.parametrize("term", ["cls", "fine", "con"])
def test_a_loss_that_is_not_finite_changes_nothing(
    amp: str, term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight, no average, no state of the optimizer; the steps before and after it do."""
    monkeypatch.setattr(Switch, "draw", lambda self, generator: Choice(True, True))
    training = make_training(amp)
    if amp == "fp16":  # low enough that no step of this run overflows
        training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    training.ema = ModelEmaV3(training.module, decay=0.5)
    kept, states, said = planted_loss(training, term, {2}), [], []

    def see(indices: Tensor) -> bool:
        moments = [state["exp_avg"].flatten() for state in training.optimizer.state.values()]
        counts = [state["step"].flatten() for state in training.optimizer.state.values()]
        states.append(torch.cat([weights_of(training.ema.module), *moments, *counts]))
        return False

    epoch_of(
        training,
        5,
        log_every=1,
        after_step=see,
        on_log=lambda step, means, trouble: said.append(trouble),
    )
    changes = [not torch.equal(kept[i], kept[i + 1]) for i in range(4)]
    assert changes == [True, True, False, True]
    assert [not torch.equal(states[i], states[i + 1]) for i in range(4)] == [
        True,
        False,
        True,
        True,
    ]
    assert training.nonfinite.reported == 1
    report = said[2]
    assert [trouble is None for trouble in said] == [True, True, False, True, True]
    assert report is not None
    assert "left out 1 update" in report
    assert "rank 0: step 2, total nan" in report
    assert f"{term} nan" in report
    assert "images [20, 21, 22, 23]" in report


def test_too_many_in_a_row_stop_the_run_with_the_evidence() -> None:
    training = make_training()
    training.nonfinite.limit = 4
    kept = planted_loss(training, "cls", {1, 3, 4, 5, 6, 7, 8, 9})
    training.mixer = cast(Any, training.mixer).first
    with pytest.raises(NonFiniteLoss) as failure:
        epoch_of(training, 20, log_every=2)
    assert "5 steps in a row were not finite" in str(
        failure.value
    )  # steps 3 to 7, read after step 7
    assert "rank 0: step 3, total nan" in str(failure.value)
    assert "--amp bf16, --clip-grad 1.0, --attn-fp32, a lower --lr" in str(failure.value)
    assert len(kept) == 8
    evidence = failure.value.evidence
    assert evidence is not None
    assert torch.equal(evidence["images"], batch_of(7)[0])
    assert evidence["mixed_images"].shape == evidence["images"].shape
    assert "step 7" in evidence["report"]
    assert failure.value.exit_code == 3


def test_the_evidence_is_of_the_micro_batch_that_failed() -> None:
    training = make_training(accum_steps=2)
    training.nonfinite.limit = 2
    training.mixer = cast(Any, training.mixer).first
    planted_loss(training, "cls", {4, 6})  # the first micro-batches of steps 2 and 3
    meters = Meters()
    with pytest.raises(NonFiniteLoss) as failure:
        engine.train_one_epoch(
            training,
            [batch_of(number) for number in range(12)],
            first_step=0,
            meters=meters,
            log_every=100,
            on_log=lambda step, means, trouble: None,
        )
    evidence = failure.value.evidence
    assert evidence is not None
    assert torch.equal(evidence["images"], batch_of(6)[0])
    assert torch.equal(evidence["indices"], batch_of(6)[2])
    assert str(batch_of(6)[2].tolist()) in evidence["report"]
    assert (
        "mixed_images" not in evidence
    )  # another micro-batch has needed the device's memory since


def test_what_was_mixed_leaves_the_device_before_the_next_batch() -> None:
    training, held = make_training(), []
    mixer = training.mixer

    def look(images: Tensor, *rest: Any) -> Any:
        held.append([kept.mixed for kept in training.nonfinite.kept])
        return mixer(images, *rest)

    training.mixer = cast(Any, look)
    epoch_of(training, 3)
    assert held == [[], [{}], [{}]]
    assert "mixed_images" in training.nonfinite.kept[-1].mixed


def test_a_row_that_ended_before_anybody_looked_stops_the_run_too() -> None:
    training = make_training()
    training.nonfinite.limit = 3
    planted_loss(training, "cls", {3, 4, 5})
    training.mixer = cast(Any, training.mixer).first
    with pytest.raises(NonFiniteLoss) as failure:
        epoch_of(training, 20, log_every=7)
    assert "3 steps in a row were not finite" in str(failure.value)
    training = make_training()
    training.nonfinite.limit = 3
    kept = planted_loss(training, "cls", {2, 3, 4})
    training.mixer = cast(Any, training.mixer).first
    with pytest.raises(NonFiniteLoss, match="step 2, total nan"):
        epoch_of(training, 20, log_every=1000)
    assert len(kept) == 6  # looked at every third step, whatever the log does


def test_the_mean_of_the_log_leaves_such_steps_out() -> None:
    training = make_training()
    planted_loss(training, "cls", {1})
    training.mixer = cast(Any, training.mixer).first
    meters = Meters()
    epoch_of(training, 3, meters=meters)
    assert all(torch.isfinite(torch.tensor(value)) for value in meters.read().values())


@pytest.mark.parametrize("opt", ["adamw", "lamb"])
@pytest.mark.parametrize("amp", ["none", "fp16"])
@pytest.mark.parametrize("factor", [float("inf"), 1e25])
def test_a_gradient_that_is_not_finite_is_left_out_too(factor: float, amp: str, opt: str) -> None:
    """With 1e25 every value is finite, and their norm is not."""
    training, said = make_training(amp, opt), []
    network: Any = training.module.network
    network.head.weight.register_hook(lambda gradient: gradient * factor)
    before = weights_of(training.module)
    epoch_of(training, 2, log_every=2, on_log=lambda step, means, trouble: said.append(trouble))
    assert torch.equal(weights_of(training.module), before)
    assert "left out 2 updates" in said[0]
    assert "all losses were finite, the gradient was not: step 0" in said[0]


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_precisions_train_and_agree_roughly(amp: str) -> None:
    exact, rough = make_training("none"), make_training(amp)
    losses = [epoch_of(training, 4)["loss"] for training in (exact, rough)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert torch.isfinite(weights_of(rough.module)).all()
    assert all(parameter.dtype == torch.float32 for parameter in rough.module.parameters())


def test_clipping_bounds_the_gradient_the_optimizer_meets() -> None:
    training = make_training(clip_grad=1e-3)
    norms: list[float] = []
    training.optimizer.register_step_pre_hook(
        lambda *args: norms.append(
            float(
                torch.nn.utils.get_total_norm(
                    [p.grad for p in training.module.parameters() if p.grad is not None]
                )
            )
        )
    )
    logged = epoch_of(training, 2)["grad_norm"]
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for norm in norms)
    assert logged > 1e-2, "the log shows the norm before clipping"


def test_the_log_has_each_term_over_the_steps_that_had_it(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = iter([True, False, False, True])
    monkeypatch.setattr(Switch, "draw", lambda self, generator: Choice(True, next(choices)))
    training, seen = make_training(), []
    good = training.criterion

    def watch(output: Any, batch: Any) -> Any:
        terms = good(output, batch)
        seen.append({name: float(value.detach()) for name, value in terms.items()})
        return terms

    training.criterion = watch
    figures = epoch_of(training, 4)
    assert figures["loss"] == pytest.approx(sum(terms["total"] for terms in seen) / 4)
    assert figures["loss_fine"] == pytest.approx((seen[0]["fine"] + seen[3]["fine"]) / 2)
    assert figures["loss_con"] == pytest.approx((seen[0]["con"] + seen[3]["con"]) / 2)
    assert 0 <= figures["clean_acc1"] <= 100


def test_the_criterion_hears_of_each_step_before_its_micro_batches() -> None:
    training, loss = make_training(accum_steps=2), SMMixLoss(con_warmup=4)
    heard: list[float] = []

    def watch(output: Any, batch: Any) -> Any:
        heard.append(loss.weights["con"])
        return loss(output, batch)

    training.criterion, training.before_step = watch, loss.set_step
    epoch_of(training, 6, first_step=2)  # three steps, as of a run that is resumed
    assert heard == [0.5, 0.5, 0.75, 0.75, 1.0, 1.0]


def test_every_step_has_draws_of_its_own_and_repeats_them() -> None:
    training = make_training()
    draws = [
        torch.rand(3, generator=training.random(step, micro).own)
        for step in range(3)
        for micro in range(2)
    ]
    again = torch.rand(3, generator=training.random(1, 1).own)
    assert torch.equal(draws[3], again)
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


class Planted(nn.Module):
    """Stands for an `ImageModel` whose logits are the images' first pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Any:
        return type("Output", (), {"logits": images[:, 0, 0, :CLASSES]})


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_each_image_once(world_size: int) -> None:
    """Planted logits, 17 images, unequal shares: hits over all ranks equal a plain loop's."""
    generator = torch.Generator().manual_seed(0)
    images, labels = (
        torch.randn(17, 1, 1, 8, generator=generator),
        torch.randint(CLASSES, (17,), generator=generator),
    )
    model: Any = Planted()
    figures = []
    for rank in range(world_size):
        shard = list(EvalShard(17, rank, world_size))
        loader = [
            (images[shard[i : i + 4]], labels[shard[i : i + 4]]) for i in range(0, len(shard), 4)
        ]
        figures.append(
            engine.evaluate(model, loader, CPU, precision.make_autocast(CPU.device, "none"))
        )
    assert sum(part["images"] for part in figures) == 17
    hits = sum(part["acc1"] * part["images"] / 100 for part in figures)
    logits = images[:, 0, 0, :CLASSES]
    assert hits == pytest.approx(
        sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True))
    )
    assert all(part["acc5"] == 100 for part in figures), "top-5 of five classes is every class"
    loss = sum(part["loss"] * part["images"] for part in figures) / 17
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-6)


def test_an_evaluation_of_no_image_is_an_error() -> None:
    model: Any = Planted()
    autocast = precision.make_autocast(CPU.device, "none")
    with pytest.raises(InputError, match="no image was evaluated"):
        engine.evaluate(model, [], CPU, autocast)


def test_evaluation_leaves_modes_as_they_are() -> None:
    model: ImageModel = make_training().module.train()
    next(model.network.children()).eval()
    modes = [module.training for module in model.modules()]
    loader = [(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.long))]
    engine.evaluate(model, loader, CPU, precision.make_autocast(CPU.device, "none"))
    assert [module.training for module in model.modules()] == modes
