"""Swin: timm's own predictions, the score of one window and of several shifted ones against slow
loops, gradients, linear drop path, official weights and tables from other windows."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from torch import Tensor

from engine import make_guide
from models.interface import AttentionOf
from models.swin import TABLE, Swin, resize_table, window_attention_map, window_of_table
from tests.conftest import randomise
from training.precision import make_autocast

AUTOCASTS = {name: make_autocast(torch.device("cpu"), name) for name in ("none", "bf16")}

# Two stages: a grid of 2 x 2 pixel patches, then one of 4 x 4.
TINY: dict[str, Any] = {
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (1, 2),
    "num_heads": (2, 4),
    "window_size": 3,
    "drop_path_rate": 0.0,
}
CASES: dict[str, dict[str, Any]] = {
    "one_window": {"img_size": 12},
    "small_grid": {"img_size": (8, 12)},  # its windows are 2 x 3
    "shifted": {"img_size": (24, 36)},
    "shifted_by_two": {"img_size": (32, 48), "window_size": 4},
    "shifted_along_one_axis": {"img_size": (12, 24)},
    "not_shifted": {"img_size": (24, 36), "depths": (2, 1)},
    "padded": {"img_size": (16, 28), "depths": (1, 1)},
    "padded_and_shifted": {"img_size": (16, 28)},
    "always_partition": {"img_size": 12, "window_size": 4, "always_partition": True},
    "any_size": {"img_size": (24, 36), "strict_img_size": False},
    "wide_heads": {"img_size": (24, 36), "head_dim": 6, "qkv_bias": False},
    "three_stages": {"img_size": (24, 48), "depths": (1, 1, 2), "num_heads": (2, 2, 2)},
    "dropping": {
        "img_size": (24, 36),
        "drop_rate": 0.2,
        "drop_path_rate": 0.3,
        "attn_drop_rate": 0.1,
    },
}
case = pytest.mark.parametrize("case", CASES)
some_cases = pytest.mark.parametrize("case", ["one_window", "shifted", "padded_and_shifted"])


def build(case: str = "shifted", separate: bool = False, **more: Any) -> Swin:
    torch.manual_seed(1)
    model = Swin(SwinTransformer(num_classes=7, **{**TINY, **CASES[case], **more}), separate)
    randomise(model)
    return model.eval()


def images_for(model: Swin, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *model.input_size)


def some_mask(model: Swin, count: int = 3) -> Tensor:
    """(count, N) with both regions in each row, of another size in each row."""
    order = torch.rand(count, model.grid_size[0] * model.grid_size[1]).argsort(dim=1)
    return order < torch.arange(1, count + 1)[:, None]


def map_used(network: SwinTransformer, images: Tensor) -> Tensor:
    """(B W, H, A, A): what timm's unfused last block really multiplies its values with."""
    layer: Any = network.layers[-1].blocks[-1].attn  # type: ignore[union-attr, index]
    layer.fused_attn = False
    seen: list[Tensor] = []
    hook = layer.attn_drop.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach())
    )
    with torch.no_grad():
        network(images)
    hook.remove()
    (used,) = seen
    return used


def slow_score(network: SwinTransformer, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Window by window: each token's mean over heads and the queries of its window; padding is
    neither."""
    block: Any = network.layers[-1].blocks[-1]  # type: ignore[index]
    (tall, wide), shift = block.window_size, block.shift_size
    down, across = math.ceil(grid[0] / tall), math.ceil(grid[1] / wide)
    used = (
        map_used(network, images).double().unflatten(0, (len(images), down * across))
    )  # (B, W, H, A, A)
    score = torch.full((len(images), *grid), math.nan, dtype=torch.float64)
    for window in range(down * across):
        places = {}  # number inside the window -> place on the grid
        for number in range(tall * wide):
            row, column = (
                window // across * tall + number // wide,
                window % across * wide + number % wide,
            )
            if row < grid[0] and column < grid[1]:
                places[number] = (row + shift[0]) % grid[0], (column + shift[1]) % grid[1]
        for b in range(len(images)):
            for key, (row, column) in places.items():
                received = [
                    used[b, window, h, query, key] for h in range(used.shape[2]) for query in places
                ]
                score[b, row, column] = torch.stack(received).mean()
    return score.flatten(1)


# --------------------------------------------------------------------------- predictions and scores


@case
def test_predictions_tokens_and_scores_are_timms(case: str) -> None:
    model = build(case)
    images, own = images_for(model), copy.deepcopy(model.network)
    for need_attention in (None, "image"):
        output = model(images, need_attention=need_attention)
        torch.testing.assert_close(output.logits, own(images), atol=1e-5, rtol=1e-5)
        features = own.forward_features(images)
        assert features.shape[1:3] == model.grid_size
        for number in range(features.shape[1] * features.shape[2]):  # row-major
            expected = features[:, number // features.shape[2], number % features.shape[2]]
            torch.testing.assert_close(output.tokens[:, number], expected, atol=1e-5, rtol=1e-5)
        assert (output.image_attention is not None) == (need_attention == "image")
        assert (output.region_logits, output.distillation_logits) == (None, None)
    score = output.image_attention
    assert score is not None
    assert score.dtype == torch.float32
    assert not score.requires_grad
    torch.testing.assert_close(
        score.double(), slow_score(own, images, model.grid_size), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("case", "window", "shift", "windows"),
    [
        ("one_window", (3, 3), (0, 0), 1),
        ("small_grid", (2, 3), (0, 0), 1),
        ("shifted", (3, 3), (1, 1), 6),
        ("shifted_by_two", (4, 4), (2, 2), 6),
        ("shifted_along_one_axis", (3, 3), (0, 1), 2),
        ("not_shifted", (3, 3), (0, 0), 6),
        ("padded_and_shifted", (3, 3), (1, 1), None),
        ("always_partition", (4, 4), (2, 2), None),
    ],
)
def test_the_cases_are_what_they_say(
    case: str, window: Any, shift: Any, windows: int | None
) -> None:
    model = build(case)
    last: Any = model.network.layers[-1].blocks[-1]  # type: ignore[index]
    assert (last.window_size, last.shift_size) == (window, shift)
    assert (last.attn_mask is not None) == any(shift)
    if windows is not None:  # nothing padded: what all queries give is received
        score = model(images_for(model), need_attention="image").image_attention
        torch.testing.assert_close(score.sum(dim=1), torch.full((3,), float(windows)))


@case
def test_equal_attention_scores_alike_in_all_windows(case: str) -> None:
    model = build(case)
    layer: Any = model.network.layers[-1].blocks[-1].attn  # type: ignore[union-attr, index]
    with torch.no_grad():
        layer.qkv.weight.zero_()
        layer.relative_position_bias_table.zero_()
        if layer.qkv.bias is not None:
            layer.qkv.bias.zero_()
    score = model(images_for(model), need_attention="image").image_attention
    if case not in (
        "padded_and_shifted",
        "always_partition",
    ):  # where padding parts the groups of a window unevenly
        torch.testing.assert_close(score, torch.full_like(score, 1 / layer.window_area))
    assert (score > 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_map_of_a_window_by_its_formula(masked: bool) -> None:
    """softmax over keys of q k / sqrt(d) + bias[offset] + mask, in float64, query by query."""
    model = build("shifted")
    layer: Any = model.network.layers[-1].blocks[-1].attn  # type: ignore[union-attr, index]
    windows = torch.randn(4, 9, 16)  # two images of two windows
    mask = torch.where(torch.rand(2, 9, 9) < 0.3, -100.0, 0.0) if masked else None
    ours = window_attention_map(layer, windows, mask)
    with torch.no_grad():
        queries, keys, _ = layer.qkv(windows).double().reshape(4, 9, 3, 4, 4).permute(2, 0, 3, 1, 4)
        table = layer.relative_position_bias_table.double().unflatten(
            0, (5, 5)
        )  # (rows apart, columns apart, H)
        for w in range(4):
            for h in range(4):
                for i in range(9):
                    similar = (queries[w, h, i] * keys[w, h]).sum(dim=1) / 2
                    offsets = [(i // 3 - j // 3 + 2, i % 3 - j % 3 + 2) for j in range(9)]
                    similar = similar + torch.stack([table[offset][h] for offset in offsets])
                    if mask is not None:
                        similar = similar + mask[w % 2, i].double()
                    torch.testing.assert_close(
                        ours[w, h, i].double(), similar.softmax(dim=0), atol=1e-5, rtol=1e-5
                    )


@pytest.mark.parametrize("case", ["one_window", "not_shifted", "shifted_by_two", "padded"])
def test_the_score_finds_the_token_that_its_window_attends_to(case: str) -> None:
    """Whatever the windows, and with the shift undone: the marked token is found where it lies in
    the image."""
    model = build(case)
    network: Any = model.network
    rows, columns = model.grid_size
    cells = rows * columns
    images = torch.zeros(cells, 3, *model.input_size)
    for cell in range(cells):  # the image of each cell has a mark there
        top, left = 4 * (cell // columns), 4 * (cell % columns)
        images[cell, :, top : top + 4, left : left + 4] = torch.tensor([1.0, -2.0, 3.0])[
            :, None, None
        ]
    final, seen = network.layers[-1], []
    with torch.no_grad():
        for stage in network.layers:
            for block in stage.blocks:  # tokens reach the last block as they are
                for layer in (block.attn.proj, block.mlp.fc2):
                    layer.weight.zero_()
                    layer.bias.zero_()
        last = final.blocks[-1]
        hook = last.norm1.register_forward_hook(
            lambda _, inputs, output: seen.append(output.flatten(1, 2))
        )
        network(images)
        hook.remove()
        layer, width = last.attn, 16
        layer.relative_position_bias_table.zero_()
        layer.qkv.weight.zero_()
        layer.qkv.bias.zero_()
        layer.qkv.bias[: width : width // 4] = (
            50  # each query asks for the first feature of its head,
        )
        layer.qkv.weight[width : 2 * width : width // 4] = (
            seen[0][0, 0] - seen[0][1, 0]
        )  # of which a mark has most
    score = model(images, need_attention="image").image_attention
    assert score.argmax(dim=1).tolist() == list(range(cells))
    if case in ("one_window", "not_shifted"):
        torch.testing.assert_close(score.diagonal(), torch.ones(cells), atol=1e-3, rtol=0)


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


def test_similarities_are_computed_in_float32_under_autocast() -> None:
    """Queries and keys that bfloat16 holds exactly: whatever differs from float64 was lost after
    them."""
    layer: Any = build().network.layers[-1].blocks[-1].attn  # type: ignore[union-attr, index]
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.randint(-2, 3, (48, 16)) / 4)
        layer.qkv.bias.copy_(torch.randint(-2, 3, (48,)) / 4)
    windows = torch.randint(-2, 3, (3, 9, 16)) / 4
    with AUTOCASTS["bf16"]():
        ours = window_attention_map(layer, windows, None)
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        queries, keys, _ = exact.qkv(windows.double()).reshape(3, 9, 3, 4, 4).permute(2, 0, 3, 1, 4)
        similarity = queries @ keys.transpose(-2, -1) * exact.scale + exact._get_rel_pos_bias()
    torch.testing.assert_close(ours.double(), similarity.softmax(dim=-1), atol=1e-6, rtol=0)


def test_the_fused_kernel_gives_the_same() -> None:
    model = build()
    images = images_for(model)
    plain = model(images, need_attention="image")
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for layer in layers:
        layer.fused_attn = True
    assert len(layers) == 3
    fused = model(images, need_attention="image")
    torch.testing.assert_close(fused.logits, plain.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.image_attention, plain.image_attention, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------- regions, gradients


@some_cases
@pytest.mark.parametrize("separate", [False, True])
def test_regions_are_classified_by_their_mean_token(case: str, separate: bool) -> None:
    model = build(case, separate)
    images, mask = images_for(model), some_mask(model)
    output = model(images, source_mask=mask)
    torch.testing.assert_close(output.logits, model(images).logits)
    classify: Any = model.token_head if separate else model.network.head.fc
    for b in range(3):
        for region, inside in enumerate((True, False)):
            members = [
                output.tokens[b, n] for n in range(mask.shape[1]) if bool(mask[b, n]) is inside
            ]
            expected = classify(sum(members) / len(members))
            torch.testing.assert_close(
                output.region_logits[b, region], expected, atol=1e-5, rtol=1e-5
            )


@case
def test_the_prediction_is_the_mix_of_its_regions(case: str) -> None:
    """logits(M) = lam logits(A) + (1 - lam) logits(B): one linear classifier of one mean over
    normed tokens."""
    model = build(case)
    mask = some_mask(model)
    output = model(images_for(model), source_mask=mask)
    lam = mask.float().mean(dim=1)[:, None]
    mixed = lam * output.region_logits[:, 0] + (1 - lam) * output.region_logits[:, 1]
    torch.testing.assert_close(output.logits, mixed, atol=1e-5, rtol=1e-5)


def test_the_shared_classifier_drops_as_the_prediction_does() -> None:
    model = build(drop_rate=1.0).train()
    output = model(images_for(model), source_mask=some_mask(model))
    bias: Any = model.network.head.fc.bias
    torch.testing.assert_close(output.logits, bias.expand(3, 7))
    torch.testing.assert_close(output.region_logits, bias.expand(3, 2, 7))


@pytest.mark.parametrize(
    "case", ["small_grid", "shifted", "padded_and_shifted", "wide_heads", "dropping"]
)
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


@pytest.fixture(scope="module")
def swin_t() -> Any:
    return timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.2)


def test_parameter_counts(swin_t: Any) -> None:
    for separate in (False, True):
        model = Swin(swin_t, separate)
        assert (
            sum(parameter.numel() for parameter in model.parameters())
            == 28_288_354 + separate * 769_000
        )
        assert (model.grid_size, model.patch_size, model.input_size) == (
            (7, 7),
            (32, 32),
            (224, 224),
        )


def test_at_224_the_last_stage_is_one_window(swin_t: Any) -> None:
    blocks: Any = swin_t.layers[-1].blocks
    assert [(block.window_size, block.shift_size, block.attn_mask) for block in blocks] == [
        ((7, 7), (0, 0), None)
    ] * 2
    score = Swin(swin_t.eval())(torch.randn(1, 3, 224, 224), need_attention="image").image_attention
    assert score.shape == (1, 49)
    assert float(score.sum()) == pytest.approx(1, abs=1e-5)


def test_drop_path_is_linear_over_all_blocks(swin_t: Any) -> None:
    blocks: list[Any] = [block for stage in swin_t.layers for block in stage.blocks]
    for drop in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, drop), "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx([0.2 * number / 11 for number in range(12)])


def test_no_weight_decay_on_any_table_of_relative_positions(swin_t: Any) -> None:
    model = Swin(swin_t)
    tables = {
        name for name, _ in model.named_parameters() if "relative_position_bias_table" in name
    }
    assert len(tables) == 12
    assert model.no_weight_decay() == tables


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        ((24, 36), (24, 36)),
        ((24, 38), (24, 36)),
        ((27, 36), (24, 36)),
        ((12, 16), (12, 16)),
        ((30, 30), (28, 28)),
    ],
)
def test_a_size_that_the_stages_do_not_divide_shows(
    size: tuple[int, int], fits: tuple[int, int]
) -> None:
    assert Swin(SwinTransformer(**{**TINY, "img_size": size})).input_size == fits


@pytest.mark.parametrize("patch", [1, 4])
def test_another_patch_size_is_another_grid(patch: int) -> None:
    model = build("shifted", patch_size=patch, img_size=(24, 40))
    assert model.patch_size == (2 * patch, 2 * patch)
    assert model.grid_size == (12 // patch, 20 // patch)
    images = images_for(model, 1)
    score = model(images, need_attention="image").image_attention
    torch.testing.assert_close(
        score.double(), slow_score(model.network, images, model.grid_size), atol=1e-6, rtol=0
    )


def test_a_prediction_without_a_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="global_pool"):
        Swin(SwinTransformer(**TINY, img_size=12, global_pool="", num_classes=0))


# ------------------------------------------------------------------------------ weights made to fit


def as_microsoft(model: Swin) -> dict[str, Tensor]:
    """The same weights as the official code would write them."""
    weights = {}
    for key, value in model.network.state_dict().items():
        for stage in range(1, len(model.network.layers)):
            key = key.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample~")
        weights[key.replace("~", "").replace("head.fc.", "head.")] = value
    for name, buffer in model.network.named_buffers():
        if name.endswith(("relative_position_index", "attn_mask")):
            weights[name] = buffer
    return weights


@pytest.mark.parametrize("case", ["shifted", "three_stages"])
def test_official_weights_load_with_a_note(case: str) -> None:
    old, new = build(case), build(case)
    randomise(new)
    official = as_microsoft(old)
    assert not official.keys() <= new.network.state_dict().keys()
    weights, notes = new.resize_weights(official, None)
    new.network.load_state_dict(weights, strict=True)
    images = images_for(old)
    assert torch.equal(new(images).logits, old(images).logits)
    assert [note.split()[0] for note in notes] == [
        "relative_position_index",
        "attn_mask",
        "layers.<i>.downsample",
    ]
    expected = checkpoint_filter_fn(official, new.network)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)


def test_our_region_head_keeps_its_name_among_official_ones() -> None:
    model = build()
    official = {**as_microsoft(model), "token_head.weight": torch.zeros(7, 16)}
    assert "token_head.weight" in model.resize_weights(official, None)[0]


@pytest.mark.parametrize(
    ("case", "old_grid"),
    [
        ("shifted", None),
        ("shifted", (6, 9)),
        ("shifted", (9, 9)),  # other images, but windows of the same size
        ("small_grid", None),
        ("small_grid", (2, 3)),
        ("always_partition", None),
        ("always_partition", (3, 3)),
    ],
)
def test_weights_that_fit_are_taken_as_they_are(
    case: str, old_grid: tuple[int, int] | None
) -> None:
    model = build(case)
    weights, notes = model.resize_weights(model.network.state_dict(), old_grid)
    assert notes == []
    assert weights.keys() == model.network.state_dict().keys()
    assert all(
        torch.equal(weights[key], value) for key, value in model.network.state_dict().items()
    )


def tables(model: Swin) -> dict[str, Tensor]:
    return {key: value for key, value in model.network.state_dict().items() if key.endswith(TABLE)}


def test_tables_are_resized_for_another_window_as_timm_does() -> None:
    old, new = build("shifted_by_two", window_size=3), build("shifted_by_two", window_size=4)
    weights, notes = new.resize_weights(old.network.state_dict(), None)
    new.network.load_state_dict(weights, strict=True)
    expected = checkpoint_filter_fn(old.network.state_dict(), new.network)
    assert len(notes) == len(tables(new)) == 3
    for key in tables(new):
        torch.testing.assert_close(weights[key], expected[key])
        assert any(note.startswith(key) and "(3, 3) to (4, 4)" in note for note in notes)
    others = old.network.state_dict().keys() - tables(old).keys()
    assert all(torch.equal(weights[key], old.network.state_dict()[key]) for key in others)


@pytest.mark.parametrize("old_case", ["one_window", "small_grid", "shifted", "tall"])
@pytest.mark.parametrize("new_case", ["one_window", "small_grid", "shifted", "tall"])
def test_tables_of_windows_that_the_grid_cuts_are_resized(old_case: str, new_case: str) -> None:
    sizes = {name: settings["img_size"] for name, settings in CASES.items()} | {"tall": (12, 8)}
    old, new = (build("shifted", img_size=sizes[name]) for name in (old_case, new_case))
    weights, notes = new.resize_weights(old.network.state_dict(), old.grid_size)
    new.network.load_state_dict(weights, strict=True)
    windows = [
        {
            f"{name}.{TABLE}": layer.window_size
            for name, layer in model.network.named_modules()
            if hasattr(layer, TABLE)
        }
        for model in (old, new)
    ]
    assert {note.split()[0] for note in notes} == {
        key for key in windows[0] if windows[0][key] != windows[1][key]
    }
    for key in windows[0]:  # the middle of every table is the same place: no offset at all
        middles = [tables(model)[key][len(tables(model)[key]) // 2] for model in (old, new)]
        torch.testing.assert_close(middles[1], middles[0], atol=1e-5, rtol=1e-5)


def test_near_offsets_keep_their_values_in_a_resized_table() -> None:
    table = torch.randn(13 * 13, 2)
    for window in ((4, 4), (12, 12), (5, 9)):
        resized = resize_table(table, (7, 7), window).unflatten(
            0, (2 * window[0] - 1, 2 * window[1] - 1)
        )
        near, old = (
            grid[rows - 2 : rows + 1, columns - 2 : columns + 1]
            for grid, rows, columns in ((resized, *window), (table.unflatten(0, (13, 13)), 7, 7))
        )
        torch.testing.assert_close(near, old, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(resize_table(table, (7, 7), (7, 7)), table, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("entries", "grid", "window"),
    [
        (169, None, (7, 7)),
        (169, (14, 14), (7, 7)),
        (25, (3, 3), (3, 3)),
        (15, (2, 3), (2, 3)),
        (15, (3, 2), (3, 2)),
        (21, (2, 9), (2, 4)),
        (15, None, None),
        (20, (4, 4), None),
        (49, (3, 3), (4, 4)),  # a window larger than the grid: `always_partition`
        (1, (1, 1), (1, 1)),
    ],
)
def test_the_window_behind_a_table(entries: int, grid: Any, window: Any) -> None:
    assert window_of_table(entries, grid) == window


def test_weights_of_another_architecture_stay_as_they_are() -> None:
    old, new = build("shifted", num_heads=(1, 2), depths=(2, 2)), build("shifted")
    weights, notes = new.resize_weights(old.network.state_dict(), None)
    assert notes == []
    with pytest.raises(RuntimeError):
        new.network.load_state_dict(weights, strict=True)


# ------------------------------------------------------------------------------ with checkpointing


@pytest.mark.parametrize("need_attention", [None, "image", "class"])
def test_gradient_checkpointing_changes_nothing(need_attention: AttentionOf | None) -> None:
    plain = build("shifted", separate=True).train()
    saving = copy.deepcopy(plain)
    saving.network.set_grad_checkpointing(True)
    images, mask = images_for(plain), some_mask(plain)
    for model in (plain, saving):
        output = model(images, source_mask=mask, need_attention=need_attention)
        (output.logits.square().sum() + output.region_logits.square().sum()).backward()
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
