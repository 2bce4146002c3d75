"""The page of a run shows all of it, whatever the run lacks and whatever its classes are called, in one file."""

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.shards import ClassName
from tests.helpers import look_at
from train.accuracy import Accuracy, EvalStats
from train.pictures import CHARTS, draw_charts, draw_png, read_lines
from train.report import ReportData, compute_saturation, describe_towers, render_page, summarize_speed

HOSTILE = [
    '</td></table><script>document.title = "taken"</script>',
    "<img src=http://example.com/x.png>, other words",
    "\"quoted\" & 'quoted' &amp; $\\frac{$ {{ 7 * 7 }} {% raw %}",
    "a-very-long-word-without-any-space-" * 6,
]
SECTIONS = [
    "summary",
    "learning-and-speed",
    "first-layer",
    "hardest-classes",
    "surest-mistakes",
    "augmentation",
]
SECTIONS += ["configuration"]
IMAGES = dict.fromkeys(("kernels", "augmentation"), draw_png(lambda figure: None))


def make_stats(classes: int, right: list[int], wrong: list[tuple[int, int]]) -> EvalStats:
    """Make statistics of images that are recognized, and of (label, guess) that are not."""
    stats = EvalStats(classes, torch.device("cpu"))
    pairs = [(label, label) for label in right] + wrong
    scores = torch.full((len(pairs), classes), 0.1 / classes)
    for row, (_, guess) in enumerate(pairs):
        scores[row, guess] = 0.5 + 0.01 * row
    if pairs:
        labels = torch.tensor([label for label, _ in pairs])
        stats.update(torch.zeros(len(pairs), 3, 256, 256), labels, scores)
    return stats


@pytest.fixture
def data(tmp_path: Path) -> ReportData:
    """A run with every figure, two towers, and four classes with hostile names."""
    train = {"kind": "train", "loss": 2.0, "top1_error": 80.0, "images_per_s": 100.0, "wait_percent": 1.0}
    train |= {"step_ms_p50": 30.0, "saving_step_ms_p50": 31.0}
    evals = {"kind": "eval", "centre_top1_error": 60.0, "centre_top5_error": 20.0, "eval_s": 3.0}
    return ReportData(
        run_dir=tmp_path / "a <run> & more",
        accuracy=Accuracy(100, 40.0, 80.0, "ten-view", 42.5, 82.0).rows(),
        facts=[("versions", "torch <1> & DALI")],
        rows=[{**train, "step": step, "epoch": step // 10} for step in (5, 10, 15, 20)]
        + [{**evals, "step": step, "epoch": step // 10} for step in (10, 20)],
        steps_per_epoch=10,
        classes=[ClassName(f"n{number}", words) for number, words in enumerate(HOSTILE)],
        stats=make_stats(4, [0, 0, 1, 2, 3], [(0, 1), (1, 2), (1, 2), (1, 3), (3, 2)]),
        restore_pixels=lambda image: np.full((256, 256, 3), 90, np.uint8),
        towers=np.split(np.random.default_rng(0).normal(size=(16, 3, 11, 11)), 2),
        config={"data": {"shards": 'a "folder" <b>', "more": {"std": 1.0, "none": None}}},
    )


class Parsed(HTMLParser):
    """What a browser finds: tags with their attributes, all text, and the text of each table row."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(page.decode())
        self.ids = [attributes["id"] for tag, attributes in self.tags if tag == "section"]
        self.images = [attributes for tag, attributes in self.tags if tag == "img"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")


def test_page_is_complete_self_contained_and_escaped(data: ReportData) -> None:
    """Every section is there; every picture is inside, whole and described; no address leads out, nothing runs, and
    hostile names are text."""
    page = render_page(data, IMAGES)
    parsed = Parsed(page)
    assert parsed.ids == SECTIONS
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base", "video", "audio"}
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") or name in ("srcset", "background") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert b"url(" not in page and b"@import" not in page
    assert b"content=\"default-src 'none'; img-src data:;" in page
    for attributes in parsed.images:
        head, content = (attributes["src"] or "").split(",")
        assert head == "data:image/png;base64" and attributes["alt"]
        Image.open(io.BytesIO(base64.b64decode(content, validate=True))).load()
    # Six charts, conv1 twice, confusions, ten examples, augmentation.
    assert len(parsed.images) == 6 + 2 + 1 + 10 + 1
    assert all(words in parsed.text for words in HOSTILE) and "a <run> & more" in parsed.text
    assert ["versions", "torch <1> & DALI"] in parsed.rows and "ten-view top-5 accuracy" in parsed.text
    assert 'shards: a "folder" <b>' in parsed.text and "none: null" in parsed.text


def test_classes_and_mistakes_are_those_found(data: ReportData) -> None:
    """Classes from the highest error down, with what they are most often taken for; a mistake's text and its picture's
    description say what it is, what it was taken for and how confidently."""
    parsed = Parsed(render_page(data, IMAGES))
    start = next(place for place, row in enumerate(parsed.rows) if "top-1 error" in row)
    assert [row[1:] for row in parsed.rows[start + 1 : start + 5]] == [
        ["4", "75.0 %", f"{HOSTILE[2]} (2 of 4)"],
        ["2", "50.0 %", f"{HOSTILE[2]} (1 of 2)"],
        ["3", "33.3 %", f"{HOSTILE[1]} (1 of 3)"],
        ["1", "0.0 %", "–"],
    ]
    caption = f"{HOSTILE[3]}, taken for {HOSTILE[2].split(',')[0]} at 59\N{NO-BREAK SPACE}%"
    assert caption in parsed.text and caption in [attributes["alt"] for attributes in parsed.images]


@pytest.mark.filterwarnings("error")
def test_runs_that_lack_something_have_a_page(data: ReportData) -> None:
    """Without rows, with odd ones or one of an older version, without an evaluation, without mistakes or images, with
    one tower, with 1,000 classes: the page has what there is, and its size stays bounded."""
    classes = [ClassName(f"n{number:08d}", f"thing {number}, it") for number in range(1000)]
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    many = make_stats(1000, list(range(500, 530)), [(number, number + 1) for number in range(30)])
    large = replace(data, rows=[], classes=classes, stats=many, restore_pixels=lambda image: noise)
    page = render_page(large, IMAGES)
    parsed = Parsed(page)
    assert len(page) < 3e6 and parsed.ids == SECTIONS and "too short for a row" in parsed.text
    assert len(parsed.images) == 2 + 20 + 1  # neither charts nor confusions
    assert sum("of 1)" in row[-1] for row in parsed.rows if row) == 10

    old = [{"kind": "train", "step": 5, "epoch": 0, "loss": 2.0, "top1_error": 90.0}]
    one_tower = [np.concatenate(data.towers)]
    small = replace(data, rows=old, stats=make_stats(4, [], []), towers=one_tower)
    parsed = Parsed(render_page(small, IMAGES))
    assert parsed.ids == SECTIONS and len(parsed.images) == 2 + 2 + 1 + 1
    assert "No validation image was mistaken" in parsed.text
    assert summarize_speed(old) == [] and draw_png(draw_charts, list(CHARTS), [], 10, 4)

    odd = ["b", [1.0], {}, None, 10**400, -1e300, float("nan"), float("inf")]
    values = [*enumerate(odd), (20, 7.0), (21, 9.0), (22, 8.0), (10**400, 1.0)]
    names = ("loss", "images_per_s", "gpu_memory_gb")
    rows = [{"kind": "train", "epoch": 0, "step": s} | dict.fromkeys(names, value) for s, value in values]
    ((steps, losses),) = read_lines(rows, "Loss").values()
    assert (steps.tolist(), losses.tolist()) == ([20, 21, 22], [7, 9, 8])
    assert [value for _, value in summarize_speed(rows)] == ["8.0 images/s", "9.0 GB"]
    assert len(Parsed(render_page(replace(data, rows=rows), IMAGES)).images) == 20 - 6 + 3


@pytest.mark.browser
def test_page_in_a_browser(data: ReportData, tmp_path: Path) -> None:
    """Hostile names neither run nor widen the page, and an address that leads out is blocked."""
    page = render_page(data, IMAGES).decode()
    leads_out = page.replace("</main>", '</main><img src="http://127.0.0.1:9/x.png">')
    (wide, narrow, other), console = look_at({page: 1280, page + " ": 400, leads_out: 700}, tmp_path)
    for each in (wide, narrow):
        assert each["sections"] == SECTIONS and each["images"] == 20 and not each["broken"]
        assert each["scroll"] <= each["width"] and not each["outside"]
    assert other["broken"] == 1 and len(console.splitlines()) == 1 and "Content Security Policy" in console


def test_saturation_is_the_angle_to_grey() -> None:
    """One colour (r, g, b) has the squared sine of its angle to (1, 1, 1), whatever the strength: 0 for grey, 1 where
    channels cancel, 2/3 for red alone. Zeros have 0."""
    rng = np.random.default_rng(2)
    known = {(1.0, 1.0, 1.0): 0, (1.0, 1.0, -2.0): 1, (1e-20, 0.0, 0.0): 2 / 3}
    for colour in [*known, *map(tuple, rng.normal(size=(20, 3)))]:
        cosine = sum(colour) / np.sqrt(3 * np.square(colour).sum())
        saturations = compute_saturation(rng.normal(size=(5, 1, 11, 11)) * np.reshape(colour, (3, 1, 1)))
        np.testing.assert_allclose(saturations, known.get(colour, 1 - cosine**2), atol=1e-12)
    assert compute_saturation(np.zeros((2, 3, 11, 11))).tolist() == [0, 0]


def test_towers_split_where_colours_were_planted_and_rarely_by_chance() -> None:
    """A grey half and a coloured one split, whichever comes first; of 50 pairs of random towers at most a few do. One
    tower, or kernels too few to compare, are only described."""
    rng = np.random.default_rng(4)
    grey, coloured = rng.normal(0.1, 0.1, 24), rng.normal(0.8, 0.1, 24)
    for towers in ([grey, coloured], [coloured, grey]):
        means = f"{towers[0].mean():.3f} in tower 0, {towers[1].mean():.3f} in tower 1. The towers split"
        assert means in describe_towers(towers)
    by_chance = [describe_towers(rng.random((2, 16))) for _ in range(50)]
    assert sum("towers split" in text for text in by_chance) <= 3
    for shape in ((1, 7), (2, 1)):
        assert "split" not in describe_towers(rng.random(shape))
