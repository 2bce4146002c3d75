"""Settings of the section `data`: shards, augmentation, speed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.errors import check_choices
from pipeline.lighting import Lighting
from pipeline.machine import share_of_cores


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images, and what is subtracted from all images."""

    crop: Literal["random", "center"] = "random"
    """random: a 224x224 crop at offsets drawn uniformly from 0..32; center: always the central one."""
    flip: float = 0.5
    """Probability of a horizontal flip. With 0, evaluation leaves the mirrored views out."""
    images_per_crop: int = 1
    """Number of consecutive images of a batch that get the same crop and the same flip (the 2012 program: 32)."""
    lighting: Lighting = field(default_factory=Lighting)
    """Colour shifts along the principal RGB axes."""
    mean: Literal["channel", "image"] = "channel"
    """Subtracted from pixels: channel: the mean colour; image: the centre of the mean image (the paper, section 2),
    which tools/compute_pca.py --mean-image makes."""
    std: float | tuple[float, float, float] = 1.0
    """Divisor of pixels, or of R, G and B, after the mean is subtracted; the initialization of 2012 needs 1."""

    @property
    def stds(self) -> tuple[float, float, float]:
        """Divisors of R, G and B."""
        return (self.std,) * 3 if isinstance(self.std, int | float) else self.std

    def __post_init__(self) -> None:
        check_choices(self, "augmentation")
        if not isinstance(self.std, int | float):  # a list in a configuration as JSON
            object.__setattr__(self, "std", tuple(map(float, self.std)))
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augmentation.flip: expected a probability, 0 to 1, got {self.flip}")
        if self.images_per_crop < 1:
            raise ValueError(f"augmentation.images_per_crop: expected at least 1, got {self.images_per_crop}")
        if len(self.stds) != 3 or not all(0 < each < float("inf") for each in self.stds):
            raise ValueError(
                f"augmentation.std: expected one or three finite numbers above 0, got {self.std}"
            )


@dataclass(frozen=True)
class Speed:
    """Settings of the speed of loading; of the content of batches only `hw_decoder_load` changes a little.
    `tools/tune_pipeline.py` finds the best ones for a machine."""

    threads: int | None = None
    """DALI's CPU threads; by default one more than this process's share of the machine's cores, so that no core idles
    while a thread waits."""
    prefetch_queue_depth: int = 2
    """Batches decoded ahead."""
    reader_queue_depth: int = 4
    """Batches of encoded images read ahead of the decoder, with `shuffle: global` each by a thread; for a network disk
    16 or more."""
    hw_decoder_load: float = 0.65
    """Share of the images that a GPU's JPEG engine decodes (A100, H100 and later); its SMs decode the others. Their
    pixels differ by a level here and there, so a run resumes only with the share that it began with."""

    @property
    def num_threads(self) -> int:
        """`threads`, or their default."""
        return self.threads or share_of_cores() + 1

    def __post_init__(self) -> None:
        for name in ("threads", "prefetch_queue_depth", "reader_queue_depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"speed.{name}: expected at least 1, got {value}")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"speed.hw_decoder_load: expected a share, 0 to 1, got {self.hw_decoder_load}")


@dataclass(frozen=True)
class DataConfig:
    """Source of the images, and how they are decoded, shuffled and augmented."""

    shards: Path
    """Folder written by tools/make_shards.py and tools/compute_pca.py."""
    eigenbasis: Path | None = None
    """pca.json of these shards elsewhere, where their folder may not be written (default: SHARDS/pca.json)."""
    decode: Literal["auto", "gpu", "cpu"] = "auto"
    """Where JPEGs are decoded: gpu: nvJPEG; cpu: libjpeg-turbo (augmented on the GPU if there is one); auto: on the
    device of the network."""
    shuffle: Literal["global", "blocks"] = "global"
    """Order of training images: global: over the whole split; blocks: shards are shuffled, and images within blocks of
    `block_shards`, for slow or remote disks, which then read whole shards in sequence."""
    block_shards: int = 16
    """Shards per block with `shuffle: blocks`; two blocks should fit in the machine's free memory."""
    on_corrupt: Literal["fail", "skip"] = "fail"
    """Damaged image: fail: stop (exit code 3); skip: leave it out of its batch, and log and count it."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Augmentation of training images."""
    speed: Speed = field(default_factory=Speed)
    """Settings that change only the speed."""

    def __post_init__(self) -> None:
        check_choices(self, "data")
        if self.block_shards < 1:
            raise ValueError(f"data.block_shards: expected at least 1, got {self.block_shards}")
