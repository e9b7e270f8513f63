"""One contract over every family: SMMix and Mixup steps teach every parameter, and the guide leaves
no trace."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import engine
import utils
from errors import InputError
from losses import SMMixLoss
from mixers.smmix_options import VARIANTS
from mixers.switch import Choice, Switch
from models.build import FAMILIES, build_model, use_grad_checkpointing, wrap
from models.interface import AttentionOf, ImageModel, ModelOutput
from models.pvt import PVT
from models.weights import adapt_weights, load_strictly, plain_weights
from pipeline.samples import Batch
from tests.conftest import randomise
from tests.mixing import make_switch
from training import optim, precision
from training.meters import Meters

CPU = utils.Processes(0, 1, torch.device("cpu"))
CLASSES, SIDE = 5, 64

# A tiny member of each family: name and keywords. 2 x 2 tokens or more at 64 pixels.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "VisionTransformer": ("deit_tiny_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "VisionTransformerDistilled": (
        "deit_tiny_distilled_patch16_224",
        {"embed_dim": 24, "depth": 2, "num_heads": 3},
    ),
    "Cait": ("cait_xxs24_224", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "PyramidVisionTransformer": (
        "pvt_tiny",
        {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    ),
    "SwinTransformer": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": (1, 1, 1, 2), "num_heads": (1, 1, 2, 2)},
    ),
    "Beit": ("beit_base_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "Eva": (
        "eva02_tiny_patch14_224",
        {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3},
    ),
    "SwinTransformerV2": (
        "swinv2_tiny_window8_256",
        {"embed_dim": 8, "depths": (1, 1, 1, 2), "num_heads": (1, 1, 2, 2)},
    ),
    "PyramidVisionTransformerV2": (
        "pvt_v2_b0",
        {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    ),
    "Twins": (
        "twins_pcpvt_small",
        {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    ),
    "MaxxVit": ("test_maxvit", {}),
    "ConvNeXt": ("test_convnext", {}),
    "ResNet": ("test_resnet", {}),
}
# As few blocks as hold every kind of a family's: a compiler traces each block by itself.
ONE_OF_EACH: dict[str, dict[str, Any]] = {
    "VisionTransformer": {"depth": 1},
    "VisionTransformerDistilled": {"depth": 1},
    "Cait": {"depth": 1},
    "Beit": {"depth": 1},
    "Eva": {"depth": 1},
    "SwinTransformer": {"depths": (1, 2), "num_heads": (1, 2)},
    "SwinTransformerV2": {"depths": (1, 2), "num_heads": (1, 2)},
    "PyramidVisionTransformerV2": {
        "embed_dims": (8, 16),
        "num_heads": (1, 2),
        "depths": (1, 1),
        "sr_ratios": (2, 1),
        "mlp_ratios": (2, 2),
    },
    "MaxxVit": {"embed_dim": (16, 24), "depths": (1, 1), "transformer_dim_head": 8},
    "ConvNeXt": {"depths": (1, 1, 1, 1)},
}
WITH_CLASS_TOKEN = [
    "VisionTransformer",
    "VisionTransformerDistilled",
    "Cait",
    "PyramidVisionTransformer",
    "Beit",
    "Eva",
]


def make_model(
    family: str, num_classes: int = CLASSES, separate: bool = False, **more: Any
) -> ImageModel:
    name, settings = TINY[family]
    settings = {"input_size": (SIDE, SIDE), "separate_region_head": separate, **settings, **more}
    utils.seed_globals("init", num_classes)
    return build_model(name, num_classes, **settings)


def make_training(family: str, variant: str, **more: Any) -> engine.Training:
    model = make_model(family, separate=VARIANTS[variant].region_head == "separate", **more)
    autocast = precision.make_autocast(CPU.device, "none")
    mixer = make_switch(CLASSES, model.grid_size, variant=variant)
    return engine.Training(
        module=model,
        model=model,
        criterion=SMMixLoss(),
        mixer=mixer,
        guide=engine.make_guide(model, autocast),
        optimizer=optim.make_optimizer(model, {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}),
        scaler=precision.make_scaler(CPU.device, "none"),
        autocast=autocast,
        processes=CPU,
    )


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, SIDE, SIDE, generator=generator)
    return Batch(images, torch.arange(4), torch.arange(4))


def test_every_family_is_in_this_contract() -> None:
    covered: set[Any] = set()
    for name, _ in TINY.values():
        with torch.device("meta"):
            network = timm.create_model(name)
        covered.update(
            family.network_class for family in FAMILIES if isinstance(network, family.network_class)
        )
    assert covered == {family.network_class for family in FAMILIES}


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("family", TINY)
def test_two_steps_reach_every_parameter(
    family: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = iter([True, False])
    monkeypatch.setattr(Switch, "draw", lambda self, generator: Choice(True, next(choices)))
    training = make_training(family, variant)
    training.model.train()
    idle: list[str] = []
    training.optimizer.register_step_pre_hook(
        lambda *args: idle.extend(
            name for name, p in training.module.named_parameters() if p.grad is None
        )
    )
    before = [p.detach().clone() for p in training.module.parameters()]
    for step in range(2):
        engine.train_step(training, [batch_of(step)], step, meters := Meters())
        assert all(torch.isfinite(torch.tensor(value)) for value in meters.read().values())
    assert idle == []
    moved = [
        not torch.equal(old, new)
        for old, new in zip(before, training.module.parameters(), strict=True)
    ]
    assert all(moved)


HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang", "g++", "cl")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "backend"),
    [
        *((family, "eager") for family in TINY),
        pytest.param(
            "VisionTransformer",
            "inductor",
            marks=pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler"),
        ),
    ],
)
def test_a_compiled_model_takes_the_same_step(
    family: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced whole by dynamo; the code generator behind it is torch's affair, and runs once."""
    monkeypatch.setattr(Switch, "draw", lambda self, generator: Choice(True, True))
    losses, gradients = [], []
    for compiled in (False, True):
        training = make_training(family, "paper", **ONE_OF_EACH.get(family, {}))
        for module in training.module.modules():
            if hasattr(module, "drop_prob"):
                setattr(module, "drop_prob", 0.0)  # noqa: B010
        training.model.train()
        if compiled:
            torch._dynamo.reset()
            training.model = torch.compile(training.module, backend=backend, fullgraph=True)  # type: ignore[assignment]
            call = torch.compile(training.module.motivating_pass, backend="eager", fullgraph=True)
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
            lambda module, given, named, formats=formats: formats.append(
                (*given, *named.values())[0].is_contiguous(
                    memory_format=torch.channels_last
                )  # the images
            ),
            with_kwargs=True,
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


# ---------------------------------------------------------------------------------- layer decay


def decayed_groups(model: ImageModel, factor: float | None = 0.5) -> dict[str, tuple[float, bool]]:
    """Name of each parameter -> scale of its rate, and whether its weight decays."""
    settings = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": factor}
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optim.make_optimizer(model, settings).param_groups
    found = [
        (names[parameter], (group.get("lr_scale", 1.0), group["weight_decay"] > 0))
        for group in groups
        for parameter in group["params"]
    ]
    assert sorted(name for name, _ in found) == sorted(names.values()), "each exactly once"
    return dict(found)


@pytest.mark.parametrize("family", TINY)
def test_layer_decay_takes_each_parameter_once_and_decays_the_same_weights(family: str) -> None:
    model = make_model(family, separate=True)
    groups, plain = decayed_groups(model), decayed_groups(model, None)
    assert {name: decays for name, (_, decays) in groups.items()} == {
        name: decays for name, (_, decays) in plain.items()
    }
    scales = {name: scale for name, (scale, _) in groups.items()}
    assert min(scales.values()) > 0
    assert max(scales.values()) == 1
    heads = {"token_head.weight", "token_head.bias", *(n for n in scales if ".head" in n)}
    heads |= {name for name in scales if name.startswith("network.fc.")}
    assert {scales[name] for name in heads if "norm" not in name} == {1.0}
    first = next(iter(scales)) if family == "ResNet" else None
    stem = [n for n in scales if "patch_embed" in n or "stem" in n or n == first]
    assert {scales[stem[0]]} == {min(scales.values())}
    assert len(set(scales.values())) >= 4


@pytest.mark.parametrize("family", ["VisionTransformer", "PyramidVisionTransformer"])
def test_layer_decay_is_a_power_for_each_layer(family: str) -> None:
    model = make_model(family, separate=True)
    blocks = [f"blocks.{i}." for i in range(2)]  # of the ViT
    if family == "PyramidVisionTransformer":
        blocks = [f"block{stage}.0." for stage in range(1, 5)]
    last = len(blocks) + 1
    for name, (scale, _) in decayed_groups(model, 0.3).items():
        plain = name.removeprefix("network.")
        layer = next((i + 1 for i, block in enumerate(blocks) if plain.startswith(block)), 0)
        if plain.startswith("norm"):
            layer = len(blocks)
        elif "head" in plain:
            layer = last
        elif family == "PyramidVisionTransformer" and "_embed" in plain:
            stage = int(plain.split("_embed")[1][0])
            layer = stage if stage > 1 else 0
        elif family == "PyramidVisionTransformer" and plain == "cls_token":
            layer = 4
        assert scale == pytest.approx(0.3 ** (last - layer)), name


def test_a_family_without_checkpointing_says_so() -> None:
    with pytest.raises(InputError, match=r"--grad-checkpointing: Twins does not support it"):
        use_grad_checkpointing(make_training("Twins", "paper").module, "Twins")


@pytest.mark.parametrize("family", [family for family in TINY if family != "Twins"])
def test_recomputed_activations_give_the_same_gradients(family: str) -> None:
    gradients, kept = [], []
    passes: list[tuple[bool, AttentionOf | None]] = [
        (False, None),
        (True, None),
        (True, "image"),
        (True, "class"),
    ]
    for recompute, asked in passes:
        model = make_dropping(family)
        sizes: list[int] = []
        if recompute:
            use_grad_checkpointing(model, family)

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = loss_of(one_pass(model, asked))
        loss.backward()
        gradients.append(gradient_of(model))
        kept.append(sum(sizes))
    for ours in gradients[1:]:
        torch.testing.assert_close(ours, gradients[0], atol=1e-5, rtol=1e-4)
    assert kept[1] < 0.8 * kept[0]
    assert max(kept[2:]) < 1.02 * kept[1]  # the score does not put an end to it


# ------------------------------------------------------------------------- networks built by others


@pytest.mark.parametrize("family", TINY)
def test_a_network_is_wrapped_as_build_model_does(family: str) -> None:
    built = make_model(family).eval()
    model = wrap(built.network, input_size=(SIDE, SIDE)).eval()
    assert type(model) is type(built)
    assert (model.network, model.grid_size) == (built.network, built.grid_size)
    assert model.token_head is None
    assert wrap(built.network, True, (SIDE, SIDE)).token_head is not None
    with torch.no_grad():
        images = batch_of(0)[0]
        assert torch.equal(model(images).logits, built.network(images))


@pytest.mark.parametrize("family", TINY)
def test_a_network_without_classifier_is_refused(family: str) -> None:
    network: Any = make_model(family).network
    if hasattr(network, "reset_classifier"):
        network.reset_classifier(0)
    else:
        network.num_classes = 0
    with pytest.raises(InputError, match=r"the network cannot be trained.*no classifier"):
        wrap(network)


@pytest.mark.parametrize("family", ["VisionTransformer", "Beit", "Eva"])
def test_a_network_that_does_not_pool_or_drops_patches_is_refused(family: str) -> None:
    name, settings = TINY[family]
    settings = {"img_size": SIDE, **settings}
    with pytest.raises(InputError, match="no pooling"):
        wrap(timm.create_model(name, num_classes=5, global_pool="", **settings))
    if family != "Beit":  # timm's has no such setting
        with pytest.raises(InputError, match="drops patches"):
            wrap(timm.create_model(name, num_classes=5, patch_drop_rate=0.25, **settings))


def test_other_networks_and_sizes_are_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"the network: Linear has no .*supported are Vision"):
        wrap(nn.Linear(2, 2))
    with pytest.raises(InputError, match="across channels"):
        wrap(timm.create_model("xcit_nano_12_p16_224", depth=1))
    for family in ("VisionTransformer", "PyramidVisionTransformerV2"):
        with pytest.raises(InputError, match="takes images of 64 x 64 pixels, not 70 x 70"):
            wrap(make_model(family).network, input_size=(70, 70))


# ------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("family", TINY)
def test_drop_acts_where_the_page_of_flags_says(family: str) -> None:
    """Nowhere else, in particular not before the classifier of a network that has DeiT's places."""
    network: Any = make_model(family, drop=0.3).network
    layers = {
        re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        for name, module in network.named_modules()
        if isinstance(module, nn.Dropout) and module.p == 0.3
    }
    layers = {re.sub(r"^block\d", "block*", name) for name in layers}
    page = (Path(__file__).parent.parent / "docs" / "flags.md").read_text()
    (written,) = re.findall(rf"^\| {family} \| (.*) \|$", page, re.MULTILINE)
    if family == "ResNet":
        assert written == "before fc, without a layer of its own"
        assert (layers, network.drop_rate) == (set(), 0.3)
    else:
        assert layers == set(written.split(", "))


# --------------------------------------------------------------------------------------- the scores


def make_dropping(family: str, **more: Any) -> ImageModel:
    """In training mode, with dropout and drop path before the last block too, and attention that is
    not uniform."""
    depth: dict[str, Any] = {"depth": 3} if "depth" in TINY[family][1] else {}
    model = make_model(family, drop=0.1, drop_path=0.5, **{**depth, **more})
    randomise(model)
    return model.train()


def one_pass(model: Any, need_attention: AttentionOf | None, seed: int = 3) -> ModelOutput:
    """A forward pass that draws the same drops for the same seed."""
    images = batch_of(0)[0]
    grid = getattr(model, "module", model).grid_size
    mask = torch.arange(grid[0] * grid[1]).expand(len(images), -1) < 2
    torch.manual_seed(seed)
    return model(images, source_mask=mask, need_attention=need_attention)


def loss_of(output: ModelOutput) -> Tensor:
    assert output.region_logits is not None
    return (
        output.logits.float().log_softmax(1).square().sum()
        + output.region_logits.float().square().sum()
    )


def gradient_of(model: nn.Module) -> Tensor:
    """All gradients in one row; a parameter without one fails here."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]


def check_score(score: Tensor | None, model: ImageModel) -> None:
    assert score is not None
    assert score.shape == (4, model.grid_size[0] * model.grid_size[1])
    assert score.dtype == torch.float32
    assert not score.requires_grad
    assert (score >= 0).all()


@pytest.mark.parametrize("need_attention", ["image", "class"])
@pytest.mark.parametrize("family", TINY)
def test_the_score_is_asked_for_without_changing_the_prediction(
    family: str, need_attention: AttentionOf
) -> None:
    model = make_model(family).eval()
    images = batch_of(1)[0]
    with torch.no_grad():
        plain, scored, network = (
            model(images),
            model(images, need_attention=need_attention),
            model.network(images),
        )
    torch.testing.assert_close(plain.logits, network, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored.logits, network, atol=1e-5, rtol=1e-5)
    scores = {"image": scored.image_attention, "class": scored.class_attention}
    check_score(scores.pop(need_attention), model)
    assert [*scores.values(), plain.image_attention, plain.class_attention] == [None] * 3
    assert plain.tokens.shape[:2] == (4, model.grid_size[0] * model.grid_size[1])


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("need_attention", ["image", "class"])
@pytest.mark.parametrize("family", TINY)
def test_a_training_pass_learns_the_same_with_the_score(
    family: str, need_attention: AttentionOf, amp: str
) -> None:
    """Also under autocast, where older torch keeps what is cast without gradient for the score, see
    `features`."""
    autocast = precision.make_autocast(CPU.device, amp)
    outputs, gradients = [], []
    for asked in (None, need_attention):
        model = make_dropping(family)
        with autocast():
            outputs.append(one_pass(model, asked))
        loss_of(outputs[-1]).backward()
        gradients.append(gradient_of(model))
    check_score(
        outputs[1].class_attention if need_attention == "class" else outputs[1].image_attention,
        model,
    )
    for ours, plain in zip(outputs[1][:2], outputs[0][:2], strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert outputs[1].logits.dtype == (torch.float32 if amp == "none" else torch.bfloat16)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)


def slow_class_score(model: ImageModel, seed: int) -> Tensor:
    """The class token's row of the map that an unfused plain training pass uses; prefix tokens'
    columns are cut."""
    plain = copy.deepcopy(model)
    network: Any = plain.network
    parts: list[Tensor] = []
    if isinstance(model, PVT):  # knows the fused kernel only: from its queries, keys and values
        layer = network.blocks_of(3)[-1].attn
        for linear in (layer.q, layer.kv):
            linear.register_forward_hook(
                lambda module, given, made: parts.append(made.detach().double())
            )
    else:
        layer = (
            network.blocks_token_only if hasattr(network, "blocks_token_only") else network.blocks
        )[-1].attn
        layer.fused_attn = False
        layer.attn_drop.register_forward_pre_hook(
            lambda module, given: parts.append(given[0].detach().double())
        )
    one_pass(plain, None, seed)
    if isinstance(model, PVT):
        queries, keys = (part.unflatten(2, (-1, 8)) for part in parts)  # heads are 8 wide
        similarity = (
            torch.einsum("bhd,bthd->bht", queries[:, 0], keys[:, :, : layer.num_heads]) / 8**0.5
        )
        parts = [similarity.softmax(dim=-1)[:, :, None]]
    (attention,) = parts  # (B, H, T, T), or (B, H, 1, T)
    prefix = getattr(network, "num_prefix_tokens", 1)
    return attention[:, :, 0, prefix:].mean(dim=1)


@pytest.mark.parametrize("family", TINY)
def test_the_class_score_is_that_of_this_very_training_pass(family: str) -> None:
    model = make_dropping(family)
    seen: list[Tensor] = []
    for seed in (1, 2):
        score = one_pass(copy.deepcopy(model), "class", seed).class_attention
        assert score is not None
        seen.append(score)
        if not model.has_class_token:  # the substitute
            torch.testing.assert_close(
                score, one_pass(copy.deepcopy(model), "image", seed).image_attention
            )
            continue
        torch.testing.assert_close(score.double(), slow_class_score(model, seed), atol=1e-5, rtol=0)
        assert (score.sum(dim=1) <= 1 + 1e-5).all()
        assert score.std() > 1e-3  # not the uniform score that would agree with anything
    if model.has_class_token:
        assert not torch.allclose(
            seen[0], seen[1], atol=1e-3
        )  # other drops, other tokens in the last block


def test_which_families_have_a_class_token() -> None:
    assert [family for family in TINY if make_model(family).has_class_token] == WITH_CLASS_TOKEN


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", WITH_CLASS_TOKEN
)  # the others read the image tokens' score, as the step above does
def test_a_compiled_training_pass_gives_the_same_class_score(family: str) -> None:
    outputs, gradients = [], []
    for compiled in (False, True):
        model = make_dropping(family, **ONE_OF_EACH.get(family, {}))
        for module in model.modules():  # compiled code draws its drops in its own order
            for rate in {"drop_prob", "p"} & set(vars(module)):
                setattr(module, rate, 0.0)
        torch._dynamo.reset()
        call: Any = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        outputs.append(one_pass(call, "class"))
        loss_of(outputs[-1]).backward()
        gradients.append(gradient_of(model))
    check_score(outputs[1].class_attention, model)
    torch.testing.assert_close(
        outputs[1].class_attention, outputs[0].class_attention, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
def test_the_class_score_passes_through_ddp(family: str, tmp_path: Path) -> None:
    """One process: what counts is that the wrapper takes outputs without gradient, and finds every
    parameter."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, alone = DistributedDataParallel(make_dropping(family)), make_dropping(family)
        for seed in (1, 2):
            ours, theirs = one_pass(model, "class", seed), one_pass(alone, "class", seed)
            check_score(ours.class_attention, alone)
            torch.testing.assert_close(ours.class_attention, theirs.class_attention)
            loss_of(ours).backward()
            loss_of(theirs).backward()
        torch.testing.assert_close(gradient_of(model), gradient_of(alone))
    finally:
        dist.destroy_process_group()


def test_attention_across_channels_gives_no_score() -> None:
    with pytest.raises(InputError, match=r"--model xcit_nano_12_p16_224: Xcit .*across channels"):
        build_model("xcit_nano_12_p16_224", CLASSES, input_size=(SIDE, SIDE))


def test_a_convolutional_network_has_no_patches_to_choose() -> None:
    with pytest.raises(InputError, match=r"--patch-size 4: the patch size of resnet50 is fixed"):
        build_model("resnet50", CLASSES, input_size=(SIDE, SIDE), patch_size=4)
