"""What `tests/fuzz.py` makes its cases of: values, nests, bytes, images and command lines, drawn from a generator."""

from __future__ import annotations

import argparse
import copy
import io
import pickletools
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

NUMBERS = (0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63, -(2**63), 10**30, 0.0, 0.5, -1.5, 1e-320, 1e308, float("nan"),
           float("inf"), float("-inf"), True, False)  # fmt: skip
TEXTS = ("", "a", "none", "nan", "vit_nano_patch4_32", "vit_giant_patch14_224", "resnet50", "bicubic", "fp16",
         "smmix", "\x00", "../../etc", "ü" * 3, "x" * 5000, "%s%n{0}", "-1", "--lr", "1e400", "0x10", "٣", "[1]",
         "None")  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool,
          torch.complex64, torch.float8_e4m3fn)  # fmt: skip


def tensor(rng: random.Random) -> torch.Tensor:
    shape = [rng.choice((0, 1, 2, 3, 5, 64)) for _ in range(rng.randrange(5))]
    made = torch.zeros(shape, dtype=rng.choice(DTYPES))
    kinds: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
        lambda value: value,
        lambda value: value,
        lambda value: value,
        lambda value: torch.full(value.shape, float("nan")),
        lambda value: torch.zeros(1).expand(rng.choice((7, 1 << 40)), 3),
        lambda value: torch.empty(value.shape, device="meta"),
        lambda value: torch.zeros(value.shape).to_sparse() if value.ndim else value,
        lambda value: torch.nn.Parameter(torch.zeros(value.shape)),
    )
    return rng.choice(kinds)(made)


def value(rng: random.Random, depth: int = 0) -> Any:
    """Something that weights-only files can hold."""
    kind = rng.randrange(14 if depth < 4 else 8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(TEXTS)
    if kind == 5:
        return None
    if kind == 6:
        return tensor(rng)
    if kind == 7:
        return rng.choice((np.float64(0.5), torch.float16, torch.device("cpu"), torch.Size([2, 3]), b"bytes", {1, 2}))
    items = [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 10:
        return items
    if kind == 10:
        return tuple(items)
    if kind == 11:
        return argparse.Namespace(**{f"name{place}": item for place, item in enumerate(items)})
    keys = [rng.choice((*TEXTS, 0, 3, -1, 1.5, None, (1, 2), True)) for _ in items]
    return (dict if kind == 12 else OrderedDict)(zip(keys, items, strict=True))


def _places(nest: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a nest of dicts and lists."""
    found, waiting = [], [nest]
    while waiting:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])
    return found


def _alike(rng: random.Random, old: Any) -> Any:
    """Another value of the same type, as a file might well hold."""
    if isinstance(old, torch.Tensor):
        changes: tuple[Callable[[], torch.Tensor], ...] = (
            lambda: old.flatten(), lambda: old[None], lambda: old.t() if old.ndim == 2 else old, lambda: old.double(),
            lambda: old[:0] if old.ndim else old[None].expand(5), lambda: torch.zeros(rng.choice(((), (3,), (2, 3)))),
            lambda: old * float("nan") if old.is_floating_point() else -old, lambda: old.to(torch.bool),
        )  # fmt: skip
        return rng.choice(changes)()
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return rng.choice((-old, old + 1, old * 1000, 0, 1, 2, 37, 4096, 10**6))
    if isinstance(old, float):
        return rng.choice((-old, old + 1, old * 1000, 0.0, 1e-320, 1e308))
    if isinstance(old, str):
        return rng.choice((old + "x", old[:-1], old.upper(), *TEXTS))
    if isinstance(old, (list, tuple)):
        return rng.choice((list(old)[:-1], [*old, *old], list(old)[::-1], []))
    if isinstance(old, dict):
        rest = {key: item for key, item in old.items() if rng.random() < 0.7}
        return rng.choice((rest, {**rest, "x": next(iter(old.values()), None)}, {}))
    return old


def _near(rng: random.Random, old: Any) -> Any:
    """Something like `old`, but of another type."""
    if isinstance(old, torch.Tensor):
        return rng.choice((lambda: old.to(rng.choice(DTYPES)), lambda: old.tolist(), lambda: tensor(rng)))()
    if isinstance(old, (bool, int, float)):
        return rng.choice((float(old), str(old), [old], int(old) if abs(old) < 1e300 else None, torch.tensor(old)))
    if isinstance(old, str):
        return rng.choice(([old], old.encode(), None, len(old)))
    if isinstance(old, (list, tuple)):
        return rng.choice(([old], dict(enumerate(old)), str(old), None))
    if isinstance(old, dict):
        return rng.choice((list(old.values()), {str(key) + "x": item for key, item in old.items()}, list(old), None))
    return value(rng)


def changed(rng: random.Random, nest: dict[Any, Any]) -> dict[Any, Any]:
    """A copy with one to three things in it replaced, removed, renamed, added or exchanged.

    Each of its entries is as likely to be met, however much it holds. Every second copy keeps its types.
    """
    made, keeps_types = copy.deepcopy(nest), rng.random() < 0.5
    for _ in range(rng.randint(1, 3)):
        places = [(made, key) for key in made] or [(made, "x")]
        container, key = rng.choice(places)
        inner = container.get(key)
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            places += _places(inner)
            container, key = rng.choice(_places(inner))
        old = container.get(key) if isinstance(container, dict) else container[key]
        action = rng.randrange(8)
        if keeps_types and action < 7:
            container[key] = _alike(rng, old)
        elif action < 2:
            container[key] = value(rng)
        elif action < 4:
            container[key] = _near(rng, old)
        elif action == 4 and isinstance(container, dict):
            container[rng.choice((*TEXTS, 0, -5, None, (1, 2)))] = value(rng)
        elif action == 5:
            other, there = rng.choice(places)
            container[key] = copy.deepcopy(other.get(there)) if isinstance(other, dict) else None
        else:
            container.pop(key, None) if isinstance(container, dict) else container.pop(key)
    return made


# ------------------------------------------------------------------------------------------------------------- bytes


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Cut short, with flipped bits, overwritten, with something put in or taken out, or nothing of it left."""
    made, at = bytearray(content), rng.randrange(len(content) + 1)
    length = rng.choice((1, 2, 8, 100, 5000))
    action = rng.randrange(7)
    if action < 2:
        return bytes(made[: at if action else max(0, len(made) - length)])
    if action == 2:
        for _ in range(rng.randint(1, 8)):
            made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    elif action == 3:
        made[at : at + length] = rng.randbytes(length)
    elif action == 4:
        made[at:at] = rng.randbytes(length)
    elif action == 5:
        del made[at : at + length]
    else:
        return rng.choice(
            (b"", rng.randbytes(length), b"PK\x03\x04" + rng.randbytes(length), b"\x80\x02" + made[:length])
        )
    return bytes(made)


def rewritten_pickle(rng: random.Random, content: bytes) -> bytes:
    """A zip file whose checksums are right, with the pickle or another small part in it changed."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        chosen = rng.choice([name for name in names if name.endswith("data.pkl")] * 4 + names)
        for name in names:
            part = old.read(name)
            if name != chosen:
                new.writestr(name, part)
            elif name.endswith("data.pkl") and rng.random() < 0.5:
                new.writestr(name, renumbered(rng, part))
            elif rng.random() < 0.95:  # else it is left out
                new.writestr(name, damaged(rng, part))
    return made.getvalue()


def renumbered(rng: random.Random, content: bytes) -> bytes:
    """A pickle with some of its whole numbers exchanged: sizes, strides, offsets, counts."""
    codes = [(place, code.name) for code, _, place in pickletools.genops(content)]
    lengths = {"BININT1": 2, "BININT2": 3, "BININT": 5}
    places = [(place or 0, lengths[name]) for place, name in codes if name in lengths]
    chosen = dict(rng.sample(places, min(len(places), rng.randint(1, 3))))
    made, at = bytearray(), 0
    for place, length in sorted(chosen.items()):
        number = rng.choice((0, 1, 2, -1, -7, 10**6, 2**31, 2**40, 2**62, -(2**62)))
        made += content[at:place] + b"\x8a\x08" + number.to_bytes(8, "little", signed=True)
        at = place + length
    return bytes(made + content[at:])


FORMATS = (("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"),
           ("PNG", "I;16"), ("GIF", "P"), ("BMP", "RGB"), ("WEBP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"),
           ("PPM", "RGB"), ("ICO", "RGB"), ("TGA", "RGB"), ("PCX", "RGB"), ("JPEG2000", "RGB"))  # fmt: skip


def image(rng: random.Random) -> bytes:
    """A small image in some format, mostly damaged, sometimes with the beginning of another format."""
    kind, mode = rng.choice(FORMATS)
    stream = io.BytesIO()
    size = rng.randint(1, 60), rng.randint(1, 60)
    noise = np.frombuffer(rng.randbytes(size[0] * size[1] * 3), dtype=np.uint8).reshape(size[1], size[0], 3)
    picture = Image.fromarray(noise)
    picture = picture.convert("L").convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
    picture.save(stream, kind)
    content = stream.getvalue()
    if rng.random() < 0.15:
        starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b"II*\0", b"%!PS-Adobe")
        start = rng.choice(starts)
        content = start + content[len(start) :]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        content = damaged(rng, content) or b"\0"
    return content


# ------------------------------------------------------------------------------------------------------ command lines

WORDS = ("0", "1", "-1", "2", "0.5", "1.5", "nan", "inf", "-inf", "1e400", "1e-320", "1000000000000", "9" * 40, "x", "",
         "none", "ü", "٣", "1,2", "[1]", "True", "0x10", "--", "-", "a=b", "../..", "x" * 3000)  # fmt: skip


def word(rng: random.Random, action: argparse.Action) -> str:
    if action.choices and rng.random() < 0.7:
        return str(rng.choice(list(action.choices)))
    if action.type in (int, float) and rng.random() < 0.5:
        return str(rng.choice((rng.randint(-3, 300), round(rng.uniform(-1, 2), 3))))
    return rng.choice(WORDS)


def command_line(rng: random.Random, parser: argparse.ArgumentParser) -> list[str]:
    """Flags that the parser has, with values that it may have, and now and then something else."""
    words: list[str] = []
    actions = [action for action in parser._actions if action.option_strings]
    for action in rng.sample(actions, rng.randrange(min(9, len(actions)))):
        flag = rng.choice(list(action.option_strings))
        count = action.nargs if isinstance(action.nargs, int) else 1 if action.nargs is None else rng.randrange(4)
        values = [word(rng, action) for _ in range(count if rng.random() < 0.95 else rng.randrange(4))]
        if len(values) == 1 and rng.random() < 0.3:
            words.append(f"{flag}={values[0]}")
        else:
            words += [flag, *values]
    if rng.random() < 0.1:
        words.insert(
            rng.randrange(len(words) + 1), rng.choice((*WORDS, "--no-such", "--lr=", "--=", "---", "--eval=1"))
        )
    return words
