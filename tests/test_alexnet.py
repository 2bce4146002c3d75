"""The network of 2012: parameters, shapes, initialization, dropout, towers.

Longer than others: it is one class, whose variants are written out a second time to compare with.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.alexnet import AlexNet, AlexNetConfig, normalize_within_channels
from tests.helpers import TORCHVISION

SLIM = AlexNetConfig(channels=(8, 16, 24, 24, 16), fc_dim=32, num_classes=10)


def test_parameters_of_the_full_network() -> None:
    """60,965,224 in all, layer by layer as counted in 2012."""
    with torch.device("meta"):
        model = AlexNet(AlexNetConfig())
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in model.named_children()}
    assert counts == {
        "conv1": 34_944, "conv2": 307_456, "conv3": 885_120, "conv4": 663_936, "conv5": 442_624,
        "fc6": 37_752_832, "fc7": 16_781_312, "fc8": 4_097_000,
    }  # fmt: skip
    assert sum(counts.values()) == 60_965_224


@pytest.mark.parametrize("variant", ["paper", "original"])
@pytest.mark.parametrize("pooling", ["overlapping", "plain"])
def test_shapes(variant: str, pooling: str) -> None:
    """Maps and sides of every layer's output, on the full network without arithmetic."""
    with torch.device("meta"):
        model = AlexNet(AlexNetConfig(variant=variant, pooling=pooling))  # type: ignore[arg-type]
    shapes = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(
            lambda _m, _i, output, name=name: shapes.update({name: tuple(output.shape)})
        )
    logits = model(torch.empty(2, 3, 224, 224, device="meta", dtype=torch.float16))
    assert shapes == {
        "conv1": (2, 96, 55, 55), "conv2": (2, 256, 27, 27), "conv3": (2, 384, 13, 13), "conv4": (2, 384, 13, 13),
        "conv5": (2, 256, 13, 13), "fc6": (2, 4096), "fc7": (2, 4096), "fc8": (2, 1000),
    }  # fmt: skip
    assert logits.shape == (2, 1000) and logits.dtype == torch.float32


def test_forward_by_hand() -> None:
    """Both variants in evaluation equal their layers written out with torch.nn.functional."""
    for variant in ("paper", "original"):
        torch.manual_seed(0)
        model = AlexNet(replace(SLIM, variant=variant)).double().eval()  # type: ignore[arg-type]
        p = dict(model.named_parameters())
        x = 60 * torch.randn(2, 3, 224, 224, dtype=torch.float64)

        def lrn(x: torch.Tensor, variant: str = variant) -> torch.Tensor:
            alpha = 5e-4 if variant == "paper" else 1e-4  # torch divides alpha by 5
            return torch.cat(
                [F.local_response_norm(tower, 5, alpha, 0.75, 2.0) for tower in x.chunk(2, 1)], 1
            )

        def conv(
            name: str, x: torch.Tensor, p: dict[str, torch.nn.Parameter] = p, **options: int
        ) -> torch.Tensor:
            return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **options)

        y = conv("conv1", F.pad(x, (0, 3, 0, 3)), stride=4)
        if variant == "paper":
            y = F.max_pool2d(lrn(y.relu()), 3, 2)
            y = F.max_pool2d(lrn(conv("conv2", y, padding=2, groups=2).relu()), 3, 2)
        else:
            y = F.max_pool2d(lrn(y), 3, 2).relu()
            y = lrn(conv("conv2", y, padding=2, groups=2).relu())
            squares = F.unfold((y * y).flatten(0, 1)[:, None], 5, padding=2).sum(1).view_as(y)
            y = F.max_pool2d(y / (1 + 1e-3 / 25 * squares) ** 0.75, 3, 2)
        y = conv("conv3", y, padding=1).relu()
        y = conv("conv4", y, padding=1, groups=2).relu()
        y = F.max_pool2d(conv("conv5", y, padding=1, groups=2).relu(), 3, 2)
        y = 0.5 * F.linear(y.flatten(1), p["fc6.weight"], p["fc6.bias"]).relu()
        y = 0.5 * F.linear(y, p["fc7.weight"], p["fc7.bias"]).relu()
        y = F.linear(y, p["fc8.weight"], p["fc8.bias"])
        torch.testing.assert_close(model(x).double(), y, rtol=1e-5, atol=1e-6)


def test_within_map_normalization() -> None:
    """A constant map: the divisor is (1 + 1e-3 * value^2)^.75 inside, less at the border, where zeros count."""
    y = normalize_within_channels(torch.full((1, 1, 9, 9), 30.0, dtype=torch.float64))
    assert y[0, 0, 4, 4].item() == pytest.approx(30 / (1 + 1e-3 * 900) ** 0.75)
    assert y[0, 0, 0, 0].item() == pytest.approx(30 / (1 + 1e-3 * 900 * 9 / 25) ** 0.75)


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


def test_dropout_masks_without_scaling() -> None:
    """Training silences about half of the units and leaves the others as they are; evaluation halves all."""
    model = AlexNet(SLIM)
    x = torch.rand(100, 1000) + 1
    torch.manual_seed(0)
    kept = model.train().drop(x)
    assert ((kept == 0) | (kept == x)).all() and (kept == 0).float().mean().item() == pytest.approx(
        0.5, abs=0.01
    )
    torch.testing.assert_close(model.eval().drop(x), x * 0.5)
    quarter = AlexNet(replace(SLIM, dropout=0.25))
    assert (quarter.train().drop(x) == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(quarter.eval().drop(x), x * 0.75)


def test_towers_meet_only_where_they_should() -> None:
    """A change in tower 1's half of conv1 reaches tower 0 in conv3, not in conv2; with one tower, in conv2 already."""
    for towers, crosses in ((2, False), (1, True)):
        torch.manual_seed(0)
        model = AlexNet(replace(SLIM, towers=towers)).eval()  # type: ignore[arg-type]
        outputs: dict[str, list[torch.Tensor]] = {"conv2": [], "conv3": []}
        for name in outputs:
            getattr(model, name).register_forward_hook(
                lambda _m, _i, output, kept=outputs[name]: kept.append(output.detach())
            )
        x = 60 * torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            model(x)
            model.conv1.bias[4:] += 50
            model(x)
        first_halves = {name: [o[:, : o.shape[1] // 2] for o in pair] for name, pair in outputs.items()}
        assert torch.equal(*first_halves["conv2"]) is not crosses
        assert not torch.equal(*first_halves["conv3"])


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "abs_tanh"])
def test_switches_train(activation: str) -> None:
    """Every activation, without normalization and with plain pooling, gives finite logits and gradients everywhere."""
    model = AlexNet(replace(SLIM, activation=activation, lrn="none", pooling="plain"))  # type: ignore[arg-type]
    model(30 * torch.randn(2, 3, 224, 224)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"channels": (7, 16, 24, 24, 16)},
        {"channels": (0, 16, 24, 24, 16)},
        {"channels": (8, 16, -24, 24, 16)},
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
    names = list(state)
    model.load_state_dict(state)
    assert list(state) == names

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
