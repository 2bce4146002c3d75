"""Raw images in the parquet files of a Hugging Face data set (`imagenet-1k`): columns `image: {bytes, path}`, `label`.

A parquet file can be read cheaply in its own order only, so such a source is always packed by `sequential.py`.
`pyarrow` is an extra: nothing else here needs it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.shards import MAX_LABEL_DIGITS, ClassName
from tools.packing.listing import Listing, RawImageNet

WNID = re.compile(r"(?<![a-z0-9])n\d{8}(?!\d)")
COLUMNS = {"image.bytes", "image.path", "label"}


def import_pyarrow() -> ModuleType:
    """`pyarrow.parquet`. Raises `ValueError` that tells how to get it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("parquet files need pyarrow, which is not installed here; run pip install pyarrow") from None
    return pyarrow.parquet


def find_parquet(raw: Path) -> dict[str, list[Path]]:
    """The parquet files of each split, in `raw` or `raw/data`, by the names that Hugging Face gives; test files have
    no labels and are left aside.

    Raises `FileNotFoundError` for a missing part and `ValueError` for one that is there twice.
    """
    paths = sorted(raw.glob("*.parquet")) or sorted(raw.glob("data/*.parquet"))
    parts: dict[tuple[str, str], dict[int, Path]] = {}
    for path in paths:
        if match := re.match(r"(.*)-(\d+)-of-(\d{1,6})(?!\d)", path.name):
            first = parts.setdefault((match[1], match[3]), {}).setdefault(int(match[2]), path)
            if first != path:  # the Hub keeps the files of earlier pushes, whose names end in another hash
                raise ValueError(f"{path} and {first.name} are the same part of one set; keep the files of one push")
    for (name, number), there in parts.items():
        if missing := sorted(set(range(int(number))) - set(there)):
            raise FileNotFoundError(f"{raw} lacks {name}-{missing[0]:0{len(number)}}-of-{number}; fetch it as well")
    found = {split: [path for path in paths if path.name.startswith(split)] for split in ("train", "val")}
    for files in found.values():
        sets = {re.sub(r"[-_]?\d+(-of-\d+)?(-\w+)?$", r"\1", path.stem): path for path in files}
        if len(sets) > 1:
            first, second, *_ = sorted(sets.values())
            raise ValueError(f"{first} and {second.name} are of two sets, or two pushes of one; keep the files of one")
    return found


def read_parquet(raw: Path, files: dict[str, list[Path]]) -> RawImageNet:
    """List parquet files: labels and names alone are read.

    Raises `ValueError` for files of another form and labels that are no class.
    """
    parquet = import_pyarrow()
    splits: dict[str, Listing] = {}
    wnids: dict[int, set[str]] = {}
    words: list[str] = []
    for split, paths in files.items():
        if not paths:
            continue
        listing = splits[split] = Listing(raw)
        for path in paths:
            archive = listing.add_file(path)
            try:
                source = parquet.ParquetFile(path)
                columns = {source.schema.column(k).path for k in range(len(source.schema))}
                if not columns >= COLUMNS:
                    raise ValueError(f"it lacks the columns {', '.join(sorted(COLUMNS - columns))}")
                image = source.schema_arrow.field("image").type
                if (kind := str(image.field("bytes").type)) not in ("binary", "large_binary"):
                    raise ValueError(f"its column image.bytes is of type {kind}, not binary")
                table = source.read(columns=["image.path", "label"])
                metadata = json.loads((source.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            except Exception as error:  # pyarrow raises several kinds over damaged bytes
                reason = " ".join(str(error).split())
                raise ValueError(f"{path} is no data set of images and labels ({reason}); fetch it again") from None
            words = class_words(metadata) or words
            names = table.column("image").combine_chunks().field("path").to_pylist()
            for row, (name, label) in enumerate(zip(names, table.column("label").to_pylist(), strict=True)):
                if not isinstance(label, int) or not 0 <= label < 10**MAX_LABEL_DIGITS:
                    raise ValueError(f"{path} labels row {row} as {label}, which is no class; fetch it again")
                listing.append(archive, name or f"{path.stem}_{row}", row, 0, label)
                wnids.setdefault(label, set()).update(WNID.findall(name or ""))
    if "train" not in splits or not all(splits.values()):
        raise ValueError(f"{raw} holds no images in parquet files called train-*; fetch them again")
    return RawImageNet("Hugging Face parquet files", class_names(wnids, words), splits, sequential=True)


def class_words(metadata: Any) -> list[str]:
    """What Hugging Face's description of a data set calls the classes; empty where it does not tell."""
    for name in ("info", "features", "label", "names"):
        metadata = metadata.get(name) if isinstance(metadata, dict) else None
    return [str(each) for each in metadata] if isinstance(metadata, list) else []


def class_names(wnids: dict[int, set[str]], words: list[str]) -> tuple[ClassName, ...]:
    """Classes in the order of the labels: by the wnid that all file names of a label share, if that gives sorted
    wnids, else by the number."""
    number = max(max(wnids) + 1, len(words))
    shown = words if len(words) == number else [f"class {label}" for label in range(number)]
    found = [wnids.get(label, set()) for label in range(number)]
    if all(len(names) == 1 for names in found):
        names = [next(iter(names)) for names in found]
        if names == sorted(set(names)):
            return tuple(ClassName(wnid, text) for wnid, text in zip(names, shown, strict=True))
    return tuple(ClassName(f"{label:06d}", text) for label, text in enumerate(shown))


def rows_of(path: Path, group: int) -> Iterator[bytes]:
    """The images of one row group, in order; an empty one for a row without bytes. Raises `ValueError`."""
    try:
        source = import_pyarrow().ParquetFile(path, buffer_size=2**20)
        for batch in source.iter_batches(batch_size=32, row_groups=[group], columns=["image.bytes"]):
            for image in batch.column("image").field("bytes"):
                yield image.as_py() or b""
    except OSError as error:  # of pyarrow's decoders, too
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged in row group {group} ({reason}); fetch it again") from None


def row_groups(path: Path) -> list[int]:
    """Rows in each row group."""
    metadata = import_pyarrow().ParquetFile(path).metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
