"""Files from the network, each compared with its SHA-256 before anybody reads it.

Level 0: imports nothing from the project and says no with a `ValueError`, which callers turn into
their own message. It must not know what is in a file. A hash of 8 digits in a name tells damage; it
is the connection that tells the sender.
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
    """The local copy of the file at `url`, in torch.hub's folder. Downloaded unless it is there;
    checked either way.

    Raises:
        ValueError: not an https URL of a file whose name ends in its hash (`name-0123abcd.pth`).
        OSError, RuntimeError: no network or disk; another hash than the name says.
    """
    name = urlparse(url).path.rpartition("/")[2]
    match = _HASHED_NAME.search(name)
    if match is None or not re.fullmatch(r"https://[!-~]+", url):
        raise ValueError(
            "only https URLs of files whose name ends in their hash (name-0123abcd.pth) are "
            "loaded, because anything "
            "else cannot be verified; download it yourself and give the local file"
        )
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if file.is_file() and sha256_of(file).startswith(match[1]):
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    progress = os.environ.get("RANK", "0") == "0"
    torch.hub.download_url_to_file(url, str(file), hash_prefix=match[1], progress=progress)
    return file


def from_hub(repository: str, name: str | None = None) -> Path:
    """The local copy of the weights in a repository of the Hugging Face hub: safetensors if there
    are any.

    Args:
        repository: `owner/name`, with `@revision` or without.
        name: of the pickled file beside them.

    Raises:
        ValueError: the file is not what the hub has, or it cannot be told.
        Exception: whatever the hub's client raises; its HTTP libraries' errors have no class in
            common.
    """
    from huggingface_hub import hf_hub_download  # comes with timm; only few runs need it
    from huggingface_hub.utils import EntryNotFoundError

    repository, _, revision = repository.partition("@")
    pickled = name or "pytorch_model.bin"
    try:
        safe = re.sub(r"(pytorch_)?model\.bin$", "model.safetensors", pickled)
        file = Path(hf_hub_download(repository, safe, revision=revision or None))
    except EntryNotFoundError:
        file = Path(hf_hub_download(repository, pickled, revision=revision or None))
    # The cache holds a link to a file whose name is what the hub says of its content: of large
    # files, the SHA-256.
    promised = file.readlink().name if file.is_symlink() else ""
    if not re.fullmatch("[0-9a-f]{64}", promised):
        raise ValueError(f"the hub's cache has no SHA-256 of {file}, so it cannot be verified")
    if (found := sha256_of(file)) != promised:
        raise ValueError(
            f"{file.resolve()} is damaged: its SHA-256 is {found}, the hub's is {promised}; remove "
            "it"
        )
    return file
