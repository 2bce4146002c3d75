"""One update: forward and backward passes over a batch, gradients averaged over replicas, the paper's rule."""

import torch
import torch.nn.functional as F
from torch import nn

from model.alexnet import AlexNet
from model.towers import TowerAlexNet
from pipeline.loader import PADDING, Batch
from train.config import Config
from train.device import can_compile, compiled
from train.optimizer import LossScale, PaperSGD
from train.placement import Placement

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """This process's part of the network, and its optimizer."""

    def __init__(self, config: Config, device: torch.device, placement: Placement) -> None:
        """Build them, in all processes together."""
        self._placement, self._train, self._device = placement, config.train, device
        self.model = placement.build(config.model, config.train.seed).to(device)
        self.names = [name for name, _ in self.model.named_parameters()]
        """Of parameters."""
        self.optimizer = PaperSGD(self.model.named_parameters(), config.optimizer)
        self.scale = LossScale(device, config.train.precision == "fp16")
        self.network: nn.Module = self.model
        """The same weights, compiled where that pays."""
        if config.train.compile:
            self.network = compiled(self.model, device)
            if device.type == "cuda" and can_compile(device):
                self.optimizer.compile()
        self._replicated = placement.replicated(self.network)

    def step(
        self, batch: Batch, rates: dict[str, float], with_norm: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """One update, at the rate under each parameter's name. Returns the batch's mean loss, number of correct
        answers, and if wanted the norm of the gradient over the whole network, all on the device; none of them is
        waited for."""
        pieces, half = self._train.accumulate, HALVES.get(self._train.precision)
        loss = torch.zeros((), device=self._device)
        correct = torch.zeros((), dtype=torch.int64, device=self._device)
        cut = zip(batch.images.chunk(pieces), batch.labels.chunk(pieces), strict=True)
        for number, (images, labels) in enumerate(cut, start=1):
            with self._placement.exchanging(self._replicated, number == pieces):
                with torch.autocast(self._device.type, half, enabled=half is not None):
                    logits = self._replicated(images)
                piece = F.cross_entropy(logits, labels, ignore_index=PADDING) / pieces
                (piece * self.scale.factor if self.scale.enabled else piece).backward()
            loss += piece.detach()
            correct += (logits.detach().argmax(1) == labels).sum()
        overflow = self.scale.unscale(self.optimizer.gradients, self._placement.any_on_device)
        norm = None
        if with_norm:
            squares = torch.stack(
                [gradient.float().square().sum() for gradient in self.optimizer.gradients]
            ).sum()
            norm = self._placement.total_over_parts(squares).sqrt()
        self.optimizer.step(rates, overflow)
        return loss, correct, norm

    @property
    def is_finite(self) -> bool:
        """Whether all weights are numbers; waits for the device."""
        return bool(torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).all())

    def weights(self) -> dict[str, torch.Tensor]:
        """Of the whole network, in the single-device layout. All processes have to ask."""
        return self._placement.whole(self.model.state_dict(), self.model.config)

    def velocities(self) -> dict[str, torch.Tensor]:
        """Likewise."""
        return self._placement.whole(self.optimizer.state_dict(), self.model.config)

    def load(self, weights: dict[str, torch.Tensor], velocities: dict[str, torch.Tensor]) -> None:
        """Set both, from the single-device layout."""
        self.model.load_state_dict(self._placement.part(weights))
        self.optimizer.load_state_dict(self._placement.part(velocities))

    def gather_network(self) -> AlexNet:
        """The whole network, uncompiled, with which training cannot go on. All processes have to ask."""
        if isinstance(self.model, TowerAlexNet):
            whole = AlexNet(self.model.config).to(self._device)
            whole.load_state_dict(self.weights())
            return whole
        return self.model
