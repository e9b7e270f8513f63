"""Ten training steps against a plain, slow reference written from the paper, one image and one
window at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor

import engine
import utils
from losses import SMMixLoss
from mixers.interface import StepRandom, draw_beta
from mixers.smmix_options import VARIANTS
from models.build import build_model
from models.interface import ImageModel
from pipeline.samples import Batch
from tests.mixing import make_switch
from training import optim, precision
from training.meters import Meters

CLASSES, SIDE, PATCH, BATCH, STEPS = 5, (24, 32), 8, 4, 10
GRID = (SIDE[0] // PATCH, SIDE[1] // PATCH)
RATE, DECAY, EMA_DECAY, SMOOTHING = 2e-3, 0.05, 0.9, 0.1
# Above rounding errors: softmax does not see a key's bias, whose gradient is nothing but these, and
# Adam would scale them up to whole steps.
EPS = 1e-5
CPU = utils.Processes(0, 1, torch.device("cpu"))


def tiny(separate: bool) -> ImageModel:
    utils.seed_globals("init", 0)
    return build_model(
        "deit_tiny_patch16_224",
        CLASSES,
        input_size=SIDE,
        patch_size=PATCH,
        embed_dim=24,
        depth=2,
        num_heads=3,
        separate_region_head=separate,
    )


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    return [
        Batch(
            torch.randn(BATCH, 3, *SIDE, generator=generator),
            torch.randint(CLASSES, (BATCH,), generator=generator),
            torch.arange(BATCH),
        )
        for _ in range(STEPS)
    ]


# ------------------------------------------------------------------------------- the slow reference


def slow_forward(model: ImageModel, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, image tokens and Eq. 6's score of a ViT, attention written out per head (Eq. 5)."""
    net: Any = model.network
    x = net.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = torch.cat((net.cls_token.expand(len(x), -1, -1), x), dim=1) + net.pos_embed
    score = None
    for block in net.blocks:
        qkv = block.attn.qkv(block.norm1(x))
        width, heads = x.shape[-1], block.attn.num_heads
        size, outputs, maps = width // heads, [], []
        for head in range(heads):
            q, k, v = (
                qkv[..., i * width + head * size : i * width + (head + 1) * size] for i in range(3)
            )
            attention = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(size), dim=-1)
            outputs.append(attention @ v)
            maps.append(attention[:, 1:, 1:].mean(dim=1))
        x = x + block.attn.proj(torch.cat(outputs, dim=-1))
        x = x + block.mlp(block.norm2(x))
        score = sum(maps) / heads
    x = net.norm(x)
    assert isinstance(score, Tensor)
    return net.head(x[:, 0]), x[:, 1:], score


def slow_window(score: Tensor, size: tuple[int, int], largest: bool) -> tuple[int, int]:
    """Eq. 7: the first best window in row-major order."""
    grid, best, corner = score.reshape(GRID), None, (0, 0)
    for i in range(GRID[0] - size[0] + 1):
        for j in range(GRID[1] - size[1] + 1):
            total = grid[i : i + size[0], j : j + size[1]].sum().item()
            if best is None or (total > best + 1e-9 if largest else total < best - 1e-9):
                best, corner = total, (i, j)
    return corner


def smooth(label: int) -> Tensor:
    return torch.tensor(
        [SMOOTHING / CLASSES + (1 - SMOOTHING) * (k == label) for k in range(CLASSES)]
    )


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return -(label * torch.log(torch.softmax(logits, -1))).sum()


def slow_smmix_loss(
    model: ImageModel, images: Tensor, labels: Tensor, random: StepRandom, variant: str
) -> dict[str, Tensor]:
    """Eq. 7 to 15, pair by pair."""
    arithmetic = VARIANTS[variant]
    delta = torch.rand((), generator=random.own, dtype=torch.float64).item()
    if arithmetic.region_size == "floor":
        size = tuple(
            min(max(math.floor((0.25 + 0.5 * delta) * side), 1), side - 1) for side in GRID
        )
    else:
        spans = [(math.floor(0.25 * side), math.floor(0.75 * side)) for side in GRID]
        drawn = [low + math.floor(delta * (high - low + 1)) for low, high in spans]
        size = tuple(min(max(d, 1), side - 1) for d, side in zip(drawn, GRID, strict=True))
    h, w = size
    lam = h * w / (GRID[0] * GRID[1])
    with torch.no_grad():
        clean_logits, _, scores = slow_forward(model, images)
    terms: dict[str, list[Tensor]] = {"cls": [], "fine": [], "con": []}
    for b in range(BATCH):
        a = BATCH - 1 - b
        si, sj = slow_window(scores[a], (h, w), True)
        ti, tj = slow_window(scores[b], (h, w), False)
        mixed = images[b].clone()
        for p in range(h * PATCH):
            for q in range(w * PATCH):
                mixed[:, ti * PATCH + p, tj * PATCH + q] = images[a][
                    :, si * PATCH + p, sj * PATCH + q
                ]
        logits, tokens, _ = slow_forward(model, mixed[None])
        cells = {(ti + p) * GRID[1] + tj + q for p in range(h) for q in range(w)}
        source = torch.stack([tokens[0, i] for i in sorted(cells)]).mean(0)
        target = torch.stack(
            [tokens[0, i] for i in range(GRID[0] * GRID[1]) if i not in cells]
        ).mean(0)
        classify: Any = model.token_head if model.token_head is not None else model.network.head
        label_a, label_b = smooth(int(labels[a])), smooth(int(labels[b]))
        terms["cls"].append(cross_entropy(logits[0], lam * label_a + (1 - lam) * label_b))
        terms["fine"].append(
            (cross_entropy(classify(source), label_a) + cross_entropy(classify(target), label_b))
            / 2
        )
        if arithmetic.consistency == "probs":
            reference = lam * clean_logits[a].softmax(-1) + (1 - lam) * clean_logits[b].softmax(-1)
        else:
            reference = (lam * clean_logits[a] + (1 - lam) * clean_logits[b]).softmax(-1)
        terms["con"].append((reference * (reference.log() - logits[0].softmax(-1).log())).sum())
    return {name: torch.stack(values).mean() for name, values in terms.items()}


def slow_mixup_loss(
    model: ImageModel, images: Tensor, labels: Tensor, random: StepRandom
) -> dict[str, Tensor]:
    lam = draw_beta(0.8, BATCH, random.own)[0]
    losses = []
    for b in range(BATCH):
        a = BATCH - 1 - b
        logits, _, _ = slow_forward(model, (lam * images[a] + (1 - lam) * images[b])[None])
        losses.append(
            cross_entropy(
                logits[0], lam * smooth(int(labels[a])) + (1 - lam) * smooth(int(labels[b]))
            )
        )
    return {"cls": torch.stack(losses).mean()}


def slow_run(
    model: ImageModel, variant: str, keys: list[StepRandom]
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Ten steps of AdamW and of the averaged weights, parameter by parameter."""
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {
        name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()
    }
    history = []
    for step, ((images, labels, *_), random) in enumerate(
        zip(batches(), keys, strict=True), start=1
    ):
        smmix = torch.rand(2, generator=random.shared)[1].item() < 0.5
        terms = (
            slow_smmix_loss(model, images, labels, random, variant)
            if smmix
            else slow_mixup_loss(model, images, labels, random)
        )
        total = sum(terms.values())
        assert isinstance(total, Tensor)
        model.zero_grad()
        total.backward()
        history.append(
            {
                "loss": total.item(),
                **{f"loss_{name}": value.item() for name, value in terms.items()},
            }
        )
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient = (
                    torch.zeros_like(p) if p.grad is None else p.grad
                )  # the second head on Mixup steps
                first, second = state[name]
                decay = (
                    0.0
                    if p.ndim <= 1 or name in ("network.pos_embed", "network.cls_token")
                    else DECAY
                )
                p.mul_(1 - RATE * decay)
                first.mul_(0.9).add_(gradient, alpha=0.1)
                second.mul_(0.999).add_(gradient * gradient, alpha=0.001)
                p.sub_(
                    RATE * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + EPS)
                )
                average[name].mul_(EMA_DECAY).add_(p, alpha=1 - EMA_DECAY)
    return history, average


# ----------------------------------------------------------------------------------------- the test


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_ten_steps_equal_the_slow_reference(variant: str) -> None:
    separate = VARIANTS[variant].region_head == "separate"
    model, plain = tiny(separate), tiny(separate)
    autocast = precision.make_autocast(CPU.device, "none")
    mixer = make_switch(CLASSES, model.grid_size, smoothing=SMOOTHING, variant=variant)
    training = engine.Training(
        module=model,
        model=model,
        criterion=SMMixLoss(),
        mixer=mixer,
        guide=engine.make_guide(model, autocast),
        optimizer=optim.make_optimizer(
            model, {"opt": "adamw", "lr": RATE, "weight_decay": DECAY, "eps": EPS}
        ),
        scaler=precision.make_scaler(CPU.device, "none"),
        autocast=autocast,
        processes=CPU,
        ema=ModelEmaV3(model, decay=EMA_DECAY),
    )
    model.train()
    plain.train()
    history = []
    for step, batch in enumerate(batches()):
        meters = Meters()
        engine.train_step(training, [batch], step, meters)
        history.append(
            {name: value for name, value in meters.read().items() if name.startswith("loss")}
        )
    expected, average = slow_run(
        plain, variant, [training.random(step, 0) for step in range(STEPS)]
    )

    kinds = {tuple(sorted(terms)) for terms in expected}
    assert len(kinds) == 2, "the ten steps must hold both SMMix and Mixup steps"
    for step, (ours, theirs) in enumerate(zip(history, expected, strict=True)):
        assert ours == pytest.approx(theirs, abs=2e-5), f"step {step}"
    for (name, ours_p), theirs_p in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            ours_p, theirs_p, atol=2e-5, rtol=1e-4, msg=f"{name} differs after ten steps"
        )
    for name, value in training.ema.module.named_parameters():
        torch.testing.assert_close(value, average[name], atol=2e-5, rtol=1e-4)
