"""Benchmarks of the training step with each mixer, and of the parts that SMMix adds to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.functional import fold, unfold

import engine
import utils
from config.build_mixer import build_mixer
from config.flags import get_args_parser
from losses import SMMixLoss
from mixers.interface import Guide, MixerContext, Regions, StepRandom
from mixers.registry import METHODS
from mixers.switch import Switch
from models.build import build_model
from models.interface import ImageModel
from pipeline.samples import Batch
from pipeline.spec import ImageSpec
from pipeline.transforms import denormalise
from smmix import paste_regions
from tools.bench.timing import Case, Timing
from training import optim, precision
from training.meters import Meters

CLASSES = 1000
SPLIT = "smmix --mix-protocol split"


class Bench:
    """One model with its training, on random images that are already on the device."""

    def __init__(
        self,
        model: str,
        device: torch.device,
        batch_size: int,
        amp: str,
        compiled: bool = False,
        input_size: int | None = None,
    ) -> None:
        utils.seed_globals("init", 0)
        size = None if input_size is None else (input_size, input_size)
        self.device, self.batch_size, self.amp = device, batch_size, amp
        self.model: ImageModel = build_model(model, CLASSES, input_size=size, drop_path=0.1).to(
            device
        )
        self.autocast = precision.make_autocast(device, amp)
        wrapped: Any = torch.compile(self.model) if compiled else self.model
        self.guide = engine.make_guide(
            self.model,
            self.autocast,
            torch.compile(self.model.motivating_pass) if compiled else None,
        )
        self.training = engine.Training(
            module=self.model,
            model=wrapped,
            criterion=SMMixLoss(),
            mixer=self.mixer("none"),
            guide=self.guide,
            optimizer=optim.make_optimizer(
                self.model, {"opt": "adamw", "lr": 1e-6, "weight_decay": 0.05}
            ),
            scaler=precision.make_scaler(device, amp),
            autocast=self.autocast,
            processes=utils.Processes(0, 1, device),
            fixed_scale=amp != "fp16",
        )
        self.images = torch.rand(batch_size, 3, *self.model.input_size, device=device)
        self.labels = torch.arange(batch_size, device=device) % CLASSES
        self.meters, self.step = Meters(), 0

    def mixer(self, name: str, **more: Any) -> Switch:
        """The mixer of one method, which mixes every batch.

        AttentiveMix gets a stand-in for its classifier, so its cost is not counted.
        """
        flags = get_args_parser().parse_args(["--mixer", name, "--mix-protocol", "single"])
        vars(flags).update(more)

        def teacher(images: Tensor) -> Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(images, 7)

        to_bytes = partial(denormalise, spec=ImageSpec((1, 1)))
        context = MixerContext(CLASSES, self.model.grid_size, to_bytes, teacher)
        return build_mixer(flags, context)

    def cheaper_guides(self) -> dict[str, Guide]:
        """A guide for each flag that makes the pass cheaper and that this model supports."""
        model, guides = self.model, {}
        if self.amp == "none":
            guides["--guide-amp bf16"] = engine.make_guide(
                model, precision.make_autocast(self.device, "bf16")
            )
        if model.accepts_other_sizes:
            cells = zip(model.grid_size, model.patch_size, strict=True)
            height, width = (max(2, count // 2) * patch for count, patch in cells)
            guides[f"--guide-size {height} {width}"] = engine.make_guide(
                model, self.autocast, size=(height, width)
            )
        guides["--con-weight 0"] = engine.make_guide(model, self.autocast, predict=False)
        if model.score_blocks > 1:
            block = model.score_blocks // 2
            guides[f"--con-weight 0 --score-block {block}"] = engine.make_guide(
                model, self.autocast, block=block, predict=False
            )
        return guides

    def take_step(self, mixer: Switch, guide: Guide | None = None) -> None:
        """One step: mixing, forward, backward and update."""
        self.training.model.train()
        self.training.mixer = mixer
        self.training.guide = guide or self.guide
        batch = Batch(self.images, self.labels, self.labels)
        engine.train_step(self.training, [batch], self.step, self.meters)
        self.training.nonfinite.records.clear()
        self.step += 1

    def mix(self, mixer: Switch) -> None:
        generator = utils.keyed_generator("bench", self.step)
        mixer(self.images, self.labels, self.guide, StepRandom(generator, generator))


def step_cases(bench: Bench) -> list[Case]:
    """One step with each method and with cheaper forms of SMMix; CutMix is the reference."""
    names = ["cutmix", *(name for name in METHODS if name != "cutmix")]
    cases = [
        Case(f"step with {name}", partial(bench.take_step, bench.mixer(name))) for name in names
    ]
    for flags, guide in bench.cheaper_guides().items():
        mixer = bench.mixer("smmix", con_weight=0.0 if "--con-weight 0" in flags else 1.0)
        cases.append(Case(f"step with smmix {flags}", partial(bench.take_step, mixer, guide)))
    cases.append(
        Case(
            f"step with {SPLIT}",
            partial(bench.take_step, bench.mixer("smmix", mix_protocol="split")),
        )
    )
    return [case._replace(images=bench.batch_size) for case in cases]


def switched(timings: list[Timing]) -> dict[str, float]:
    """The cost of a run with Mixup in half of its steps, as a ratio to CutMix with Mixup.

    It is the mean cost of both kinds of step. With --mix-protocol split there is only one kind.

    Args:
        timings: the timings of `step_cases`.

    Returns:
        The ratio by method, with its flags.
    """
    seconds = {timing.name.removeprefix("step with "): timing.seconds[0] for timing in timings}
    base = seconds["cutmix"] + seconds["mixup"]
    both = {
        name: value + seconds["mixup"]
        for name, value in seconds.items()
        if name not in ("mixup", "none")
    }
    if SPLIT in both:
        both[SPLIT] = 2 * seconds[SPLIT]
    return {name: value / base for name, value in both.items()}


def guide_cases(bench: Bench) -> list[Case]:
    """The motivating pass, its cheaper forms and a whole forward pass, beside training."""

    def forward() -> None:
        bench.training.model.train()
        with bench.autocast():
            bench.training.model(bench.images)

    def whole() -> None:
        with precision.eval_mode(bench.model), torch.no_grad(), bench.autocast():
            bench.model(bench.images, need_attention="image")

    def cheaper(guide: Guide) -> Callable[[], Any]:
        return lambda: guide(bench.images)

    return [
        Case("training forward", forward),
        Case("motivating pass as a whole forward pass", whole),
        Case("motivating pass", lambda: bench.guide(bench.images)),
        *(
            Case(f"motivating pass {flags}", cheaper(guide))
            for flags, guide in bench.cheaper_guides().items()
        ),
        Case("motivating pass of half of the images", lambda: bench.guide(bench.images[::2])),
        Case("training step (cutmix)", partial(bench.take_step, bench.mixer("cutmix"))),
    ]


def update_cases(bench: Bench) -> list[Case]:
    """Optimizer and average: one call for all parameters, as in training, and a loop over them."""
    fused = optim.make_optimizer(bench.model, {"opt": "adamw", "lr": 1e-6, "weight_decay": 0.05})
    looped = torch.optim.AdamW(bench.model.parameters(), lr=1e-6, weight_decay=0.05, foreach=False)
    average = ModelEmaV3(bench.model, decay=0.99996)
    one_by_one = ModelEmaV3(bench.model, decay=0.99996, foreach=False)
    good = torch.ones((), device=bench.device)

    def step(optimizer: torch.optim.Optimizer) -> None:
        for parameter in bench.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()

    return [
        Case("AdamW, a loop over parameters", partial(step, looped)),
        Case("AdamW as here", partial(step, fused)),
        Case("average, a loop over parameters", lambda: one_by_one.update(bench.model)),
        Case("average as here", lambda: optim.update_average(average, bench.model, good)),
    ]


def paste_by_unfolding(
    size: tuple[int, int], images: Tensor, regions: Regions, patch_size: tuple[int, int]
) -> Tensor:
    """The simple way: unfold all patches, index those of the regions, fold all patches again.

    Args:
        size: of every region, in tokens.
    """
    rows, columns = images.shape[2] // patch_size[0], images.shape[3] // patch_size[1]
    patches = unfold(images, patch_size, stride=patch_size)  # (B, C * P, N)
    below = torch.arange(size[0], device=images.device)[:, None]
    beside = torch.arange(size[1], device=images.device)

    def cells(corners: Tensor) -> Tensor:
        tops, lefts = corners[:, :1, None], corners[:, 1:, None]
        return ((tops + below) * columns + lefts + beside).flatten(1)  # (B, h * w)

    batch = torch.arange(len(images), device=images.device)[:, None]
    mixed = patches.clone()
    source, target = cells(regions.source_corners), cells(regions.target_corners)
    mixed[batch, :, target] = patches.flip(0)[batch, :, source]
    image_size = (rows * patch_size[0], columns * patch_size[1])
    return fold(mixed, image_size, patch_size, stride=patch_size)


def copy_regions(
    size: tuple[int, int], images: Tensor, regions: Regions, patch_size: tuple[int, int]
) -> Tensor:
    """Copies as many pixels as pasting does: the least that any pasting needs."""
    height, width = size[0] * patch_size[0], size[1] * patch_size[1]
    return images[:, :, :height, :width].clone()


def paste_cases(bench: Bench) -> list[Case]:
    """The mixing operation alone, on regions of half the side; copying them is the reference."""
    model, batch = bench.model, bench.batch_size
    size = (model.grid_size[0] // 2, model.grid_size[1] // 2)
    room = torch.tensor([model.grid_size[0] - size[0] + 1, model.grid_size[1] - size[1] + 1])
    generator = utils.keyed_generator("corners")
    corners = [
        (torch.rand(batch, 2, generator=generator) * room).long().to(bench.device) for _ in range(2)
    ]
    sizes = torch.tensor(size, device=bench.device).expand(batch, 2)
    regions = Regions(corners[0], corners[1], sizes)

    def timed(paste: Callable[[Tensor, Regions, tuple[int, int]], Tensor]) -> Callable[[], Any]:
        return lambda: paste(bench.images, regions, model.patch_size)

    return [
        Case("copy of the pasted regions", timed(partial(copy_regions, size)), 5),
        Case("copy of the batch", lambda: bench.images.clone(), 5),
        Case("paste_regions", timed(paste_regions), 5),
        Case("unfold, index, fold", timed(partial(paste_by_unfolding, size)), 5),
        Case("all of SMMix's mixing without the pass", partial(_mix_without_pass, bench), 5),
    ]


def _mix_without_pass(bench: Bench) -> None:
    if not hasattr(bench, "guide_output"):
        bench.guide_output = bench.guide(bench.images)  # type: ignore[attr-defined]
    mixer, generator = bench.mixer("smmix"), utils.keyed_generator("bench")
    output = bench.guide_output  # type: ignore[attr-defined]
    mixer(bench.images, bench.labels, lambda images: output, StepRandom(generator, generator))
