"""Networks that are only looked through: where their weights come from, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import datasets
from config import network_files, second_networks
from errors import InputError, as_pair
from models.build import build_model
from models.weights import plain_weights
from pipeline.spec import ImageSpec
from storage.checkpoints import save_checkpoint
from tests.image_folders import make_image_folder
from tests.runs import run_small

SIZE = (64, 96)
OF_STUDENT = ImageSpec(SIZE)
HALF = ImageSpec(SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # what timm says of test_resnet
OTHER = ImageSpec((32, 32), mean=(0.2, 0.4, 0.1), std=(0.3, 0.2, 0.5))
NOTHING: dict[str, dict[str, Any]] = {"model_config": {}, "data": {}}


def write_weights(path: Path, name: str = "test_resnet", num_classes: int = 3) -> tuple[Path, Any]:
    torch.manual_seed(2)
    network = timm.create_model(name, num_classes=num_classes)
    torch.save({"model": network.state_dict()}, path)
    return path, network.eval()


def again(images: Tensor, shown: ImageSpec, own: ImageSpec) -> Tensor:
    """Images (B, 3, height, width) that are normalised as `shown`, as `own` has them: by way of
    their pixels."""
    result = torch.empty_like(images)
    for channel in range(3):
        pixels = images[:, channel] * shown.std[channel] + shown.mean[channel]
        result[:, channel] = (pixels - own.mean[channel]) / own.std[channel]
    return result


@pytest.mark.parametrize("num_classes", [3, 1000])
def test_a_name_with_a_file_gives_that_networks_features(tmp_path: Path, num_classes: int) -> None:
    path, network = write_weights(tmp_path / "weights.pth", num_classes=num_classes)
    features = second_networks.build_feature_map(f"test_resnet={path}", SIZE, HALF)
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(features(images), network.forward_features(images))
    assert features(images).shape[2:] == (2, 3)


def test_a_checkpoint_of_main_brings_its_own_network(tmp_path: Path) -> None:
    config = {"name": "test_resnet", "num_classes": 2, "input_size": list(SIZE)}
    model = build_model("test_resnet", 2, input_size=SIZE)
    save_checkpoint(tmp_path / "run.pth", {"model_config": config, "model": plain_weights(model)})
    features = second_networks.build_feature_map(str(tmp_path / "run.pth"), SIZE)
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(features(images), model.eval().network.forward_features(images))  # type: ignore[operator]


def test_channels_that_come_last_are_moved(tmp_path: Path) -> None:
    name = "swin_tiny_patch4_window7_224"
    features = second_networks.FeatureMap(
        timm.create_model(name, img_size=64, embed_dim=8, depths=(1, 1, 1, 1)).eval()
    )
    images = torch.randn(1, 3, 64, 64)
    expected = features.network.forward_features(images)  # type: ignore[operator]
    assert features(images).shape == (1, 64, 2, 2)
    assert torch.equal(features(images)[0, :, 0, 1], expected[0, 0, 1])


def test_a_name_alone_has_its_weights_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network: Any = timm.create_model("test_resnet").eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(
        network_files.downloads, "from_hub", lambda *asked: tmp_path / "model.safetensors"
    )
    features: Any = second_networks.build_feature_map("test_resnet", SIZE, HALF)
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(features(images), network.forward_features(images))
    assert "state_dict" not in features.network.pretrained_cfg


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            "resnet5O=weights.pth",
            "--attentive-teacher resnet5O: no such model; did you mean resnet50",
        ),
        ("missing.pth", "--attentive-teacher missing.pth: no such model"),
        ("test_resnet=", "--attentive-teacher test_resnet=: names no file after the ="),
        (
            "test_resnet.old=weights.pth",
            "Invalid pretrained tag (old) for test_resnet. It has test_resnet.r160_in1k",
        ),
        ("test_resnet=missing.pth", "there is no file missing.pth"),
        ("test_convnext=weights.pth", "--attentive-teacher test_convnext=weights.pth"),
        ("vit_nano_patch4_32=nano.pth", "has no feature map"),
        ("xcit_nano_12_p16_224=xcit.pth", "has no feature map"),  # it cannot be trained here
        ("test_vit=vit.pth", "has no feature map"),
    ],
)
def test_what_cannot_be_looked_through_is_refused(
    tmp_path: Path, choice: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_weights(Path("weights.pth"))
    write_weights(Path("vit.pth"), "test_vit")
    write_weights(Path("nano.pth"), "vit_nano_patch4_32")
    if "xcit" in choice:
        write_weights(Path("xcit.pth"), "xcit_nano_12_p16_224")
    with pytest.raises(InputError) as refusal:
        second_networks.build_feature_map(choice, SIZE)
    assert message in str(refusal.value)


def test_weights_that_cannot_be_fetched_ask_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*asked: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(network_files.downloads, "from_hub", offline)
    with pytest.raises(
        InputError,
        match=r"could not get its weights \(no route to host\); give a file: test_resnet=",
    ):
        second_networks.build_feature_map("test_resnet", SIZE)
    with pytest.raises(InputError, match=r"could not get its weights \(timm has none\)"):
        second_networks.build_feature_map("cspresnet50d", SIZE)


# --------------------------------------------------------------- the images as a network knows them


def test_images_are_normalised_anew_by_way_of_their_pixels() -> None:
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    renormalise = second_networks.renormaliser(OF_STUDENT, OTHER)
    torch.testing.assert_close(renormalise(images), again(images, OF_STUDENT, OTHER))
    assert renormalise(images).is_contiguous(memory_format=torch.channels_last)
    back = second_networks.renormaliser(OTHER, OF_STUDENT)(renormalise(images))
    torch.testing.assert_close(back, images, rtol=1e-4, atol=1e-5)
    for changed in (replace(OF_STUDENT, mean=OTHER.mean), replace(OF_STUDENT, std=OTHER.std)):
        torch.testing.assert_close(
            second_networks.renormaliser(OF_STUDENT, changed)(images),
            again(images, OF_STUDENT, changed),
        )


def test_what_it_takes_moves_with_it_and_is_no_weight() -> None:
    renormalise = second_networks.renormaliser(OF_STUDENT, OTHER)
    assert not renormalise.state_dict()
    assert [buffer.device.type for buffer in renormalise.to("meta").buffers()] == ["meta", "meta"]


def test_images_that_are_known_are_left_as_they_are() -> None:
    images = torch.randn(2, 3, 4, 5)
    assert (
        second_networks.renormaliser(OF_STUDENT, ImageSpec((8, 8), crop_ratio=1.0))(images)
        is images
    )


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("vit_base_patch16_224", HALF.mean),
        ("vit_base_patch16_224.mae", OF_STUDENT.mean),  # another tag, other images
        ("regnety_160", OF_STUDENT.mean),
        ("vit_nano_patch4_32", OTHER.mean),  # ours, of which timm says nothing
    ],
)
def test_a_name_says_what_its_weights_know(name: str, mean: tuple[float, ...]) -> None:
    own = network_files.spec_of(NOTHING, name, nn.Identity(), OTHER, "--motivator")
    assert own.mean == mean


def test_a_name_that_timm_has_retired_says_it_too() -> None:
    name = "vit_tiny_patch16_224_in21k"
    network = timm.create_model(name, img_size=32, depth=1, num_classes=1)
    assert network_files.spec_of(NOTHING, name, network, OTHER, "--motivator").std == HALF.std


def test_a_checkpoint_says_itself_what_it_knows() -> None:
    said: dict[str, dict[str, Any]] = {
        "model_config": {"name": "test_resnet"},
        "data": {"image_spec": OTHER.to_plain()},
    }
    assert (
        network_files.spec_of(said, "test_resnet", nn.Identity(), OF_STUDENT, "--motivator")
        == OTHER
    )
    said["data"] = {}
    assert (
        network_files.spec_of(said, "test_resnet", nn.Identity(), OF_STUDENT, "--motivator")
        == OF_STUDENT
    )
    with pytest.raises(InputError, match="has format 2, this version reads format 1"):
        network_files.description_in({"model_config": {"name": "test_resnet"}, "format": 2})


@pytest.mark.parametrize("ours", [True, False])
def test_a_feature_map_is_that_of_the_images_as_the_network_knows_them(
    ours: bool, tmp_path: Path
) -> None:
    path, network = write_weights(tmp_path / "weights.pth")
    choice, own, images = f"test_resnet={path}", HALF, torch.randn(2, 3, *SIZE)
    if ours:
        config = {"name": "test_resnet", "num_classes": 3, "input_size": list(SIZE)}
        data = {"class_names": ["a", "b", "c"], "image_spec": OTHER.to_plain()}
        save_checkpoint(path, {"model_config": config, "data": data, "model": network.state_dict()})
        choice, own = str(path), OTHER
    features = second_networks.build_feature_map(
        choice, SIZE
    )  # the student's are ImageNet's where nothing else is said
    with torch.no_grad():
        expected, unchanged = (
            network.forward_features(again(images, OF_STUDENT, own)),
            network.forward_features(images),
        )
        torch.testing.assert_close(features(images), expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(features(images), unchanged, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shown", [None, OTHER, HALF])
def test_a_teacher_is_shown_the_images_as_it_knows_them(
    shown: ImageSpec | None, tmp_path: Path
) -> None:
    path, network = write_weights(tmp_path / "weights.pth")
    teacher, images = (
        second_networks.build_teacher("test_resnet", str(path), 3, SIZE, shown),
        torch.randn(2, 3, *SIZE),
    )
    with torch.no_grad():
        expected, unchanged = network(again(images, shown or OF_STUDENT, HALF)), network(images)
        torch.testing.assert_close(teacher(images), expected, rtol=1e-3, atol=1e-4)
    assert torch.allclose(expected, unchanged, rtol=1e-3, atol=1e-4) == (shown == HALF)


# ------------------------------------------------------------------ images of another size or patch


def ours(path: Path, name: str, **config: Any) -> tuple[Path, Any]:
    """A checkpoint of main.py on 32 x 32 pixels, and its model."""
    torch.manual_seed(3)
    config = {"name": name, "num_classes": 3, "input_size": (32, 32), **config}
    model = build_model(**config)
    plain = {**config, "input_size": list(config["input_size"])}
    save_checkpoint(path, {"model_config": plain, "model": plain_weights(model)})
    return path, model.eval()


@pytest.mark.parametrize("patch", [4, 8])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_a_teacher_of_ours_is_resized_as_a_motivator_is(
    tmp_path: Path, patch: int, size: tuple[int, int]
) -> None:
    name = "vit_nano_patch4_32"
    path, model = ours(tmp_path / "run.pth", name, patch_size=patch)
    spec, images = ImageSpec(size), torch.randn(2, 3, *size)
    teacher = second_networks.build_teacher(name, str(path), 3, size, spec)
    motivator, _ = second_networks.build_motivator(str(path), 3, spec)
    with torch.no_grad():
        assert torch.equal(teacher(images), motivator.network(images))
        if size == (32, 32):
            assert torch.equal(teacher(images), model.network(images))
    # The same weights without their description: they belong to the default patch.
    torch.save({"model": model.network.state_dict()}, tmp_path / "plain.pth")
    plain = second_networks.build_teacher(name, str(tmp_path / "plain.pth"), 3, size, spec)
    with torch.no_grad():
        assert patch == 8 or torch.equal(plain(images), teacher(images))


@pytest.mark.parametrize("name", ["test_resnet", "pvt_v2_b0"])
def test_a_teacher_that_takes_any_size_stays_as_it_is(tmp_path: Path, name: str) -> None:
    path, model = ours(tmp_path / "run.pth", name)
    teacher = second_networks.build_teacher(name, str(path), 3, (40, 72))
    images = torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        assert torch.equal(teacher(images), model.network(images))


def test_a_feature_map_of_ours_is_resized(tmp_path: Path) -> None:
    """Swin is built for one size; its bias tables are resampled."""
    path, _ = ours(tmp_path / "run.pth", "swin_tiny_patch4_window7_224", embed_dim=24)
    features = second_networks.build_feature_map(str(path), (64, 96))
    assert features(torch.randn(1, 3, 64, 96)).shape == (1, 192, 2, 3)


def test_a_distilled_teacher_without_description_has_its_classes(tmp_path: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    path, _ = write_weights(tmp_path / "weights.pth", name)
    teacher = second_networks.build_teacher(name, str(path), 3, (32, 32))
    assert teacher(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_a_teacher_of_other_classes_or_another_name_is_refused(tmp_path: Path) -> None:
    path, _ = ours(tmp_path / "run.pth", "vit_nano_patch4_32")
    for name, classes, size, message in (
        ("vit_nano_patch4_32", 5, (32, 32), "predicts 3 classes, the data has 5"),
        ("regnety_160", 3, (32, 32), "give --teacher-model vit_nano_patch4_32"),
        ("vit_nano_patch4_32", 3, (30, 30), "not divisible by the patch size"),
    ):
        with pytest.raises(InputError, match=message):
            second_networks.build_teacher(name, str(path), classes, size)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["motivator", "classifier", "teacher"])
def test_a_run_hands_down_how_its_images_are_normalised(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_image_folder(
        tmp_path / "photos", ("ant", "bee", "cat"), per_class=8, size=(36, 36)
    )
    path, network = write_weights(tmp_path / "weights.pth")
    words = {
        "motivator": f"--motivator test_resnet={path}",
        "classifier": f"--mixer attentivemix --attentive-teacher test_resnet={path}",
        "teacher": (
            "--model deit_runs_distilled_patch4_16 --distillation-type hard "
            f"--teacher-model test_resnet --teacher-path {path}"
        ),
    }[role]
    monkeypatch.setattr(
        datasets,
        "image_spec_for",
        lambda name, size, crop: replace(OTHER, input_size=as_pair(size)),
    )
    training: Any = run_small(
        "--input-size 32 --mix-protocol single --max-steps 1 --data-path", photos, words
    ).training
    images = torch.randn(2, 3, 32, 32)
    seen = {
        "motivator": lambda: training.guide(images).logits,
        "classifier": lambda: training.mixer.first.teacher(images),
        "teacher": lambda: training.criterion.teacher(images),
    }[role]()
    whole = network.forward_features if role == "classifier" else network
    with torch.no_grad():
        torch.testing.assert_close(seen, whole(again(images, OTHER, HALF)), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(seen, whole(images), rtol=1e-2, atol=1e-2)
