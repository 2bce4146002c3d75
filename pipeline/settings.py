"""Settings of the data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.lighting import Lighting
from pipeline.machine import share_of_cores


@dataclass(frozen=True)
class Augmentation:
    """Changes to a training image between its file and the network."""

    crop: Literal["random", "center"] = "random"
    """random: a 224x224 window at offsets drawn evenly from 0..32; center: always the middle one."""
    flip: float = 0.5
    """Probability of a horizontal flip. With 0, evaluation leaves the mirrored views out."""
    images_per_crop: int = 1
    """So many consecutive images of a batch get the same window and the same flip (the 2012 program: 32)."""
    lighting: Lighting = field(default_factory=Lighting)
    """Colour shifts along the principal RGB axes."""
    mean: Literal["channel", "image"] = "channel"
    """Subtracted from pixels: the mean colour, or the centre of the mean image (the paper, section 2), for which
    compute_pca --mean-image is needed."""
    std: float = 1.0
    """Divisor of pixels after the mean is subtracted; the 2012 initialization is made for 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augmentation.flip is a probability, 0 to 1, not {self.flip}")
        if self.images_per_crop < 1:
            raise ValueError(f"augmentation.images_per_crop must be at least 1, not {self.images_per_crop}")
        if not 0 < self.std < float("inf"):
            raise ValueError(f"augmentation.std must be positive, not {self.std}")


@dataclass(frozen=True)
class Speed:
    """Knobs that change how fast batches come and never what is in them. `tools/tune_pipeline.py` finds the best ones
    for a machine."""

    threads: int | None = None
    """DALI's CPU threads; by default one more than the cores of this process (those of the machine are shared among
    the processes on it), so that none idles while a thread waits."""
    prefetch_queue_depth: int = 2
    """Batches that DALI prepares ahead."""
    reader_queue_depth: int = 1
    """Batches of encoded images read ahead of the decoder; a network disk wants 4 or more."""
    hw_decoder_load: float = 0.65
    """Share of the images that a GPU's own JPEG decoder takes (A100, H100 and later); its SMs decode the rest."""

    @property
    def num_threads(self) -> int:
        """`threads`, or their default."""
        return self.threads or share_of_cores() + 1

    def __post_init__(self) -> None:
        for name in ("threads", "prefetch_queue_depth", "reader_queue_depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"speed.{name} must be at least 1, not {value}")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"speed.hw_decoder_load is a share, 0 to 1, not {self.hw_decoder_load}")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and what happens to them."""

    shards: Path
    """Folder written by tools/make_shards.py and tools/compute_pca.py."""
    decode: Literal["auto", "gpu", "cpu"] = "auto"
    """Where JPEGs are decoded: gpu (nvJPEG), cpu (libjpeg-turbo; augmented on the GPU if there is one), auto: where
    the network is."""
    shuffle_buffer: int = 4096
    """Encoded images from which each next one is drawn; the order of shards is shuffled, too."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Changes to a training image."""
    speed: Speed = field(default_factory=Speed)
    """How fast it happens."""

    def __post_init__(self) -> None:
        if self.shuffle_buffer < 1:
            raise ValueError(f"data.shuffle_buffer must be at least 1, not {self.shuffle_buffer}")
