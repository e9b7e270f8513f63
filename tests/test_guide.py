"""The motivating pass: the same prediction and score for less work, no trace, and the flags that
make it cheaper."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.parallel import DistributedDataParallel

import engine
import utils
from config import build_guide
from config.build_guide import check_guide_size
from config.checks import check_args
from config.flags import get_args_parser
from errors import InputError
from models.build import build_model, use_float32_attention
from models.deit import PlainViT
from models.interface import GuideOutput, ImageModel, upsample_score
from models.weights import adapt_weights, load_strictly, plain_weights
from tests.conftest import randomise
from tests.image_folders import make_image_folder
from tests.runs import run_small
from tests.test_families import (
    CPU,
    ONE_OF_EACH,
    TINY,
    batch_of,
    check_score,
    gradient_of,
    loss_of,
    make_model,
    one_pass,
)
from training import precision

SMALL_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}
# Every family, and the blocks and attention layers that differ within one: family (or timm's name)
# and keywords.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in TINY},
    "ViT, everything": (
        "VisionTransformer",
        {
            "qk_norm": True,
            "scale_attn_norm": True,
            "init_values": 0.1,
            "reg_tokens": 3,
            "no_embed_class": True,
        },
    ),
    "ViT, mean": (
        "vit_tiny_patch16_224",
        {**SMALL_VIT, "global_pool": "avg", "class_token": False},
    ),
    "ViT, pooled": ("VisionTransformer", {"global_pool": "map"}),
    "BEiT, token": ("Beit", {"global_pool": "token", "init_values": 0.1}),
    "BEiT, token, shared": (
        "Beit",
        {
            "global_pool": "token",
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
            "init_values": None,
        },
    ),
    "EVA, token": ("Eva", {"global_pool": "token", "qkv_fused": True, "scale_attn_inner": True}),
    "EVA, token, split": ("Eva", {"global_pool": "token", "qkv_fused": False, "init_values": 0.1}),
    "EVA, token, rope": (
        "Eva",
        {"global_pool": "token", "attn_type": "rope", "qk_norm": True, "num_reg_tokens": 2},
    ),
    "EVA, token, grouped": (
        "Eva",
        {"global_pool": "token", "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
    ),
    "EVA, token, mixed": ("vit_small_patch16_rope_mixed_224", SMALL_VIT),
    "EVA, token, post-norm": ("Eva", {"global_pool": "token", "use_post_norm": True}),
}
# Those whose last MLP sees the class token (and its like) only: how many tokens that are.
SHORT = {
    "VisionTransformer": 1,
    "VisionTransformerDistilled": 2,
    "PyramidVisionTransformer": 1,
    "ViT, everything": 4,
    "BEiT, token": 1,
    "BEiT, token, shared": 1,
    "EVA, token": 1,
    "EVA, token, split": 1,
    "EVA, token, rope": 3,
    "EVA, token, grouped": 1,
    "EVA, token, mixed": 1,
}
CONVOLUTIONAL = ("ConvNeXt", "ResNet")
cases = pytest.mark.parametrize("case", CASES)
AUTOCASTS = {name: precision.make_autocast(CPU.device, name) for name in ("none", "bf16", "fp16")}


def make(case: str, **more: Any) -> ImageModel:
    """In evaluation mode, far from its initial weights."""
    family, settings = CASES[case]
    utils.seed_globals("init", 0)
    if family in TINY:
        model = make_model(family, **{**settings, **more})
    else:
        model = build_model(family, 5, **{"input_size": (64, 64), **settings, **more})
    randomise(model)
    return model.eval()


def parts_of(model: ImageModel) -> Any:
    """timm's network, of whatever family."""
    return model.network


def watch(module: nn.Module, seen: list[Tensor]) -> None:
    """Keeps what a module is given first, on each of its calls."""
    module.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))


def prediction(model: ImageModel, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    logits = model.motivating_pass(images, size).logits
    assert logits is not None
    return logits


def same(ours: GuideOutput, theirs: Any) -> None:
    """Equal; logits in half precision to a rounding or two, because kernels differ in where they
    round."""
    assert ours.logits is not None
    within = 1e-5 if ours.logits.dtype == torch.float32 else 2 * torch.finfo(ours.logits.dtype).eps
    torch.testing.assert_close(ours.logits, theirs.logits, atol=within, rtol=within)
    torch.testing.assert_close(ours.image_attention, theirs.image_attention, atol=1e-6, rtol=0)


# -------------------------------------------------------------------------------- the same for less


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("in_float32", [False, True])
@cases
def test_a_glance_shows_what_the_whole_pass_shows(case: str, in_float32: bool, amp: str) -> None:
    model, images = make(case), batch_of(1)[0]
    if in_float32 and case in CONVOLUTIONAL:
        pytest.skip("no attention")
    if in_float32:
        use_float32_attention(model, case)
    with torch.no_grad(), AUTOCASTS[amp]():
        whole = model(images, need_attention="image")
        seen = model.motivating_pass(images)
    check_score(seen.image_attention, model)
    assert seen.image_attention.std() > 0
    same(seen, whole)


@cases
def test_the_last_mlp_sees_only_the_tokens_that_decide(case: str) -> None:
    model, seen = make(case), []  # type: ignore[var-annotated]
    mlps = [module for name, module in model.named_modules() if name.endswith(".mlp")]
    if not mlps:
        assert case in CONVOLUTIONAL
        return
    for mlp in mlps:
        watch(mlp, seen)
    with torch.no_grad():
        model(batch_of(1)[0], need_attention="image")
        whole, short = [len(tokens[0]) for tokens in seen], SHORT.get(case)
        seen.clear()
        model.motivating_pass(batch_of(1)[0])
    assert [len(tokens[0]) for tokens in seen] == (whole if short is None else [*whole[:-1], short])


def test_a_block_of_an_unknown_kind_is_passed_as_a_whole() -> None:
    model, images = make("VisionTransformer"), batch_of(1)[0]
    last = parts_of(model).blocks[-1]

    class Shifted(type(last)):  # type: ignore[misc]
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) + 3 * tokens.mean(dim=1, keepdim=True)

    last.__class__ = Shifted
    with torch.no_grad():
        same(model.motivating_pass(images), model(images, need_attention="image"))


@pytest.mark.parametrize(
    "case", ["VisionTransformer", "PyramidVisionTransformer", "BEiT, token, shared", "EVA, token"]
)
def test_attention_in_float32_gives_the_rest_what_its_layer_would(case: str) -> None:
    model, seen = make(case), []  # type: ignore[var-annotated]
    use_float32_attention(model, case)
    paths = [module for name, module in model.named_modules() if re.search(r"drop_path1?$", name)]
    watch(paths[-1], seen)
    with torch.no_grad(), AUTOCASTS["bf16"]():
        model(batch_of(1)[0])
        model.motivating_pass(batch_of(1)[0])
    both = (
        seen if case != "PyramidVisionTransformer" else seen[::2]
    )  # there one module drops both branches
    assert [part.dtype for part in both] == [torch.bfloat16] * 2
    torch.testing.assert_close(both[1], both[0][:, : both[1].shape[1]], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("case", ["VisionTransformer", "EVA, token"])
def test_a_gate_on_the_attention_is_passed(case: str) -> None:
    """timm's newer layers have a place for one; no model of today's families asks for it."""
    model, images = make(case), batch_of(1)[0]
    layer = parts_of(model).blocks[-1].attn
    if not hasattr(layer, "gate"):
        pytest.skip("this timm has none")
    ungated = prediction(model, images)
    layer.gate = nn.Linear(24, 24)
    same(model.motivating_pass(images), model(images, need_attention="image"))
    assert not torch.allclose(prediction(model, images), ungated, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", SHORT)
def test_a_glance_compiles_whole(case: str) -> None:
    """Under autocast; that the rest compiles, `test_a_compiled_model_takes_the_same_step` sees."""
    model, images = make(case, **ONE_OF_EACH.get(CASES[case][0], {})), batch_of(1)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model.motivating_pass, backend="eager", fullgraph=True)
    sizes = [None, (32, 48)] if model.accepts_other_sizes else [None]
    for size in sizes:
        with torch.no_grad(), AUTOCASTS["bf16"]():
            same(compiled(images, size), model.motivating_pass(images, size))


def test_a_model_in_training_mode_is_not_looked_through() -> None:
    with pytest.raises(AssertionError, match="eval mode"):
        make("VisionTransformer").train().motivating_pass(batch_of(1)[0])


# ----------------------------------------------------------------------------------------- no trace


def mixed_modes(model: nn.Module) -> dict[str, bool]:
    """Puts every third module into evaluation mode, and returns all modes."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 != 1
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("size", [None, (32, 48)])
@cases
def test_the_guide_leaves_no_trace(case: str, size: tuple[int, int] | None) -> None:
    model, images = make(case, drop=0.2, drop_path=0.2), batch_of(1)[0]
    if size is not None and not model.accepts_other_sizes:
        pytest.skip("one size only")
    modes, state, held = mixed_modes(model), copy.deepcopy(model.state_dict()), images.clone()
    buffers = {
        name: value.clone() for name, value in model.named_buffers()
    }  # also those that are not saved
    names, drawn = set(vars(model.network)), torch.get_rng_state()
    seen = engine.make_guide(model, AUTOCASTS["bf16"], size=size)(images)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert set(vars(model.network)) == names
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(images, held)
    assert not any(value.requires_grad for value in seen if value is not None)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("case", SHORT)
def test_a_step_after_the_guide_learns_as_without_it(case: str, amp: str, tmp_path: Path) -> None:
    """Within one autocast, and through DDP, whose wrapper the guide goes around."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    gradients = []
    try:
        for looks in (False, True):
            model = make(case).train()
            wrapped = DistributedDataParallel(model)
            with AUTOCASTS[amp]():
                if looks:
                    engine.make_guide(model, AUTOCASTS[amp])(batch_of(1)[0])
                output = one_pass(wrapped, None)
            loss_of(output).backward()
            gradients.append(gradient_of(model))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(gradients[1], gradients[0], atol=0, rtol=0)


# ----------------------------------------------------------------------------------- a smaller size


def test_a_resized_score_is_the_bilinear_one() -> None:
    score = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    ours = upsample_score(score, (2, 3), (5, 4)).unflatten(1, (5, 4))

    def between(position: int, length: int, fine: int) -> tuple[int, int, float]:
        place = min(max((position + 0.5) * length / fine - 0.5, 0.0), length - 1.0)
        low = min(int(place), max(length - 2, 0))
        return low, min(low + 1, length - 1), place - low

    grid = score.unflatten(1, (2, 3))
    for row in range(5):
        for column in range(4):
            top, bottom, down = between(row, 2, 5)
            left, right, along = between(column, 3, 4)
            above = grid[:, top, left] * (1 - along) + grid[:, top, right] * along
            below = grid[:, bottom, left] * (1 - along) + grid[:, bottom, right] * along
            expected = (above * (1 - down) + below * down) * 6 / 20
            torch.testing.assert_close(ours[:, row, column], expected)
    uniform = upsample_score(torch.full((1, 6), 1 / 6), (2, 3), (4, 6))
    torch.testing.assert_close(uniform, torch.full((1, 24), 1 / 24))
    assert torch.equal(upsample_score(score, (2, 3), (2, 3)), score)


LOOKERS = [
    "VisionTransformer",
    "VisionTransformerDistilled",
    "ViT, everything",
    "ViT, mean",
    "ViT, pooled",
]


@pytest.mark.parametrize("case", LOOKERS)
def test_a_smaller_look_is_that_of_a_model_built_smaller(case: str) -> None:
    """With the same weights, made to fit as loading does it."""
    size, images = (32, 48), batch_of(1)[0]
    model, small = make(case), make(case, input_size=size)
    weights, _ = adapt_weights(small, plain_weights(model), model.grid_size)
    load_strictly(small, weights, source="the test")
    with torch.no_grad():
        seen = model.motivating_pass(images, size)
        expected = small(
            interpolate(images, size, mode="bilinear", antialias=True), need_attention="image"
        )
    check_score(seen.image_attention, model)
    torch.testing.assert_close(seen.logits, expected.logits, atol=1e-5, rtol=1e-5)
    score = upsample_score(expected.image_attention, small.grid_size, model.grid_size)
    torch.testing.assert_close(seen.image_attention, score, atol=1e-6, rtol=0)
    assert not torch.allclose(prediction(model, images, size), prediction(model, images), atol=1e-3)


def test_a_smaller_look_finds_what_the_full_one_finds() -> None:
    """Planted: no positions, and pictures of four plain quarters, so that a token is its quarter's
    colour."""
    model = make("VisionTransformer", patch_size=8)  # 8 x 8 tokens
    with torch.no_grad():
        parts_of(model).pos_embed.zero_()
        colours = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(2))
        images = interpolate(colours, scale_factor=32, mode="nearest")  # 64 x 64 pixels
        full, small = (
            model.motivating_pass(images).image_attention,
            model.motivating_pass(images, (32, 32)).image_attention,
        )
    inner = torch.ones(8, 8, dtype=torch.bool)
    inner[3:5] = inner[:, 3:5] = False  # where the quarters meet, the smaller score is in between
    for one, other in zip(full[:, inner.flatten()], small[:, inner.flatten()], strict=True):
        assert torch.corrcoef(torch.stack((one, other)))[0, 1] > 0.9
    assert full.std(dim=1).min() > 1e-3


def test_which_families_look_smaller() -> None:
    assert [case for case in CASES if make(case).accepts_other_sizes] == sorted(
        LOOKERS, key=list(CASES).index
    )


REFUSED = [
    (
        "BEiT, token",
        (32, 32),
        r"--guide-size 32 32: tiny, a Beit, takes images of one size only; use the flag with",
    ),
    (
        "PyramidVisionTransformer",
        (32, 32),
        r"tiny, a PyramidVisionTransformer, takes images of one size only",
    ),
    ("ResNet", (32, 32), r"tiny, a ResNet, takes images of one size only"),
    (
        "VisionTransformer",
        (64, 64),
        r"--guide-size 64 64: must be smaller than the images, 64 x 64 pixels",
    ),
    ("VisionTransformer", (32, 80), r"--guide-size 32 80: must be smaller"),
    (
        "VisionTransformer",
        (40, 32),
        r"multiple of the patch size 16x16 of tiny, and two patches or more, .* 32 32",
    ),
    ("VisionTransformer", (16, 48), r"two patches or more, such as 32 48"),
]


@pytest.mark.parametrize(("case", "size", "said"), REFUSED)
def test_a_size_that_does_not_do_is_refused(case: str, size: tuple[int, int], said: str) -> None:
    model = make(case)
    with pytest.raises(InputError, match=said):
        check_guide_size(model, "tiny", size)
    check_guide_size(make("VisionTransformer"), "tiny", (32, 64))


def test_a_transformer_of_another_make_does_not_look_smaller() -> None:
    model = make("VisionTransformer")
    assert isinstance(model, PlainViT)
    model.network.patch_embed.__class__ = type("Other", (type(model.network.patch_embed),), {})
    assert not model.accepts_other_sizes


# ---------------------------------------------------------------------------------------- the flags


def guide_of(model: ImageModel, *words: str) -> Any:
    args = get_args_parser().parse_args(["--device", "cpu", "--amp", "none", *words])
    check_args(args)
    return build_guide.make_guide(args, model, CPU.device)


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        ("", torch.float32),
        ("--guide-amp bf16", torch.bfloat16),
        ("--guide-amp fp16", torch.float16),
        ("--amp bf16", torch.bfloat16),
        ("--amp bf16 --guide-amp none", torch.float32),
    ],
)
def test_the_pass_runs_in_its_own_precision(words: str, dtype: torch.dtype) -> None:
    model, images, seen = make("VisionTransformer", num_classes=5), batch_of(1)[0], []  # type: ignore[var-annotated]
    for block in parts_of(model).blocks:
        watch(block.attn.proj, seen)
    made = guide_of(model, *words.split())(images)
    assert {tokens.dtype for tokens in seen} == {dtype}
    assert (made.logits.dtype, made.image_attention.dtype) == (dtype, torch.float32)
    seen.clear()
    model(images)  # nothing of it lingers
    assert {tokens.dtype for tokens in seen} == {torch.float32}


@pytest.mark.parametrize(
    ("words", "tokens"), [("", 17), ("--guide-size 32", 5), ("--guide-size 32 48", 7)]
)
def test_the_pass_runs_at_its_own_size(words: str, tokens: int) -> None:
    model, seen = make("VisionTransformer"), []  # type: ignore[var-annotated]
    watch(parts_of(model).blocks[0], seen)
    made = guide_of(model, *words.split())(batch_of(1)[0])
    assert [len(each[0]) for each in seen] == [tokens]
    check_score(made.image_attention, model)
    assert made.logits.shape == (4, model.num_classes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--guide-size 0", "--guide-size 0: takes one side, or height and width, in pixels"),
        ("--guide-size 32 32 32", "--guide-size 32 32 32: takes one side"),
        (
            "--mixer cutmix --guide-size 112",
            r"--guide-size 112 \(for smmix, or with --con-weight above 0\): "
            r"--mixer cutmix has no use for it",
        ),
        (
            "--mixer transmix --guide-amp bf16",
            r"--guide-amp bf16 \(for smmix, or with --con-weight above 0\): "
            r"--mixer transmix has no use for it",
        ),
        ("--guide-size 40", "multiple of the patch size"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        guide_of(make("VisionTransformer"), *words.split())


@pytest.mark.slow
def test_a_run_takes_both_flags_and_keeps_them(tmp_path: Path) -> None:
    photos = make_image_folder(
        tmp_path / "photos", ("ant", "bee", "cat"), per_class=8, size=(20, 20)
    )
    words = "--guide-size 8 --guide-amp bf16 --mix-protocol single"
    run = run_small(words, "--data-path", photos, "--output-dir", tmp_path / "run")
    assert run.training.module.grid_size == (4, 4)
    assert all(value.isfinite().all() for value in run.training.module.state_dict().values())
    more = run_small(
        "--epochs 2 --accept-changes epochs --auto-resume --mix-protocol single",
        "--data-path",
        photos,
        "--output-dir",
        tmp_path / "run",
    )
    assert more.code == 2
    assert "--guide-size 8 -> None, --guide-amp bf16 -> None" in more.err
    refused = run_small("--guide-size 6 --data-path", photos)
    assert refused.code == 2
    assert (
        "--guide-size 6 6: each side must be a multiple of the patch size 4x4 of vit_nano_patch4_32"
        in refused.err
    )


# --------------------------------------------------------------------------------- an earlier block

READ_ANYWHERE = [
    case for case in CASES if case.split(",")[0] in ("VisionTransformer", "ViT", "BEiT", "EVA")
] + [
    "VisionTransformerDistilled",
    "Cait",
    "Beit",
    "Eva",
]


def cut_after(model: ImageModel, block: int) -> ImageModel:
    """The same model without the later blocks: its last block is the one asked for."""
    shorter = copy.deepcopy(model)
    del parts_of(shorter).blocks[block:]
    return shorter


@pytest.mark.parametrize(
    "case", ["VisionTransformer", "VisionTransformerDistilled", "Cait", "Beit", "ViT, everything"]
)
def test_a_score_from_an_earlier_block_is_that_of_a_shorter_model(case: str) -> None:
    model, images = make(case), batch_of(1)[0]
    with torch.no_grad():
        shorter = cut_after(model, 1).motivating_pass(images)
        seen, whole = model.motivating_pass(images, block=1), model.motivating_pass(images)
    torch.testing.assert_close(seen.image_attention, shorter.image_attention, atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.logits, whole.logits, atol=1e-5, rtol=1e-5)  # the pass went on
    assert not torch.allclose(seen.image_attention, whole.image_attention, atol=1e-5)


@cases
def test_every_block_that_is_offered_can_be_read(case: str) -> None:
    model, images = make(case), batch_of(1)[0]
    assert bool(model.score_blocks) == (case in READ_ANYWHERE), case
    with torch.no_grad():
        last = model.motivating_pass(images)
        for block in range(1, model.score_blocks + 1):
            seen, alone = (
                model.motivating_pass(images, block=block),
                model.motivating_pass(images, block=block, predict=False),
            )
            check_score(seen.image_attention, model)
            assert alone.logits is None
            torch.testing.assert_close(
                alone.image_attention, seen.image_attention, atol=1e-6, rtol=0
            )
            torch.testing.assert_close(seen.logits, last.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            model.motivating_pass(images, predict=False).image_attention,
            last.image_attention,
            atol=1e-6,
            rtol=0,
        )


@pytest.mark.parametrize(
    "case", ["VisionTransformer", "Cait", "PyramidVisionTransformer", "SwinTransformer"]
)
def test_without_a_prediction_the_pass_ends_where_the_score_is_read(case: str) -> None:
    model, seen = make(case), []  # type: ignore[var-annotated]
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            watch(module, seen)
    with torch.no_grad():
        model.motivating_pass(batch_of(1)[0])
        all_of_them = len(seen)
        for block in (None, *range(1, model.score_blocks + 1)):
            seen.clear()
            assert model.motivating_pass(batch_of(1)[0], block=block, predict=False).logits is None
            wanted = (
                block - 1
                if block is not None
                else model.score_blocks - 1
                if model.score_blocks
                else all_of_them - 1
            )
            assert len(seen) == wanted


@pytest.mark.parametrize(
    ("case", "words", "said"),
    [
        ("VisionTransformer", "--score-block 0", r"--score-block 0: \S+ has the blocks 1 to 2"),
        ("VisionTransformer", "--score-block 3", r"has the blocks 1 to 2"),
        (
            "SwinTransformer",
            "--score-block 1",
            r"a SwinTransformer, has a score in its last block only",
        ),
        ("VisionTransformer", "--mixer cutmix --score-block 1", r"--score-block 1 \(for smmix\)"),
        ("VisionTransformer", "--con-weight -1", "--con-weight -1.0: must not be negative"),
        ("VisionTransformer", "--mixer cutmix --fine-weight 0", r"--fine-weight 0.0 \(for smmix\)"),
    ],
)
def test_a_block_or_weight_that_does_not_do_is_refused(case: str, words: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        guide_of(make(case), *words.split())


@pytest.mark.slow
def test_runs_without_a_term_leave_it_out(tmp_path: Path) -> None:
    photos = make_image_folder(
        tmp_path / "photos", ("ant", "bee", "cat"), per_class=8, size=(20, 20)
    )
    heads = {}
    for name in ("fine", "con"):
        words = f"--{name}-weight 0 --score-block 2 --variant released --mix-protocol single"
        run = run_small(words, "--data-path", photos, "--output-dir", tmp_path / name)
        assert run.code == 0, run.err
        line = json.loads((tmp_path / name / "log.txt").read_text().splitlines()[0])
        terms = {key for key in line if key.startswith("train_loss_")}
        assert terms == {
            "train_loss_cls",
            *({"train_loss_fine", "train_loss_con"} - {f"train_loss_{name}"}),
        }
        heads[name] = run.training.module.token_head is not None
    assert heads == {"fine": False, "con": True}  # no region, no classifier for it
