"""From shards to batches: `from pipeline import train_loader`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.loader import train_loader, val_loader

__all__ = ["train_loader", "val_loader"]


def __getattr__(name: str) -> Any:
    """Import the loader when it is asked for: DALI and torch take seconds, which a wrong option should not wait for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline import loader

    return getattr(loader, name)
