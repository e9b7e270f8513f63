"""`--attn-fp32`: attention in float32 under autocast, in every family, and nothing else changed."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import InputError
from models.build import FAMILIES, build_model, use_float32_attention, use_grad_checkpointing
from models.float32_attention import InFloat32, attention_in_float32
from models.interface import AttentionOf, ImageModel, ModelOutput
from models.weights import plain_weights
from tests.conftest import randomise
from tests.image_folders import make_image_folder
from tests.runs import read_log, run_small, split
from tests.test_families import ONE_OF_EACH, TINY, gradient_of, loss_of, make_model, one_pass

CONVOLUTIONAL = ("ConvNeXt", "ResNet")
FP16, BF16 = torch.float16, torch.bfloat16
families = pytest.mark.parametrize(
    "family", [family for family in TINY if family not in CONVOLUTIONAL]
)


def make(family: str, in_float32: bool, **more: Any) -> ImageModel:
    """In training mode, without drops, far from its initial weights."""
    model = make_model(family, **more)
    randomise(model)
    if in_float32:
        use_float32_attention(model, family)
    return model.train()


def run(
    model: Any, dtype: torch.dtype | None, need_attention: AttentionOf | None = None
) -> ModelOutput:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return one_pass(model, need_attention)


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, InFloat32)]


def plant_huge_queries(layer: Any) -> None:
    """Multiplies what makes the queries, so that they and their products with the keys are beyond
    float16."""
    with torch.no_grad():
        if getattr(
            layer, "head_first", False
        ):  # MaxViT: queries, keys and values of a head stand together
            layer.qkv.weight.unflatten(0, (layer.num_heads, 3, -1))[:, 0].mul_(1e6)
        elif getattr(layer, "qkv", None) is not None:
            layer.qkv.weight[: len(layer.qkv.weight) // 3].mul_(1e6)
        else:
            layer.q.weight.mul_(1e6)


@families
def test_every_attention_layer_of_a_family_is_changed(family: str) -> None:
    model = make(family, True)
    inner = [
        module
        for module in model.modules()
        if re.search("Att(n|ention)", type(module).__name__)
        and not any(
            re.search("Att(n|ention)", type(part).__name__) for part in list(module.modules())[1:]
        )
    ]
    assert inner
    assert layers_of(model) == inner
    assert attention_in_float32(model.network) == len(inner)  # a second time changes nothing
    assert all(type(layer).__mro__[1:3] == (InFloat32, layer.plain) for layer in inner)


def test_all_families_are_here() -> None:
    wrappers = {type(make_model(family)) for family in TINY}
    assert wrappers == {family.wrapper for family in FAMILIES}


@pytest.mark.parametrize("need_attention", ["image", "class"])
@families
def test_logits_that_overflow_float16_stay_finite(family: str, need_attention: AttentionOf) -> None:
    fine = []
    for in_float32 in (False, True):
        model = make(family, in_float32)
        for name, layer in model.named_modules():
            if name.endswith(".attn"):
                plant_huge_queries(layer)
        output = run(model, FP16, need_attention)
        fine.append(all(value.isfinite().all() for value in output if value is not None))
    assert fine == [False, True]
    (
        loss_of(output) * 2**-20
    ).backward()  # as the scaler would scale it in the end: float16 is narrow elsewhere too
    assert gradient_of(model).isfinite().all()


@families
def test_without_autocast_nothing_changes(family: str) -> None:
    outputs, gradients, keys = [], [], []
    for in_float32 in (False, True):
        model = make(family, in_float32)
        outputs.append(run(model, None, "class"))
        loss_of(outputs[-1]).backward()
        gradients.append(gradient_of(model))
        keys.append(
            [
                *model.state_dict(),
                *plain_weights(model),
                *(name for name, _ in model.named_parameters()),
            ]
        )
    assert keys[0] == keys[1]
    assert torch.equal(gradients[0], gradients[1])
    for one, other in zip(*outputs, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@families
def test_bfloat16_comes_closer_to_float32(family: str) -> None:
    """In what each layer gives for the same input. What is outside of attention is as rough as
    before."""
    plain, ours = make(family, False), make(family, True)
    outputs = [run(model, BF16, "image") for model in (plain, ours)]
    assert (
        len(
            {
                tuple(value if value is None else value.dtype for value in output)
                for output in outputs
            }
        )
        == 1
    )
    errors: list[tuple[float, float]] = []

    def compare(layer: Any, given: Any, named: Any, made: Tensor) -> None:
        with torch.autocast("cpu", enabled=False):
            widened = [value.float() if isinstance(value, Tensor) else value for value in given]
            exact = layer.plain.forward(layer, *widened, **named)
        rough = layer.plain.forward(layer, *given, **named)
        assert made.dtype == rough.dtype == BF16
        errors.append((float((made - exact).norm()), float((rough - exact).norm())))

    for layer in layers_of(ours):
        layer.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        run(ours, BF16)
    assert len(errors) >= len(layers_of(ours))
    assert all(fine < 0.7 * rough for fine, rough in errors)


@families
def test_every_parameter_learns_and_recomputing_changes_nothing(family: str) -> None:
    gradients = []
    for recompute in (False, True)[
        : 1 if family == "Twins" else 2
    ]:  # timm's Twins cannot recompute
        model = make(family, True)
        if recompute:
            use_grad_checkpointing(model, family)
        loss_of(run(model, BF16, "image")).backward()
        gradients.append(gradient_of(model))
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


@families
def test_copies_and_averages_and_pickles_compute_alike_and_on_their_own(family: str) -> None:
    model = make(family, True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies: list[nn.Module] = [
        copy.deepcopy(model),
        ModelEmaV3(model).module,
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    with torch.no_grad():
        wanted = run(model, BF16, "image")
        for parameter in model.parameters():
            parameter.zero_()
        for other in copies:
            assert [type(layer) for layer in layers_of(other)] == [
                type(layer) for layer in layers_of(model)
            ]
            found = run(other.train(), BF16, "image")
            assert all(
                torch.equal(a, b)
                for a, b in zip(wanted, found, strict=True)
                if a is not None and b is not None
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["VisionTransformer", "PyramidVisionTransformer"]
)  # timm's, ours
def test_compiled_whole_it_computes_alike(family: str) -> None:
    torch._dynamo.reset()
    outputs, gradients = [], []
    for compiled in (False, True):
        model = make(family, True, **ONE_OF_EACH.get(family, {}))
        call: Any = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        outputs.append(run(call, FP16, "image"))
        loss_of(outputs[-1]).backward()
        gradients.append(gradient_of(model))
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(
        outputs[1].image_attention, outputs[0].image_attention, atol=1e-3, rtol=2e-2
    )
    assert float((gradients[1] - gradients[0]).norm()) < 0.05 * float(gradients[0].norm())


def test_it_passes_through_ddp(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped, alone = (
            DistributedDataParallel(make("VisionTransformer", True)),
            make("VisionTransformer", True),
        )
        for model in (wrapped, alone):
            loss_of(run(model, BF16, "image")).backward()
        assert torch.equal(gradient_of(wrapped), gradient_of(alone))
    finally:
        dist.destroy_process_group()


def test_attention_pooling_is_changed_too() -> None:
    settings: dict[str, Any] = {
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 3,
        "input_size": (32, 32),
        "patch_size": 8,
    }
    model = build_model("vit_base_patch16_siglip_224", 5, **settings)
    use_float32_attention(model, "siglip")
    assert [type(layer).__name__ for layer in layers_of(model)] == [
        "AttentionInFloat32",
        "AttentionPoolLatentInFloat32",
    ]


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "skresnet18"])
def test_a_convolutional_network_is_refused(name: str) -> None:
    with pytest.raises(
        InputError, match=f"--attn-fp32: {name} has no attention; leave the flag out"
    ):
        use_float32_attention(build_model(name, 5, input_size=(64, 64)), name)


@pytest.mark.slow
def test_a_run_trains_and_averages_so_and_its_checkpoint_is_as_ever(tmp_path: Path) -> None:
    photos = make_image_folder(tmp_path / "photos", ("ant", "bee"), per_class=8, size=(20, 20))
    flags = split("--amp bf16 --mixup-switch-prob 1 --data-path", photos)
    training = run_small(*flags, "--attn-fp32 --output-dir", tmp_path / "a").training
    assert len(layers_of(training.module)) == len(layers_of(training.ema.module)) == 4
    assert 0 < read_log(tmp_path / "a")[0]["train_loss"] < 10
    evaluated = run_small("--eval --resume", tmp_path / "a/checkpoint.pth")
    assert evaluated.code == 0, evaluated.err
    refused = run_small(*flags, "--attn-fp32 --model test_resnet --input-size 64")
    assert refused.code == 2
    assert "--attn-fp32: test_resnet has no attention" in refused.err
