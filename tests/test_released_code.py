"""`--variant released` reproduces what the released research code computed; `tests/data/README.md`
says what is there.

The other variant, `paper`, must differ where the paper differs.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import make_guide
from losses import SMMixLoss
from mixers.interface import MixedBatch, mix_labels, soft_labels
from mixers.masks import region_mask
from mixers.smmix_options import VARIANTS
from models.build import build_model
from models.interface import ImageModel, ModelOutput
from models.weights import adapt_weights, load_strictly, pick_weights
from smmix import Drawn, SMMix, mix_logits, mix_probs, paste_regions
from storage.checkpoints import load_checkpoint
from training.precision import make_autocast

DATA = Path(__file__).parent / "data"
NO_AMP = make_autocast(torch.device("cpu"), "none")
TOLERANCE = 1e-5
close = partial(torch.testing.assert_close, atol=TOLERANCE, rtol=0)

MIXES: list[dict[str, Any]] = torch.load(DATA / "mixing_records.pt", weights_only=True)
STEPS: list[dict[str, Any]] = torch.load(DATA / "deit_mini_records.pt", weights_only=True)
steps = pytest.mark.parametrize("record", STEPS, ids=lambda record: f"rect{record['rect']}")


@pytest.fixture(scope="module")
def model() -> ImageModel:
    """The recorded network, through the same doors as any foreign checkpoint."""
    checkpoint = load_checkpoint(DATA / "deit_mini.pth")
    arch = checkpoint["arch"]
    model = build_model(
        "deit_tiny_patch16_224",
        arch["num_classes"],
        input_size=(arch["img_size"],) * 2,
        patch_size=arch["patch_size"],
        separate_region_head=True,
        embed_dim=arch["embed_dim"],
        depth=arch["depth"],
        num_heads=arch["num_heads"],
    )
    weights, notes = adapt_weights(model, pick_weights(checkpoint))
    assert notes == []
    assert load_strictly(model, weights, source="deit_mini.pth") == []
    return model.train()


def sha256(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def apply(record: dict[str, Any], guide: Any, variant: str = "released") -> MixedBatch:
    mixer = SMMix(
        record["n_classes"],
        (record["side"],) * 2,
        record["label_smoothing"],
        variant=VARIANTS[variant],
    )
    return mixer.apply(
        record["x"], record["y"], Drawn([(record["rect"],) * 2] * len(record["x"])), guide
    )


def recorded_guide(record: dict[str, Any]) -> Any:
    return lambda images: ModelOutput(record["logits"], images.new_zeros(0), record["attention"])


# ------------------------------------------------------------------------------------- mixing alone


@pytest.mark.parametrize(
    "record", MIXES, ids=lambda record: f"side{record['side']}-rect{record['rect']}"
)
def test_images_and_masks_bit_for_bit(record: dict[str, Any]) -> None:
    grid, size = (record["side"],) * 2, (record["rect"],) * 2
    patch = record["x"].shape[-1] // record["side"]
    regions = SMMix(2, grid).choose(record["attention"], [size] * len(record["x"]))
    assert torch.equal(paste_regions(record["x"], regions, (patch, patch)), record["mixed"])
    mask = region_mask(regions.target_corners, regions.sizes, grid)
    assert torch.equal(mask, record["source_mask"])


@steps
def test_recorded_predictions_give_the_recorded_mix(record: dict[str, Any]) -> None:
    mixed = apply(record, recorded_guide(record))
    assert sha256(mixed.images) == record["mixed_sha256"]
    assert mixed.source_mask is not None
    assert torch.equal(mixed.source_mask, record["source_mask"])
    close(mixed.labels, record["mixed_target"])
    close(mixed.reference_probs, record["consistency_logits"].softmax(dim=-1))


# -------------------------------------------------------------------------- end to end from weights


@steps
def test_the_network_predicts_as_recorded(model: ImageModel, record: dict[str, Any]) -> None:
    clean = make_guide(model, NO_AMP)(record["x"])
    close(clean.logits, record["logits"])
    close(clean.image_attention, record["attention"])


@steps
def test_a_whole_step_is_the_recorded_one(model: ImageModel, record: dict[str, Any]) -> None:
    mixed = apply(record, make_guide(model, NO_AMP))
    assert sha256(mixed.images) == record["mixed_sha256"]
    output = model(mixed.images, source_mask=mixed.source_mask)
    close(output.logits, record["mixed_logits"])
    assert output.region_logits is not None
    close(
        output.region_logits,
        torch.stack((record["source_region_logits"], record["target_region_logits"]), dim=1),
    )
    terms = SMMixLoss()(output, mixed)
    assert terms.keys() == {"total", "cls", "fine", "con"}
    for name, term in terms.items():
        close(term, record[f"loss_{name}"])


# -------------------------------------------------------------------------------- negative controls


@steps
def test_the_papers_consistency_term_is_another_one(
    model: ImageModel, record: dict[str, Any]
) -> None:
    mixed = apply(record, recorded_guide(record), "paper")
    assert sha256(mixed.images) == record["mixed_sha256"]  # the regions of Eq. 7 and 8 are the same
    output = model(mixed.images, source_mask=mixed.source_mask)
    terms = SMMixLoss()(output, mixed)
    close(terms["cls"], record["loss_cls"])
    assert (terms["con"] - record["loss_con"]).detach().abs() > 10 * TOLERANCE
    assert mixed.reference_probs is not None
    assert (mixed.reference_probs - record["consistency_logits"].softmax(-1)).abs().max() > 1e-3


@steps
def test_swapped_roles_would_be_noticed(record: dict[str, Any]) -> None:
    lam = torch.full((len(record["x"]),), record["rect"] ** 2 / record["side"] ** 2)
    labels = soft_labels(record["y"], record["n_classes"], record["label_smoothing"])
    assert (mix_labels(labels, labels.flip(0), lam) - record["mixed_target"]).abs().max() > 0.1
    wanted = record["consistency_logits"].softmax(-1)
    assert (mix_logits(record["logits"], 1 - lam) - wanted).abs().max() > 1e-2
    assert (mix_probs(record["logits"], lam) - wanted).abs().max() > 1e-3
