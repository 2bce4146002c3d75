"""The page of a run tells all of it, whatever the run lacks and whatever its classes are called, and needs nothing but
itself."""

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
from train.charts import figures_of, png_of
from train.page import Story, build_page, colours_told
from train.report import speed_of, summary

HOSTILE = [
    '</td></table><script>document.title = "taken"</script>',
    "<img src=http://example.com/x.png>, other words",
    "\"quoted\" & 'quoted' &amp; $\\frac{$",
    "a-very-long-word-without-any-space-" * 6,
]
SECTIONS = ["what", "learning-and-speed", "first-layer", "hardest-classes", "surest-mistakes", "augmentation"]
SECTIONS += ["configuration"]


def found_by(classes: int, right: list[int], wrong: list[tuple[int, int]]) -> EvalStats:
    """EvalStats from images that are recognized, and from (label, guess) that are not."""
    findings = EvalStats(classes, torch.device("cpu"))
    pairs = [(label, label) for label in right] + wrong
    scores = torch.full((len(pairs), classes), 0.1 / classes)
    for row, (_, guess) in enumerate(pairs):
        scores[row, guess] = 0.5 + 0.01 * row
    if pairs:
        labels = torch.tensor([label for label, _ in pairs])
        findings.see(torch.zeros(len(pairs), 3, 256, 256), labels, scores)
    return findings


@pytest.fixture
def story() -> Story:
    """A run with every figure, two towers, and four classes with hostile names."""
    rng = np.random.default_rng(0)
    train = {"kind": "train", "loss": 2.0, "top1_error": 80.0, "images_per_s": 100.0, "wait_percent": 1.0}
    train |= {"step_ms_p50": 30.0, "saving_step_ms_p50": 31.0}
    evals = {"kind": "eval", "centre_top1_error": 60.0, "centre_top5_error": 20.0, "eval_s": 3.0}
    blank = png_of(lambda figure: None)
    return Story(
        name="a <run> & more",
        summary=summary(Accuracy(100, 40.0, 80.0, "ten-view", 42.5, 82.0), 2, 20, 640),
        accuracy=[("centre top-1 accuracy", "40.0 %")],
        facts=[("versions", "torch <1> & DALI")],
        rows=[{**train, "step": step, "epoch": step // 10} for step in (5, 10, 15, 20)]
        + [{**evals, "step": step, "epoch": step // 10} for step in (10, 20)],
        steps_per_epoch=10,
        classes=[ClassName(f"n{number}", words) for number, words in enumerate(HOSTILE)],
        findings=found_by(4, [0, 0, 1, 2, 3], [(0, 1), (1, 2), (1, 2), (1, 3), (3, 2)]),
        pixels=lambda example: np.full((256, 256, 3), 90, np.uint8),
        conv1=rng.normal(size=(16, 3, 11, 11)),
        towers=2,
        kernels=blank,
        augmentation=blank,
        config={
            "data": {"shards": 'a "folder" <b>', "more": {"std": 1.0, "none": None}},
            "model": {"maps": [1, 2]},
        },
    )


class Parsed(HTMLParser):
    """What a browser would find: tags with their attributes, and the text of each table row."""

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


def test_whole_and_alone(story: Story) -> None:
    """Every section is there; every picture is inside, whole and described; no address leads out, nothing runs, and
    hostile names are text."""
    page = build_page(story)
    parsed = Parsed(page)
    assert parsed.ids == SECTIONS
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base", "video", "audio"}
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") or name in ("srcset", "background") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not any(other in page for other in (b"url(", b"@import"))
    assert b"content=\"default-src 'none'; img-src data:;" in page
    for attributes in parsed.images:
        head, data = (attributes["src"] or "").split(",")
        assert head == "data:image/png;base64" and attributes["alt"]
        Image.open(io.BytesIO(base64.b64decode(data, validate=True))).load()
    # Six charts, conv1 twice, confusions, ten examples, augmentation.
    assert len(parsed.images) == 6 + 2 + 1 + 10 + 1
    assert all(words in parsed.text for words in HOSTILE) and "a <run> & more" in parsed.text
    assert (
        ["shards", 'a "folder" <b>'] in parsed.rows
        and ["none", "null"] in parsed.rows
        and "data.more" in parsed.text
    )
    assert "ten-view 42.5 % top-1, 82.0 % top-5; after 2 epochs, 20 steps, 640 images." in parsed.text


def test_hardest_classes(story: Story) -> None:
    """Classes from the highest error down, with what they are most often taken for; a mistake's text and its picture's
    name say what it is, what it was taken for and how surely."""
    parsed = Parsed(build_page(story))
    start = next(place for place, row in enumerate(parsed.rows) if "top-1 error" in row)
    assert [row[1:] for row in parsed.rows[start + 1 : start + 5]] == [
        ["4", "75.0 %", f"{HOSTILE[2]} (2 of 4)"],
        ["2", "50.0 %", f"{HOSTILE[2]} (1 of 2)"],
        ["3", "33.3 %", f"{HOSTILE[1]} (1 of 3)"],
        ["1", "0.0 %", "–"],
    ]
    told = f"{HOSTILE[3]}, taken for {HOSTILE[2].split(',')[0]} at 59\N{NO-BREAK SPACE}%"
    assert told in parsed.text and told in [attributes["alt"] for attributes in parsed.images]


def test_runs_that_lack_something(story: Story) -> None:
    """Without rows, with one row of an older version, without an evaluation, without mistakes or images, with one
    tower, with 1,000 classes: the page has what there is, and its size stays bounded."""
    classes = [ClassName(f"n{number:08d}", f"thing {number}, it") for number in range(1000)]
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    many = found_by(1000, list(range(500, 530)), [(number, number + 1) for number in range(30)])
    large = build_page(replace(story, rows=[], classes=classes, findings=many, pixels=lambda example: noise))
    parsed = Parsed(large)
    assert len(large) < 3e6 and parsed.ids == SECTIONS and "too short for a row" in parsed.text
    assert len(parsed.images) == 2 + 20 + 1  # neither charts nor confusions
    assert sum("of 1)" in row[-1] for row in parsed.rows if row) == 10

    old = [{"kind": "train", "step": 5, "epoch": 0, "loss": 2.0, "top1_error": 90.0}]
    parsed = Parsed(build_page(replace(story, rows=old, findings=found_by(4, [], []), towers=1)))
    assert parsed.ids == [each for each in SECTIONS if each != "hardest-classes"]
    assert len(parsed.images) == 2 + 2 + 1 and "No validation image was mistaken" in parsed.text
    assert not any(attributes.get("href") == "#hardest-classes" for _, attributes in parsed.tags)
    assert "one tower" in parsed.text and speed_of(old) == [] == speed_of([])
    memory = [{**old[0], "gpu_memory_gb": value} for value in (1.0, 3.0)]
    assert speed_of(memory) == [("GPU memory, at most", "3.0 GB")]


def test_figures_that_are_none(story: Story) -> None:
    """A row with a text, a list or a number without end in a figure's place, or with a step beyond all bounds, costs no
    other its place in tables and charts."""
    names = ("loss", "top1_error", "images_per_s", "wait_percent", "gpu_memory_gb")
    odd = ["b", "12", [1.0], {}, 10**400, -1e300, float("nan"), float("inf")]
    rows = [
        {"kind": "train", "step": step, "epoch": 0, **dict.fromkeys(names, value)}
        for step, value in enumerate(odd)
    ]
    rows += [{**rows[0], "step": step, **dict.fromkeys(names, 7.0)} for step in (20, 10**400)]
    steps, values = figures_of(rows, "train", "loss")
    assert (steps.tolist(), values.tolist()) == ([20], [7])
    assert ("GPU memory, at most", "7.0 GB") in speed_of(rows)
    assert "Median over the rows: 7 images/s" in Parsed(build_page(replace(story, rows=rows))).text


def test_colours_are_told(story: Story) -> None:
    """The grey tower comes first, and a split is claimed where colours were planted and nowhere else."""
    rng = np.random.default_rng(1)
    grey, coloured = rng.normal(size=(24, 1, 11, 11)).repeat(3, 1), rng.normal(size=(24, 3, 11, 11))
    told = colours_told(np.concatenate([coloured, grey]), 2)
    assert "0.000 in tower 1 and 0.6" in told and "tower 1 is the grey one, tower 0 the colourful one" in told
    assert "do not split" in colours_told(story.conv1, 2)
    assert "the control" in colours_told(story.conv1, 1) and "split by" not in colours_told(story.conv1, 1)


@pytest.mark.browser
def test_in_a_browser(story: Story, tmp_path: Path) -> None:
    """Hostile names neither run nor widen the page; a page that is broken is seen to be."""
    page = build_page(story).decode()
    wide_image = '<img src="data:image/png;base64,AAAA"><p style="max-width:none;width:900px">wide'
    broken = page.replace("<main>", f"<main>{wide_image}")
    broken = broken.replace("</main>", '</main><img src="http://127.0.0.1:9/x.png">')
    (wide, narrow, ruined), console = look_at({page: 1280, page + " ": 400, broken: 700}, tmp_path)
    for each in (wide, narrow):
        assert each["sections"] == SECTIONS and each["images"] == 20 and not each["broken"]
        assert each["scroll"] <= each["width"] and not each["outside"]
    assert ruined["broken"] == 2 and ruined["scroll"] > 700 and ruined["outside"]
    assert (
        "Content Security Policy" in console and "127.0.0.1:9" in console and len(console.splitlines()) == 1
    )
