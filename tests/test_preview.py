"""The sheet shows what training sees: its windows are those of the training loader, cut from the images that its
captions name. The table and picture of the eigenbasis are those of pca.json."""

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import webdataset
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from pipeline.eigenbasis import Eigenbasis
from pipeline.files import read_json
from pipeline.lighting import Lighting
from pipeline.loader import train_loader
from pipeline.settings import Augmentation
from pipeline.shards import ShardSet
from tests.helpers import Make, jpeg, photo, refuses, run_ok
from tools.moments import Moments, write_eigenbasis
from tools.preview import IMAGENET, preview, render_views

NO_LIGHTING = Augmentation(lighting=Lighting(strength=0))


def stored(shards: ShardSet) -> dict[str, tuple[int, np.ndarray]]:
    """Label and int (256, 256, 3) pixels by key, as the webdataset library and Pillow read them."""
    samples = webdataset.WebDataset(list(shards.tars), shardshuffle=False)
    return {
        sample["__key__"]: (int(sample["cls"]), np.asarray(Image.open(io.BytesIO(sample["jpg"]))).astype(int))
        for sample in samples
    }


def places(window: np.ndarray, image: np.ndarray) -> set[tuple[int, int, bool]]:
    """Every (left, top, mirrored) at which a window equals the image within two levels."""
    found, all_windows = set(), sliding_window_view(image, (224, 224), (0, 1))  # (33, 33, 3, 224, 224)
    for mirrored in (False, True):
        turned = (window[:, ::-1] if mirrored else window).astype(int).transpose(2, 0, 1)
        corner = np.abs(all_windows[..., 0, 0] - turned[:, 0, 0]).max(-1) <= 2
        for top, left in np.argwhere(corner).tolist():
            if np.abs(all_windows[top, left] - turned).max() <= 2:
                found.add((left, top, mirrored))
    return found


def add_basis(shards: ShardSet, sha256: str | None = None) -> Path:
    """Write a pca.json next to the splits, of these shards or of those with this checksum; returns the folder."""
    folder = Path(shards.tars[0]).parents[1]
    moments = Moments.of(photo(np.random.default_rng(1))[None].copy())
    write_eigenbasis(folder / "pca.json", moments, sha256 or shards.manifest_sha256, "none")
    return folder


def test_views_are_windows_of_the_named_images(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Without lighting, the first views are 24 different images in another order than they are stored in, each with its
    own key, label and window, where it is said to lie; repeated, one image has windows at different places and flips,
    which another image does not hold."""
    shards = numbered_shards(60, 3)
    views, expected = render_views(shards, plain_basis, NO_LIGHTING, 5), stored(shards)
    assert len({view.key for view in views}) == 24 and len(expected) == 60
    assert [view.label for view in views] != sorted(view.label for view in views)
    again = render_views(shards, plain_basis, NO_LIGHTING, 6)
    assert [view.key for view in views] != [view.key for view in again]
    same = replace(shards, samples=np.repeat(shards.samples[[views[0].row]], 24))
    repeated = render_views(same, plain_basis, NO_LIGHTING, 3)
    for view in (*views, *repeated):
        label, image = expected[view.key]
        assert view.label == label and np.abs(view.stored - image).max() <= 1
        assert (view.left, view.top, view.mirrored) in places(view.pixels, image)
    assert {view.key for view in repeated} == {views[0].key}
    assert len({(view.left, view.top, view.mirrored) for view in repeated}) == 24
    assert {view.mirrored for view in repeated} == {False, True}
    other = next(view.key for view in views if (view.label - views[0].label) % 8)  # there are eight images
    assert not places(repeated[0].pixels, expected[other][1])


@pytest.mark.parametrize("convention", ["stddev", "eigenvalue"])
def test_first_views_equal_the_loaders_batch(
    numbered_shards: Make, plain_basis: Eigenbasis, convention: Literal["stddev", "eigenvalue"]
) -> None:
    """The lower half is the first images of training with the same seed, whatever the batch size, lighting included."""
    shards, lighting = numbered_shards(60, 3), Lighting(convention, 0.5)
    augmentation = Augmentation(lighting=lighting)
    options = {"batch_size": 40, "seed": 3, "device": "cpu", "augmentation": augmentation}
    loader = train_loader(shards, basis=plain_basis, **options)
    images, labels = next(iter(loader))
    levels = images[:24].permute(0, 2, 3, 1).double().numpy() * lighting.divisor + plain_basis.mean
    views, plain = (render_views(shards, plain_basis, each, 3) for each in (augmentation, NO_LIGHTING))
    assert labels[:24].tolist() == [view.label for view in views]
    assert np.abs(np.stack([view.pixels for view in views]) - levels.clip(0, 255)).max() < 0.51
    difference = np.stack([view.pixels for view in plain]) - levels.clip(0, 255)
    assert np.abs(difference).max() > 5, "lighting can be seen"


def test_originals_are_shown_at_256(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Images that are kept as they came are shown as the central 256x256 of which training cuts its windows."""
    shards = replace(numbered_shards(1, 1, jpeg(photo(np.random.default_rng(4), 300, 420))), store="original")
    (view,) = render_views(shards, plain_basis, NO_LIGHTING, 5)
    assert view.stored.shape == (256, 256, 3)
    cut = view.stored[view.top : view.top + 224, view.left : view.left + 224].astype(int)
    assert np.abs(cut - (view.pixels[:, ::-1] if view.mirrored else view.pixels)).max() <= 3


@pytest.mark.parametrize("num_samples", [3, 30])
def test_sheet_shows_one_image_repeated_and_the_first_ones_once(
    numbered_shards: Make, monkeypatch: pytest.MonkeyPatch, num_samples: int
) -> None:
    """The sheet shows one image 24 times and the first images once; where there are fewer than 24 none is repeated."""
    folder, drawn = add_basis(numbered_shards(num_samples, 1)), []
    monkeypatch.setattr("tools.preview.draw_sheet", lambda path, halves: drawn.extend(halves.values()))
    preview(folder, folder / "out", seed=9, strength=0.3)
    repeated, training = ([view.key for view, _ in half] for half in drawn)
    assert len(repeated) == 25 and len({*repeated}) == 1
    assert len({*training}) == len(training) == min(24, num_samples)


def test_wrong_input_draws_nothing(numbered_shards: Make, tmp_path: Path) -> None:
    """A basis that is missing or of other shards gets one sentence that names it, and no picture."""
    shards = numbered_shards(3, 2)
    assert f"{tmp_path}/pca.json" in refuses("tools/preview.py", tmp_path)
    add_basis(shards, "0" * 64)
    assert f"{tmp_path}/pca.json" in refuses("tools/preview.py", tmp_path)
    assert not (tmp_path / "preview.png").exists()


def test_published_eigenbasis() -> None:
    """ImageNet's axes are orthonormal to their four digits; their variances on 0..1 are those that fb.resnet's readers
    know (.228, .0212, .0060)."""
    vectors, stddev = np.array(IMAGENET["eigenvectors"]), np.array(IMAGENET["axis_stddev"])
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-4)
    np.testing.assert_allclose(stddev**2 / 255**2, [0.228, 0.0212, 0.0060], rtol=0.01)


def test_program_shows_the_eigenbasis(few: Path, tmp_path: Path) -> None:
    """It prints the figures of pca.json, and draws a picture in which the middle of each ramp is the mean colour, and
    the sheet."""
    shards = tmp_path / "shards"
    shutil.copytree(few, shards)
    output, content = run_ok("tools/preview.py", shards), read_json(shards / "pca.json")
    for name in ("mean", "channel_stddev", "axis_stddev"):
        assert all(f"{value:.2f} (" in output for value in content[name]), name
    pixels = np.asarray(Image.open(shards / "pca.png").convert("RGB")).astype(int)
    middle = pixels[:, pixels.shape[1] // 2]
    close = (np.abs(middle - np.array(content["mean"])) <= 2).all(1)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], close, [0]])) == 1)
    assert len(runs) >= 3, "three ramps cross the mean colour in the middle of the picture"
    with Image.open(shards / "preview.png") as sheet:
        assert sheet.format == "PNG" and sheet.size == (18 * 120, 15 * 120)
    assert "note:" not in run_ok("tools/make_shards.py", "verify", shards, "--fast")
