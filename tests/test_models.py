"""One contract for every plain vision transformer: timm's own predictions, Eq. 6 and Eq. 10 to 12
against slow loops, gradients for every parameter, weights from other sizes; and the motivating pass
of `engine.make_guide`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention, ResPostBlock
from torch import Tensor, nn
from torch.nn.functional import interpolate

from engine import make_guide, make_teacher
from errors import InputError
from losses import soft_cross_entropy
from models.blocks import attention_map
from models.build import ALIASES, build_model, use_distillation
from models.interface import (
    GuideOutput,
    ImageModel,
    class_attention_score,
    image_attention_score,
    pool_regions,
)
from models.weights import adapt_weights, load_strictly, plain_weights, restore_model, to_model_keys
from tests.conftest import TINY, MakeModel
from training.precision import eval_mode, make_autocast

BF16 = make_autocast(torch.device("cpu"), "bf16")
NO_AMP = make_autocast(torch.device("cpu"), "none")

MEAN: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_patch16_224", {}),
    "deit_dropping": ("deit_tiny_patch16_224", {"drop": 0.2, "drop_path": 0.3}),
    "deit_patch4": ("deit_small_patch16_224", {"patch_size": 4, "input_size": (16, 8)}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "vit": ("vit_tiny_patch16_224", {}),
    "vit_no_bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "vit_avg": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "vit_avg_norm_first": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "no_class_token": ("vit_tiny_patch16_224", MEAN),
    "no_class_token_norm_first": ("vit_tiny_patch16_224", {**MEAN, "fc_norm": False}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "registers_gap": ("vit_medium_patch16_reg4_gap_256", {}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "layer_scale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "post_norm": ("vit_tiny_patch16_224", {"block_fn": ResPostBlock}),
    "pre_norm": ("vit_base_patch16_clip_224", {}),
    "nano": ("vit_nano_patch4_32", {"depth": None, "num_heads": None}),
}
case = pytest.mark.parametrize("case", CASES)


def build(make_model: MakeModel, case: str, **more: Any) -> ImageModel:
    name, overrides = CASES[case]
    return make_model(name, **{**overrides, **more})


def timms_own(model: ImageModel, case: str) -> nn.Module:
    """timm's model of the same settings with the same weights."""
    name, overrides = CASES[case]
    settings = {key: value for key, value in {**TINY, **overrides}.items() if value is not None}
    settings["img_size"] = settings.pop("input_size")
    for ours, theirs in (("drop", "drop_rate"), ("drop_path", "drop_path_rate")):
        if ours in settings:
            settings[theirs] = settings.pop(ours)
    own = timm.create_model(name, num_classes=7, **settings)
    own.load_state_dict(plain_weights(model), strict=True)
    return own.eval()


def images_for(model: ImageModel, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *model.input_size)


def some_mask(model: ImageModel, count: int = 3) -> Tensor:
    """(count, N) with both regions in each row, of another size in each row."""
    tokens = model.grid_size[0] * model.grid_size[1]
    order = torch.rand(count, tokens).argsort(dim=1)
    return order < torch.arange(1, count + 1)[:, None]


def map_used(own: nn.Module, images: Tensor) -> Tensor:
    """(B, H, T, T): the map that timm's unfused last block really uses."""
    last: Any = own.blocks[-1]  # type: ignore[index]
    last.attn.fused_attn = False
    maps: list[Tensor] = []
    hook = last.attn.attn_drop.register_forward_pre_hook(
        lambda _, inputs: maps.append(inputs[0].detach())
    )
    with torch.no_grad():
        own(images)
    hook.remove()
    (attention,) = maps
    return attention


def slow_score(own: nn.Module, images: Tensor, prefix: int) -> Tensor:
    """Eq. 5 and 6 from that map."""
    attention = map_used(own, images)
    batch, heads, total, _ = attention.shape
    score = torch.zeros(batch, total - prefix, dtype=torch.float64)
    for b in range(batch):
        for j in range(prefix, total):
            column = attention[b, :, :, j].double()
            score[b, j - prefix] = (
                sum(float(column[h, prefix:].sum()) for h in range(heads))
                / heads
                / (total - prefix)
            )
    return score


def grad_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ----------------------------------------------------------------------- Eq. 6 and Eq. 10, 11 alone


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_score_is_the_mean_over_heads_and_image_queries(prefix: int) -> None:
    attention = torch.randn(2, 3, prefix + 6, prefix + 6, dtype=torch.float64).softmax(dim=-1)
    score = image_attention_score(attention, prefix)
    assert score.dtype == torch.float32
    for b in range(2):
        for j in range(6):
            values = [attention[b, h, prefix + i, prefix + j] for h in range(3) for i in range(6)]
            assert float(score[b, j]) == pytest.approx(float(sum(values)) / 18, abs=1e-7)
    if prefix == 0:
        torch.testing.assert_close(score.sum(dim=1), torch.ones(2))
    else:
        assert (score.sum(dim=1) < 1).all()


@pytest.mark.parametrize("queries", [1, 8])
@pytest.mark.parametrize("prefix", [1, 2])
def test_class_score_is_the_first_rows_mean_over_heads(prefix: int, queries: int) -> None:
    attention = torch.randn(2, 3, queries, prefix + 6, dtype=torch.float64).softmax(dim=-1)
    score = class_attention_score(attention, prefix)
    assert score.dtype == torch.float32
    assert score.shape == (2, 6)
    for b in range(2):
        for j in range(6):
            values = [attention[b, h, 0, prefix + j] for h in range(3)]
            assert float(score[b, j]) == pytest.approx(float(sum(values)) / 3, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_score_of_a_low_precision_map_is_averaged_in_float32(dtype: torch.dtype) -> None:
    attention = torch.rand(2, 3, 65, 65).to(dtype)
    torch.testing.assert_close(
        image_attention_score(attention, 1), attention[:, :, 1:, 1:].float().mean(dim=(1, 2))
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_regions_are_mean_tokens_inside_and_outside(autocast: bool) -> None:
    tokens, mask = torch.randn(3, 10, 4), torch.rand(3, 10) < 0.4
    mask[0], mask[1] = True, False
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        pooled = pool_regions(tokens, mask)
    assert pooled.dtype == torch.float32
    for b in range(3):
        for region, inside in enumerate((True, False)):
            members = [tokens[b, n] for n in range(10) if bool(mask[b, n]) is inside]
            expected = (
                torch.stack(members).mean(dim=0) if members else torch.zeros(4)
            )  # empty: zeros, not NaN
            torch.testing.assert_close(pooled[b, region], expected)


# --------------------------------------------------------------------------- predictions and scores


@case
def test_predictions_and_scores_are_timms(make_model: MakeModel, case: str) -> None:
    model = build(make_model, case)
    own, images = timms_own(model, case), images_for(model)
    expected = own(images)
    for need_attention in (None, "image"):
        output = model(images, need_attention=need_attention)
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
        assert (output.image_attention is not None) == (need_attention == "image")
        assert output.region_logits is None
        assert output.distillation_logits is None
    prefix = model.network.num_prefix_tokens
    assert isinstance(prefix, int)
    features = own.forward_features(images)  # type: ignore[operator]
    torch.testing.assert_close(output.tokens, features[:, prefix:], atol=1e-5, rtol=1e-5)

    score = output.image_attention
    assert score is not None
    assert score.dtype == torch.float32
    assert not score.requires_grad
    assert score.shape == (3, model.grid_size[0] * model.grid_size[1])
    torch.testing.assert_close(score.double(), slow_score(own, images, prefix), atol=1e-6, rtol=0)
    sums = score.sum(dim=1)
    assert (
        ((sums - 1).abs() < 1e-6).all() if prefix == 0 else ((sums > 0) & (sums < 1 + 1e-6)).all()
    )


@case
def test_class_scores_are_timms(make_model: MakeModel, case: str) -> None:
    model = build(make_model, case)
    own, images = timms_own(model, case), images_for(model)
    output, prefix = model(images, need_attention="class"), model.network.num_prefix_tokens
    assert isinstance(prefix, int)
    assert output.image_attention is None
    score, expected = output.class_attention, slow_score(own, images, prefix)  # the substitute
    assert score is not None
    if model.has_class_token:
        expected = map_used(own, images).double()[:, :, 0, prefix:].mean(dim=1)
    assert model.has_class_token == (
        "class_token" not in CASES[case][1] and case != "registers_gap"
    )
    torch.testing.assert_close(score.double(), expected, atol=1e-6, rtol=0)


def test_score_of_a_fresh_model_is_about_uniform() -> None:
    model = build_model("deit_tiny_patch16_224", 7, **TINY).eval()
    score = model(torch.randn(2, 3, 32, 48), need_attention="image").image_attention
    assert score is not None
    assert score.sum(dim=1).tolist() == pytest.approx([24 / 25] * 2, abs=0.01)


@case
def test_score_stays_float32_under_autocast(make_model: MakeModel, case: str) -> None:
    model = build(make_model, case)
    images = images_for(model)
    plain = model(images, need_attention="image").image_attention
    with BF16():
        output = model(images, need_attention="image")
    assert plain is not None
    assert output.image_attention is not None
    assert output.image_attention.dtype == torch.float32
    assert not output.image_attention.requires_grad
    assert (output.image_attention - plain).abs().max() < 0.1 * plain.max()
    assert output.logits.dtype == torch.bfloat16


def test_similarities_are_computed_in_float32_under_autocast() -> None:
    """Queries and keys that bfloat16 holds exactly: whatever differs from float64 was lost after
    them."""
    layer = Attention(16, num_heads=2, qkv_bias=True)
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.randint(-2, 3, (48, 16)) / 4)
        layer.qkv.bias.copy_(torch.randint(-2, 3, (48,)) / 4)
    tokens = torch.randint(-2, 3, (3, 9, 16)) / 4
    with BF16():
        ours = attention_map(layer, tokens)
    queries_keys = (
        tokens.double() @ layer.qkv.weight[:32].detach().double().T
        + layer.qkv.bias[:32].detach().double()
    )
    queries, keys = queries_keys.unflatten(2, (2, 2, 8)).permute(
        2, 0, 3, 1, 4
    )  # (B, H, T, D / H) each
    assert torch.equal(queries_keys, queries_keys.bfloat16().double())
    expected = (queries @ keys.transpose(-2, -1) / 8**0.5).softmax(dim=-1)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=0)


@case
@pytest.mark.parametrize("separate", [False, True])
def test_regions_are_classified_by_their_mean_token(
    make_model: MakeModel, case: str, separate: bool
) -> None:
    model = build(make_model, case, separate_region_head=separate)
    images, mask = images_for(model), some_mask(model)
    output = model(images, source_mask=mask)
    torch.testing.assert_close(output.logits, model(images).logits)
    assert output.region_logits is not None
    assert output.region_logits.shape == (3, 2, 7)
    network: Any = model.network
    for b in range(3):
        for region, inside in enumerate((True, False)):
            members = [
                output.tokens[b, n] for n in range(mask.shape[1]) if bool(mask[b, n]) is inside
            ]
            pooled = sum(members) / len(members)
            if separate:
                assert model.token_head is not None
                expected = model.token_head(pooled)
            else:
                expected = network.head(network.fc_norm(pooled))
                if case == "distilled":  # its own prediction is the mean of two classifiers
                    expected = (expected + network.head_dist(pooled)) / 2
            torch.testing.assert_close(
                output.region_logits[b, region], expected, atol=1e-5, rtol=1e-5
            )


def test_a_mean_pooled_prediction_is_the_mix_of_its_regions(
    tiny_mean_model: ImageModel, images: Tensor
) -> None:
    """logits(M) = lam logits(A) + (1 - lam) logits(B): one linear classifier of one mean over
    normed tokens."""
    mask = some_mask(tiny_mean_model, 4)
    output = tiny_mean_model(images, source_mask=mask)
    lam = mask.float().mean(dim=1)[:, None]
    assert output.region_logits is not None
    mixed = lam * output.region_logits[:, 0] + (1 - lam) * output.region_logits[:, 1]
    torch.testing.assert_close(output.logits, mixed, atol=1e-5, rtol=1e-5)


@case
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_every_parameter_gets_a_gradient_on_every_step(
    make_model: MakeModel, case: str, separate: bool, with_mask: bool, amp: str
) -> None:
    model = build(make_model, case, separate_region_head=separate).train()
    images, mask = images_for(model), some_mask(model) if with_mask else None
    guide = make_guide(model, make_autocast(torch.device("cpu"), amp))
    guide(images)  # as in a real step: nothing of it may linger
    labels = torch.eye(7)[:3]
    with make_autocast(torch.device("cpu"), amp)():
        output = model(images, source_mask=mask)
    loss = soft_cross_entropy(output.logits, labels)
    if output.region_logits is not None:
        loss = loss + soft_cross_entropy(output.region_logits[:, 0], labels)
    loss.backward()
    assert [name for name, grad in grad_of(model).items() if grad is None] == []
    assert all(grad.isfinite().all() for grad in grad_of(model).values() if grad is not None)
    assert model.token_head is None or bool(model.token_head.weight.grad.any()) == with_mask  # type: ignore[union-attr]


def test_an_idle_region_head_does_not_change_the_prediction(
    make_model: MakeModel, images: Tensor
) -> None:
    model = make_model(separate_region_head=True)
    evaluated = model(images).logits
    torch.testing.assert_close(model.train()(images).logits, evaluated)


# ------------------------------------------------------------------------------------- distillation


def test_distillation_gives_both_tokens_logits_while_training(
    make_model: MakeModel, images: Tensor
) -> None:
    model = make_model("deit_tiny_distilled_patch16_224")
    together = model(images).logits
    use_distillation(model, "deit_tiny_distilled_patch16_224")
    assert model(images).distillation_logits is None
    torch.testing.assert_close(model(images).logits, together)

    output = model.train()(images, source_mask=some_mask(model, 4))
    assert output.distillation_logits is not None
    torch.testing.assert_close((output.logits + output.distillation_logits) / 2, together)
    features: Any = model.network.forward_features(images)  # type: ignore[operator]
    network: Any = model.network
    torch.testing.assert_close(output.logits, network.head(features[:, 0]))
    torch.testing.assert_close(output.distillation_logits, network.head_dist(features[:, 1]))
    (output.logits.sum() + output.distillation_logits.sum()).backward()
    assert all(grad is not None for grad in grad_of(model).values())


def test_distillation_without_its_token_is_refused(tiny_model: ImageModel) -> None:
    with pytest.raises(InputError, match=r"--distillation-type: deit_tiny_patch16_224 .*distilled"):
        use_distillation(tiny_model, "deit_tiny_patch16_224")


def test_a_teacher_is_frozen_and_answers_without_gradient(
    tiny_model: ImageModel, images: Tensor
) -> None:
    teacher = make_teacher(tiny_model.network.train(), NO_AMP)
    assert not any(parameter.requires_grad for parameter in tiny_model.network.parameters())
    assert not any(module.training for module in tiny_model.network.modules())
    assert not teacher(images).requires_grad
    assert teacher(images).shape == (4, 7)


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "count", "region_head"),
    [("tiny", 5_717_416, 193_000), ("small", 22_050_664, 385_000), ("base", 86_567_656, 769_000)],
)
def test_parameter_counts(name: str, count: int, region_head: int) -> None:
    for separate in (False, True):
        with torch.device("meta"):
            model = build_model(f"deit_{name}_patch16_224", 1000, separate_region_head=separate)
        assert (
            sum(parameter.numel() for parameter in model.parameters())
            == count + separate * region_head
        )
        assert (model.grid_size, model.patch_size, model.input_size) == (
            (14, 14),
            (16, 16),
            (224, 224),
        )


@case
def test_plain_weights_have_timms_keys(make_model: MakeModel, case: str) -> None:
    model = build(make_model, case)
    own = timms_own(model, case)
    assert set(plain_weights(model)) == set(own.state_dict())
    with_head = plain_weights(build(make_model, case, separate_region_head=True))
    assert set(with_head) - set(own.state_dict()) == {"token_head.weight", "token_head.bias"}
    other = build(make_model, case)
    other.load_state_dict(to_model_keys(plain_weights(model)), strict=True)


def test_deit_starts_its_class_token_as_deit_did() -> None:
    model = build_model("deit_tiny_patch16_224", 7, **{**TINY, "embed_dim": 768, "depth": 1})
    assert float(model.network.cls_token.detach().std()) == pytest.approx(0.02, rel=0.15)  # type: ignore[operator]


def test_the_released_codes_names_are_aliases() -> None:
    assert set(ALIASES) == {f"vit_deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
    for alias, name in ALIASES.items():
        with torch.device("meta"):
            shapes = [
                {
                    key: tuple(value.shape)
                    for key, value in build_model(model, 7, input_size=(32, 48))
                    .state_dict()
                    .items()
                }
                for model in (alias, name)
            ]
        assert shapes[0] == shapes[1]


# ---------------------------------------------------------------------------------- what is refused


def test_an_unknown_name_lists_near_misses() -> None:
    with pytest.raises(
        InputError, match=r"--model deit_tinny_patch16_224: no such model.*deit_tiny_patch16_224"
    ):
        build_model("deit_tinny_patch16_224", 7)
    with pytest.raises(InputError, match="vit_deit_base_patch16_224"):
        build_model("vit_deit_bas_patch16_224", 7)
    with pytest.raises(InputError, match="no such model"):
        build_model("", 7)


@pytest.mark.parametrize("settings", [{}, {"input_size": (64, 64)}, {"patch_size": 8}])
def test_a_network_without_attention_is_refused_with_the_reason(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"--model vgg11.*VGG.*attention"):
        build_model("vgg11", 7, **settings)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit_small_patch16_18x2_224", "ModuleList|Parallel"),
        ("vit_dpwee_patch16_reg1_gap_256", "Diff"),
    ],
)
def test_unreadable_attention_is_refused_with_the_reason(name: str, kind: str) -> None:
    with pytest.raises(InputError, match=rf"--model {name} cannot be trained with SMMix.*({kind})"):
        build_model(name, 7, **TINY)


@pytest.mark.parametrize(
    ("size", "smaller"), [((32, 50), "32 48"), ((33, 48), "32 48"), ((30, 30), "24 24")]
)
def test_a_size_that_patches_do_not_divide_is_refused_with_the_fix(
    size: tuple[int, int], smaller: str
) -> None:
    wanted = rf"--input-size {size[0]} {size[1]}.*8x8.*{smaller}.*--patch-size"
    with pytest.raises(InputError, match=wanted):
        build_model("deit_tiny_patch16_224", 7, **{**TINY, "input_size": size})


@pytest.mark.parametrize("name", ["vit_nano_patch4_32", "vit_mini_patch4_32"])
def test_our_small_models_take_the_keywords_of_their_class(name: str) -> None:
    model = build_model(name, 7, depth=1, num_heads=2, embed_dim=16, input_size=(8, 12))
    assert model.grid_size == (2, 3)
    assert len(model.network.blocks) == 1  # type: ignore[arg-type]


def test_a_setting_that_timm_refuses_is_told_as_such() -> None:
    with pytest.raises(InputError, match="--model deit_tiny_patch16_224: timm cannot build it"):
        build_model("deit_tiny_patch16_224", 7, no_such_setting=1)


# ------------------------------------------------------------------------------ weights made to fit


def adapted(
    old: ImageModel, new: ImageModel, old_grid: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """The new model with the old one's weights, and the notes; nothing may be left over or
    missing."""
    before = {key: value.clone() for key, value in plain_weights(old).items()}
    weights, notes = adapt_weights(new, plain_weights(old), old_grid)
    assert load_strictly(new, weights, source="test") == []
    assert all(torch.equal(value, before[key]) for key, value in plain_weights(old).items())
    return plain_weights(new), notes


def resized(
    position: Tensor, prefix: int, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Bicubic, antialiased, image part only: what timm and DeiT do."""
    grid = position[:, prefix:].unflatten(1, old_grid).permute(0, 3, 1, 2)
    grid = interpolate(grid, new_grid, mode="bicubic", antialias=True)
    return torch.cat((position[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


@pytest.mark.parametrize("case", ["deit", "distilled", "deit3", "registers", "no_class_token"])
@pytest.mark.parametrize(
    ("old_size", "new_size", "old_grid"),
    [
        ((32, 32), (48, 48), None),  # square, so the grid needs no telling
        ((32, 32), (32, 48), None),
        ((32, 48), (48, 48), (4, 6)),
        ((32, 48), (48, 32), (4, 6)),  # as many tokens, other places
        ((32, 32), (16, 64), (4, 4)),
    ],
)
def test_position_embeddings_are_resized(
    make_model: MakeModel,
    case: str,
    old_size: tuple[int, int],
    new_size: tuple[int, int],
    old_grid: Any,
) -> None:
    old, new = (
        build(make_model, case, input_size=old_size),
        build(make_model, case, input_size=new_size),
    )
    weights, notes = adapted(old, new, old_grid)
    position = plain_weights(old)["pos_embed"]
    prefix = position.shape[1] - old.grid_size[0] * old.grid_size[1]
    torch.testing.assert_close(
        weights["pos_embed"], resized(position, prefix, old.grid_size, new.grid_size)
    )
    assert len(notes) == 1
    assert notes[0].startswith("pos_embed resized")
    same = set(weights) - {"pos_embed"}
    assert all(torch.equal(weights[key], plain_weights(old)[key]) for key in same)


@pytest.mark.parametrize("old_grid", [None, (4, 6)])
def test_weights_that_fit_are_taken_as_they_are(
    make_model: MakeModel, images: Tensor, old_grid: Any
) -> None:
    old, new = make_model(), build_model("deit_tiny_patch16_224", 7, **TINY).eval()
    weights, notes = adapted(old, new, old_grid)
    assert notes == []
    assert all(torch.equal(weights[key], value) for key, value in plain_weights(old).items())
    assert torch.equal(new(images).logits, old(images).logits)


def test_another_class_count_is_announced_and_starts_anew(make_model: MakeModel) -> None:
    old, new = make_model(num_classes=9), make_model()
    fresh = {key: value.clone() for key, value in plain_weights(new).items()}
    weights, notes = adapted(old, new)
    assert sorted(note.split()[0] for note in notes) == ["head.bias", "head.weight"]
    assert all("anew" in note for note in notes)
    for key, value in weights.items():
        expected = fresh if key.startswith("head.") else plain_weights(old)
        assert torch.equal(value, expected[key]), key


def test_a_region_head_is_dropped_or_starts_anew_with_a_note(make_model: MakeModel) -> None:
    keys = ["token_head.bias", "token_head.weight"]
    _, notes = adapted(make_model(separate_region_head=True), make_model())
    assert sorted(note.split()[0] for note in notes) == keys
    assert all("dropped" in note for note in notes)

    new = make_model(separate_region_head=True)
    fresh = {key: value.clone() for key, value in plain_weights(new).items()}
    weights, notes = adapted(make_model(), new)
    assert sorted(note.split()[0] for note in notes) == keys
    assert all("missing" in note and "anew" in note for note in notes)
    assert all(torch.equal(weights[key], fresh[key]) for key in keys)

    same, other = make_model(separate_region_head=True), make_model(separate_region_head=True)
    weights, notes = adapted(same, other)
    assert notes == []
    assert all(torch.equal(weights[key], plain_weights(same)[key]) for key in keys)


def test_a_larger_patch_sees_an_enlarged_image_as_before(make_model: MakeModel) -> None:
    """FlexiViT's defining property: new kernel on the enlarged patch = old kernel on the patch."""
    old, new = (
        make_model(patch_size=4, input_size=(16, 24)),
        make_model(patch_size=8, input_size=(32, 48)),
    )
    weights, notes = adapted(old, new)
    assert len(notes) == 1
    assert notes[0].startswith("patch_embed.proj.weight resized")
    patches = torch.randn(20, 3, 4, 4)
    enlarged = interpolate(patches, (8, 8), mode="bicubic", antialias=True)
    before = torch.einsum("bchw,dchw->bd", patches, plain_weights(old)["patch_embed.proj.weight"])
    after = torch.einsum("bchw,dchw->bd", enlarged, weights["patch_embed.proj.weight"])
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)


def test_deit3s_names_of_layer_scale_are_understood(make_model: MakeModel) -> None:
    model = build(make_model, "deit3")
    renamed = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for key, value in plain_weights(model).items()
    }
    assert any("gamma_1" in key for key in renamed)
    weights, notes = adapt_weights(model, renamed)
    assert notes == []
    assert weights.keys() == model.state_dict().keys()


@pytest.mark.parametrize("other", [{"embed_dim": 48}, {"depth": 3}])
def test_weights_of_another_architecture_do_not_load(
    make_model: MakeModel, other: dict[str, Any]
) -> None:
    model = make_model()
    weights, _ = adapt_weights(model, plain_weights(make_model(**other)))
    with pytest.raises(InputError, match="does not fit"):
        load_strictly(model, weights, source="a file")


def test_our_own_checkpoints_restore_their_model(make_model: MakeModel, images: Tensor) -> None:
    model = make_model(separate_region_head=True)
    config = {
        "name": "deit_tiny_patch16_224",
        "num_classes": 7,
        "separate_region_head": True,
        **TINY,
    }
    checkpoint = {
        "model": plain_weights(model),
        "model_config": {**config, "input_size": [32, 48]},
        "ema": None,
    }
    restored = restore_model(checkpoint).eval()
    mask = some_mask(model, 4)
    ours, theirs = model(images, source_mask=mask), restored(images, source_mask=mask)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.region_logits, theirs.region_logits)
    with pytest.raises(InputError, match="ema"):
        restore_model(checkpoint, ema=True)
    with pytest.raises(InputError, match="model_config"):
        restore_model({"model": plain_weights(model)})


# --------------------------------------------------------------------- compiled, with checkpointing


def test_compiled_equals_eager_in_all_calls(make_model: MakeModel, images: Tensor) -> None:
    torch.compiler.reset()
    model = make_model(separate_region_head=True, depth=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mask = some_mask(model, 4)
    for given in (
        {},
        {"source_mask": mask},
        {"need_attention": "image"},
        {"need_attention": "class"},
    ):
        torch.testing.assert_close(
            compiled(images, **given), model(images, **given), atol=1e-5, rtol=1e-5
        )


@case
def test_gradient_checkpointing_changes_nothing(make_model: MakeModel, case: str) -> None:
    plain = build(make_model, case, drop=0.0, drop_path=0.0).train()
    saving = copy.deepcopy(plain)
    saving.network.set_grad_checkpointing(True)  # type: ignore[operator]
    images, mask = images_for(plain), some_mask(plain)
    for model in (plain, saving):
        output = model(images, source_mask=mask, need_attention="image")
        assert output.region_logits is not None
        (output.logits.square().sum() + output.region_logits.square().sum()).backward()
    ours, theirs = grad_of(saving), grad_of(plain)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, msg=name)
    without = [model(images, source_mask=mask) for model in (plain, saving)]
    torch.testing.assert_close(without[0].logits, without[1].logits)


# ------------------------------------------------------------------------------ the motivating pass


class Watching(nn.Module):
    """Reports the mode it is called in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((self.training, torch.is_grad_enabled()))
        return images


def mixed_modes(model: nn.Module) -> dict[str, bool]:
    """Puts every third module into evaluation mode, parents apart from children; returns all
    flags."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 != 1
    return {name: module.training for name, module in model.named_modules()}


def test_the_guide_sees_the_images_in_evaluation_mode_without_gradient(
    make_model: MakeModel, images: Tensor
) -> None:
    model = make_model(drop=0.5, drop_path=0.5)
    expected = model(images, need_attention="image")
    watching = Watching()
    model.network.blocks[-1].add_module("drop_path2", watching)  # type: ignore[union-attr, index]
    clean = make_guide(model.train(), NO_AMP)(images)
    assert watching.seen == [(False, False)]
    torch.testing.assert_close(clean.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(clean.image_attention, expected.image_attention, atol=1e-6, rtol=0)
    assert not any(value.requires_grad for value in clean if value is not None)


@pytest.mark.parametrize("fails", [False, True])
def test_the_guide_puts_every_modules_mode_back(
    tiny_model: ImageModel, images: Tensor, fails: bool
) -> None:
    flags = mixed_modes(tiny_model)
    guide = make_guide(tiny_model, NO_AMP)
    if fails:
        with pytest.raises(AssertionError):
            guide(images[:, :, :8])  # timm refuses the size
    else:
        guide(images)
    assert {name: module.training for name, module in tiny_model.named_modules()} == flags
    assert torch.is_grad_enabled()


def test_evaluation_mode_is_put_back_when_the_body_fails(tiny_model: ImageModel) -> None:
    flags = mixed_modes(tiny_model)

    def body() -> None:
        with eval_mode(tiny_model):
            assert not any(module.training for module in tiny_model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert {name: module.training for name, module in tiny_model.named_modules()} == flags


def test_the_guide_runs_under_the_runs_autocast(tiny_model: ImageModel, images: Tensor) -> None:
    clean = make_guide(tiny_model, BF16)(images)
    assert clean.logits is not None
    assert clean.logits.dtype == torch.bfloat16
    assert clean.image_attention is not None
    assert clean.image_attention.dtype == torch.float32
    exact = make_guide(tiny_model, NO_AMP)(images).logits
    assert exact is not None
    assert exact.dtype == torch.float32


def test_the_guide_calls_the_compiled_form_if_given_one(
    tiny_model: ImageModel, images: Tensor
) -> None:
    asked = []

    def call(images: Tensor, *more: Any) -> GuideOutput:
        asked.append((*more, tiny_model.training))
        return tiny_model.motivating_pass(images, *more)

    make_guide(tiny_model.train(), NO_AMP, call)(images)
    assert asked == [(None, None, True, False)]
    assert tiny_model.training
