"""FMix (Harris et al. 2020, arXiv 2002.12047): random blobs, the largest values of smooth noise."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from mixers.fmix_options import FMixOptions
from mixers.interface import Guide, MixedBatch, Mixer, MixerContext, draw_beta, pair_up, send
from mixers.masks import paste, top_mask


class Blobs(NamedTuple):
    """The draws of M masks for a batch of B images."""

    noise: Tensor  # (M, height, width // 2 + 1) complex64, white noise
    pixels: list[int]  # M, number of pixels of each mask
    used: list[int]  # B, index of the mask of each image


class FMix(Mixer[Blobs]):
    """Pastes blobs whose share is drawn from Beta(alpha, alpha).

    lam is the share of the pixels that are pasted; the authors' code takes the drawn share, which
    differs by less than a pixel.

    Args:
        decay: delta, the exponent with which the spectrum of the noise falls.
        mode: draw one mask per batch, pair or image.
    """

    def __init__(
        self,
        num_classes: int,
        smoothing: float = 0.1,
        alpha: float = 1.0,
        decay: float = 3.0,
        mode: str = "batch",
    ) -> None:
        super().__init__(num_classes, smoothing)
        self.alpha, self.decay, self.mode = alpha, decay, mode

    @classmethod
    def from_options(cls, options: FMixOptions, context: MixerContext) -> Self:
        (alpha,) = options.mix_alpha or (1.0,)
        return cls(
            context.num_classes, options.smoothing, alpha, options.fmix_decay, options.mixup_mode
        )

    def draw(
        self, batch_size: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> Blobs:
        used = pair_up(list(range(batch_size)), batch_size, self.mode, self.groups)
        count, (height, width) = max(used) + 1, image_size
        shares = draw_beta(self.alpha, count, generator)
        # The number of pixels is rounded down or up with equal probability.
        up = torch.randint(2, (count,), generator=generator).tolist()
        pixels = [
            min(int(share * height * width) + one, height * width)
            for share, one in zip(shares, up, strict=True)
        ]
        noise = torch.randn(count, height, width // 2 + 1, 2, generator=generator)
        return Blobs(torch.view_as_complex(noise), pixels, used)

    def apply(self, images: Tensor, labels: Tensor, drawn: Blobs, guide: Guide) -> MixedBatch:
        height, width = images.shape[-2:]
        smooth = shape_noise(send(drawn.noise, images.device), (height, width), self.decay)
        pixels, used = (
            torch.tensor(values).to(images.device, non_blocking=True) for values in drawn[1:]
        )
        mask = top_mask(smooth.flatten(1), pixels).view(-1, 1, height, width)[used]
        return self.label(*paste(images, images.flip(0), mask), labels, mask)


def shape_noise(noise: Tensor, image_size: tuple[int, int], decay: float) -> Tensor:
    """Smooth noise (M, height, width): white noise divided by frequency**decay.

    Args:
        noise: (M, height, width // 2 + 1) complex, one value for each frequency of a real Fourier
            transform.
    """
    height, width = image_size
    rows = torch.fft.fftfreq(height, device=noise.device)[:, None]
    columns = torch.fft.rfftfreq(width, device=noise.device)
    frequency = (rows.square() + columns.square()).sqrt().clamp(min=1 / max(height, width))
    return torch.fft.irfft2(noise / frequency**decay, s=(height, width))
