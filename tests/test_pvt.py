"""PVT v1: what the released code recorded, the published sizes, a slow second writing, weights of
other sizes.

`tests/data/README.md` says what the recordings are.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, layer_norm, linear

from engine import make_guide
from errors import InputError
from losses import SMMixLoss, soft_cross_entropy
from mixers.interface import MixedBatch
from mixers.smmix_options import VARIANTS
from models import pvt
from models.build import build_model
from models.interface import ModelOutput
from models.pvt import PVT, PyramidVisionTransformer
from models.weights import adapt_weights, load_strictly, pick_weights, plain_weights
from smmix import Drawn, SMMix
from storage.checkpoints import load_checkpoint
from tests.conftest import randomise
from training.precision import make_autocast

DATA = Path(__file__).parent / "data"
NO_AMP = make_autocast(torch.device("cpu"), "none")
TOLERANCE = 1e-5
close = partial(torch.testing.assert_close, atol=TOLERANCE, rtol=0)

NARROW: dict[str, Any] = {
    "embed_dims": (8, 16, 24, 32),
    "num_heads": (1, 2, 3, 4),
    "depths": (1, 2, 1, 2),
}
SIZE = (64, 96)
SIZES = {
    "pvt_tiny": 13_229_288,
    "pvt_small": 24_485_864,
    "pvt_medium": 44_208_104,
    "pvt_large": 61_369_320,
}
DEPTHS = {
    "pvt_tiny": (2, 2, 2, 2),
    "pvt_small": (3, 4, 6, 3),
    "pvt_medium": (3, 4, 18, 3),
    "pvt_large": (3, 8, 27, 3),
}

STEPS: list[dict[str, Any]] = torch.load(DATA / "pvt_mini_records.pt", weights_only=True)
steps = pytest.mark.parametrize("record", STEPS, ids=lambda record: f"rect{record['rect']}")


def create(name: str, **settings: Any) -> PyramidVisionTransformer:
    network = timm.create_model(name, **settings)
    assert isinstance(network, PyramidVisionTransformer)
    return network


def make_pvt(
    size: tuple[int, int] = SIZE, separate: bool = False, num_classes: int = 7, **more: Any
) -> PVT:
    """A narrow PVT in evaluation mode, every weight far from its initial value."""
    torch.manual_seed(1)
    model = PVT(
        create("pvt_tiny", img_size=size, num_classes=num_classes, **{**NARROW, **more}), separate
    )
    randomise(model)
    with torch.no_grad():  # so that attention is neither uniform nor one token's alone
        for name, parameter in model.named_parameters():
            if name.endswith(("q.weight", "kv.weight", "fc1.weight", "fc2.weight", "sr.weight")):
                parameter.mul_(0.6)
    return model.eval()


def images_for(model: PVT, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *model.input_size)


def some_mask(model: PVT, count: int = 3) -> Tensor:
    """(count, N) with both regions in each row, of another size in each row."""
    order = torch.rand(count, model.grid_size[0] * model.grid_size[1]).argsort(dim=1)
    return order < torch.arange(1, count + 1)[:, None]


def blocks(network: nn.Module) -> list[pvt.Block]:
    return [module for module in network.modules() if isinstance(module, pvt.Block)]


# --------------------------------------------------------------------------------- released variant


@pytest.fixture(scope="module")
def recorded() -> PVT:
    """The recorded network, through the same doors as any foreign checkpoint."""
    checkpoint = load_checkpoint(DATA / "pvt_mini.pth")
    arch = {
        key: value for key, value in checkpoint["arch"].items() if key != "qkv_bias"
    }  # always on
    model = PVT(PyramidVisionTransformer(**arch), separate_region_head=True)
    weights, notes = adapt_weights(model, pick_weights(checkpoint))
    assert notes == []
    assert load_strictly(model, weights, source="pvt_mini.pth") == []
    assert plain_weights(model).keys() == pick_weights(checkpoint).keys()
    return model.train()


def recorded_images(record: dict[str, Any]) -> Tensor:
    images = torch.randn(
        record["x_shape"], generator=torch.Generator().manual_seed(record["x_seed"])
    )
    close(images.flatten()[::1999], record["x_sample"])
    return images


def recorded_mix(record: dict[str, Any], images: Tensor) -> Tensor:
    """The recorded mixed images: which patch of which image lies where."""
    side, patch = record["side"], images.shape[2] // record["side"]
    mixed = torch.empty_like(images)
    for b in range(len(images)):
        for place, origin in enumerate(record["mixed_origins"][b].tolist()):
            owner, cell = divmod(origin, side * side)
            (row, column), (old_row, old_column) = divmod(place, side), divmod(cell, side)
            mixed[b, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = (
                images[
                    owner,
                    :,
                    old_row * patch : (old_row + 1) * patch,
                    old_column * patch : (old_column + 1) * patch,
                ]
            )
    return mixed


def apply(record: dict[str, Any], guide: Any, variant: str = "released") -> MixedBatch:
    side, rect = (record["side"],) * 2, (record["rect"],) * 2
    mixer = SMMix(record["n_classes"], side, record["label_smoothing"], variant=VARIANTS[variant])
    images = recorded_images(record)
    return mixer.apply(images, record["y"], Drawn([rect] * len(images)), guide)


@steps
def test_the_network_predicts_as_recorded(recorded: PVT, record: dict[str, Any]) -> None:
    clean = make_guide(recorded, NO_AMP)(recorded_images(record))
    close(clean.logits, record["logits"])
    close(clean.image_attention, record["attention"])


@steps
def test_a_whole_step_is_the_recorded_one(recorded: PVT, record: dict[str, Any]) -> None:
    mixed = apply(record, make_guide(recorded, NO_AMP))
    assert torch.equal(mixed.images, recorded_mix(record, recorded_images(record)))
    assert mixed.source_mask is not None
    assert torch.equal(mixed.source_mask, record["source_mask"])
    close(mixed.labels, record["mixed_target"])
    close(mixed.reference_probs, record["consistency_logits"].softmax(dim=-1))
    output = recorded(mixed.images, source_mask=mixed.source_mask)
    close(output.logits, record["mixed_logits"])
    close(
        output.region_logits,
        torch.stack((record["source_region_logits"], record["target_region_logits"]), dim=1),
    )
    terms = SMMixLoss()(output, mixed)
    assert terms.keys() == {"total", "cls", "fine", "con"}
    for name, term in terms.items():
        close(term, record[f"loss_{name}"])


@steps
def test_the_papers_consistency_term_is_another_one(recorded: PVT, record: dict[str, Any]) -> None:
    mixed = apply(
        record,
        lambda images: ModelOutput(record["logits"], images.new_zeros(0), record["attention"]),
        "paper",
    )
    terms = SMMixLoss()(recorded(mixed.images, source_mask=mixed.source_mask), mixed)
    close(terms["cls"], record["loss_cls"])
    assert (terms["con"] - record["loss_con"]).detach().abs() > 10 * TOLERANCE


# ------------------------------------------------------------------------------- published settings


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_and_depths(name: str) -> None:
    with torch.device("meta"):
        network = create(name)
        separate = PVT(network, separate_region_head=True)
    assert sum(parameter.numel() for parameter in network.parameters()) == SIZES[name]
    assert sum(parameter.numel() for parameter in separate.parameters()) == SIZES[name] + 513_000
    assert tuple(len(network.blocks_of(stage)) for stage in range(4)) == DEPTHS[name]
    assert (separate.grid_size, separate.patch_size, separate.input_size) == (
        (7, 7),
        (32, 32),
        (224, 224),
    )


def test_tokens_keys_and_parts_per_stage() -> None:
    """The table of the paper's architecture at 224 pixels, read off a running network of full
    width."""
    network = create("pvt_tiny", depths=(1, 1, 1, 1)).eval()
    seen: dict[int, list[tuple[int, ...]]] = {stage: [] for stage in range(4)}
    for stage in range(4):
        attention = network.blocks_of(stage)[0].attn
        for layer in (
            attention.q,
            attention.kv,
        ):  # what queries and what keys and values are made of
            layer.register_forward_pre_hook(
                lambda _, inputs, s=stage: seen[s].append(tuple(inputs[0].shape))
            )
    with torch.no_grad():
        assert network(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    assert seen == {
        0: [(1, 3136, 64), (1, 49, 64)],
        1: [(1, 784, 128), (1, 49, 128)],
        2: [(1, 196, 320), (1, 49, 320)],
        3: [(1, 50, 512), (1, 50, 512)],
    }
    assert network.grid_sizes == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [tuple(getattr(network, f"pos_embed{n}").shape[:2]) for n in range(1, 5)] == [
        (1, 3136),
        (1, 784),
        (1, 196),
        (1, 50),
    ]
    each = [network.blocks_of(stage)[0] for stage in range(4)]
    assert [block.attn.num_heads for block in each] == [1, 2, 5, 8]
    assert [block.mlp.fc1.weight.shape[0] // block.mlp.fc1.weight.shape[1] for block in each] == [
        8,
        8,
        4,
        4,
    ]
    assert [hasattr(block.attn, "sr") for block in each] == [True, True, True, False]
    assert [block.attn.sr.kernel_size for block in each[:3]] == [(8, 8), (4, 4), (2, 2)]
    assert [block.attn.sr.stride for block in each[:3]] == [(8, 8), (4, 4), (2, 2)]
    projections = [getattr(network, f"patch_embed{n}").proj for n in range(1, 5)]
    assert (
        [p.kernel_size[0] for p in projections]
        == [p.stride[0] for p in projections]
        == [4, 2, 2, 2]
    )


def test_two_epsilons() -> None:
    norms = {
        name: module.eps
        for name, module in make_pvt().network.named_modules()
        if isinstance(module, nn.LayerNorm)
    }
    small = {name for name, eps in norms.items() if eps == 1e-6}
    assert small == {name for name in norms if name.endswith(("norm1", "norm2")) or name == "norm"}
    assert {norms[name] for name in norms.keys() - small} == {1e-5}
    assert len(norms.keys() - small) == 4 + sum(
        NARROW["depths"][:3]
    )  # patch embeddings, reductions


@pytest.mark.parametrize(
    ("rate", "depths"), [(0.3, (2, 2, 2, 2)), (0.1, (1, 2, 3, 4)), (0.0, (1, 1, 1, 1))]
)
def test_drop_path_rises_over_the_blocks_of_all_stages(
    rate: float, depths: tuple[int, ...]
) -> None:
    network = make_pvt(depths=depths, drop_path_rate=rate).network
    rates = [float(getattr(block.drop_path, "drop_prob", 0.0)) for block in blocks(network)]
    assert rates == pytest.approx(torch.linspace(0, rate, sum(depths)).tolist())


def test_drop_path_drops_both_branches() -> None:
    block = pvt.Block(16, 2, 4, reduction=2, drop=0.0, drop_path=1.0).train()
    tokens = torch.randn(3, 8, 16)
    assert torch.equal(block(tokens, (2, 4)), tokens)
    assert not torch.equal(block.eval()(tokens, (2, 4)), tokens)


def test_dropout_is_where_pvt_has_it() -> None:
    network = make_pvt(drop_rate=0.25).network
    dropouts = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Dropout) and module.p == 0.25
    ]
    assert len(dropouts) == 1 + 3 * sum(
        NARROW["depths"]
    )  # positions; attention's output; MLP twice


def test_initial_weights() -> None:
    network = PyramidVisionTransformer(64, num_classes=1000, depths=(1, 1, 1, 1))
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.1), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert bool((module.weight == 1).all()), name
            assert not module.bias.any(), name
        elif isinstance(
            module, nn.Conv2d
        ):  # PyTorch's own: uniform between -1 / sqrt(fan in) and 1 / sqrt(fan in)
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                assert float(parameter.detach().abs().max()) <= bound, name
                assert float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.2), (
                    name
                )
    for parameter in (network.cls_token, *(getattr(network, f"pos_embed{n}") for n in range(1, 5))):
        assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.15)
        assert float(parameter.detach().abs().max()) < 0.1


def test_the_class_token_alone_is_exempt_from_weight_decay() -> None:
    assert make_pvt().no_weight_decay() == {"network.cls_token"}


def test_a_score_of_a_fresh_model_is_about_uniform() -> None:
    model = PVT(PyramidVisionTransformer(SIZE, **NARROW)).eval()
    score = model(images_for(model), need_attention="image").image_attention
    assert score.sum(dim=1).tolist() == pytest.approx([6 / 7] * 3, abs=0.01)


# ------------------------------------------------------------------------ predictions and the score


def slow_network(model: PVT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Final normed tokens and the last attention map (B, H, T, T), in float64 from the weights
    alone."""
    w = {key: value.double() for key, value in model.network.state_dict().items()}
    feature_map, rows, columns = images.double(), *images.shape[-2:]
    for stage in range(1, 5):
        stride = 4 if stage == 1 else 2
        rows, columns, kernel = (
            rows // stride,
            columns // stride,
            w[f"patch_embed{stage}.proj.weight"],
        )
        tokens = patches_times(feature_map, kernel, w[f"patch_embed{stage}.proj.bias"])
        tokens = normed(tokens, w, f"patch_embed{stage}.norm", 1e-5)
        if stage == 4:
            tokens = torch.cat((w["cls_token"].expand(len(tokens), -1, -1), tokens), dim=1)
        tokens = tokens + w[f"pos_embed{stage}"]
        for n in range(NARROW["depths"][stage - 1]):
            block = f"block{stage}.{n}"
            seen = normed(tokens, w, f"{block}.norm1", 1e-6)
            others = seen
            if stage < 4:
                grid = seen.reshape(len(seen), rows, columns, -1).permute(0, 3, 1, 2)
                others = patches_times(
                    grid, w[f"{block}.attn.sr.weight"], w[f"{block}.attn.sr.bias"]
                )
                others = normed(others, w, f"{block}.attn.norm", 1e-5)
            queries = linear(seen, w[f"{block}.attn.q.weight"], w[f"{block}.attn.q.bias"])
            keys_values = linear(others, w[f"{block}.attn.kv.weight"], w[f"{block}.attn.kv.bias"])
            keys, values = keys_values[..., : seen.shape[-1]], keys_values[..., seen.shape[-1] :]
            heads, maps = NARROW["num_heads"][stage - 1], []
            mixed = torch.zeros_like(queries)
            for h in range(heads):
                own = slice(h * 8, h * 8 + 8)  # all heads are 8 wide
                maps.append(
                    (queries[..., own] @ keys[..., own].transpose(1, 2) / 8**0.5).softmax(dim=-1)
                )
                mixed[..., own] = maps[-1] @ values[..., own]
            tokens = tokens + linear(
                mixed, w[f"{block}.attn.proj.weight"], w[f"{block}.attn.proj.bias"]
            )
            hidden = linear(
                normed(tokens, w, f"{block}.norm2", 1e-6),
                w[f"{block}.mlp.fc1.weight"],
                w[f"{block}.mlp.fc1.bias"],
            )
            tokens = tokens + linear(
                gelu(hidden), w[f"{block}.mlp.fc2.weight"], w[f"{block}.mlp.fc2.bias"]
            )
        feature_map = (
            tokens.permute(0, 2, 1).reshape(len(tokens), -1, rows, columns)
            if stage < 4
            else feature_map
        )
    return normed(tokens, w, "norm", 1e-6), torch.stack(maps, dim=1)


def normed(tokens: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    return layer_norm(
        tokens, tokens.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps
    )


def patches_times(images: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """A convolution whose stride is its kernel's side, as patches times a matrix: (B, D, R, C) ->
    (B, N, D_out)."""
    side = kernel.shape[-1]
    patches = images.unfold(2, side, side).unfold(3, side, side)  # (B, D, R, C, side, side)
    return torch.einsum("bdrcij,odij->brco", patches, kernel).flatten(1, 2) + bias


def test_predictions_tokens_and_score_are_those_of_a_slow_loop() -> None:
    model = make_pvt()
    images = images_for(model)
    tokens, attention = slow_network(model, images)
    output = model(images, need_attention="image")
    close(output.tokens.double(), tokens[:, 1:])
    w = model.network.state_dict()
    close(
        output.logits.double(),
        linear(tokens[:, 0], w["head.weight"].double(), w["head.bias"].double()),
        atol=1e-4,
    )
    score = output.image_attention
    assert score.shape == (3, 6)
    assert score.dtype == torch.float32
    assert not score.requires_grad
    for b in range(3):
        for j in range(6):
            received = [float(attention[b, h, 1 + i, 1 + j]) for h in range(4) for i in range(6)]
            assert float(score[b, j]) == pytest.approx(sum(received) / 24, abs=1e-6)
    of_class = model(images, need_attention="class").class_attention
    close(of_class.double(), attention[:, :, 0, 1:].mean(dim=1))
    assert float(score.std(dim=1).min()) > 0.01  # far from uniform
    assert bool((score.sum(dim=1) < 1).all())


def test_logits_are_the_same_with_and_without_attention() -> None:
    model = make_pvt()
    images = images_for(model)
    asked, not_asked = model(images, need_attention="image"), model(images)
    assert not_asked.image_attention is None
    assert torch.equal(asked.logits, not_asked.logits)
    assert torch.equal(asked.tokens, not_asked.tokens)
    assert torch.equal(asked.logits, model.network(images))


def test_the_score_stays_float32_under_autocast() -> None:
    model = make_pvt()
    images = images_for(model)
    plain = model(images, need_attention="image").image_attention
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, need_attention="image")
    assert output.logits.dtype == torch.bfloat16
    assert output.image_attention.dtype == torch.float32
    # bfloat16 has 8 bits, and how sums are rounded differs between processors
    assert (output.image_attention - plain).abs().max() < 0.2 * plain.max()


@pytest.mark.parametrize("separate", [False, True])
def test_regions_are_classified_by_their_mean_token(separate: bool) -> None:
    model = make_pvt(separate=separate)
    images, mask = images_for(model), some_mask(model)
    output = model(images, source_mask=mask)
    classify = model.token_head or model.network.head
    for b in range(3):
        for region, inside in enumerate((True, False)):
            members = [output.tokens[b, n] for n in range(6) if bool(mask[b, n]) is inside]
            close(output.region_logits[b, region], classify(sum(members) / len(members)))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_every_parameter_gets_a_gradient_on_every_step(
    separate: bool, with_mask: bool, amp: str
) -> None:
    model = make_pvt(separate=separate, drop_path_rate=0.1).train()
    images, labels = images_for(model), torch.eye(7)[:3]
    autocast = make_autocast(torch.device("cpu"), amp)
    make_guide(model, autocast)(images)  # as in a real step: nothing of it may linger
    with autocast():
        output = model(images, source_mask=some_mask(model) if with_mask else None)
    loss = soft_cross_entropy(output.logits, labels)
    if output.region_logits is not None:
        loss = loss + soft_cross_entropy(output.region_logits[:, 0], labels)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == []
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)
    idle = [name for name, grad in grads.items() if grad is not None and not grad.any()]
    assert {name.split(".")[0] for name in idle} == (
        {"token_head"} if separate and not with_mask else set()
    )


def test_gradient_checkpointing_changes_nothing() -> None:
    plain = make_pvt(separate=True).train()
    saving = copy.deepcopy(plain)
    saving.network.set_grad_checkpointing()
    images, mask = images_for(plain), some_mask(plain)
    for model in (plain, saving):
        output = model(images, source_mask=mask, need_attention="image")
        (output.logits.square().sum() + output.region_logits.square().sum()).backward()
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    held = [count_saved(model, images) for model in (plain, saving)]
    assert held[1] < held[0] / 2
    saving.network.set_grad_checkpointing(False)
    assert count_saved(saving, images) == held[0]


def count_saved(model: PVT, images: Tensor) -> int:
    """Numbers kept for the backward pass."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(images)
    return sum(sizes)


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", SIZES)
def test_the_builder_finds_them(name: str) -> None:
    model = build_model(
        name, 7, input_size=SIZE, separate_region_head=True, **{**NARROW, "drop_path": 0.1}
    )
    assert isinstance(model, PVT)
    assert (model.grid_size, model.input_size) == ((2, 3), SIZE)
    output = model(images_for(model), source_mask=some_mask(model), need_attention="image")
    assert output.logits.shape == (3, 7)
    assert output.region_logits.shape == (3, 2, 7)


def test_what_cannot_be_built_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"--input-size 64 100: .*32x32.*64 96"):
        build_model("pvt_tiny", 7, input_size=(64, 100), **NARROW)
    with pytest.raises(InputError, match=r"--model pvt_tiny: .*patch_size can only be 4"):
        build_model("pvt_tiny", 7, input_size=SIZE, patch_size=16)
    assert build_model("pvt_tiny", 7, input_size=SIZE, patch_size=4, **NARROW).input_size == SIZE


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"patch_size": (4, 8)}, "patch_size can only be 4"),
        ({"img_size": (31, 64)}, "smaller than one final token of 32"),
        ({"depths": (2, 2, 2)}, "4 stages"),
        ({"depths": (2, 2, 2, 0)}, "at least one block"),
        ({"sr_ratios": (8, 4, 2, 2)}, "no reduction"),
        ({"num_heads": (1, 2, 3, 8)}, "3 heads do not divide a width of 320"),
    ],
)
def test_settings_that_make_no_pvt(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PyramidVisionTransformer(**settings)
    with pytest.raises(ValueError, match="no weights of PVT"):
        timm.create_model("pvt_tiny", pretrained=True)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"\(96, 64\) pixels.*\(64, 96\)"):
        make_pvt()(torch.zeros(1, 3, 96, 64))


def test_a_new_classifier() -> None:
    network = make_pvt().network
    network.reset_classifier(5)
    assert network(torch.zeros(1, 3, *SIZE)).shape == (1, 5)
    network.reset_classifier(0)
    assert network(torch.zeros(1, 3, *SIZE)).shape == (1, 32)
    assert network.get_classifier() is network.head


def resized(position: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bilinear, image part only: what PVT does while running."""
    grid = position[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)
    grid = interpolate(grid, new, mode="bilinear")
    return torch.cat((position[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


@pytest.mark.parametrize(
    ("old_size", "new_size", "old_grid"),
    [
        ((64, 64), (96, 96), None),
        ((64, 64), (64, 96), None),
        ((96, 96), (64, 64), (3, 3)),
        ((64, 96), (96, 96), (2, 3)),
        ((64, 96), (96, 64), (2, 3)),  # as many tokens, other places
        ((64, 64), (32, 128), (2, 2)),
        ((224, 224), (448, 448), None),  # the new stage 2 has as many tokens as the old stage 1
        ((448, 448), (224, 224), None),
    ],
)
def test_each_stage_is_resized_from_its_own_old_grid(
    old_size: tuple[int, int], new_size: tuple[int, int], old_grid: Any
) -> None:
    more: dict[str, Any] = {
        "embed_dims": (8, 8, 8, 8),
        "num_heads": (1, 1, 1, 1),
        "depths": (1, 1, 1, 1),
    }
    old, new = make_pvt(old_size, **more), make_pvt(new_size, **more)
    before = {key: value.clone() for key, value in plain_weights(old).items()}
    weights, notes = adapt_weights(new, plain_weights(old), old_grid)
    assert load_strictly(new, weights, source="test") == []
    after = plain_weights(new)
    for stage, (was, now) in enumerate(
        zip(old.network.grid_sizes, new.network.grid_sizes, strict=True)
    ):
        key = f"pos_embed{stage + 1}"
        torch.testing.assert_close(after[key], resized(before[key], int(stage == 3), was, now))
        assert notes[stage].startswith(f"{key} resized from ")
    assert len(notes) == 4
    assert all(
        torch.equal(after[key], before[key]) for key in before if not key.startswith("pos_embed")
    )
    assert new(images_for(new, 1)).logits.isfinite().all()


@pytest.mark.parametrize("old_grid", [None, (2, 3)])
def test_weights_that_fit_are_taken_as_they_are(old_grid: Any) -> None:
    old, new = make_pvt(), PVT(PyramidVisionTransformer(SIZE, num_classes=7, **NARROW)).eval()
    weights, notes = adapt_weights(new, plain_weights(old), old_grid)
    assert notes == []
    load_strictly(new, weights, source="test")
    images = images_for(new)
    assert torch.equal(new(images).logits, old(images).logits)


def test_weights_of_another_architecture_do_not_load() -> None:
    model = make_pvt()
    for other in (make_pvt(depths=(1, 2, 2, 2)), make_pvt(embed_dims=(8, 16, 24, 64))):
        weights, _ = adapt_weights(model, plain_weights(other))
        with pytest.raises(InputError, match="does not fit"):
            load_strictly(model, weights, source="a file")


# -------------------------------------------------------------------------- a second implementation


def names_there(key: str) -> list[str]:
    """Our key -> the same tensor's in transformers (two for the joint keys and values)."""
    part, *rest = key.split(".")
    leaf, kind, stage = (
        rest[-1] if rest else "",
        part.rstrip("1234"),
        int(part[-1]) - 1 if part[-1].isdigit() else 3,
    )
    place = f"pvt.encoder.patch_embeddings.{stage}"
    if kind == "block":
        inner = f"pvt.encoder.block.{stage}.{rest[0]}"
        names = {
            "norm1": ["layer_norm_1"],
            "norm2": ["layer_norm_2"],
            "mlp.fc1": ["mlp.dense1"],
            "mlp.fc2": ["mlp.dense2"],
            "attn.q": ["attention.self.query"],
            "attn.kv": ["attention.self.key", "attention.self.value"],
            "attn.sr": ["attention.self.sequence_reduction"],
            "attn.norm": ["attention.self.layer_norm"],
            "attn.proj": ["attention.output.dense"],
        }[".".join(rest[1:-1])]
        return [f"{inner}.{name}.{leaf}" for name in names]
    if kind == "patch_embed":
        return [f"{place}.{'projection' if rest[0] == 'proj' else 'layer_norm'}.{leaf}"]
    whole = {"pos_embed": f"{place}.position_embeddings", "cls_token": f"{place}.cls_token"}
    return [
        whole.get(kind) or f"{'classifier' if kind == 'head' else 'pvt.encoder.layer_norm'}.{leaf}"
    ]


@torch.no_grad()
def test_predictions_are_those_of_transformers() -> None:
    """Development only: PVT v1-Tiny at 224 pixels, random weights in both."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PvtForImageClassification(transformers.PvtConfig(num_labels=1000)).eval()
    ours = create("pvt_tiny").eval()
    for parameter in ours.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.03)
    weights: dict[str, Tensor] = {}
    for key, value in ours.state_dict().items():
        names = names_there(key)
        weights.update(zip(names, value.chunk(len(names)), strict=True))
    theirs.load_state_dict(weights, strict=True)
    for name, module in theirs.named_modules():  # it has one epsilon for all norms
        if name.endswith("self.layer_norm") or (
            "patch_embeddings" in name and name.endswith("layer_norm")
        ):
            module.eps = 1e-5
    images = torch.randn(2, 3, 224, 224)
    found, wanted = ours(images), theirs(images, output_attentions=True)
    print(
        f"largest difference {float((found - wanted.logits).abs().max()):.1e} of "
        f"{float(wanted.logits.std()):.2f}"
    )
    torch.testing.assert_close(found, wanted.logits, atol=1e-4, rtol=1e-4)
    score = PVT(ours)(images, need_attention="image").image_attention
    torch.testing.assert_close(
        score, wanted.attentions[-1][:, :, 1:, 1:].mean(dim=(1, 2)), atol=1e-6, rtol=0
    )
