"""The plan: each image once, under a key of its own, in an order and shards that are a function of names and seed."""

import hashlib
import re
from collections import Counter
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
@example(["a.JPEG", "b.c.JPEG", "x/dup.JPEG", "y/dup.JPEG", "ü.JPEG", "l" * 80 + ".JPEG"], 3, 2012)
def test_any_list_of_images(names: list[str], samples_per_shard: int, seed: int) -> None:
    """Each image once; keys unique and safe, stems where they are unique and safe, else <class>_<position>; shard sizes
    within one; the order is that of blake2b(seed:key)."""
    options = Options(samples_per_shard=samples_per_shard, seed=seed)
    plan = make_plan(Path("train"), listing_of(names), options, CLASSES)
    shards = [plan.shard(number).samples for number in range(plan.num_shards)]
    samples = [sample for shard in shards for sample in shard]
    assert sorted(image.name for _, image in samples) == sorted(names)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) <= samples_per_shard and max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-len(names) // samples_per_shard)
    keys = [key for key, _ in samples]
    assert len(set(keys)) == len(keys) and all(re.fullmatch(r"[A-Za-z0-9_-]{1,79}", key) for key in keys)
    hashes = [hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest() for key in keys]
    assert hashes == sorted(hashes)
    stems = Counter(name.split("/")[-1].rsplit(".", 1)[0] for name in names)
    renamed = dict(plan.renamed_keys())
    for key, image in samples:
        stem = image.name.split("/")[-1].rsplit(".", 1)[0]
        if key in renamed:
            assert names[int(key.removeprefix(f"{image.label}_"))] == image.name
            assert renamed[key] == image.escaped_name
            # A safe stem is replaced only where it may be another file's <class>_<position>.
            assert stems[stem] > 1 or not re.fullmatch(r"[A-Za-z0-9_-]{1,79}", stem) or "_" in stem
        else:
            assert key == stem


def test_the_digest_names_the_content() -> None:
    """Another image, label, size, option, class or split gives another digest; where the data lies and on_bad do
    not."""

    def digest(listing: Listing, directory: str = "train", words: str = "two", **options: object) -> str:
        classes = (CLASSES[0], ClassName("n00000002", words))
        return make_plan(Path(directory), listing, Options(**options), classes).digest  # type: ignore[arg-type]

    listing = listing_of(["a.JPEG", "b.JPEG", "c.JPEG"])
    first = digest(listing)
    assert digest(listing, "/other/train", on_bad="skip") == first
    others = {digest(listing, "val"), digest(listing, words="deux"), digest(listing_of(["a.JPEG", "b.JPEG"]))}
    for options in ({"quality": 91}, {"seed": 1}, {"samples_per_shard": 2}, {"store": "original"}):
        others.add(digest(listing, **options))  # type: ignore[arg-type]
    for column in ("label", "size", "offset"):
        changed = listing_of(["a.JPEG", "b.JPEG", "c.JPEG"])
        getattr(changed, column)[1] = 512
        others.add(digest(changed))
    assert len(others) == 10 and first not in others


@pytest.mark.parametrize(
    ("name", "value"), [("samples_per_shard", 0), ("quality", 101), ("val_fraction", 1.1)]
)
def test_options_that_make_no_sense(name: str, value: object) -> None:
    """Each is refused by name."""
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
        Options(**{name: value})  # type: ignore[arg-type]
