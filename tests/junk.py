"""What `tests/fuzz.py` makes its cases of: values, nests, bytes, images, run folders and command
lines.

Longer than the working limit: all that is drawn from a case's generator is in one place.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import pickletools
import random
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    10**6,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.0,
    0.5,
    -1.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    True,
    False,
)
TEXTS = (
    "",
    "a",
    "none",
    "nan",
    "vit_nano_patch4_32",
    "vit_giant_patch14_224",
    "resnet50",
    "bicubic",
    "fp16",
    "smmix",
    "\x00",
    "../../etc",
    "ü" * 3,
    "x" * 5000,
    "%s%n{0}",
    "-1",
    "--lr",
    "1e400",
    "0x10",
    "٣",
    "[1]",
    "None",
)
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)


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
        return rng.choice(
            (
                np.float64(0.5),
                torch.float16,
                torch.device("cpu"),
                torch.Size([2, 3]),
                b"bytes",
                {1, 2},
            )
        )
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
            lambda: old.flatten(),
            lambda: old[None],
            lambda: old.t() if old.ndim == 2 else old,
            lambda: old.double(),
            lambda: old[:0] if old.ndim else old[None].expand(5),
            lambda: torch.zeros(rng.choice(((), (3,), (2, 3)))),
            lambda: old * float("nan") if old.is_floating_point() else -old,
            lambda: old.to(torch.bool),
        )
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


def _numbers(old: torch.Tensor) -> Any:
    """A tensor's content as lists; one that was made without any has none."""
    return [] if old.is_meta or old.layout is not torch.strided else old.tolist()


def _other_numbers(old: float) -> list[Any]:
    """A number as other types, as far as they hold it."""
    made: list[Any] = [str(old), [old], None]
    for kind in (float, int, torch.tensor):
        with suppress(OverflowError, ValueError, RuntimeError):
            made.append(kind(old))
    return made


def _near(rng: random.Random, old: Any) -> Any:
    """Something like `old`, but of another type."""
    if isinstance(old, torch.Tensor):
        return rng.choice(
            (lambda: old.to(rng.choice(DTYPES)), lambda: _numbers(old), lambda: tensor(rng))
        )()
    if isinstance(old, (bool, int, float)):
        return rng.choice(_other_numbers(old))
    if isinstance(old, str):
        return rng.choice(([old], old.encode(), None, len(old)))
    if isinstance(old, (list, tuple)):
        return rng.choice(([old], dict(enumerate(old)), str(old), None))
    if isinstance(old, dict):
        return rng.choice(
            (
                list(old.values()),
                {str(key) + "x": item for key, item in old.items()},
                list(old),
                None,
            )
        )
    return value(rng)


def changed(rng: random.Random, nest: dict[Any, Any]) -> dict[Any, Any]:
    """A copy with one to three things in it replaced, removed, renamed, added or exchanged.

    Each of its entries is as likely to be met, however much it holds. Every second copy keeps its
    types.
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


# -------------------------------------------------------------------------------------------- bytes


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Cut short, with flipped bits, overwritten, with something put in or taken out, or nothing of
    it left."""
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
            (
                b"",
                rng.randbytes(length),
                b"PK\x03\x04" + rng.randbytes(length),
                b"\x80\x02" + made[:length],
            )
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


FORMATS = (
    ("JPEG", "RGB"),
    ("JPEG", "L"),
    ("JPEG", "CMYK"),
    ("PNG", "RGB"),
    ("PNG", "P"),
    ("PNG", "LA"),
    ("PNG", "I;16"),
    ("GIF", "P"),
    ("BMP", "RGB"),
    ("WEBP", "RGB"),
    ("TIFF", "RGB"),
    ("TIFF", "F"),
    ("PPM", "RGB"),
    ("ICO", "RGB"),
    ("TGA", "RGB"),
    ("PCX", "RGB"),
    ("JPEG2000", "RGB"),
)


def image(rng: random.Random) -> bytes:
    """A small image in some format, mostly damaged, sometimes with the beginning of another
    format."""
    kind, mode = rng.choice(FORMATS)
    stream = io.BytesIO()
    size = rng.randint(1, 60), rng.randint(1, 60)
    noise = np.frombuffer(rng.randbytes(size[0] * size[1] * 3), dtype=np.uint8).reshape(
        size[1], size[0], 3
    )
    picture = Image.fromarray(noise)
    picture = (
        picture.convert("L").convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
    )
    picture.save(stream, kind)
    content = stream.getvalue()
    if rng.random() < 0.15:
        starts = (
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"BM",
            b"RIFF\0\0\0\0WEBP",
            b"II*\0",
            b"%!PS-Adobe",
        )
        start = rng.choice(starts)
        content = start + content[len(start) :]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        content = damaged(rng, content) or b"\0"
    return content


# -------------------------------------------------------------------------------------- run folders

DEEP = [
    opening * depth + closing * depth
    for depth in (200, 480, 900, 3000, 100_000)
    for opening, closing in (("[", "]"), ('{"a":', "}"), ("[", ""))
]
EXTREMES = (
    "NaN",
    "-Infinity",
    "1e999",
    "1.7e308",
    "-1.7e308",
    "-1e-320",
    "-0",
    "1e40",
    "0.1e1",
    "9" * 9,
    "9" * 30,
    "9" * 300,
    "9" * 4000,
    "9" * 9000,
)
JSON = (
    *EXTREMES,
    "true",
    "null",
    '"',
    '"\\ud800"',
    '"\\u0000"',
    '"\u2028"',
    "[]",
    "{}",
    '{"epoch": 0}',
    "}",
    "x",
    *DEEP,
)


def json_text(rng: random.Random, data: dict[str, Any]) -> str:
    """Nearly `data`, and nearly JSON, in one line."""
    made = changed(rng, data) if rng.random() < 0.6 else data
    text = json.dumps(made, skipkeys=True, default=lambda found: type(found).__name__)
    places = [match.span(1) for match in re.finditer(r': ("[^"]*"|[^][,{}]+)', text)]
    if places and rng.random() < 0.5:
        start, end = rng.choice(places)
        text = text[:start] + rng.choice(JSON) + text[end:]
    return text


def json_file(rng: random.Random, content: bytes) -> bytes:
    text = json_text(rng, json.loads(content))
    return text.encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16")))


def log_file(rng: random.Random, content: bytes) -> bytes:
    """Some numbers in it far from what they were, or a line or two changed, repeated, exchanged or
    run together."""
    if rng.random() < 0.5:
        return _reworded(
            rng, content, rng.choice((rb"(?<=: )[-+.\de]+", rb'(?<="epoch": )\d+')), EXTREMES
        )
    sound = content.decode().splitlines()
    lines = list(sound)
    for _ in range(rng.randint(1, 2)):
        at, other = (rng.randrange(len(lines)) for _ in range(2))
        action = rng.randrange(6)
        if action < 3:
            lines[at] = json_text(rng, json.loads(rng.choice(sound)))
        elif action == 3:
            lines[at], lines[other] = lines[other], lines[at]
        else:
            lines.insert(at, lines[other] if action == 4 else rng.choice(("", *JSON)))
    return rng.choice(("\n", "\n", "\n", "\n\n", "\r\n", " ")).join(lines).encode()


def said_file(rng: random.Random, content: bytes) -> bytes:
    """Other numbers and words in a few places of train.log."""
    words = ("9" * 9000, "9" * 4200, "0", "\u0663", ",", "1,,2", "\n", "\udcff", "  ", "x" * 9000)
    return _reworded(rng, content, rb"\d+|[a-z]{3,}", words)


def _reworded(rng: random.Random, content: bytes, pattern: bytes, words: tuple[str, ...]) -> bytes:
    """Other words in one to five of the places where the pattern is found."""
    places = [match.span() for match in re.finditer(pattern, content)]
    for start, end in sorted(rng.sample(places, min(len(places), rng.randint(1, 5))), reverse=True):
        content = (
            content[:start] + rng.choice(words).encode("utf-8", "surrogateescape") + content[end:]
        )
    return content


WRITERS = {
    "args.json": json_file,
    "status.json": json_file,
    "environment.json": json_file,
    "log.txt": log_file,
    "train.log": said_file,
    "mixing.png": damaged,
}
IN_STEPS = (
    "0000000001.pth",
    "0000000003.pth",
    "9999999999.pth",
    "9999999999.pth.aside",
    "x.unfinished.tmp",
    "\u0663.pth",
)
OBSTACLES = (
    *WRITERS,
    ".lock",
    "checkpoint.pth",
    "best_checkpoint.pth",
    "checkpoints",
    "x.unfinished.tmp",
    "steps",
    "failed_rank1.json",
    *(f"checkpoints/{name}" for name in IN_STEPS),
)


def spoil(rng: random.Random, folder: Path) -> list[str]:
    """Damages one to three things in a run folder, or puts something else in their place; returns
    their names."""
    names = [rng.choice(tuple(WRITERS) * 3 + OBSTACLES) for _ in range(rng.randint(1, 3))]
    for name in dict.fromkeys(names):
        path = folder / name
        if name in WRITERS and path.is_file() and rng.random() < 0.8:
            content = path.read_bytes()
            content = WRITERS[name](rng, content) if rng.random() < 0.7 else content
            path.write_bytes(damaged(rng, content) if rng.random() < 0.4 else content)
        elif path.parent.is_dir():
            _put_aside(path)
            _put_obstacle(rng, path)
    return names


def _put_aside(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _put_obstacle(rng: random.Random, path: Path) -> None:
    """A folder, a folder with something in it, a link to itself or to nowhere, some bytes, or
    nothing."""
    kind = rng.randrange(6)
    if kind < 2:
        path.mkdir()
    if kind == 1:
        (path / "file").touch()
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("nowhere/at/all")
    elif kind == 4:
        path.write_bytes(rng.randbytes(rng.choice((0, 1, 40))))


# ------------------------------------------------------------------------------------ command lines

WORDS = (
    "0",
    "1",
    "-1",
    "2",
    "0.5",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-320",
    "1000000000000",
    "9" * 40,
    "x",
    "",
    "none",
    "ü",
    "٣",
    "1,2",
    "[1]",
    "True",
    "0x10",
    "--",
    "-",
    "a=b",
    "../..",
    "x" * 3000,
)


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
        count = (
            action.nargs
            if isinstance(action.nargs, int)
            else 1
            if action.nargs is None
            else rng.randrange(4)
        )
        values = [
            word(rng, action) for _ in range(count if rng.random() < 0.95 else rng.randrange(4))
        ]
        if len(values) == 1 and rng.random() < 0.3:
            words.append(f"{flag}={values[0]}")
        else:
            words += [flag, *values]
    if rng.random() < 0.1:
        words.insert(
            rng.randrange(len(words) + 1),
            rng.choice((*WORDS, "--no-such", "--lr=", "--=", "---", "--eval=1")),
        )
    return words


PATHS = (
    "x",
    "no/such",
    ".",
    "~",
    "~nobody/x",
    "%j",
    "a/%j/b%j",
    "/dev/null",
    "/dev/null/x",
    "x" * 300,
    "x" * 300 + "/y",
    "ü/٣",
    "a\nb",
    "\udcff",
    "-",
    "x/" * 3000,
)


def path_flags(rng: random.Random, flags: tuple[str, ...]) -> list[str]:
    """Some of these flags with names of files or folders; a flag of no letters stands for an
    argument without one."""
    words: list[str] = []
    for flag in flags:
        if rng.random() < 0.8:
            words += [*([flag] if flag else []), rng.choice(PATHS)]
    return words
