"""Convolutional networks: timm's own predictions, the energy of the final map against a slow loop,
regions, sizes, and running statistics that the motivating pass leaves alone."""

from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn

from engine import make_guide
from losses import soft_cross_entropy
from models.convnet import ConvNet, energy_score
from models.interface import ModelOutput
from models.weights import plain_weights
from smmix import pick_regions, region_scores
from tests.conftest import randomise
from training.precision import make_autocast

BF16 = make_autocast(torch.device("cpu"), "bf16")
NO_AMP = make_autocast(torch.device("cpu"), "none")
SIZE = (64, 96)  # 2 x 3 cells

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("test_resnet", {}),
    "resnet_max": ("test_resnet", {"global_pool": "max"}),
    "resnet_both": ("test_resnet", {"global_pool": "catavgmax"}),
    "convnext": ("test_convnext", {}),
    "convnext_v2": ("test_convnext2", {}),
    "convnext_norm_first": ("test_convnext", {"head_norm_first": True}),
    "convnext_hidden": ("test_convnext", {"head_hidden_size": 20}),
}
case = pytest.mark.parametrize("case", CASES)


def build(
    case: str = "resnet", separate: bool = False, size: tuple[int, int] | None = SIZE, **more: Any
) -> ConvNet:
    """A tiny model of 7 classes in evaluation mode, weights and running statistics drawn anew."""
    name, overrides = CASES[case]
    torch.manual_seed(1)
    network = timm.create_model(name, num_classes=7, **{**overrides, **more})
    model = ConvNet(cast(Any, network), separate, input_size=size)
    randomise(model)
    for module in model.modules():
        if (
            isinstance(module, nn.BatchNorm2d)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def images_for(model: ConvNet, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *model.input_size)


def some_mask() -> Tensor:
    return torch.tensor([[True] + 5 * [False], 3 * [False, True], 5 * [True] + [False]])


def score_of(output: ModelOutput) -> Tensor:
    assert output.image_attention is not None
    return output.image_attention


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


# ---------------------------------------------------------------------------------------- the score


def slow_energy(features: Tensor) -> Tensor:
    """Cell by cell, row-major, in float64."""
    batch, width, rows, columns = features.shape
    score = torch.zeros(batch, rows * columns, dtype=torch.float64)
    for b in range(batch):
        for r in range(rows):
            for c in range(columns):
                squares = [float(features[b, d, r, c]) ** 2 for d in range(width)]
                score[b, r * columns + c] = sum(squares) ** 0.5
        score[b] /= score[b].sum()
    return score


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_score_is_each_cells_share_of_the_energy(dtype: torch.dtype) -> None:
    features = (torch.randn(2, 5, 3, 4) * 10).to(dtype).requires_grad_()
    score = energy_score(features)
    assert score.dtype == torch.float32
    assert not score.requires_grad
    torch.testing.assert_close(score.double(), slow_energy(features.detach()), atol=1e-6, rtol=1e-5)


def test_a_dead_map_has_a_uniform_score() -> None:
    features = torch.zeros(2, 5, 3, 4)
    features[1, 2, 1, 3] = 1e-30
    score = energy_score(features)
    assert torch.equal(score[0], torch.full((12,), 1 / 12))
    assert score[1].isfinite().all()


def test_regions_are_picked_where_the_energy_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's score through Eq. 7: rows and columns are not exchanged on the way."""
    model = build(size=(128, 160))
    features = torch.full((2, 96, 4, 5), 0.5)
    features[0, :, 0, 3:], features[1, :, 2:, 1] = 2.0, 0.1  # the source's region, and the target's
    monkeypatch.setattr(model.network, "forward_features", lambda images: features)
    score = score_of(model(torch.zeros(2, 3, 128, 160), need_attention="image"))
    grid = score.unflatten(1, model.grid_size)
    assert divmod(int(grid[0].argmax()), 5) == (0, 3)
    assert divmod(int(grid[1].argmin()), 5) == (2, 1)
    windows = region_scores(score, model.grid_size, (1, 2))
    assert pick_regions(windows, largest=True)[0].tolist() == [0, 3]


# ------------------------------------------------------------------------------------- one contract


@case
def test_predictions_are_timms_and_scores_are_the_maps(case: str) -> None:
    model = build(case, drop_rate=0.2, drop_path_rate=0.1)
    name, overrides = CASES[case]
    own: Any = timm.create_model(name, num_classes=7, **overrides)
    own.load_state_dict(plain_weights(model), strict=True)
    own.eval()
    images = images_for(model)
    features = own.forward_features(images)
    for need_attention in (None, "image"):
        output = model(images, need_attention=need_attention)
        assert torch.equal(output.logits, own(images))
        assert (output.image_attention is not None) == (need_attention == "image")
        assert output.region_logits is None
        assert output.distillation_logits is None
    assert output.tokens.shape == (3, 6, features.shape[1])
    for cell in range(6):
        assert torch.equal(output.tokens[:, cell], features[:, :, cell // 3, cell % 3])
    score = score_of(output)
    torch.testing.assert_close(score.double(), slow_energy(features.detach()), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(score.sum(dim=1), torch.ones(3))


@case
@pytest.mark.parametrize("separate", [False, True])
def test_regions_are_classified_by_their_mean_cell(case: str, separate: bool) -> None:
    model = build(case, separate)
    images, mask = images_for(model), some_mask()
    output = model(images, source_mask=mask)
    assert output.region_logits is not None
    assert output.region_logits.shape == (3, 2, 7)
    for b in range(3):
        for region, inside in enumerate((True, False)):
            members = [output.tokens[b, n] for n in range(6) if bool(mask[b, n]) is inside]
            pooled = sum(members) / len(members)
            if model.token_head is None:
                expected = slow_classifier(case, model.network, pooled)
            else:
                expected = model.token_head(pooled)
            # weights drawn anew give logits in the thousands, of terms that cancel in some of them
            close = 1e-5 * max(1.0, float(expected.detach().abs().max()))
            torch.testing.assert_close(
                output.region_logits[b, region], expected, atol=close, rtol=0
            )


def slow_classifier(case: str, network: Any, pooled: Tensor) -> Tensor:
    """F of Eq. 3 on one mean cell (D,), written from the papers' layouts."""
    if case.startswith("resnet"):
        return network.fc(torch.cat((pooled, pooled)) if case == "resnet_both" else pooled)
    if case == "convnext_norm_first":
        return network.head.fc(pooled)
    norm = network.head.norm
    pooled = (pooled - pooled.mean()) / (
        pooled.var(correction=0) + norm.eps
    ).sqrt() * norm.weight + norm.bias
    if case == "convnext_hidden":
        pooled = nn.functional.gelu(network.head.pre_logits.fc(pooled))
    return network.head.fc(pooled)


def test_a_resnets_prediction_is_the_mix_of_its_regions() -> None:
    """logits(M) = lam logits(A) + (1 - lam) logits(B): one linear classifier of one mean."""
    model, mask = build(), some_mask()
    output = model(images_for(model), source_mask=mask)
    lam = mask.float().mean(dim=1)[:, None]
    assert output.region_logits is not None
    mixed = lam * output.region_logits[:, 0] + (1 - lam) * output.region_logits[:, 1]
    torch.testing.assert_close(output.logits, mixed, atol=1e-4, rtol=1e-4)


@case
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_every_parameter_gets_a_gradient(case: str, separate: bool, with_mask: bool) -> None:
    model = build(case, separate).train()
    images = images_for(model)
    make_guide(model, BF16)(images)
    with BF16():
        output = model(images, source_mask=some_mask() if with_mask else None)
    loss = soft_cross_entropy(output.logits, torch.eye(7)[:3])
    if output.region_logits is not None:
        loss = loss + soft_cross_entropy(output.region_logits[:, 0], torch.eye(7)[:3])
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@case
def test_score_stays_float32_under_autocast(case: str) -> None:
    model = build(case)
    images = images_for(model)
    plain = score_of(model(images, need_attention="image"))
    with BF16():
        output = model(images, need_attention="image")
    assert score_of(output).dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16
    assert (score_of(output) - plain).abs().max() < 0.1 * plain.max()


def test_the_guide_leaves_running_statistics_alone() -> None:
    model = build().train()
    images, before = images_for(model) + 3, running_statistics(model)
    assert before
    seen = make_guide(model, NO_AMP)(images)
    assert all(
        torch.equal(value, before[name]) for name, value in running_statistics(model).items()
    )
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(seen.logits, model.eval()(images).logits)
    model.train()(images)  # a step does change them
    assert any(
        not torch.equal(value, before[name]) for name, value in running_statistics(model).items()
    )


# -------------------------------------------------------------------------------------------- sizes


def test_the_grid_follows_from_the_input() -> None:
    assert build().grid_size == (2, 3)
    assert build().patch_size == (32, 32)
    assert build().input_size == SIZE
    assert build(size=None).input_size == (160, 160)  # the size timm names for it
    assert build("convnext", size=None).grid_size == (5, 5)
    fine = build(output_stride=8)
    assert (fine.grid_size, fine.patch_size) == ((8, 12), (8, 8))
    assert fine(images_for(fine), need_attention="image").tokens.shape == (3, 96, 96)


@pytest.mark.parametrize(
    ("size", "near"), [((64, 80), "64 64"), ((33, 64), "32 64"), ((16, 16), "32 32")]
)
def test_a_size_that_the_stride_does_not_divide_is_refused_with_the_fix(
    size: tuple[int, int], near: str
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"--input-size {size[0]} {size[1]}: .*stride of 32 pixels, such as {near}$",
    ):
        build(size=size)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_patch_size_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"--patch-size 8: .*no patches; leave the flag out"):
        ConvNet(cast(Any, timm.create_model(name)), input_size=SIZE, patch_size=8)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_network_without_pooling_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no pooling before its classifier"):
        ConvNet(cast(Any, timm.create_model(name, num_classes=0, global_pool="")), input_size=SIZE)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of \(64, 64\) pixels .*\(64, 96\)"):
        build()(torch.zeros(1, 3, 64, 64))
