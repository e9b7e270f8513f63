"""Toys of the mixing methods that are still to come, through the step as it is.

PuzzleMix needs gradients at the pixels, AutoMix a second network that learns and a loss on the
clean images too, TokenMix labels of its own form, TokenLabel a loss of its own. Each toy has one of
these needs and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

import engine
import utils
from config.checks import check_args
from config.flags import get_args_parser
from errors import InputError
from losses import SMMixLoss, Terms
from mixers.consistent import Consistent
from mixers.cutmix import CutMix
from mixers.interface import Guide, MixedBatch, Mixer, MixerContext, soft_labels
from mixers.masks import paste
from mixers.options import PastingOptions, option
from mixers.registry import METHODS, Method, all_flags, is_used
from mixers.transmix import TransMix
from models.build import build_model
from models.interface import ModelOutput
from pipeline.samples import Batch
from tests.mixing import make_switch
from training import optim, precision
from training.meters import Meters

CPU = utils.Processes(0, 1, torch.device("cpu"))
K = 5


def make_training(mixer: Any, extra: nn.Module | None = None, **settings: Any) -> engine.Training:
    utils.seed_globals("init", 0)
    model = build_model(
        "vit_nano_patch4_32", K, input_size=(16, 16), embed_dim=16, depth=2, num_heads=2
    )
    autocast = precision.make_autocast(CPU.device, "none")
    optimizer = optim.make_optimizer(model, {"opt": "adamw", "lr": 1e-2})
    if extra is not None:
        optimizer.add_param_group({"params": list(extra.parameters())})
    defaults: dict[str, Any] = {
        "criterion": SMMixLoss(),
        "mixer": mixer if isinstance(mixer, Mixer) else mixer(model),
    }
    return engine.Training(
        module=model,
        model=model.train(),
        guide=engine.make_guide(model, autocast),
        optimizer=optimizer,
        scaler=precision.make_scaler(CPU.device, "none"),
        autocast=autocast,
        processes=CPU,
        **{**defaults, **settings},
    )


def step(training: engine.Training) -> dict[str, float]:
    """One step on four images, and what the log says of it."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = Batch(images, torch.arange(4), torch.arange(4))
    engine.train_step(training, [batch], 0, meters := Meters())
    return meters.read()


class Plain(Mixer[None]):
    """A mixer that draws nothing."""

    def __init__(self) -> None:
        super().__init__(K)

    def draw(self, *_: Any) -> None:
        return None

    def __call__(self, images: Tensor, labels: Tensor, guide: Guide, random: Any) -> MixedBatch:
        return self.apply(images, labels, None, guide)


class BySensitivity(Plain):
    """Pastes the pixels that the loss depends on most."""

    def __init__(self, gradient: Any) -> None:
        super().__init__()
        self.gradient = gradient  # images, labels -> the same shape as the images

    def apply(self, images: Tensor, labels: Tensor, drawn: None, guide: Guide) -> MixedBatch:
        strength = self.gradient(images, labels).square().mean(dim=1, keepdim=True).flip(0)
        mask = strength > strength.mean(dim=(2, 3), keepdim=True)
        return self.label(*paste(images, images.flip(0), mask), labels, mask)


def test_gradients_at_the_pixels_come_through_a_function() -> None:
    seen: list[Any] = []

    def maker(model: Any) -> Mixer[None]:
        def gradient(images: Tensor, labels: Tensor) -> Tensor:
            with precision.eval_mode(model):
                inputs = images.detach().requires_grad_()
                loss = nn.functional.cross_entropy(model(inputs).logits, labels)
                (result,) = torch.autograd.grad(loss, inputs)
            seen.append(all(p.grad is None for p in model.parameters()) and model.training)
            return result

        return BySensitivity(gradient)

    training = make_training(maker)
    before = [p.detach().clone() for p in training.module.parameters()]
    assert step(training)["loss"] > 0
    assert seen == [True]
    assert not any(
        torch.equal(old, new) for old, new in zip(before, training.module.parameters(), strict=True)
    )


class Learned(Plain):
    """A small network chooses the mask and has a loss of its own; the model sees the mask without
    gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def apply(self, images: Tensor, labels: Tensor, drawn: None, guide: Guide) -> MixedBatch:
        weight = self.network(images).sigmoid()  # (B, 1, H, W)
        fixed = weight.detach()
        mixed = torch.lerp(images, images.flip(0), fixed)
        batch = self.label(mixed, fixed.mean(dim=(1, 2, 3)), labels)
        clean = soft_labels(labels, K, 0.1)
        return replace(
            batch,
            images=torch.cat((mixed, images)),  # the clean images are learned from too
            labels=torch.cat((batch.labels, clean)),
            terms={"mask": (weight.mean() - 0.1).abs()},
        )


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_a_second_network_learns_from_its_own_term(accum_steps: int) -> None:
    network = nn.Conv2d(3, 1, 1)
    training = make_training(Learned(network), network, accum_steps=accum_steps, clip_grad=1.0)
    before, rows = network.weight.detach().clone(), []
    training.module.register_forward_pre_hook(
        lambda module, args, kw: rows.append(len(kw["images"])), with_kwargs=True
    )
    logged = step(training)
    assert rows == [8]
    assert logged["loss_mask"] == pytest.approx(logged["loss"] - logged["loss_cls"], abs=1e-6)
    assert not torch.equal(network.weight, before)
    assert network.weight.grad is None  # cleared with the others


class Hindsight(CutMix):
    """Labels from what the model predicted for the mixed image itself."""

    def apply(self, images: Tensor, labels: Tensor, drawn: Any, guide: Guide) -> MixedBatch:
        def relabel(batch: MixedBatch, output: ModelOutput) -> MixedBatch:
            return replace(batch, labels=output.logits.detach().softmax(dim=1))

        return replace(super().apply(images, labels, drawn, guide), relabel=relabel)


def test_labels_may_be_known_only_after_the_forward_pass() -> None:
    met: list[tuple[Tensor, Tensor]] = []

    def criterion(output: ModelOutput, batch: MixedBatch) -> Terms:
        met.append((output.logits.detach().softmax(dim=1), batch.labels))
        return SMMixLoss()(output, batch)

    step(make_training(Hindsight(K), criterion=criterion))
    torch.testing.assert_close(met[0][0], met[0][1])


def test_a_loss_may_be_of_another_form() -> None:
    """Supervises each token; labels travel in a form of their own."""

    class PerToken(Plain):
        def apply(self, images: Tensor, labels: Tensor, drawn: None, guide: Guide) -> MixedBatch:
            return MixedBatch(
                images, soft_labels(labels, K, 0.0)[:, None].expand(-1, 16, -1)
            )  # (B, N, K)

    def maker(model: Any) -> Mixer[None]:
        training_model.append(model)
        return PerToken()

    def criterion(output: ModelOutput, batch: MixedBatch) -> Terms:
        logits = training_model[0].classify(output.tokens)  # (B, N, K)
        loss = -(batch.labels * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
        return {"total": loss, "tokens": loss}

    training_model: list[Any] = []
    logged = step(make_training(maker, criterion=criterion))
    assert logged["loss"] == logged["loss_tokens"] > 0


def test_something_new_may_be_asked_of_the_forward_pass() -> None:
    class Asking(MixedBatch):
        def forward_inputs(self) -> dict[str, Any]:
            return {**super().forward_inputs(), "need_attention": "image"}

    class Mix(Plain):
        def apply(self, images: Tensor, labels: Tensor, drawn: None, guide: Guide) -> MixedBatch:
            return Asking(images, soft_labels(labels, K, 0.1))

    seen: list[Tensor | None] = []

    def criterion(output: ModelOutput, batch: MixedBatch) -> Terms:
        seen.append(output.image_attention)
        return SMMixLoss()(output, batch)

    step(make_training(Mix(), criterion=criterion))
    assert seen[0] is not None


# ----------------------------------------------------------- a new method, from its flag to its mix


@dataclass(frozen=True)
class StripesOptions(PastingOptions):
    """The file of the flags."""

    stripe_width: int = option(4, "width of a stripe in pixels", "positive", type=int)


class Stripes(Plain):
    """The file of the method: pastes every second stripe of the source."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @classmethod
    def from_options(cls, options: StripesOptions, context: MixerContext) -> Self:
        return cls(options.stripe_width)

    def apply(self, images: Tensor, labels: Tensor, drawn: None, guide: Guide) -> MixedBatch:
        stripes = torch.arange(images.shape[3]) // self.width % 2 == 1
        mask = stripes.expand(len(images), 1, *images.shape[2:])
        return self.label(*paste(images, images.flip(0), mask), labels, mask)


@pytest.fixture
def stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line in the registry."""
    monkeypatch.setitem(METHODS, "stripes", Method(StripesOptions, f"{__name__}:Stripes"))


def message_of_checks(*words: str) -> str:
    with pytest.raises(InputError) as stop:
        check_args(get_args_parser().parse_args(words))
    return stop.value.text


@pytest.mark.usefixtures("stripes")
def test_a_flag_comes_with_its_method() -> None:
    parser = get_args_parser()
    assert "--stripe-width STRIPE_WIDTH width of a stripe in pixels" in " ".join(
        parser.format_help().split()
    )
    assert parser.parse_args(["--mixer", "stripes"]).stripe_width == 4
    check_args(parser.parse_args(["--mixer", "stripes", "--stripe-width", "3"]))
    assert message_of_checks("--mixer", "stripes", "--stripe-width", "0") == (
        "--stripe-width 0: must be above 0"
    )
    assert message_of_checks("--mixer", "cutmix", "--stripe-width", "3") == (
        "--stripe-width 3 (for stripes): --mixer cutmix has no use for it, leave it out"
    )
    assert is_used("stripe_width", {"mixer": "stripes"})
    assert not is_used("stripe_width", {"mixer": "cutmix"})


@pytest.mark.usefixtures("stripes")
def test_a_new_method_is_built_with_its_flag_and_what_every_method_can_have() -> None:
    plain: Any = make_switch(K, (4, 4), mixer="stripes", stripe_width=3).first
    assert (type(plain), plain.width) == (Stripes, 3)
    both: Any = make_switch(
        K, (4, 4), mixer="stripes", stripe_width=2, relabel="transmix", con_weight=1.0
    ).first
    assert [type(both), type(both.mixer), both.mixer.mixer.width] == [Consistent, TransMix, 2]
    assert step(make_training(both))["loss_con"] > 0


def test_two_methods_cannot_define_one_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Other(PastingOptions):
        fmix_decay: float = option(2.0, "another one", type=float)

    monkeypatch.setitem(METHODS, "other", Method(Other, f"{__name__}:Stripes"))
    with pytest.raises(ValueError, match="fmix_decay: two methods define it"):
        all_flags()


# ------------------------------------------------------------------------------------------- errors


def test_what_a_mixer_refuses_reaches_the_user() -> None:
    class Refusing(Plain):
        def apply(self, images: Tensor, labels: Tensor, drawn: None, guide: Guide) -> MixedBatch:
            raise InputError("--flag 3: cannot be")

    with pytest.raises(InputError, match="--flag 3"):
        step(make_training(Refusing()))
