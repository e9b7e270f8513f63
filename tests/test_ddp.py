"""Several processes on gloo: equal weights and averages, equal switches, and the gradients of one
process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import engine
import utils
from losses import SMMixLoss
from mixers.smmix_options import VARIANTS
from models.build import build_model
from models.interface import ImageModel
from pipeline.samples import Batch
from smmix import Drawn
from tests.launches import start
from tests.mixing import make_switch
from training import optim, precision
from training.meters import Meters
from training.nonfinite import NonFiniteLoss

CLASSES, SIDE, BATCH, STEPS = 5, (16, 24), 4, 6


def make_training(
    processes: utils.Processes, variant: str, accum_steps: int = 1
) -> engine.Training:
    """A tiny DeiT with everything a run has. The seed gives SMMix and Mixup steps."""
    utils.seed_globals("init", 0)
    model = build_model(
        "deit_tiny_patch16_224",
        CLASSES,
        input_size=SIDE,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        drop_path=0.2,
        separate_region_head=VARIANTS[variant].region_head == "separate",
    )
    wrapped: torch.nn.Module = model
    if processes.world_size > 1:
        wrapped = DistributedDataParallel(model)
    autocast = precision.make_autocast(processes.device, "none")
    mixer = make_switch(CLASSES, model.grid_size, variant=variant)
    return engine.Training(
        module=model,
        model=wrapped,
        criterion=SMMixLoss(),
        mixer=mixer,
        guide=engine.make_guide(model, autocast),
        optimizer=optim.make_optimizer(model, {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}),
        scaler=precision.make_scaler(processes.device, "none"),
        autocast=autocast,
        processes=processes,
        ema=ModelEmaV3(model, decay=0.9),
        accum_steps=accum_steps,
    )


def batch_of(rank: int, step: int, micro: int = 0) -> Batch:
    generator = utils.keyed_generator("test", rank, step, micro)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    return Batch(
        torch.randn(BATCH, 3, *SIDE, generator=generator),
        labels,
        torch.arange(BATCH) + 100 * rank + 10 * step,
    )


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def work(rank: int, world_size: int, folder: str, variant: str) -> None:
    """One rank: trains, then writes what the test compares."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    training = make_training(
        utils.Processes(rank, world_size, torch.device("cpu")), variant, accum_steps=2
    )
    training.model.train()
    seen: dict[str, Any] = {"gradients": {}, "choices": [], "sizes": []}
    _remember_first_gradients(training, seen)
    for step in range(STEPS):
        for micro in range(2):
            random = training.random(step, micro)
            seen["choices"].append(bool(training.mixer.draw(random.shared).first))
            seen["sizes"].append(training.mixer.first.draw(BATCH, SIDE, random.own).sizes)
        engine.train_step(
            training, [batch_of(rank, step, micro) for micro in range(2)], step, Meters()
        )
    seen.update(weights=flat(training.module), average=flat(training.ema.module))
    seen["searches"] = training.model.find_unused_parameters
    torch.save(seen, Path(folder) / f"{rank}.pt")
    if world_size == 2:
        seen["failure"] = fail_on_one_rank(training, rank)
        torch.save(seen, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _remember_first_gradients(training: engine.Training, seen: dict[str, Any]) -> None:
    """Keeps the gradients of the first step, as the optimizer meets them."""

    def keep(optimizer: Any, args: Any, kwargs: Any) -> None:
        if not seen["gradients"]:
            named = training.module.named_parameters()
            seen["gradients"] = {name: p.grad.clone() for name, p in named if p.grad is not None}

    training.optimizer.register_step_pre_hook(keep)


def fail_on_one_rank(training: engine.Training, rank: int) -> dict[str, Any]:
    """Rank 1's loss is infinite on three steps in a row before anybody looks."""
    training.nonfinite.limit = 3
    before, good = flat(training.module), training.criterion

    def planted(output: Any, batch: Any) -> Any:
        terms = good(output, batch)
        terms["cls"] = terms["cls"] + float("inf")
        return {**terms, "total": terms["total"] + float("inf")}

    for step in range(STEPS, STEPS + 3):
        training.criterion = planted if rank == 1 else good
        engine.train_step(training, [batch_of(rank, step), batch_of(rank, step, 1)], step, Meters())
    try:
        training.nonfinite.check()
    except NonFiniteLoss as error:
        unchanged = torch.equal(before, flat(training.module))
        return {
            "message": str(error),
            "unchanged": unchanged,
            "evidence": error.evidence is not None,
        }
    return {"message": "", "unchanged": False}


def run(tmp_path: Path, world_size: int, variant: str) -> list[dict[str, Any]]:
    ranks = [start(work, rank, world_size, str(tmp_path), variant) for rank in range(world_size)]
    assert [rank.wait(120) for rank in ranks] == [0] * world_size
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "variant"), [(2, "released"), (3, "paper")])
def test_ranks_agree_and_equal_one_process(tmp_path: Path, world_size: int, variant: str) -> None:
    ranks = run(tmp_path, world_size, variant)
    for other in ranks[1:]:
        assert torch.equal(ranks[0]["weights"], other["weights"])
        assert torch.equal(ranks[0]["average"], other["average"])
        assert ranks[0]["choices"] == other["choices"]
    assert set(ranks[0]["choices"]) == {True, False}, (
        "both SMMix and Mixup steps must be among them"
    )
    assert any(ranks[0]["sizes"] != other["sizes"] for other in ranks[1:]), (
        "region sizes are each rank's own"
    )
    assert not any(rank["searches"] for rank in ranks)

    expected = gradients_of_one_process(world_size, variant)
    assert expected.keys() == ranks[0]["gradients"].keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            ranks[0]["gradients"][name], gradient, atol=1e-6, rtol=1e-4, msg=name
        )

    if world_size == 2:
        assert [rank["failure"]["evidence"] for rank in ranks] == [False, True]
        for rank in ranks:
            failure = rank["failure"]
            assert failure["unchanged"], "no rank may update after a failed loss"
            assert f"step {STEPS}" in failure["message"]
            assert "cls inf" in failure["message"]
            assert f"rank 1: step {STEPS}" in failure["message"]
            assert str((torch.arange(BATCH) + 100 + 10 * STEPS).tolist()) in failure["message"]


def gradients_of_one_process(world_size: int, variant: str) -> dict[str, Tensor]:
    """The first step's gradients from one forward pass over the images of all ranks and
    micro-batches together."""
    training = make_training(utils.Processes(0, 1, torch.device("cpu")), variant)
    model: ImageModel = training.module.train()
    total = torch.zeros(())
    for micro in range(2):  # all ranks mix a micro-batch with the same method
        parts = []
        for rank in range(world_size):
            random = make_training_random(training, rank, micro)
            images, labels, *_ = batch_of(rank, 0, micro)
            parts.append((rank, training.mixer(images, labels, training.guide, random)))
        losses = []
        for (
            rank,
            batch,
        ) in parts:  # each rank draws its own drop path, so passes are apart but the loss is joint
            utils.seed_globals("forward", 0, 0, micro, rank)
            losses.append(
                training.criterion(model(batch.images, batch.source_mask), batch)["total"]
            )
        total = total + torch.stack(losses).mean() / 2
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def make_training_random(training: engine.Training, rank: int, micro: int) -> Any:
    training.processes = utils.Processes(rank, 1, torch.device("cpu"))
    return training.random(0, micro)


def test_the_joined_batch_gives_the_mean_of_the_ranks_gradients() -> None:
    """What lets two processes stand for one: with equal parts, the loss of the joined batch is the
    mean of theirs."""
    training = make_training(utils.Processes(0, 1, torch.device("cpu")), "paper")
    model = training.module.eval()
    mixer = training.mixer.first
    drawn = Drawn([(2, 3)] * len(batch_of(0, 0)[0]))
    parts = [mixer.apply(*batch_of(rank, 0)[:2], drawn, training.guide) for rank in range(2)]
    names = [
        "images",
        "labels",
        "lam",
        "source_labels",
        "target_labels",
        "source_mask",
        "reference_probs",
    ]
    together: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in names
    }
    joined = type(parts[0])(**together)
    gradients = []
    for batches in (parts, [joined]):
        model.zero_grad()
        losses = [training.criterion(model(b.images, b.source_mask), b)["total"] for b in batches]
        torch.stack(losses).mean().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
