"""One contract over every family: SMMix and Mixup steps teach every parameter, and the guide leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import engine
import optim
import utils
from checkpoints import load_strictly
from logs import Meters
from losses import SMMixLoss
from mixers.build import build_mixer
from mixers.switch import Choice, Switch
from models.build import FAMILIES, adapt_weights, build_model, plain_weights, use_grad_checkpointing
from models.interface import ImageModel
from smmix import VARIANTS

CPU = utils.Processes(0, 1, torch.device("cpu"))
CLASSES, SIDE = 5, 64

# A tiny member of each family: name and keywords. 2 x 2 tokens or more at 64 pixels.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "VisionTransformer": ("deit_tiny_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "VisionTransformerDistilled": ("deit_tiny_distilled_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "Cait": ("cait_xxs24_224", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "PyramidVisionTransformer": (
        "pvt_tiny", {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    ),
    "SwinTransformer": (
        "swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1, 1, 2), "num_heads": (1, 1, 2, 2)},
    ),
    "Beit": ("beit_base_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "Eva": ("eva02_tiny_patch14_224", {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}),
    "SwinTransformerV2": (
        "swinv2_tiny_window8_256", {"embed_dim": 8, "depths": (1, 1, 1, 2), "num_heads": (1, 1, 2, 2)},
    ),
    "PyramidVisionTransformerV2": (
        "pvt_v2_b0", {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    ),
    "Twins": (
        "twins_pcpvt_small", {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    ),
    "MaxxVit": ("test_maxvit", {}),
    "ConvNeXt": ("test_convnext", {}),
    "ResNet": ("test_resnet", {}),
}  # fmt: skip


def make_model(family: str, num_classes: int = CLASSES, separate: bool = False) -> ImageModel:
    name, settings = TINY[family]
    utils.seed_globals("init", num_classes)
    return build_model(name, num_classes, input_size=(SIDE, SIDE), separate_region_head=separate, **settings)


def make_training(family: str, variant: str) -> engine.Training:
    model = make_model(family, separate=VARIANTS[variant].region_head == "separate")
    autocast = engine.make_autocast(CPU.device, "none")
    mixer = build_mixer(
        "smmix", CLASSES, model.grid_size, smoothing=0.1, variant=VARIANTS[variant], side_ratio=(0.25, 0.75),
        mixup_alpha=0.8, cutmix_alpha=1.0, cutmix_minmax=None, mixup_prob=1.0, switch_prob=0.5, mode="batch",
    )  # fmt: skip
    return engine.Training(
        module=model, model=model, criterion=SMMixLoss(), mixer=mixer, guide=engine.make_guide(model, autocast),
        optimizer=optim.make_optimizer(model, {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}),
        scaler=engine.make_scaler(CPU.device, "none"), autocast=autocast, processes=CPU,
    )  # fmt: skip


def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, SIDE, SIDE, generator=generator), torch.arange(4), torch.arange(4)


def test_every_family_is_in_this_contract() -> None:
    covered: set[Any] = set()
    for name, _ in TINY.values():
        with torch.device("meta"):
            network = timm.create_model(name)
        covered.update(family.kind for family in FAMILIES if isinstance(network, family.kind))
    assert covered == {family.kind for family in FAMILIES}


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("family", TINY)
def test_two_steps_reach_every_parameter(family: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = iter([True, False])
    monkeypatch.setattr(Switch, "draw", lambda self, generator: Choice(True, next(choices)))
    training = make_training(family, variant)
    training.model.train()
    idle: list[str] = []
    training.optimizer.register_step_pre_hook(
        lambda *args: idle.extend(name for name, p in training.module.named_parameters() if p.grad is None)
    )
    before = [p.detach().clone() for p in training.module.parameters()]
    for step in range(2):
        engine.train_step(training, [batch_of(step)], step, meters := Meters())
        assert all(torch.isfinite(torch.tensor(value)) for value in meters.read().values())
    assert idle == []
    moved = [not torch.equal(old, new) for old, new in zip(before, training.module.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY)
def test_a_compiled_model_takes_the_same_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole by dynamo and autograd's own tracer; the code generator behind them is torch's affair."""
    monkeypatch.setattr(Switch, "draw", lambda self, generator: Choice(True, True))
    losses, gradients = [], []
    for compiled in (False, True):
        training = make_training(family, "paper")
        for module in training.module.modules():
            if hasattr(module, "drop_prob"):
                setattr(module, "drop_prob", 0.0)  # noqa: B010
        training.model.train()
        if compiled:
            torch._dynamo.reset()
            training.model = torch.compile(training.module, backend="aot_eager")  # type: ignore[assignment]
            call = torch.compile(training.module, backend="aot_eager")
            training.guide = engine.make_guide(training.module, training.autocast, call)
        seen: list[Tensor] = []
        training.optimizer.register_step_pre_hook(
            lambda *args, seen=seen, training=training: seen.extend(
                p.grad.flatten().clone() for p in training.module.parameters()
            )
        )
        engine.train_step(training, [batch_of(0)], 0, meters := Meters())
        losses.append(meters.read()["loss"])
        gradients.append(torch.cat(seen))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["ResNet", "ConvNeXt", "VisionTransformer", "SwinTransformer"])
def test_channels_last_takes_the_same_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Switch, "draw", lambda self, generator: Choice(True, True))
    losses = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        training = make_training(family, "paper")
        training.module.to(memory_format=memory_format)
        training.memory_format = memory_format
        formats: list[bool] = []
        training.module.register_forward_pre_hook(
            lambda module, given, formats=formats: formats.append(
                given[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
        engine.train_step(training, [batch_of(0)], 0, meters := Meters())
        losses.append(meters.read()["loss"])
        assert all(formats) == (memory_format is torch.channels_last)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("family", TINY)
def test_weights_move_to_other_classes_and_the_heads_are_said(family: str) -> None:
    old, new = make_model(family), make_model(family, num_classes=3)
    weights, notes = adapt_weights(new, plain_weights(old))
    load_strictly(new, weights, source="the test")
    ours, theirs = new.network.state_dict(), old.network.state_dict()
    changed = {key for key in ours if ours[key].shape != theirs[key].shape}
    assert changed
    assert all("head" in key or key.startswith("fc.") for key in changed)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() - changed)
    assert {note.split()[0] for note in notes} == changed


def test_a_family_without_checkpointing_says_so() -> None:
    with pytest.raises(utils.InputError, match=r"--grad-checkpointing: Twins does not offer it"):
        use_grad_checkpointing(make_training("Twins", "paper").module, "Twins")


@pytest.mark.parametrize("family", [family for family in TINY if family != "Twins"])
def test_recomputed_activations_give_the_same_gradients(family: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = make_training(family, "paper").module.train()
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                setattr(module, "drop_prob", 0.0)  # noqa: B010, mypy does not know it
        if recompute:
            use_grad_checkpointing(model, family)
        mask = torch.arange(model.grid_size[0] * model.grid_size[1]).expand(4, -1) < 2
        output = model(batch_of(0)[0], mask)
        assert output.region_logits is not None
        (output.logits.square().sum() + output.region_logits.square().sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", TINY)
def test_the_score_is_asked_for_without_changing_the_prediction(family: str) -> None:
    model = make_training(family, "paper").module.eval()
    images = batch_of(1)[0]
    with torch.no_grad():
        plain, scored, network = model(images), model(images, need_attention=True), model.network(images)
    torch.testing.assert_close(plain.logits, network, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored.logits, network, atol=1e-5, rtol=1e-5)
    rows, columns = model.grid_size
    assert scored.image_attention is not None
    assert scored.image_attention.shape == (4, rows * columns)
    assert scored.image_attention.dtype == torch.float32
    assert (scored.image_attention >= 0).all()
    assert plain.image_attention is None
    assert plain.tokens.shape[:2] == (4, rows * columns)


def test_attention_across_channels_gives_no_score() -> None:
    with pytest.raises(utils.InputError, match=r"--model xcit_nano_12_p16_224: a Xcit .*across channels"):
        build_model("xcit_nano_12_p16_224", CLASSES, input_size=(SIDE, SIDE))


def test_a_convolutional_network_has_no_patches_to_choose() -> None:
    with pytest.raises(utils.InputError, match=r"--patch-size 4: resnet50 has none to choose"):
        build_model("resnet50", CLASSES, input_size=(SIDE, SIDE), patch_size=4)
