"""Valid files turned into bad ones, with a knowledge of their structure. For tools/fuzz.py.

Every function takes a generator and valid contents (seeds), and returns one mutated content.
"""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
import zlib
from copy import deepcopy

LAUGHS = (
    b'<!DOCTYPE a [<!ENTITY a "ha">'
    + b"".join(b'<!ENTITY %c "%s">' % (ord("b") + i, b"&%c;" % (ord("a") + i) * 10) for i in range(9))
    + b"]>"
)
NUMBERS = (
    *b"0 -1 1 2 3 -0.0 0.5 1.5 640 512 1e5 1e308 1e400 -1e400 1e-400 nan -nan inf -inf NaN".split(),
    *b"Infinity -Infinity 2147483648 9223372036854775808 18446744073709551616 0x10 1_0".split(),
    b"9" * 400,
    b"9" * 5000,
    "٣".encode(),
    "１".encode(),
)
LONGEST = 200_000  # bytes of an input
WORDS = (
    *NUMBERS,
    b"",
    b" ",
    b"\t",
    b"\n",
    b"\r\n",
    b"\r",
    b"\0",
    b"\x0b",
    b"\x1c",
    b"\x85",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    "\u2028é😀".encode(),
    b"%",
    b"%s{}",
    b"'",
    b'"',
    b"\\",
    b"\\ud800",
    b",",
    b";",
    b"#",
    b"-",
    b"../../x",
    b"/dev/null",
    b"true",
    b"null",
    b"person",
    b"A" * 70_000,
    b"1 " * 5000,
    b"1," * 5000,
)
JSON_WORDS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b"[" * 3000,
    b"[" * 100_000,
    b'{"a":' * 3000,
    b":",
    b"//",
    b'"image_id"',
    b'"id"',
    b'"bbox"',
)
XML_WORDS = (
    b"<",
    b">",
    b"</",
    b"<object>",
    b"</object>",
    b"<name>",
    b"<bndbox>",
    b"<a>" * 3000,
    b"&a;",
    b"<a>" * 100_000,
    LAUGHS,
    b"&i;",
    b"&lt;",
    b"&#0;",
    b"&#x110000;",
    b"<![CDATA[",
    b"]]>",
    b"<!--",
    b"-->",
    b'<!DOCTYPE a SYSTEM "file:///etc/passwd">',
    b"<?xml version='1.0'?>",
    b'<?xml version="1.0" encoding="utf-16"?>',
    b'<?xml version="1.0" encoding="klingon"?>',
    b"xmlns:a='b'",
    b"<a:object/>",
)
JSON_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2.5,
    10**30,
    -(10**30),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "set06/V000/I00001",
    "\ud800",
    "\0",
    [],
    {},
    [[]],
    [1],
    [1, 2, 3, 4],
    {"id": 1},
    "NINES",
    "DEEP",
    "E400",
)
UNWRITABLE = {'"NINES"': "9" * 5000, '"DEEP"': "[" * 2000 + "]" * 2000, '"E400"': "1e400"}


def mutate_bytes(rng: random.Random, seeds: list[bytes], data: bytes | None = None) -> bytes:
    """A seed with one to four damages that know nothing of its structure."""
    data = bytearray(rng.choice(seeds) if data is None else data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 16, 200)))
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:end] = rng.randbytes(end - at)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end] * rng.choice((1, 2, 50))
            case 4:
                del data[at:]
            case 5:
                data[at:end] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff"))
            case 6:
                other = rng.choice(seeds)
                data[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(data)


def mutate_text(rng: random.Random, seeds: list[bytes], words: tuple, data: bytes = b"") -> bytes:
    """A seed whose words and lines are replaced, repeated, dropped or swapped."""
    data = data or rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 3))):
        spans = [match.span() for match in re.finditer(rb"[^\s,<>\":{}\[\]]+", data[:4000])]
        start, end = rng.choice(spans) if spans else (0, 0)
        lines = data.split(b"\n")
        line = rng.randrange(len(lines))
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                data = data[:start] + rng.choice(words) + data[end:]
            case 4:
                data = data[:start] + rng.choice(words) + data[start:]
            case 5:
                data = data[:start] + data[end:]
            case 6:
                lines[line] = b"\n".join([lines[line]] * rng.choice((2, 2, 2, 300)))
                data = b"\n".join(lines)
            case 7:
                del lines[line]
                data = b"\n".join(lines)
            case 8:
                old, new = rng.choice(("\n \r\n", "\n \r", "\n \0", ", ;", "0 \0")).split(" ")
                data = data.replace(old.encode(), new.encode())
            case 9:
                data = mutate_bytes(rng, seeds, data)
    if rng.random() < 0.02:
        data = data.decode("latin-1").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    return data[:LONGEST]


def mutate_json(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A JSON with values of wrong types, without keys, with repeated ones; or its text mutated."""
    data = rng.choice(seeds)
    if rng.random() < 0.3:
        return mutate_text(rng, seeds, WORDS + JSON_WORDS, data)
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place, key = content, None
        while isinstance(place, dict | list) and place:
            parent = place
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            place = place[key]
            if rng.random() < 0.2:
                break
        if key is None:
            content = rng.choice(JSON_VALUES)
            break
        match rng.randrange(6):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, list):
                parent.insert(key, deepcopy(parent[key]))
            case 2 if isinstance(parent, dict):
                parent[rng.choice(list(parent))] = deepcopy(parent[key])
            case _:
                parent[key] = deepcopy(rng.choice(JSON_VALUES))
    text = json.dumps(content)
    for word, value in UNWRITABLE.items():
        text = text.replace(word, value)
    if rng.random() < 0.05:  # a key twice
        text = text.replace("{", '{"id": 0, "image_id": 0, "bbox": [], ', 1)
    return text.encode()


def mutate_zip(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A zip archive (a checkpoint) with one member mutated, or mutated as it is."""
    data = rng.choice(seeds)
    if rng.random() < 0.4:
        return mutate_bytes(rng, seeds, data)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith(".pkl")]
        bad = rng.choice(names if rng.random() < 0.3 else pickles)
        for name in names:
            member = old.read(name)
            if name == bad:
                member = mutate_bytes(rng, [member])
            if name != bad or rng.random() < 0.9:
                new.writestr(name, member)
    return buffer.getvalue()


def mutate_png(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A PNG with a chunk mutated under a right checksum, dropped or repeated; or as it is."""
    data = rng.choice(seeds)
    if rng.random() < 0.2:
        return mutate_bytes(rng, seeds, data)
    chunks, at = [], 8
    while at < len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append(data[at + 4 : at + 8 + size])
        at += size + 12
    bad = rng.randrange(len(chunks))
    mutated = mutate_bytes(rng, [chunks[bad]])
    chunks[bad : bad + 1] = rng.choice(([], [mutated] * 2, [mutated], [mutated], [mutated]))
    packed = (struct.pack(">I", max(0, len(c) - 4)) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return data[:8] + b"".join(packed)
