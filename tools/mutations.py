"""Valid files turned into bad ones, with a knowledge of their structure. For tools/fuzz.py.

Every function takes a generator and valid contents (seeds), and returns one mutated content.
"""

from __future__ import annotations

import io
import random
import re
import zipfile

LONGEST = 200_000  # bytes of an input
LAUGHS = (
    b'<!DOCTYPE a [<!ENTITY a "ha">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + i, b"&%c;" % (97 + i) * 10) for i in range(9))
    + b"]>"
)  # each entity is ten of the one before
WORDS = (
    *b"0 -1 1 2 3 -0.0 0.5 1.5 640 512 1e5 1e308 1e400 -1e400 1e-400 nan -nan inf -inf NaN".split(),
    *b"Infinity -Infinity 2147483648 9223372036854775808 18446744073709551616 0x10 1_0".split(),
    *(b"9" * 400, b"9" * 5000, "٣".encode(), "１".encode(), "\u2028é😀".encode()),
    *b"\0|\x0b|\x1c|\x85|\xff|\xef\xbb\xbf|\xff\xfe|\xed\xa0\x80|| |\t|\n|\r\n|\r".split(b"|"),
    *rb"""% %s{} ' " \ \ud800 , ; # - ../../x /dev/null true null person""".split(),
    *(b"A" * 70_000, b"1 " * 5000, b"1," * 5000),
)
JSON_WORDS = (
    *b'{ } [ ] : // false [] {} [[]] [1] [1,2,3,4] {"id":1} {"id":0,"id":1} "x" "1" "" "\\ud800"'.split(),
    *b'"image_id" "id" "bbox" "score" "set06/V000/I00001" -1000000000000000000000000000000'.split(),
    *(b"[" * 3000, b"[" * 100_000, b'{"a":' * 3000, b"[" * 2000 + b"]" * 2000),
)
XML_WORDS = (
    *b"< > </ <object> </object> <name> <bndbox> &a; &i; &lt; &#0; &#x110000; <![CDATA[ ]]>".split(),
    *b"<!-- --> xmlns:a='b' <a:object/>".split(),
    *(b"<?xml version='1.0'%s?>" % more for more in (b"", b" encoding='utf-16'", b" encoding='klingon'")),
    *(b'<!DOCTYPE a SYSTEM "file:///etc/passwd">', b"<a>" * 3000, b"<a>" * 100_000, LAUGHS),
)


def mutate_bytes(rng: random.Random, seeds: list[bytes], data: bytes | None = None) -> bytes:
    """A seed with one to four damages that know nothing of its structure."""
    data = bytearray(rng.choice(seeds) if data is None else data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 16, 200)))
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:end] = rng.choice((rng.randbytes(end - at), b"\0\0\0\0", b"\xff" * 4, b"\x7f\xff"))
            case 2:
                data[at:end] *= rng.choice((0, 0, 2, 3, 50))
            case 3:
                del data[at:]
            case 4:
                other = rng.choice(seeds)
                data[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(data)


def mutate_text(rng: random.Random, seeds: list[bytes], words: tuple[bytes, ...]) -> bytes:
    """A seed whose words and lines are replaced, repeated, dropped or swapped."""
    data = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 3))):
        spans = [match.span() for match in re.finditer(rb"\"[^\"]*\"|[^\s,<>\":{}\[\]]+", data[:4000])]
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
            case 6 | 7:
                lines[line : line + 1] *= rng.choice((0, 0, 0, 0, 2, 2, 2, 300))
                data = b"\n".join(lines)
            case 8:
                old, new = rng.choice((b"\n|\r\n", b"\n|\r", b"\n|\0", b",|;", b"0|\0")).split(b"|")
                data = data.replace(old, new)
            case 9:
                data = mutate_bytes(rng, seeds, data)
    if rng.random() < 0.02:
        data = data.decode("latin-1").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    return data[:LONGEST]


def mutate_zip(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A zip archive (a checkpoint) with one member mutated under a right checksum; or as it is."""
    data = rng.choice(seeds)
    if rng.random() < 0.4:
        return mutate_bytes(rng, seeds, data)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        bad = rng.choice(names if rng.random() < 0.3 else [n for n in names if n.endswith(".pkl")])
        for name in names:
            member = old.read(name)
            if name != bad:
                new.writestr(zipfile.ZipInfo(name), member)
            elif rng.random() < 0.9:
                new.writestr(zipfile.ZipInfo(name), mutate_bytes(rng, [member]))
    return buffer.getvalue()
