"""Networks that are only looked through: where their weights come from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from checkpoints import save_checkpoint
from models import frozen
from models.build import build_model, plain_weights
from utils import InputError

SIZE = (64, 96)


def write_weights(path: Path, name: str = "test_resnet", num_classes: int = 3) -> tuple[Path, Any]:
    torch.manual_seed(2)
    network = timm.create_model(name, num_classes=num_classes)
    torch.save({"model": network.state_dict()}, path)
    return path, network.eval()


@pytest.mark.parametrize("num_classes", [3, 1000])
def test_a_name_with_a_file_gives_that_networks_features(tmp_path: Path, num_classes: int) -> None:
    path, network = write_weights(tmp_path / "weights.pth", num_classes=num_classes)
    features = frozen.build_feature_map(f"test_resnet={path}", SIZE)
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(features(images), network.forward_features(images))
    assert features(images).shape[2:] == (2, 3)


def test_a_checkpoint_of_main_brings_its_own_network(tmp_path: Path) -> None:
    config = {"name": "test_resnet", "num_classes": 2, "input_size": list(SIZE)}
    model = build_model("test_resnet", 2, input_size=SIZE)
    save_checkpoint(tmp_path / "run.pth", {"model_config": config, "model": plain_weights(model)})
    features = frozen.build_feature_map(str(tmp_path / "run.pth"), SIZE)
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(features(images), model.eval().network.forward_features(images))  # type: ignore[operator]


def test_channels_that_come_last_are_moved(tmp_path: Path) -> None:
    name = "swin_tiny_patch4_window7_224"
    features = frozen.FeatureMap(timm.create_model(name, img_size=64, embed_dim=8, depths=(1, 1, 1, 1)).eval())
    images = torch.randn(1, 3, 64, 64)
    expected = features.network.forward_features(images)  # type: ignore[operator]
    assert features(images).shape == (1, 64, 2, 2)
    assert torch.equal(features(images)[0, :, 0, 1], expected[0, 0, 1])


def test_a_name_alone_has_its_weights_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = timm.create_model("test_resnet").eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(frozen.downloads, "from_hub", lambda *asked: tmp_path / "model.safetensors")
    features: Any = frozen.build_feature_map("test_resnet", SIZE)
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(features(images), network.forward_features(images))
    assert "state_dict" not in features.network.pretrained_cfg


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("resnet5O=weights.pth", "--attentive-teacher resnet5O: no such model; did you mean resnet50"),
        ("missing.pth", "--attentive-teacher missing.pth: no such model"),
        ("test_resnet=missing.pth", "there is no file missing.pth"),
        ("test_convnext=weights.pth", "--attentive-teacher test_convnext=weights.pth"),
        ("vit_nano_patch4_32=nano.pth", "cannot take the student's images of 64 x 96 pixels"),
        ("test_vit=vit.pth", "gives no map of features"),
    ],
)
def test_what_cannot_be_looked_through_is_refused(
    tmp_path: Path, choice: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_weights(Path("weights.pth"))
    write_weights(Path("vit.pth"), "test_vit")
    write_weights(Path("nano.pth"), "vit_nano_patch4_32")
    with pytest.raises(InputError) as refusal:
        frozen.build_feature_map(choice, SIZE)
    assert message in str(refusal.value)


def test_weights_that_cannot_be_fetched_ask_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*asked: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(frozen.downloads, "from_hub", offline)
    with pytest.raises(InputError, match=r"could not get its weights \(no route to host\); give a file: test_resnet="):
        frozen.build_feature_map("test_resnet", SIZE)
    with pytest.raises(InputError, match=r"could not get its weights \(timm knows none\)"):
        frozen.build_feature_map("cspresnet50d", SIZE)
