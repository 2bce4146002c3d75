"""Generate photograph-like images to measure speed without ImageNet: nothing to learn, but with ImageNet's sizes,
spectra, colours, bytes and file formats.

Each is a page of 1/f noise covered by discs of 1/f noise ("dead leaves", A. B. Lee, D. Mumford and J. Huang,
IJCV 41, 2001: occlusion gives edges and a photograph's spectrum).
"""

import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageFile

# ImageNet's colours, RGB, 0..255 (cuda-convnet2, make-data/input_meta): channel means, and standard deviations along
# the axes of the pixels' covariance, one axis a row: light, yellow to blue, green to magenta.
CHANNEL_MEANS = np.array([127.3, 119.7, 104.9])
AXIS_STDS = np.array([121.78, 37.09, 19.72])
AXES = np.array([[-0.5635, -0.5762, -0.5920], [-0.7126, -0.0235, 0.7012], [0.4180, -0.8170, 0.3973]])
SCENES, SCENE_SIDE, SCENE_CONTRAST = 8, 1024, 0.3


def make_photo(number: int, seed: int) -> bytes:
    """Make one photograph-like file; equal numbers and seeds give equal bytes."""
    rng = np.random.default_rng([seed, number])
    width, height = draw_size(rng)
    page = cut_texture(rng, width, height, seed)
    # Radii by the power law that makes the picture scale-invariant.
    largest, smallest = 0.5 * min(width, height), 0.03 * min(width, height)
    share = rng.uniform(0, 1, int(rng.integers(0, 60)))
    for radius in np.sort((smallest**-2 - share * (smallest**-2 - largest**-2)) ** -0.5)[::-1]:
        side = max(2, round(2 * radius))
        left, top = (int(rng.integers(-side // 2, length - side // 2)) for length in (width, height))
        mask = draw_disc().resize((side, side), Image.Resampling.BILINEAR)
        page.paste(cut_texture(rng, side, side, seed), (left, top), mask)
    # ImageNet has one PNG, 23 CMYK files in 1.3 million, grey ones in a hundred.
    kind = rng.choice(["rgb", "grey", "cmyk", "progressive", "exif"], p=[0.927, 0.02, 0.003, 0.03, 0.02])
    return encode(page, rng, "png" if number == 1 else str(kind), quality=int(rng.choice([80, 85, 90, 94])))


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Draw width and height as in ImageNet: mostly 500 pixels long, many smaller, a few at camera resolution."""
    kind = rng.choice(["500", "small", "large"], p=[0.62, 0.345, 0.035])
    if kind == "500":
        short = int(rng.choice([375, 333, 332, 400], p=[0.66, 0.2, 0.07, 0.07]))
        return (500, short) if rng.uniform() < 0.75 else (short, 500)
    least, most = (130, 600) if kind == "small" else (600, 2500)
    long = round(float(np.exp(rng.uniform(np.log(least), np.log(most)))))
    short = max(96, round(long * rng.uniform(0.62, 0.9)))
    return (long, short) if rng.uniform() < 0.7 else (short, long)


def cut_texture(rng: np.random.Generator, width: int, height: int, seed: int) -> Image.Image:
    """Crop a window of a scene, with random contrast and colour. RGB."""
    scene = make_scenes(seed)[rng.integers(SCENES)]
    top, left = rng.integers(0, SCENE_SIDE, 2)
    window = scene.take(top + np.arange(height), 0, mode="wrap").take(left + np.arange(width), 1, mode="wrap")
    contrast = rng.uniform(0.1, 1.0) / SCENE_CONTRAST
    colour = CHANNEL_MEANS + (rng.normal(0, 0.85, 3) * AXIS_STDS) @ AXES
    levels = colour[:, None] + contrast * (np.arange(256) - 128)
    return Image.fromarray(window).point(np.rint(levels.clip(0, 255)).astype(int).ravel().tolist())


@functools.cache
def make_scenes(seed: int) -> list[np.ndarray]:
    """Make periodic 1/f pictures in ImageNet's colours at low contrast, uint8 (SCENE_SIDE, SCENE_SIDE, 3) each."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(SCENE_SIDE)[:, None], np.fft.rfftfreq(SCENE_SIDE))
    frequency[0, 0] = np.inf
    pictures = []
    for _ in range(SCENES):
        phases = rng.normal(size=(2, 3, *frequency.shape))
        fields = np.fft.irfft2((phases[0] + 1j * phases[1]) / frequency, s=(SCENE_SIDE, SCENE_SIDE))
        fields *= (SCENE_CONTRAST * AXIS_STDS / fields.std((1, 2)))[:, None, None]
        pictures.append(np.rint(np.moveaxis(fields, 0, 2) @ AXES + 128).clip(0, 255).astype(np.uint8))
    return pictures


@functools.cache
def draw_disc() -> Image.Image:
    """Draw a white disc on black, 512x512, mode L; resized, it has an antialiased edge."""
    offset = np.arange(512) - 255.5
    return Image.fromarray(np.where(np.hypot(offset[:, None], offset) < 256, 255, 0).astype(np.uint8))


def encode(
    image: Image.Image, rng: np.random.Generator, encoding: str | None = None, quality: int = 92
) -> bytes:
    """Encode an image in one of ImageNet's file formats.

    Args:
        image: RGB image.
        rng: Draws the encoding if it is None, and the chroma subsampling.
        encoding: "rgb", "grey", "cmyk", "progressive", "exif" or "png".
        quality: JPEG quality, 1 to 100.
    """
    subsampling = str(rng.choice(["4:2:0", "4:4:4"], p=[0.7, 0.3]))
    random_encoding = str(
        rng.choice(["rgb", "grey", "cmyk", "progressive", "exif"], p=[0.71, 0.06, 0.03, 0.1, 0.1])
    )
    encoding = encoding or random_encoding
    out = io.BytesIO()
    if encoding == "png":
        image.save(out, "PNG")
        return out.getvalue()
    options: dict[str, Any] = {"quality": quality, "subsampling": subsampling}
    if encoding == "grey":
        image, options = image.convert("L"), {"quality": quality}
    elif encoding == "cmyk":
        image = image.convert("CMYK")
    elif encoding == "progressive":
        options["progressive"] = True
    elif encoding == "exif":
        options["exif"] = exif = Image.Exif()
        exif[0x0112] = (
            6  # "rotate by 90 degrees to show"; the pixels are upright, as in many files of ImageNet
        )
    # Pillow writes a progressive file in one block.
    ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 3 * image.width * image.height)
    image.save(out, "JPEG", **options)
    return out.getvalue()
