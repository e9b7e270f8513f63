"""The arithmetic of the total batch: how a process divides its share, and the rate that follows."""

from __future__ import annotations


def fewest_micro_batches(share: int, largest: int) -> int:
    """The smallest number of micro-batches of equal size for the images of one process and step.

    Args:
        share: images of one step of one process.
        largest: the largest size of a micro-batch.
    """
    counts = (n for n in range(1, share + 1) if share % n == 0 and share // n <= largest)
    return next(counts)


def scale_rate(rate: float, total_batch: int) -> float:
    """The learning rate by DeiT's linear rule; `rate` is that for a total batch of 512 images."""
    return rate * total_batch / 512
