"""The plan: each image once, under a key of its own, in an order and shards that are a function of names and seed."""

import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.shards import ClassName
from tools.packing.listing import Listing
from tools.packing.plan import Options, make_plan

CLASSES = (ClassName("n00000001", "one"), ClassName("n00000002", "two"))
NAMES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
    st.from_regex(r"(x/)?[ab0-3_.-]{1,4}\.JPE?G", fullmatch=True),
    st.from_regex(r"[01]_[0-9]\.JPEG", fullmatch=True),
)


def listing_of(names: list[str]) -> Listing:
    """A listing of these names; labels 0 and 1 in turn."""
    listing = Listing(Path("raw"))
    for row, name in enumerate(names):
        listing.append(-1, name, 0, 1, row % 2)
    return listing


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 3))
@example(["0_1.JPEG", "a b.JPEG", "1_1.JPEG", "a b.JPEG"], 2, 0)
def test_any_list_of_images(names: list[str], samples_per_shard: int, seed: int) -> None:
    """Each image once; keys unique and safe; shard sizes within one; the order is that of blake2b(seed:key)."""
    plan = make_plan(
        Path("train"), listing_of(names), Options(samples_per_shard=samples_per_shard, seed=seed), CLASSES
    )
    shards = [plan.shard(number).samples for number in range(plan.num_shards)]
    samples = [sample for shard in shards for sample in shard]
    assert sorted(image.name for _, image in samples) == sorted(names)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) <= samples_per_shard and max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-len(names) // samples_per_shard)
    keys = [key for key, _ in samples]
    assert len(set(keys)) == len(keys) and all(re.fullmatch(r"[A-Za-z0-9_-]{1,79}", key) for key in keys)
    assert keys == sorted(
        keys, key=lambda key: hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()
    )
    renamed = dict(plan.renamed_keys())
    for key, image in samples:
        assert (
            key == (re.sub(r"\.[^.]*$", "", image.name.split("/")[-1])) or renamed[key] == image.escaped_name
        )


def test_keys() -> None:
    """Stems are keys where they are unique and safe; every other name becomes <class>_<position>."""
    names = ["a.JPEG", "b.c.JPEG", "x/dup.JPEG", "y/dup.JPEG", "sp ace.JPEG", "ü.JPEG", "l" * 80 + ".JPEG"]
    plan = make_plan(Path("train"), listing_of(names), Options(samples_per_shard=3), CLASSES)
    keys = {image.name: key for number in range(3) for key, image in plan.shard(number).samples}
    assert keys == {names[0]: "a", **{name: f"{n % 2}_{n}" for n, name in enumerate(names) if n}}
    assert dict(plan.renamed_keys()) == {f"{n % 2}_{n}": name for n, name in enumerate(names) if n}


def test_the_digest_names_the_content() -> None:
    """Another image, label, size, option, seed or split gives another digest; where the data lies and on_bad do not."""
    names = ["a.JPEG", "b.JPEG", "c.JPEG"]
    first = make_plan(Path("train"), listing_of(names), Options(), CLASSES).digest
    assert make_plan(Path("/other/train"), listing_of(names), Options(on_bad="skip"), CLASSES).digest == first
    renamed = (CLASSES[0], ClassName("n00000002", "deux"))
    others = {make_plan(Path("train"), listing_of(names), Options(), renamed).digest}
    others |= {make_plan(Path("val"), listing_of(names), Options(), CLASSES).digest}
    for options in (
        Options(quality=91),
        Options(seed=1),
        Options(samples_per_shard=2),
        Options(store="original"),
    ):
        others.add(make_plan(Path("train"), listing_of(names), options, CLASSES).digest)
    for column, value in (("label", 5), ("size", 9), ("offset", 512)):
        listing = listing_of(names)
        getattr(listing, column)[1] = value
        others.add(make_plan(Path("train"), listing, Options(), CLASSES).digest)
    others.add(
        make_plan(Path("train"), listing_of(["a.JPEG", "b.JPEG", "d.JPEG"]), Options(), CLASSES).digest
    )
    assert len(others) == 10 and first not in others


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 0}, "--samples-per-shard"),
        ({"quality": 101}, "--quality"),
        ({"val_fraction": 1.0}, "--val-fraction"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    """Each is refused by name."""
    with pytest.raises(ValueError, match=message):
        Options(**options)  # type: ignore[arg-type]
