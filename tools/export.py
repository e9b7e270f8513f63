"""Writes the plain network of a checkpoint for other programs: safetensors for timm, or ONNX.

    python -m tools.export --resume output/checkpoint.pth --output model.safetensors
    python -m tools.export --resume output/checkpoint.pth --output model.onnx --ema

The suffix of --output chooses the format. A safetensors file has timm's keys. An ONNX file maps
`images` (any number of them, one size, normalised as in training) to `logits`; it is compared with
the network if onnxruntime is installed. Both hold the model's name, the classes, the size, crop and
normalisation of images, and the commit. Weights that only training needs (a second region head) are
left out and listed.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config.parser import Parser
from errors import InputError, run_command
from models.build import ALIASES
from models.weights import plain_weights, restore_model
from pipeline.spec import ImageSpec
from storage.checkpoints import load_checkpoint
from storage.files import write_atomically
from utils import keyed_generator

PACKAGES = {".safetensors": ("safetensors",), ".onnx": ("onnx", "onnxscript")}
TOLERANCE = 1e-3  # largest difference by rounding, as a share of the largest logit


class Plain(NamedTuple):
    """The plain network and what is exported with it."""

    network: nn.Module  # in eval mode
    input_size: tuple[int, int]  # height and width in pixels
    metadata: dict[str, str]
    dropped: list[str]  # keys of the checkpoint's model that the network does not have
    call: str  # timm's call that builds the same network


def get_args_parser() -> Parser:
    parser = Parser(
        "python -m tools.export", description="Writes a trained network as safetensors or ONNX."
    )
    parser.add_argument(
        "--resume", required=True, metavar="CHECKPOINT", help="checkpoint of main.py"
    )
    parser.add_argument("--ema", action="store_true", help="export the averaged weights")
    parser.add_argument("--output", required=True, help="file to write: .safetensors or .onnx")
    return parser


def read_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked before anything is read.

    Raises:
        InputError: the suffix is unknown, a package is missing, or there is no folder to write to.
    """
    args = get_args_parser().parse_args(argv)
    args.output = Path(args.output)
    suffix, folder = args.output.suffix.lower(), args.output.parent
    if suffix not in PACKAGES:
        raise InputError(f"--output {args.output}: name a {' or '.join(PACKAGES)} file")
    if missing := [name for name in PACKAGES[suffix] if not is_installed(name)]:
        raise InputError(
            f"--output {args.output}: {suffix} needs more packages: pip install {' '.join(missing)}"
        )
    if not os.path.isdir(folder) or os.path.isdir(args.output):
        raise InputError(
            f"--output {args.output}: the folder {folder} does not exist, or this is a folder"
        )
    return args


def is_installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def read_plain(path: str, ema: bool) -> Plain:
    """The plain network of one of main.py's checkpoints.

    Raises:
        InputError: it cannot be read, main.py did not write it, or it has no averaged weights.
    """
    checkpoint = load_checkpoint(path)
    try:
        model = restore_model(checkpoint, ema)
    except InputError as error:
        raise InputError(f"--resume {path}: {error.text}") from error
    config, data = checkpoint["model_config"], checkpoint.get("data")
    try:
        spec, class_names = ImageSpec.from_plain(data["image_spec"]), list(data["class_names"])  # type: ignore[index]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"--resume {path}: holds no image_spec and class_names under data; it is damaged"
        ) from error
    name = ALIASES.get(config["name"], config["name"])
    metadata = {
        "format": "pt",  # other readers of safetensors expect the framework here
        "model": name,
        "num_classes": str(model.num_classes),
        "class_names": json.dumps(class_names),
        "image_spec": json.dumps(spec.to_plain()),
        "weights": "averaged" if ema else "trained",
        "commit": str((checkpoint.get("versions") or {}).get("commit", "unknown")),
    }
    network = model.network.eval()
    dropped = sorted(plain_weights(model).keys() - network.state_dict().keys())
    call = timm_call(name, network, model.input_size, config)
    return Plain(network, model.input_size, metadata, dropped, call)


def timm_call(
    name: str, network: nn.Module, input_size: tuple[int, int], config: dict[str, Any]
) -> str:
    """The call of timm that builds the network, without the file's name and regularisation."""
    settings = {"num_classes": config["num_classes"]}
    # Convolutional networks take any size and have no such argument.
    if "img_size" in inspect.signature(type(network)).parameters:
        settings["img_size"] = input_size
    ours = {"name", "num_classes", "input_size", "drop", "drop_path", "separate_region_head"}
    settings |= {
        key: value for key, value in config.items() if key not in ours and value is not None
    }
    words = "".join(f", {key}={value!r}" for key, value in settings.items())
    return f"timm.create_model({name!r}{words}, checkpoint_path=...)"


def to_safetensors(plain: Plain) -> bytes:
    from safetensors.torch import save

    # Copies, because safetensors refuses tensors that share memory or are not contiguous.
    weights = {
        key: value.detach().clone().contiguous()
        for key, value in plain.network.state_dict().items()
    }
    return save(weights, metadata=plain.metadata)


def to_onnx(plain: Plain) -> bytes:
    """The network as one ONNX file, for any number of images."""
    images = example_images(plain, 2)
    # The exporter prints its progress and warnings that do not concern the user.
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            plain.network,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
    assert program is not None
    proto: Any = program.model_proto
    for key, value in plain.metadata.items():
        if key != "format":
            proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


def check_onnx(plain: Plain, content: bytes) -> float:
    """The largest difference from the network's logits, over one image and over three.

    Raises:
        RuntimeError: the difference is too large for rounding.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in (1, 3):
        images = example_images(plain, count)
        with torch.no_grad():
            expected = plain.network(images)
        logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        difference = float((logits - expected).abs().max())
        limit = TOLERANCE * max(1.0, float(expected.abs().max()))
        if not difference <= limit:  # refuses NaN too
            raise RuntimeError(
                f"onnxruntime's logits differ from the network's by {difference:.3g}; nothing was "
                "written"
            )
        worst = max(worst, difference)
    return worst


def example_images(plain: Plain, count: int) -> Tensor:
    return torch.randn(count, 3, *plain.input_size, generator=keyed_generator("export", count))


def main(argv: Sequence[str] | None = None) -> None:
    args = read_args(argv)
    plain = read_plain(args.resume, args.ema)
    if args.output.suffix.lower() == ".onnx":
        content = to_onnx(plain)
        if is_installed("onnxruntime"):
            difference = check_onnx(plain, content)
            print(f"onnxruntime agrees: logits differ by at most {difference:.2g}")
        else:
            print("not compared with the network: pip install onnxruntime")
    else:
        content = to_safetensors(plain)
        print(f"read it with {plain.call}")
    write_atomically(args.output, lambda stream: stream.write(content))
    print(f"left out: {', '.join(plain.dropped) or 'nothing'}")
    print(f"wrote {args.output}: {plain.metadata['model']}, {plain.metadata['weights']} weights")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
