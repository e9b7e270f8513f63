"""CaiT: timm's own predictions, Eq. 6 on the talking-heads map against slow loops, gradients,
constant drop path, weights from other sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.cait import Cait, ClassAttn, LayerScaleBlock
from torch import Tensor, nn
from torch.nn.functional import interpolate

from engine import make_guide
from models.cait import CaiT, talking_heads_map
from models.interface import AttentionOf
from tests.conftest import randomise
from training.precision import make_autocast

AUTOCASTS = {name: make_autocast(torch.device("cpu"), name) for name in ("none", "bf16")}

TINY: dict[str, Any] = {
    "img_size": (32, 48),
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "square": {"img_size": 32},
    "one_block": {"depth": 1, "depth_token_only": 1},
    "no_bias": {"qkv_bias": False},
    "dropping": {
        "drop_rate": 0.2,
        "drop_path_rate": 0.3,
        "pos_drop_rate": 0.1,
        "attn_drop_rate": 0.1,
    },
}
case = pytest.mark.parametrize("case", CASES)


def build(case: str = "plain", separate: bool = False, **more: Any) -> CaiT:
    torch.manual_seed(1)
    model = CaiT(Cait(num_classes=7, **{**TINY, **CASES[case], **more}), separate)
    randomise(model)
    return model.eval()


def images_for(model: CaiT, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *model.input_size)


def some_mask(model: CaiT, count: int = 3) -> Tensor:
    """(count, N) with both regions in each row, of another size in each row."""
    order = torch.rand(count, model.grid_size[0] * model.grid_size[1]).argsort(dim=1)
    return order < torch.arange(1, count + 1)[:, None]


def maps_used(network: Cait, images: Tensor) -> Tensor:
    """(B, N, N, H): what timm's last self-attention block really hands from its softmax to its
    second mix."""
    seen: list[Tensor] = []
    mix: Any = network.blocks[-1].attn.proj_w  # type: ignore[union-attr]
    hook = mix.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        network(images)
    hook.remove()
    (used,) = seen
    return used


def slow_score(network: Cait, images: Tensor) -> Tensor:
    used = maps_used(network, images)
    batch, count, _, heads = used.shape
    score = torch.zeros(batch, count, dtype=torch.float64)
    for b in range(batch):
        for j in range(count):
            score[b, j] = (
                sum(float(used[b, :, j, h].double().sum()) for h in range(heads)) / heads / count
            )
    return score


# --------------------------------------------------------------------------- predictions and scores


@case
def test_predictions_tokens_and_scores_are_timms(case: str) -> None:
    model = build(case)
    images, own = images_for(model), copy.deepcopy(model.network)
    for need_attention in (None, "image"):
        output = model(images, need_attention=need_attention)
        torch.testing.assert_close(output.logits, own(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            output.tokens, own.forward_features(images)[:, 1:], atol=1e-5, rtol=1e-5
        )
        assert (output.image_attention is not None) == (need_attention == "image")
        assert (output.region_logits, output.distillation_logits) == (None, None)
    score = output.image_attention
    assert score is not None
    assert score.dtype == torch.float32
    assert not score.requires_grad
    torch.testing.assert_close(score.double(), slow_score(own, images), atol=1e-6, rtol=0)
    torch.testing.assert_close(score.sum(dim=1), torch.ones(3))


def test_tokens_are_the_self_attention_blocks_output_normed() -> None:
    """The class-attention blocks have no part in them."""
    model = build()
    images = images_for(model)
    network = model.network
    with torch.no_grad():
        expected = network.norm(network.blocks(network.patch_embed(images) + network.pos_embed))
        torch.testing.assert_close(model(images).tokens, expected, atol=1e-5, rtol=1e-5)
        before = model(images)
        randomise(network.blocks_token_only)
        after = model(images)
    assert torch.equal(after.tokens, before.tokens)
    assert not torch.allclose(after.logits, before.logits)


def test_map_of_talking_heads_by_its_formula() -> None:
    """softmax over keys of sum_g L[h, g] (q_g k_g / sqrt(d)) + l[h], in float64, query by query."""
    layer: Any = build().network.blocks[-1].attn
    tokens = torch.randn(2, 5, 24)
    ours = talking_heads_map(layer, tokens)
    with torch.no_grad():
        queries, keys, _ = layer.qkv(tokens).double().reshape(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
        weight, bias = layer.proj_l.weight.double(), layer.proj_l.bias.double()
        for b in range(2):
            for h in range(3):
                for i in range(5):
                    similar = torch.stack(
                        [(queries[b, g, i] * keys[b, g]).sum(dim=1) / 8**0.5 for g in range(3)]
                    )
                    expected = ((weight[h, :, None] * similar).sum(dim=0) + bias[h]).softmax(dim=0)
                    torch.testing.assert_close(
                        ours[b, h, i].double(), expected, atol=1e-5, rtol=1e-5
                    )


@case
def test_class_score_by_its_formula(case: str) -> None:
    """softmax over [class; images] of q k / sqrt(d) in the last class attention, in float64; its
    column is cut."""
    model = build(case)
    images, network = images_for(model), model.network
    given: list[Tensor] = []
    block: Any = network.blocks_token_only[-1]
    hook = block.register_forward_pre_hook(lambda _, inputs: given.extend(inputs))
    with torch.no_grad():
        network(images)
        hook.remove()
        normed = block.norm1(torch.cat((given[1], given[0]), dim=1))
        query, keys = block.attn.q(normed[:, 0]).double(), block.attn.k(normed).double()
    output = model(images, need_attention="class")
    assert output.image_attention is None
    torch.testing.assert_close(output.logits, network(images), atol=1e-5, rtol=1e-5)
    for b in range(3):
        rows = []
        for h in range(3):
            own = slice(8 * h, 8 * h + 8)
            rows.append((keys[b, :, own] @ query[b, own] / 8**0.5).softmax(dim=0)[1:])
        expected = torch.stack(rows).mean(dim=0)
        torch.testing.assert_close(output.class_attention[b].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("mix", "counts"), [("proj_l", True), ("proj_w", False)])
def test_only_the_first_mix_of_the_heads_is_in_the_score(mix: str, counts: bool) -> None:
    model = build()
    images = images_for(model)
    before = model(images, need_attention="image")
    randomise(getattr(model.network.blocks[-1].attn, mix))
    after = model(images, need_attention="image")
    assert not torch.allclose(before.logits, after.logits)
    assert torch.equal(before.image_attention, after.image_attention) != counts


@pytest.mark.parametrize("cell", [0, 5, 6, 16, 23])
def test_the_score_finds_the_token_that_all_attend_to(cell: int) -> None:
    model = build()
    network: Any = model.network
    row, column = divmod(cell, 6)
    images = torch.zeros(1, 3, 32, 48)
    images[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = torch.randn(3, 8, 8)
    with torch.no_grad():
        network.pos_embed.zero_()
        for block in network.blocks:  # tokens reach the last block as they are
            block.gamma_1.zero_()
            block.gamma_2.zero_()
        normed = network.blocks[-1].norm1(network.patch_embed(images))[0]
        layer = network.blocks[-1].attn
        layer.qkv.weight.zero_()
        layer.qkv.bias.zero_()
        layer.qkv.bias[:24:8] = 50  # each query asks for the first feature of its head,
        layer.qkv.weight[24:48:8] = (
            normed[cell] - normed[cell - 1]
        )  # of which the marked token's key has most
        layer.proj_l.weight.copy_(torch.eye(3))
        layer.proj_l.bias.zero_()
    score = model(images, need_attention="image").image_attention
    assert int(score.argmax()) == cell
    assert float(score[0, cell]) == pytest.approx(1, abs=1e-3)


@case
def test_score_stays_float32_and_detached_under_autocast(case: str) -> None:
    model = build(case)
    images = images_for(model)
    plain = model(images, need_attention="image").image_attention
    with AUTOCASTS["bf16"]():
        output = model(images, need_attention="image")
    assert output.logits.dtype == torch.bfloat16
    assert output.image_attention.dtype == torch.float32
    assert not output.image_attention.requires_grad
    assert (output.image_attention - plain).abs().max() < 0.1 * plain.max()


def test_similarities_and_their_mix_are_computed_in_float32_under_autocast() -> None:
    """Queries and keys that bfloat16 holds exactly: whatever differs from float64 was lost after
    them."""
    layer: Any = build().network.blocks[-1].attn
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.randint(-2, 3, (72, 24)) / 4)
        layer.qkv.bias.copy_(torch.randint(-2, 3, (72,)) / 4)
    tokens = torch.randint(-2, 3, (3, 9, 24)) / 4
    with AUTOCASTS["bf16"]():
        ours = talking_heads_map(layer, tokens)
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        queries, keys, _ = exact.qkv(tokens.double()).reshape(3, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)
        similarity = queries @ keys.transpose(-2, -1) * exact.scale
        expected = exact.proj_l(similarity.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------- regions, gradients


@pytest.mark.parametrize("separate", [False, True])
def test_regions_are_classified_by_their_mean_token(separate: bool) -> None:
    model = build(separate=separate)
    images, mask = images_for(model), some_mask(model)
    output = model(images, source_mask=mask)
    torch.testing.assert_close(output.logits, model(images).logits)
    classify: Any = model.token_head if separate else model.network.head
    for b in range(3):
        for region, inside in enumerate((True, False)):
            members = [
                output.tokens[b, n] for n in range(mask.shape[1]) if bool(mask[b, n]) is inside
            ]
            expected = classify(sum(members) / len(members))
            torch.testing.assert_close(
                output.region_logits[b, region], expected, atol=1e-5, rtol=1e-5
            )


def test_the_shared_classifier_drops_as_the_prediction_does() -> None:
    model = build(drop_rate=1.0).train()
    images = images_for(model)
    output = model(images, source_mask=some_mask(model))
    bias: Any = model.network.head.bias
    torch.testing.assert_close(output.logits, bias.expand(3, 7))
    torch.testing.assert_close(output.region_logits, bias.expand(3, 2, 7))


@case
@pytest.mark.parametrize("amp", AUTOCASTS)
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_every_parameter_gets_a_gradient_on_every_step(
    case: str, separate: bool, with_mask: bool, amp: str
) -> None:
    model = build(case, separate).train()
    images, mask = images_for(model), some_mask(model) if with_mask else None
    make_guide(model, AUTOCASTS[amp])(images)  # as in a real step: nothing of it may linger
    with AUTOCASTS[amp]():
        output = model(images, source_mask=mask)
    loss = output.logits.float().square().sum()
    if output.region_logits is not None:
        loss = loss + output.region_logits.float().square().sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [
        name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()
    ] == []
    if model.token_head is not None:
        assert bool(gradients["token_head.weight"].any()) == with_mask  # type: ignore[union-attr]


# --------------------------------------------------------------------------------- what timm builds


@pytest.mark.parametrize(
    ("name", "count"), [("cait_xxs24_224", 11_956_264), ("cait_xxs36_224", 17_299_720)]
)
def test_parameter_counts(name: str, count: int) -> None:
    for separate in (False, True):
        with torch.device("meta"):
            network: Any = timm.create_model(name)
            model = CaiT(network, separate)
        assert (
            sum(parameter.numel() for parameter in model.parameters()) == count + separate * 193_000
        )
        assert (model.grid_size, model.patch_size, model.input_size) == (
            (14, 14),
            (16, 16),
            (224, 224),
        )


def test_grid_and_patch_are_the_networks() -> None:
    model = build()
    assert (model.grid_size, model.patch_size, model.input_size) == ((4, 6), (8, 8), (32, 48))


def test_a_size_that_patches_do_not_divide_shows() -> None:
    assert CaiT(Cait(**{**TINY, "img_size": (36, 50)})).input_size == (32, 48)


@pytest.mark.parametrize("name", ["cait_xxs24_224", "cait_xxs36_224"])
def test_drop_path_is_constant_and_spares_class_attention(name: str) -> None:
    with torch.device("meta"):
        network: Any = timm.create_model(name, drop_path_rate=0.05)
    assert {block.drop_path.drop_prob for block in network.blocks} == {0.05}
    assert {type(block.drop_path) for block in network.blocks_token_only} == {nn.Identity}


@pytest.mark.parametrize("name", ["cait_xxs24_224", "cait_xxs36_224"])
def test_layer_scale_starts_small(name: str) -> None:
    network = timm.create_model(name, depth=1)
    scales = [value for key, value in network.named_parameters() if "gamma_" in key]
    assert len(scales) == 2 * (1 + 2)
    assert all((scale == 1e-5).all() for scale in scales)


def test_no_weight_decay_on_positions_and_class_token() -> None:
    assert build().no_weight_decay() == {"network.pos_embed", "network.cls_token"}


class ForeignAttention(ClassAttn):
    """Not a talking-heads layer."""


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attn_block": ForeignAttention}, "ForeignAttention"),
        ({"global_pool": "avg"}, "'avg'"),
        ({"global_pool": ""}, "global_pool"),
    ],
)
def test_what_cannot_be_read_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CaiT(Cait(**{**TINY, **settings}))


def test_the_last_block_must_be_a_self_attention_block() -> None:
    class Wrapped(LayerScaleBlock):
        """A subclass is fine."""

    assert CaiT(Cait(**{**TINY, "block_layers": Wrapped})).grid_size == (4, 6)


# ------------------------------------------------------------------------------ weights made to fit


@pytest.mark.parametrize(
    ("old_size", "new_size", "old_grid"),
    [
        ((32, 32), (48, 48), None),  # square, so the grid needs no telling
        ((32, 32), (32, 48), None),
        ((32, 48), (48, 48), (4, 6)),
        ((32, 48), (48, 32), (4, 6)),  # as many tokens, other places
    ],
)
def test_position_embeddings_are_resized(
    old_size: tuple[int, int], new_size: tuple[int, int], old_grid: tuple[int, int] | None
) -> None:
    old, new = build(img_size=old_size), build(img_size=new_size)
    before = {key: value.clone() for key, value in old.network.state_dict().items()}
    weights, notes = new.resize_weights(old.network.state_dict(), old_grid)
    new.network.load_state_dict(weights, strict=True)
    assert all(torch.equal(value, before[key]) for key, value in old.network.state_dict().items())
    grid = before["pos_embed"].unflatten(1, old.grid_size).permute(0, 3, 1, 2)
    expected = (
        interpolate(grid, new.grid_size, mode="bicubic", antialias=True)
        .permute(0, 2, 3, 1)
        .flatten(1, 2)
    )
    torch.testing.assert_close(weights["pos_embed"], expected)
    assert len(notes) == 1
    assert notes[0].startswith("pos_embed resized")
    assert all(torch.equal(weights[key], before[key]) for key in set(weights) - {"pos_embed"})


@pytest.mark.parametrize("old_grid", [None, (4, 6)])
def test_weights_that_fit_are_taken_as_they_are(old_grid: tuple[int, int] | None) -> None:
    model = build()
    weights, notes = model.resize_weights(model.network.state_dict(), old_grid)
    assert notes == []
    assert weights.keys() == model.network.state_dict().keys()
    assert all(
        torch.equal(weights[key], value) for key, value in model.network.state_dict().items()
    )


# ------------------------------------------------------------------------------ with checkpointing


@pytest.mark.parametrize("need_attention", [None, "image", "class"])
def test_gradient_checkpointing_changes_nothing(need_attention: AttentionOf | None) -> None:
    plain = build(separate=True).train()
    saving = copy.deepcopy(plain)
    saving.network.set_grad_checkpointing(True)
    images, mask = images_for(plain), some_mask(plain)
    for model in (plain, saving):
        output = model(images, source_mask=mask, need_attention=need_attention)
        (output.logits.square().sum() + output.region_logits.square().sum()).backward()
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
