"""Damage to files, drawn from a seeded generator: bytes, texts, JSON trees, YAML and tar headers.

Every function takes a `random.Random` and something sound, and gives something that may not be. Nothing here knows a
reader: which of it is refused, and how, is for tests/test_fuzz.py to see.

Longer than others: nearly half of it is tables of odd values.
"""

import copy
import io
import json
import random
import re
import tarfile
from typing import Any

NUMBERS = (
    -(2**63) - 1,
    -(2**31),
    -1,
    0,
    1,
    2,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**32,
    2**40,
    2**63 - 1,
    2**64,
    10**30,
)
NAMES = (
    *(
        "../../escape",
        "../escape.tar",
        "/absolute",
        "a/../../escape",
        ".",
        "..",
        "",
        "a\nb",
        "\x1b[31mred",
        "\x00",
        "CON",
    ),
    *(
        "%s%n",
        "${HOME}",
        "`id`",
        "$(id)",
        "n" * 300,
        "\udc80",
        "\N{SNOWMAN}.tar",
        "train-000000.tar",
        "-rf",
        "a b",
        "~",
    ),
)
"""For files: out of their folder, no names at all, too long, with what a terminal or a shell would act on."""
TREES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        [],
        {},
        "",
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
        "NaN",
        "1",
        [1, [2]],
        {"a": 1},
    ),
    *NUMBERS,
    *NAMES,
)
"""For JSON: other types, extremes."""
YAML_VALUES = (
    *(
        "1:30",
        "1:30:15.5",
        "010",
        "0o17",
        "0x1f",
        ".nan",
        "-.inf",
        "1e400",
        "9" * 400,
        "~",
        "null",
        "yes",
        "2001-01-01",
    ),
    *(
        "&a [*a]",
        "&a {b: *a}",
        "*nobody",
        "<<",
        "{<<: 5}",
        "!!python/object/apply:os.system [id]",
        "!!binary gA==",
        "!!set",
    ),
    *(
        "[1, 2",
        "{",
        "'",
        '"\\x"',
        "|",
        ">",
        "- - -",
        "? ?",
        "!!float abc",
        "!!int x",
        "!x y",
        "%TAG",
        "---",
        "...",
        "@",
    ),
    *(
        "[" * 3000,
        "{a: " * 300,
        "x" * 100_000,
        "../../x",
        "/etc/x",
        "1_000",
        "+1",
        "1.",
        "-0",
        "0b12",
        "\t5",
        "#",
        "a: b: c",
    ),
    *(
        "{lr: 1, lr: 2}",
        "{? [1]: 2}",
        "!!timestamp 5",
        "!!merge x",
        "!!omap [a]",
        "!!null x",
        "!!bool 5",
        "&a",
        "*",
        "1e3",
    ),
)
YAML_LINES = (
    "<<: {train: {seed: 3}}",
    "<<: [{train: 5}, {optimizer: 3}]",
    "base: &base {lr: 3}\noptimizer:\n  <<: *base",
    "train: &t {<<: *t}",
    "data: &d\n  augmentation: *d",
    "model: &m [*m]",
    "a: &a [x, x, x, x, x, x, x, x]\n"
    + "\n".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "? {a: b}\n: c",
    "--- {}",
    "--config: x",
    "config: other.yaml",
    "optimizer.lr: 1",
    "optimizer: ../../x.yaml",
    "print_shtab: bash",
    "help: true",
    "data: {shards: {}}",
)
JSON_TEXTS = (
    b"",
    b"null",
    b"5",
    b'"x"',
    b"[]",
    b"{}",
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
)
JSON_TEXTS += (
    b"9" * 5000,
    b"-",
    b"NaN",
    b"{" + b'"a": 1,' * 1000 + b'"a": 1}',
    b'"\\ud800"',
    b'{"\\u0000": 1}',
    b"\0" * 100,
)


def mutate_bytes(rng: random.Random, data: bytes, most: int = 6) -> bytes:
    """One to `most` changes: bits, bytes, integer fields, slices."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at, length = rng.randrange(len(out) + 1), min(rng.choice((1, 2, 4, 8, 64, 1000)), len(out))
        end = min(len(out), at + length)
        match rng.randrange(9):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[min(at, len(out) - 1)] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
            case 2:
                del out[at:]
            case 3:
                out[at:at] = rng.randbytes(length)
            case 4:
                out[at:at] = out[at:end]
            case 5:
                del out[at:end]
            case 6:
                out[at:end] = bytes(end - at)
            case 7:
                size = rng.choice((1, 2, 4, 8))
                out[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(
                    size, rng.choice(("big", "little"))
                )
            case _:
                other = rng.randrange(len(out) + 1)
                out[at:end] = out[other : other + length]
    return bytes(out)


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything in a tree."""
    found: list[tuple[Any, Any]] = []
    inner: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        inner = list(tree.items())
    elif isinstance(tree, list):
        inner = list(enumerate(tree))
    for key, value in inner:
        found += [(tree, key), *nodes(value)]
    return found


def mutate_tree(rng: random.Random, tree: Any, most: int = 2) -> Any:
    """A copy of plain values (dicts, lists, numbers, texts) with one to `most` of them changed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, most)):
        if not (places := nodes(tree)):
            return rng.choice(TREES)
        container, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            case 1:
                container[rng.choice(NAMES)] = container.pop(key)
            case 2 if isinstance(container[key], int | float) and not isinstance(container[key], bool):
                container[key] = rng.choice(
                    (container[key] + 1, -container[key], container[key] * 2**40, float(container[key]))
                )
            case 2 if isinstance(container[key], str):
                container[key] = rng.choice(
                    (container[key] + "x", container[key][:-1], rng.choice(NAMES) + container[key])
                )
            case 3:
                for _ in range(rng.choice((1, 30, 200))):
                    container[key] = [container[key]] if rng.random() < 0.5 else {"x": container[key]}
            case 4:
                other, name = rng.choice(places)
                container[key] = (
                    copy.deepcopy(other[name]) if isinstance(name, int) and name < len(other) else None
                )
            case _:
                container[key] = copy.deepcopy(rng.choice(TREES))
    return tree


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON file with other values, or other bytes."""
    draw = rng.random()
    if draw < 0.05:
        return rng.choice(JSON_TEXTS)
    if draw < 0.3:
        return mutate_bytes(rng, content)
    text = json.dumps(mutate_tree(rng, json.loads(content)))
    if draw < 0.4 and text.startswith("{"):
        text = text[:-1] + f", {json.dumps(rng.choice(NAMES))}: 1" * 2 + "}"
    return text.encode(errors="surrogatepass")


def mutate_text(rng: random.Random, content: bytes, values: tuple[Any, ...] = TREES, most: int = 2) -> bytes:
    """A text of lines and words with one to `most` of them changed."""
    text = content.decode(errors="surrogateescape")
    if rng.random() < 0.2:
        return mutate_bytes(rng, content)
    for _ in range(rng.randint(1, most)):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        words = re.split(r"([\s,]+)", lines[at])
        match rng.randrange(6):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, lines[at])
            case 2:
                other = rng.randrange(len(lines))
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines[at] = rng.choice(
                    ("", " ", "\t" + lines[at], lines[at] + " ", lines[at] * 50, "\0", "\r", "\u2028")
                )
            case _:
                words[rng.randrange(0, len(words), 2)] = str(rng.choice(values))
                lines[at] = "".join(words)
        text = "\n".join(lines)
    return text.encode(errors="surrogateescape") if text.isprintable() else text.encode("utf-8", "replace")


def mutate_yaml(rng: random.Random, content: bytes) -> bytes:
    """A YAML file of sections with odd values, lines and bytes."""
    draw = rng.random()
    if draw < 0.15:
        return mutate_bytes(rng, content)
    lines = content.decode().split("\n")
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(lines))
        if rng.random() < 0.25:
            lines.insert(at, rng.choice(YAML_LINES))
        elif ":" in lines[at]:
            lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(YAML_VALUES)
        else:
            lines[at] = rng.choice(YAML_VALUES)
    return "\n".join(lines).encode()


FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "link": (157, 100),
}
FIELDS |= {"magic": (257, 8), "prefix": (345, 155)}
SIZES = (
    b"0" * 11,
    b"7" * 11,
    b"-0000000001",
    b"99999999999",
    b"",
    b"\x80" + b"\0" * 10 + b"\xff",
    b"\xff" * 12,
    b"00000001000",
)


def mutate_tar(rng: random.Random, data: bytes) -> bytes:
    """A tar with other header fields and sound checksums, with members of other kinds, or with other bytes."""
    draw = rng.random()
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if draw < 0.25 or not headers:
        return mutate_bytes(rng, data)
    at = rng.choice(headers)
    if draw < 0.45:
        info = tarfile.TarInfo(rng.choice(NAMES) or "x")
        info.type = rng.choice(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.REGTYPE, b"S", b"z")
        )
        info.linkname, info.size = rng.choice(NAMES) or "x", 0
        return data[:at] + info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape") + data[at:]
    if draw < 0.65:
        key = rng.choice(
            ("path", "size", "linkpath", "hdrcharset", "mtime", "GNU.sparse.size", "GNU.sparse.map", "uid")
        )
        value = str(rng.choice((*NUMBERS, *NAMES, "1,2,3", "0,99999999999999"))).encode(
            errors="surrogateescape"
        )
        record = b" " + key.encode() + b"=" + value + b"\n"
        length = rng.choice((len(record) + len(str(len(record) + 3)), 0, 5, 10**9, len(record) + 2))
        return (
            data[:at] + pax(str(length).encode() + record, rng.choice((b"x", b"g", b"L", b"K"))) + data[at:]
        )
    header = bytearray(data[at : at + 512])
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(("name", "size", "size", "type", *FIELDS))
        start, length = FIELDS[name]
        value = {
            "size": rng.choice(SIZES),
            "type": rng.choice(
                (b"0", b"\0", b"1", b"2", b"5", b"x", b"g", b"L", b"K", b"S", b"7", b"V", b"\xff")
            ),
            "magic": rng.choice((b"ustar  \0", b"\0" * 8, b"ustar\x0000")),
        }.get(name, rng.choice(NAMES).encode(errors="surrogateescape"))
        header[start : start + length] = value[:length].ljust(length, b"\0")
    return data[:at] + checksummed(header) + data[at + 512 :]


def pax(content: bytes, kind: bytes) -> bytes:
    """A header of extended attributes (POSIX) or of a long name (GNU), with its content."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def checksummed(header: bytearray) -> bytes:
    """A header with the checksum that it should have."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def make_tar(members: dict[str, bytes]) -> bytes:
    """A plain tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()
