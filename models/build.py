"""Builds an `ImageModel` from its name, lists the families, and switches options of a model on."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.maxxvit import MaxxVit
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.twins import Twins
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from errors import InputError
from models.beit import BEiT
from models.cait import CaiT
from models.convnet import ConvNet
from models.deit import PlainViT, init_like_deit
from models.eva import EVA
from models.float32_attention import attention_in_float32
from models.interface import ImageModel
from models.maxvit import MaxViT
from models.pvt import PVT, PyramidVisionTransformer
from models.pvt_v2 import PVTv2
from models.swin import Swin
from models.swin_v2 import SwinV2
from models.twins import TwinsModel

# The names of the same networks in the authors' released code.
ALIASES = {
    f"vit_deit_{size}_patch16_224": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")
}


class Family(NamedTuple):
    """One model family. A new one needs a row in `FAMILIES`."""

    network_class: type[nn.Module]  # the class of the plain network
    wrapper: Callable[..., ImageModel]  # the `ImageModel` around it
    modules: tuple[str, ...]  # timm's modules whose model names build this class
    score: str  # the meaning of its attention score, for the documentation

    # Whether the network's class takes the input size; otherwise the wrapper takes it.
    takes_img_size: bool = True

    # The settings of the network's class that get the dropout rate: those of DeiT's own code, after
    # the position embedding and in the blocks, where timm has them; else before the classifier.
    drop: tuple[str, ...] = ("drop_rate",)


IN_BLOCKS = ("proj_drop_rate",)
EVERYWHERE = ("pos_drop_rate", *IN_BLOCKS)
ENERGY = (
    "an extension beyond the paper: each cell's share in the energy of the final feature map, no "
    "attention"
)
FAMILIES = (
    Family(
        VisionTransformer,
        PlainViT,
        ("vision_transformer", "deit"),
        "the last block's map, image-token queries and keys (Eq. 6)",
        drop=EVERYWHERE,
    ),
    Family(
        Cait,
        CaiT,
        ("cait",),
        "the last self-attention block's map, between softmax and second head mix; class attention "
        "is left out",
        drop=EVERYWHERE,
    ),
    Family(
        PyramidVisionTransformer,
        PVT,
        ("pvt",),
        "the last block's map in stage 4, image-token queries and keys",
    ),
    Family(
        SwinTransformer,
        Swin,
        ("swin_transformer",),
        "the last block's map; with several windows, each token's mean over the queries of its own "
        "window",
        drop=IN_BLOCKS,
    ),
    Family(
        Beit,
        BEiT,
        ("beit",),
        "the last block's map with its relative position biases, class token cut",
        drop=EVERYWHERE,
    ),
    Family(
        Eva,
        EVA,
        ("eva",),
        "the last block's map after the rotary embedding, class and register tokens cut",
        drop=EVERYWHERE,
    ),
    Family(
        SwinTransformerV2,
        SwinV2,
        ("swin_transformer_v2",),
        "the last block's cosine map; with several windows, each token's mean over its own, over "
        "their number",
        drop=IN_BLOCKS,
    ),
    Family(
        PyramidVisionTransformerV2,
        PVTv2,
        ("pvt_v2",),
        "the last block's map; where keys are reduced, each one's score is shared by its cells",
        takes_img_size=False,
        drop=IN_BLOCKS,
    ),
    Family(Twins, TwinsModel, ("twins",), "the map of the last global attention", drop=EVERYWHERE),
    Family(
        MaxxVit,
        MaxViT,
        ("maxxvit",),
        "MaxViT: the last grid attention's map; CoAtNet: its global attention's",
    ),
    Family(ConvNeXt, ConvNet, ("convnext",), ENERGY, takes_img_size=False),
    Family(
        ResNet,
        ConvNet,
        ("resnet", "res2net", "resnest", "sknet"),
        ENERGY,
        takes_img_size=False,
    ),
)

# The reason why the networks of a class have no score, for the error message.
NO_SCORE = {"Xcit": "its attention runs across channels, so no token receives a score"}


def build_model(
    name: str,
    num_classes: int,
    *,
    input_size: tuple[int, int] | None = None,
    patch_size: int | None = None,
    drop: float = 0.0,
    drop_path: float = 0.0,
    separate_region_head: bool = False,
    **overrides: Any,
) -> ImageModel:
    """Builds a model with freshly initialised weights.

    Args:
        name: a name of timm, or of the authors' released code.
        num_classes: K.
        input_size: (height, width) in pixels. None: timm's default for this name.
        patch_size: side of a patch in pixels. None: timm's default for this name.
        drop: dropout rate; `Family.drop` says where.
        drop_path: rate of stochastic depth.
        separate_region_head: see `ImageModel`.
        overrides: further keyword arguments of the timm class (`embed_dim`, `depth`, ...).

    Raises:
        InputError: the name is unknown (the message lists similar ones), the network gives no
            score, or the input size is not a multiple of the patch size.
    """
    name = ALIASES.get(name, name)
    if not timm.is_model(name):
        raise InputError(f"--model {name}: no such model; {near_misses(name)}")
    entry = timm.model_entrypoint(name)
    takes_size = takes_input_size(name)
    families = _families_of_name(name)
    settings = families[0].drop if families else ("drop_rate",)
    overrides = {**dict.fromkeys(settings, drop), **overrides}
    if input_size is not None and takes_size:
        overrides["img_size"] = input_size
    if patch_size is not None and not takes_size:
        raise InputError(
            f"--patch-size {patch_size}: the patch size of {name} is fixed; leave the flag out"
        )
    if patch_size is not None:
        overrides["patch_size"] = patch_size
    try:
        network = entry(num_classes=num_classes, drop_path_rate=drop_path, **overrides)
    except (TypeError, AssertionError, ValueError) as error:
        # If SMMix does not support the family at all, `_family_of` raises that error instead: it
        # explains more than a setting that timm refuses.
        with torch.device("meta"):
            _family_of(entry(), f"--model {name}")
        raise InputError(
            f"--model {name}: timm cannot build it with these settings: {error}"
        ) from error
    model = _wrap(network, separate_region_head, input_size, f"--model {name}")
    _check_grid(model, name, input_size)
    if name.startswith("deit_"):
        init_like_deit(network)
    return model


def wrap(
    network: nn.Module,
    separate_region_head: bool = False,
    input_size: tuple[int, int] | None = None,
) -> ImageModel:
    """The `ImageModel` of the right family around a network of timm, or around our PVT.

    Args:
        network: with its classifier; it is not copied.
        separate_region_head: see `ImageModel`.
        input_size: height and width in pixels of the images. None: the size for which the network
            was built, or timm's default for a network that takes images of any size.

    Raises:
        InputError: no family has this class, the network cannot be trained with SMMix (the message
            gives the reason), or it takes images of another size.
    """
    model = _wrap(network, separate_region_head, input_size, "the network")
    if input_size not in (None, model.input_size):
        raise InputError(
            "the network takes images of {} x {} pixels, not {} x {}: build it for this size, in "
            "multiples of its patch of {} x {}".format(
                *model.input_size, *input_size, *model.patch_size
            )
        )
    return model


def _wrap(
    network: nn.Module, separate_head: bool, input_size: tuple[int, int] | None, name: str
) -> ImageModel:
    family = _family_of(network, name)
    wrapper_args = {} if family.takes_img_size else {"input_size": input_size}
    try:
        return family.wrapper(network, separate_head, **wrapper_args)
    except ValueError as error:
        raise InputError(f"{name} cannot be trained with SMMix: {error}") from error


def takes_input_size(name: str) -> bool:
    """Whether a network is built for one input size. The others take images of any size."""
    return all(family.takes_img_size for family in _families_of_name(name))


def _families_of_name(name: str) -> list[Family]:
    """The families that the module of a model's name belongs to: one, or none."""
    module = timm.model_entrypoint(ALIASES.get(name, name)).__module__.rsplit(".")[-1]
    return [family for family in FAMILIES if module in family.modules]


def build_on_meta(**config: Any) -> ImageModel:
    """`build_model` on the meta device: the model has shapes, but no memory for its weights.

    For reading its sizes, or for refusing weights of other shapes early.

    Args:
        config: the arguments of `build_model`.
    """
    try:
        with torch.device("meta"):
            return build_model(**config)
    except (NotImplementedError, RuntimeError):
        # Some models of older releases of timm cannot be built without real values.
        return build_model(**config)


@cache
def own_input_size(name: str, patch_size: int | None = None) -> tuple[int, int]:
    """Height and width in pixels of the images that a model takes if no other size is asked for.

    Args:
        patch_size: side of a patch in pixels; default: the model's own.

    Raises:
        InputError: as in `build_model`.
    """
    return build_on_meta(name=name, num_classes=1, patch_size=patch_size).input_size


def _family_of(network: nn.Module, name: str) -> Family:
    for family in FAMILIES:
        if isinstance(network, family.network_class):
            return family
    kind = type(network).__name__
    supported = ", ".join(family.network_class.__name__ for family in FAMILIES)
    reason = f" ({NO_SCORE[kind]})" if kind in NO_SCORE else ""
    raise InputError(
        f"{name}: {kind} has no attention score that SMMix can use{reason}; "
        f"supported are {supported}: see --list-models"
    )


def list_models() -> Iterator[tuple[str, str, str, str]]:
    """Family, name, grid and meaning of the score of every model, or why it is not supported.

    Each model is built on the meta device, which takes a minute or two for all of them.
    """
    for family in FAMILIES:
        kind = family.network_class.__name__
        found = {name for module in family.modules for name in timm.list_models(module=module)}
        for name in sorted(found):
            try:
                with torch.device("meta"):
                    model = build_model(name, 1000)
            except InputError as error:
                yield kind, name, "-", f"refused: {error.text.split(': ', 1)[-1]}"
            else:
                grid = " x ".join(map(str, model.grid_size))
                yield kind, name, grid, family.score


def describe_families() -> list[tuple[str, str]]:
    """Class of the network and meaning of the score for each family, for the documentation."""
    return [(family.network_class.__name__, family.score) for family in FAMILIES]


def near_misses(name: str) -> str:
    """Advice for an unknown model name: similar names, or how to list all."""
    near = difflib.get_close_matches(name, [*timm.list_models(), *ALIASES], n=5, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists all names"


def _check_grid(model: ImageModel, name: str, input_size: tuple[int, int] | None) -> None:
    if input_size is not None and input_size != model.input_size:
        raise InputError(
            f"--input-size {input_size[0]} {input_size[1]}: not divisible by the patch size "
            f"{model.patch_size[0]}x{model.patch_size[1]} of {name}; the next smaller size is "
            f"{model.input_size[0]} {model.input_size[1]}; a plain ViT also takes another "
            "--patch-size"
        )


def use_distillation(model: ImageModel, name: str) -> None:
    """Makes the model return separate logits of its distillation token in training (DeiT Sec. 4).

    Raises:
        InputError: the model has no distillation token.
    """
    if not isinstance(model.network, VisionTransformerDistilled):
        raise InputError(
            f"--distillation-type: {name} has no distillation token; use a distilled model "
            "(deit_tiny_distilled_patch16_224, deit_small_..., deit_base_...) or "
            "--distillation-type none"
        )
    model.network.set_distilled_training(True)


def use_grad_checkpointing(model: ImageModel, name: str) -> None:
    """Switches gradient checkpointing on: activations are computed again in the backward pass.

    Raises:
        InputError: timm's model does not support it.
    """
    try:
        cast(Any, model.network).set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise InputError(f"--grad-checkpointing: {name} does not support it: {error}") from error


def use_float32_attention(model: ImageModel, name: str) -> None:
    """Computes attention and its score in float32 under autocast.

    Raises:
        InputError: the model has no attention.
    """
    if isinstance(model, ConvNet) or not attention_in_float32(model.network):
        raise InputError(f"--attn-fp32: {name} has no attention; leave the flag out")
