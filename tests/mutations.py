"""Seeded damage for fuzz tests: of bytes, of text and of records; the same in every process.

Not hypothesis: ten thousand small files take it half an hour, and a seed names a failure as well.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

HARD = (
    None, True, False, 0, -1, 1, 3, 2**31, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, float("inf"), float("-inf"),
    float("nan"), "", " ", "x", "kd", "\x1b[31mred\x07", "a\nb", "\u202e", "\ud800", "../../../tmp/x", "/dev/zero",
    "$(touch ran)", "'; touch ran", "-oProxyCommand=x", "\0", "9" * 400, "x" * 300, [], {}, [[]], [None], [1, 2],
    {"": 0}, {"x": {}}, {"top1": "1"}, {"name": ["a"]},
)  # fmt: skip

WORDS = (
    b"\0", b"\x1b[2J", b"\xff\xfe", b"\xc3", b"\n", b"\r", b"\t", b"  ", b"- ", b"? ", b": ", b"{", b"}", b"[", b"]",
    b"&a ", b"*a", b"<<: *a", b"!!python/object/apply:os.system [id]", b"!!binary ", b"|\n", b">\n", b"'", b'"', b"#",
    b"---\n", b"...\n", b"%YAML 1.2\n", b"NaN", b"Infinity", b"1e999", b".inf", b".nan", b"9" * 30, b"-1", b"0",
    b"null", b"true", b"\\ud800", b"\\u001b", b"\xe2\x80\xae", b"[" * 60, b'{"a":' * 2000, b"../",
)  # fmt: skip


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """One to four small damages."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed) + 1)
        end = min(len(changed), at + draw.choice((1, 1, 2, 8, 64)))
        kind = draw.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at:at] = draw.choice(WORDS)
        elif kind == 2:
            changed[at:end] = draw.choice(WORDS)
        elif kind == 3:
            del changed[at:end]
        elif kind == 4:
            changed[at:at] = changed[at:end] * draw.randint(1, 3)
        elif draw.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def mutate_lines(draw: random.Random, text: str) -> str:
    """Lines doubled, dropped, moved, shifted, or with another value."""
    lines = text.splitlines(keepends=True)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(lines))
        kind = draw.randrange(5)
        if kind == 0:
            lines.insert(draw.randrange(len(lines)), lines[at])
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            lines[at] = " " * draw.randint(0, 9) + lines[at].lstrip()
        else:
            name = lines[at].partition(":")[0]
            lines[at] = f"{name}: {_text(draw)}\n"
    return "".join(lines)


def _text(draw: random.Random) -> str:
    value = draw.choice(HARD)
    return json.dumps(value) if draw.random() < 0.7 else str(value)


def mutate_record(draw: random.Random, record: Any) -> Any:
    """One to three entries of a JSON document replaced, dropped or doubled."""
    changed = json.loads(json.dumps(record))
    for _ in range(draw.randint(1, 3)):
        places = list(_places(changed))
        if not places:
            return draw.choice(HARD)
        holder, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw.choice(("x", "", "\x1b", str(key) + "_"))] = deepcopy(holder[key])
        elif kind == 1:
            holder.append(deepcopy(holder[key]))
        else:
            holder[key] = deepcopy(draw.choice(HARD))
    return changed if draw.random() < 0.99 else draw.choice(HARD)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


def damaged_json(draw: random.Random, data: bytes) -> bytes:
    """A JSON file with damaged bytes, or with another record in it."""
    if draw.random() < 0.4:
        return mutate_bytes(draw, data)
    return json.dumps(mutate_record(draw, json.loads(data))).encode()


def is_clean(text: str, keep: str = "\n") -> bool:
    """Whether a terminal shows it and does nothing else."""
    return all(c.isprintable() or c in keep for c in text)
