"""Downloads files and compares each with its SHA-256 before it is read.

Callers turn the `ValueError`s raised here into messages. A hash of 8 digits in a file name detects
damage only; that the file comes from the right sender is ensured by https.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlparse

import torch

_HASHED_NAME = re.compile(r"-([0-9a-f]{8,64})(?:\.[a-z]+)+$")


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def from_url(url: str) -> Path:
    """The path of the local copy of the file at `url`, in torch.hub's folder.

    The file is downloaded if it is missing or if its hash is wrong.

    Raises:
        ValueError: not an https URL of a file whose name ends in its hash (`name-0123abcd.pth`).
        OSError, RuntimeError: the network or the disk failed, or the downloaded file has another
            hash than its name.
    """
    name = urlparse(url).path.rpartition("/")[2]
    match = _HASHED_NAME.search(name)
    if match is None or not re.fullmatch(r"https://[!-~]+", url):
        raise ValueError(
            "only https URLs of files whose name ends in their hash (name-0123abcd.pth) are "
            "loaded, because anything else cannot be verified; download it yourself and give the "
            "local file"
        )
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if file.is_file() and sha256_of(file).startswith(match[1]):
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    progress = os.environ.get("RANK", "0") == "0"
    torch.hub.download_url_to_file(url, str(file), hash_prefix=match[1], progress=progress)
    return file


def from_hub(repository: str, name: str | None = None) -> Path:
    """The path of the local copy of the weights in a repository of the Hugging Face hub.

    The repository's safetensors file is used if it has one, else its pickled file.

    Args:
        repository: `owner/name` or `owner/name@revision`.
        name: the name of the pickled file; default `pytorch_model.bin`.

    Raises:
        ValueError: the file differs from the hub's, or the hub's hash is not known.
        Exception: any error of the hub's client; the errors of its HTTP libraries have no common
            class.
    """
    # Imported here because few runs need it. timm depends on it.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    repository, _, revision = repository.partition("@")
    pickled = name or "pytorch_model.bin"
    try:
        safe = re.sub(r"(pytorch_)?model\.bin$", "model.safetensors", pickled)
        file = Path(hf_hub_download(repository, safe, revision=revision or None))
    except EntryNotFoundError:
        file = Path(hf_hub_download(repository, pickled, revision=revision or None))
    # In the hub's cache this path is a link to a file that is named by the hub's hash of its
    # content. For large files this hash is the SHA-256.
    expected = file.readlink().name if file.is_symlink() else ""
    if not re.fullmatch("[0-9a-f]{64}", expected):
        raise ValueError(f"the hub's cache has no SHA-256 of {file}, so it cannot be verified")
    if (found := sha256_of(file)) != expected:
        raise ValueError(
            f"{file.resolve()} is damaged: its SHA-256 is {found}, the hub's is {expected}; "
            "remove it"
        )
    return file
