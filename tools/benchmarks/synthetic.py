"""Training steps on a batch that is there already."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from train.optimizer import PaperSGD
from train.schedule import OptimizerConfig


def training_on(
    batch_size: int, dtype: torch.dtype, place: torch.device
) -> Callable[..., Callable[[], None]]:
    """Makes steps on a synthetic batch from a network, and from what is to be done with it first."""
    images = 50 * torch.randn(batch_size, 3, 224, 224, device=place).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch_size,), device=place)

    def training(
        model: nn.Module, wrap: Callable[[Any], nn.Module] = lambda model: model
    ) -> Callable[[], None]:
        network = wrap(model.to(place))
        optimizer = PaperSGD(model.named_parameters(), OptimizerConfig())
        rates = {name: 1e-9 for name, _ in model.named_parameters()}

        def step() -> None:
            with torch.autocast(place.type, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(network(images).float(), labels)
            loss.backward()
            optimizer.step(rates)

        return step

    return training
