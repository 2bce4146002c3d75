"""What a run warns of while it goes: input that is too slow, a loss that does not move, an accuracy at chance."""

import math
from collections.abc import Callable

from tqdm import tqdm

from train.accuracy import Accuracy

WINDOW = 500
"""Steps over which waiting is judged."""
MUCH_WAITING = 20.0
"""Percent of the time in which the network waits for input that are worth a line."""
PATIENCE = 3000
"""Steps after which a loss at ln(classes) is not the usual slow start any more. With N(0, .01) weights the first
thousand steps or two show next to nothing."""
SIGMAS = 3
"""How far from chance an accuracy has to be, in standard deviations of guessing."""


class Alarms:
    """Looks at the rows of a run; tells each thing once, and of slow input once an epoch."""

    def __init__(self, classes: int, tell: Callable[[str], object] = tqdm.write) -> None:
        self._classes, self._tell = classes, tell
        self._told_epoch = -1
        self._told_stall = self._told_chance = False
        self._steps, self._waited, self._last_step = 0, 0.0, None
        self._loss = math.inf

    def train_row(self, step: int, epoch: int, steps: int, figures: dict[str, float]) -> None:
        """Judge a row over `steps` steps."""
        self._loss = figures["loss"]
        self._steps, self._waited = self._steps + steps, self._waited + steps * figures["wait_percent"]
        if self._steps >= WINDOW:
            percent = self._waited / self._steps
            if percent > MUCH_WAITING and epoch != self._told_epoch:
                self._told_epoch = epoch
                self._tell(
                    f"input-bound: waited {percent:.0f} % of the last {self._steps} steps; see tools/tune_pipeline.py"
                )
            self._steps, self._waited = 0, 0.0
        if step >= PATIENCE and not self._told_stall and self.at_chance:
            self._told_stall = True
            self._tell(
                f"the loss still is ln({self._classes}) = {math.log(self._classes):.2f} after {step} steps: nothing is "
                "learned; is data.augmentation.std 1 (2012's weights are made for pixels of 0..255), optimizer.lr high "
                "enough and model.variant the one meant?"
            )

    @property
    def at_chance(self) -> bool:
        """Whether the last row's loss is that of guessing, give or take a percent."""
        return abs(self._loss / math.log(self._classes) - 1) < 0.01

    def eval_row(self, epoch: int, accuracy: Accuracy) -> None:
        """Judge the evaluation after `epoch` epochs."""
        chance = 1 / self._classes
        noise = math.sqrt(chance * (1 - chance) / accuracy.samples)
        learned = self._loss < 0.9 * math.log(self._classes)
        if accuracy.centre_top1 / 100 < chance + SIGMAS * noise and learned and not self._told_chance:
            self._told_chance = True
            self._tell(
                f"accuracy after epoch {epoch} is {accuracy.centre_top1:.1f} %, no better than guessing, while the "
                "training loss falls: do train/ and val/ count their classes alike? (tools/make_shards.py stats; "
                "ILSVRC2012_ID is not the order of sorted wnids)"
            )
