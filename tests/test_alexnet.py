"""The network of 2012: parameters, shapes, initialization, dropout, towers.

Longer than others: it is one class, whose variants are written out a second time to compare with.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.alexnet import AlexNet, AlexNetConfig
from tests.helpers import TORCHVISION

SLIM = AlexNetConfig(channels=(8, 16, 24, 24, 16), fc_dim=32, num_classes=10)


@pytest.mark.parametrize("variant", ["paper", "original"])
@pytest.mark.parametrize("pooling", ["overlapping", "plain"])
def test_full_network(variant: str, pooling: str) -> None:
    """Parameters of every layer as counted in 2012, maps and sides of its output; on `meta`, without arithmetic."""
    with torch.device("meta"):
        model = AlexNet(AlexNetConfig(variant=variant, pooling=pooling))  # type: ignore[arg-type]
    found = {}
    for name, layer in model.named_children():
        parameters = sum(p.numel() for p in layer.parameters())
        layer.register_forward_hook(
            lambda _m, _i, output, name=name, parameters=parameters: found.update(
                {name: (parameters, tuple(output.shape))}
            )
        )
    logits = model(torch.empty(2, 3, 224, 224, device="meta", dtype=torch.float16))
    assert found == {
        "conv1": (34_944, (2, 96, 55, 55)), "conv2": (307_456, (2, 256, 27, 27)),
        "conv3": (885_120, (2, 384, 13, 13)), "conv4": (663_936, (2, 384, 13, 13)),
        "conv5": (442_624, (2, 256, 13, 13)), "fc6": (37_752_832, (2, 4096)),
        "fc7": (16_781_312, (2, 4096)), "fc8": (4_097_000, (2, 1000)),
    }  # fmt: skip
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"variant": "original"},
        {"towers": 1, "activation": "sigmoid"},
        {"activation": "tanh", "pooling": "plain"},
        {"variant": "original", "activation": "abs_tanh", "lrn": "none"},
    ],
)
def test_forward_is_the_layers_written_out(change: dict[str, Any]) -> None:
    """In evaluation, with every switch, by torch.nn.functional; gradients reach every parameter."""
    torch.manual_seed(0)
    config = replace(SLIM, **change)
    model = AlexNet(config).double().eval()
    p = dict(model.named_parameters())
    x = 60 * torch.randn(2, 3, 224, 224, dtype=torch.float64)
    act = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "abs_tanh": lambda x: torch.tanh(x).abs()}.get(
        config.activation, F.relu
    )

    def lrn(x: torch.Tensor) -> torch.Tensor:
        if config.lrn == "none":
            return x
        alpha = 5e-4 if config.variant == "paper" else 1e-4  # torch divides alpha by 5
        towers = x.chunk(config.num_towers, 1)
        return torch.cat([F.local_response_norm(tower, 5, alpha, 0.75, 2.0) for tower in towers], 1)

    def conv(name: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **options)

    def pool(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 2 if config.pooling == "plain" else 3, 2)

    groups = config.num_towers
    y = conv("conv1", F.pad(x, (0, 3, 0, 3)), stride=4)
    y = pool(lrn(act(y))) if config.variant == "paper" else act(pool(lrn(y)))
    y = lrn(act(conv("conv2", y, padding=2, groups=groups)))
    if config.variant == "original" and config.lrn != "none":
        squares = F.unfold((y * y).flatten(0, 1)[:, None], 5, padding=2).sum(1).view_as(y)
        y = y / (1 + 1e-3 / 25 * squares) ** 0.75
    y = act(conv("conv3", pool(y), padding=1))
    y = act(conv("conv4", y, padding=1, groups=groups))
    y = pool(act(conv("conv5", y, padding=1, groups=groups)))
    y = 0.5 * act(F.linear(y.flatten(1), p["fc6.weight"], p["fc6.bias"]))
    y = 0.5 * act(F.linear(y, p["fc7.weight"], p["fc7.bias"]))
    y = F.linear(y, p["fc8.weight"], p["fc8.bias"])
    got = model(x)
    torch.testing.assert_close(got, y, rtol=1e-9, atol=1e-12)
    got.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("variant", "middle"), [("paper", 0.01), ("original", 0.03)])
@pytest.mark.parametrize(("towers", "width"), [(2, 1), (2, 4), (1, 2)])
def test_initialization(variant: str, middle: float, towers: int, width: int) -> None:
    """Standard deviations and biases as in 2012; slimmer towers get wider weights; the paper's net for one GPU
    (footnote 2) is one tower of full width."""
    torch.manual_seed(0)
    channels = tuple(c // width for c in (96, 256, 384, 384, 256))
    model = AlexNet(AlexNetConfig(variant, towers, channels, fc_dim=512, num_classes=100))  # type: ignore[arg-type]
    width = width * towers // 2
    for name, layer in model.named_children():
        expected = (middle if name in ("conv3", "conv4", "conv5") else 0.01) * math.sqrt(width)
        weights = layer.weight.detach()
        assert weights.std().item() == pytest.approx(expected, rel=0.05)
        assert abs(weights.mean().item()) < expected / 10
        bias = 1.0 if name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0
        assert (layer.bias == bias).all()


@pytest.mark.parametrize("dropout", [0.5, 0.25])
def test_dropout_masks_without_scaling(dropout: float) -> None:
    """Training silences that share of units and leaves the others as they are; evaluation scales all."""
    model, x = AlexNet(replace(SLIM, dropout=dropout)), torch.rand(100, 1000) + 1
    torch.manual_seed(0)
    kept = model.train().drop(x)
    assert ((kept == 0) | (kept == x)).all()
    assert (kept == 0).float().mean().item() == pytest.approx(dropout, abs=0.01)
    torch.testing.assert_close(model.eval().drop(x), x * (1 - dropout))


@pytest.mark.parametrize(
    "change",
    [
        {"channels": (7, 16, 24, 24, 16)},
        {"channels": (0, 16, 24, 24, 16)},
        {"fc_dim": 31},
        {"num_classes": 1},
        {"dropout": 1.0},
    ],
)
def test_bad_values(change: dict[str, object]) -> None:
    """Refused with the field's name."""
    with pytest.raises(ValueError, match=f"model.{next(iter(change))}"):
        replace(SLIM, **change)  # type: ignore[arg-type]


def test_torchvision_variant() -> None:
    """61,100,840 parameters; takes torchvision's state dict as it is, and then equals its layers written out, dropout
    included."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in TORCHVISION.items():
        fan_in = math.prod(shape[1:])
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / fan_in**0.5
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    model = AlexNet(AlexNetConfig(variant="torchvision"))
    assert sum(p.numel() for p in model.parameters()) == 61_100_840
    model.load_state_dict(state)

    p, x = state, torch.randn(2, 3, 224, 224, generator=generator)

    def conv(name: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **options).relu()

    def forward(x: torch.Tensor, training: bool) -> torch.Tensor:
        y = F.max_pool2d(conv("features.0", x, stride=4, padding=2), 3, 2)
        y = F.max_pool2d(conv("features.3", y, padding=2), 3, 2)
        y = conv("features.8", conv("features.6", y, padding=1), padding=1)
        y = F.max_pool2d(conv("features.10", y, padding=1), 3, 2)
        y = F.dropout(F.adaptive_avg_pool2d(y, 6).flatten(1), 0.5, training)
        y = F.dropout(F.linear(y, p["classifier.1.weight"], p["classifier.1.bias"]).relu(), 0.5, training)
        y = F.linear(y, p["classifier.4.weight"], p["classifier.4.bias"]).relu()
        return F.linear(y, p["classifier.6.weight"], p["classifier.6.bias"])

    for training in (False, True):
        model.train(training)
        torch.manual_seed(1)
        got = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(got, forward(x, training), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # FACTS of 2012: the paper's one-GPU network, and its network without conv4.
        (AlexNetConfig(towers=1, channels=(48, 128, 192, 192, 256)), 59_798_312),
        (AlexNetConfig(channels=(96, 256, 384, 0, 256)), 60_301_288),
        # Counted by hand: without conv3 conv4 reads 128 maps each; fc6 then reads what is left.
        (
            AlexNetConfig(channels=(96, 256, 0, 384, 256)),
            60_965_224 - 885_120 - 663_936 + 384 * (128 * 9 + 1),
        ),
        (AlexNetConfig(channels=(96, 256, 384, 384, 0)), 60_965_224 - 442_624 + (384 - 256) * 36 * 4096),
        (AlexNetConfig(channels=(96, 256, 0, 0, 0)), 34_944 + 307_456 + 37_752_832 + 16_781_312 + 4_097_000),
    ],
)
def test_ablations(config: AlexNetConfig, parameters: int) -> None:
    """Parameter counts of networks with layers left out or one tower; logits come out."""
    with torch.device("meta"):
        model = AlexNet(config)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)


@pytest.mark.parametrize("variant", ["paper", "original", "torchvision"])
def test_compiles_as_one_graph(variant: str) -> None:
    """Forward, loss and backward without a break, under autocast too, with the numbers of the uncompiled network."""
    torch.manual_seed(0)
    model = AlexNet(replace(SLIM, variant=variant, dropout=0))  # type: ignore[arg-type]
    images, labels = 50 * torch.randn(2, 3, 224, 224), torch.tensor([3, 7])

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(images), labels)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for half in (False, True):
        results = []
        for function in (loss_of, compiled):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = function(images)
            loss.backward()
            results.append(
                [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            )
        for expected, got in zip(*results, strict=True):
            bound = (0.02 if half else 1e-4) * float(expected.abs().max())
            torch.testing.assert_close(got, expected, rtol=0, atol=bound)


def test_given_fields_win_over_the_variant() -> None:
    """Presets fill what is silent and nothing else."""
    config = AlexNetConfig(variant="torchvision", lrn="paper", channels=(8, 8, 8, 8, 8))
    assert (config.num_towers, config.normalization, config.conv_channels) == (1, "paper", (8, 8, 8, 8, 8))
    assert replace(SLIM, variant="original").normalization == "original"
