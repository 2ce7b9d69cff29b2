"""Mangling: of bytes, of trees (what JSON and YAML hold), and of the containers npz and safetensors.

Every function takes a `random.Random` and is a pure function of it and its input, so that a seed gives an input again.
"""

from __future__ import annotations

import copy
import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from random import Random
from typing import Any

import numpy as np

Mutator = Callable[[Random, bytes], bytes]

LIMIT_BYTES = 2 << 20  # no mangled input is longer, so that time limits mean something
DEEP = 20_000

INTEGERS = (0, 1, -1, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63)
WIDE = (2**64 - 1, 2**64, 10**30, 10**400, -(2**63) - 1)

# Tokens that `json.dumps` does not write; put into the text in place of a marker.
RAW = (
    "NaN",
    "-Infinity",
    "1e999",
    "-0",
    "9" * 4000,
    "9" * 5000,
    '"\\ud800"',
    '"\\u0000"',
    '"\\u001b[31m"',
    "[" * DEEP,
    "[" * 200 + "]" * 200,
    '{"a":' * 500 + "1" + "}" * 500,
    "{" * DEEP,
    "",
)
YAML_RAW = (
    *RAW,
    ".nan",
    ".inf",
    "1:30",
    "0x7fffffff",
    "2026-11-22",
    "!!python/object/apply:os.system ['true']",
    "!!python/name:os.system ''",
    "!!python/object/new:tuple [[1]]",
    '!!timestamp "x"',
    '!!int ""',
    '!!int "1_0"',
    "!!bool maybe",
    '!!float "."',
    "!!null x",
    "!!binary '*'",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    "!!str 1",
    "!<tag:yaml.org,2002:map> 3",
    "&a [*a]",
    "*nowhere",
    "{? [1, 2] : 3}",
    "{? {a: 1} : 3}",
    "{!!merge <<: {kind: x}}",
    "'" + "long " * 40_000 + "'",
    "|\n  text\n text",
    '"\\x00"',
)
TEXTS = (
    "",
    " ",
    "\0",
    "\x1b[2J",
    "\u2028",
    "é" * 50,
    "../../../etc/passwd",
    "/dev/zero",
    "a" * 100_000,
    "%s%n",
    "25%",
    "1e5%",
)


def bytes_of(rng: Random, data: bytes) -> bytes:
    """`data` after one to four small accidents."""
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(_ACCIDENTS)(rng, data)[:LIMIT_BYTES]
    return data


def _place(rng: Random, data: bytes) -> int:
    # Headers are where parsers decide: half of the accidents happen there.
    return rng.randrange(min(len(data), 400) if rng.random() < 0.5 else len(data)) if data else 0


def _chunk(rng: Random, data: bytes) -> slice:
    start = _place(rng, data)
    return slice(start, start + int(2 ** rng.uniform(0, 12)))


def _flip(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 16)) if data else 0):
        changed[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _delete(rng: Random, data: bytes) -> bytes:
    chunk = _chunk(rng, data)
    return data[: chunk.start] + data[chunk.stop :]


def _duplicate(rng: Random, data: bytes) -> bytes:
    chunk = _chunk(rng, data)
    times = rng.choice((1, 1, 2, 100, 10_000))
    return data[: chunk.stop] + (data[chunk] * times)[:LIMIT_BYTES] + data[chunk.stop :]


def _move(rng: Random, data: bytes) -> bytes:
    chunk, to = _chunk(rng, data), _place(rng, data)
    rest = data[: chunk.start] + data[chunk.stop :]
    return rest[:to] + data[chunk] + rest[to:]


def _number(rng: Random, data: bytes) -> bytes:
    width = rng.choice((1, 2, 4, 8))
    number = rng.choice(INTEGERS) % (1 << 8 * width)
    place = _place(rng, data)
    return data[:place] + number.to_bytes(width, rng.choice(("little", "big"))) + data[place + width :]


_MARKS = (
    *(
        b"\0",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\t",
        b"\r",
        b"\x85",
        b"\xed\xa0\x80",
        b"\n---\n",
        b"\n...\n",
        b"%YAML 9.9\n",
    ),
    *(b"'", b'"', b"\\", b"{", b"]", b": ", b"- ", b"? ", b"&a ", b"*a", b"!!", b"<<: ", b"#", b"|", b">", b"@", b"`"),
)


def _insert(rng: Random, data: bytes) -> bytes:
    place = _place(rng, data)
    new = rng.choice((*_MARKS, rng.randbytes(rng.randint(1, 64))))
    return data[:place] + new + data[place:]


def _recode(rng: Random, data: bytes) -> bytes:
    return data.decode("latin-1").encode(
        rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-7"))
    )


_ACCIDENTS: tuple[Mutator, ...] = (
    _flip,
    _flip,
    _truncate,
    _delete,
    _duplicate,
    _move,
    _number,
    _insert,
    _insert,
    _recode,
)


def tree_of(rng: Random, tree: Any, raw: tuple[str, ...] = RAW) -> Any:
    """A copy of `tree` with one to three of its values, keys or sections replaced; may hold markers for `text_of`."""
    changed = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(changed))
        if not places:
            return _value(rng, raw)
        holder, key = rng.choice(places)
        what = rng.random()
        if what < 0.6:
            holder[key] = _value(rng, raw, holder[key])
        elif what < 0.75:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice((f"{key}x", f"@{rng.randrange(len(raw))}@", *TEXTS))] = holder[key]
        else:
            holder.extend([holder[key]] * rng.choice((1, 3, 1000)))
    return changed


def _places(tree: Any) -> Any:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield tree, key
        yield from _places(value)


def _value(rng: Random, raw: tuple[str, ...], old: Any = None) -> Any:
    pick = rng.randrange(8)
    if pick == 0 and isinstance(old, (int, float)) and not isinstance(old, bool) and abs(old) < 2**64:
        return rng.choice((-old, old + 1, old * 2, float(old), str(old), old // 2))
    choices: tuple[Any, ...] = (
        rng.choice(INTEGERS),
        rng.choice(WIDE),
        rng.choice((None, True, False, 0.5, -1.5, 1e308, 5e-324)),
        rng.choice(TEXTS),
        f"@{rng.randrange(len(raw))}@",
        rng.choice(([], {}, [[]], [1, 2, 3], {"a": 1}, {"": None}, [old], {"kind": old})),
        old,
        [old] * rng.choice((0, 2, 100)),
    )
    return choices[pick]


def text_of(tree: Any, raw: tuple[str, ...] = RAW, indent: int | None = None) -> bytes:
    """JSON of a mangled tree, its markers replaced."""
    text = json.dumps(tree, indent=indent)
    for number, token in enumerate(raw):
        text = text.replace(f'"@{number}@"', token)
    return text.encode()[:LIMIT_BYTES]


def yaml_text(rng: Random, tree: Any, dump: Callable[[Any], str]) -> bytes:
    """YAML of a mangled `tree`, in block or in flow style, or one of the tricks that YAML is known for."""
    pick = rng.random()
    if pick < 0.2:
        return rng.choice(_YAML_TRICKS)(rng, dump(tree))
    mangled = tree_of(rng, tree, YAML_RAW)
    if pick < 0.6 or not isinstance(mangled, dict):
        return text_of(mangled, YAML_RAW, rng.choice((None, 1)))
    text = dump(mangled)
    for number, token in enumerate(YAML_RAW):
        text = text.replace(f"'@{number}@'", token).replace(f"@{number}@", token)
    return text.encode("utf-8", "surrogatepass")[:LIMIT_BYTES]


def _laughs(rng: Random, text: str) -> bytes:
    rows = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'lol'}]" for n in range(rng.choice((3, 12, 40)))]
    return (text + "\n".join(rows) + f"\nfixed: *a{len(rows) - 1}\n").encode()


def _merge_laughs(rng: Random, text: str) -> bytes:
    rows = [
        f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}], k{n}: 1}}" if n else "m0: &m0 {k: 1}" for n in range(9)
    ]
    return (text + "\n".join(rows) + "\n").encode()


def _deep(rng: Random, text: str) -> bytes:
    depth = rng.choice((50, 300, 2000, DEEP))
    opening, closing = rng.choice((("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", ""), ("!!seq [", "]"), ("&a [", "]")))
    return (text + "params: " + opening * depth + closing * depth + "\n").encode()


def _many(rng: Random, text: str) -> bytes:
    count = rng.choice((10, 1000, 30_000))
    row = rng.choice(
        (
            "k{0}: {0}\n",
            "{0}: {0}\n",
            "cach{0}: {{slots: 3}}\n",
            "? [{0}]\n: 1\n",
            "# {0}\n",
            "---\n",
            "fixed: [a{0}]\n",
        )
    )
    return (text + "".join(row.format(n) for n in range(count))).encode()


def _long(rng: Random, text: str) -> bytes:
    one = rng.choice(("x", " ", "\t", "é", "1", "'", '"', "\\", "%", "!", "&", "#", ",", "- ", "a: ", "[a, "))
    return (text + rng.choice(("kind: ", "", "k", "fixed: [")) + one * rng.choice((1000, 100_000)) + "\n").encode()


_YAML_TRICKS = (_laughs, _merge_laughs, _deep, _many, _long)


def lines_of(rng: Random, data: bytes) -> bytes:
    """JSON lines with some of them mangled as trees."""
    lines = []
    for line in data.splitlines():
        lines.append(text_of(tree_of(rng, json.loads(line))) if rng.random() < 0.3 else line)
    if rng.random() < 0.2:
        lines.append(rng.choice(RAW).encode())
    return rng.choice((b"\n", b"\r\n", b"\n\n", b"\r", b"\xe2\x80\xa8")).join(lines)[:LIMIT_BYTES]


def safetensors_of(rng: Random, data: bytes) -> bytes:
    """A safetensors file with a mangled header: its tree, its length, or its metadata's own JSON."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    inner = header.get("__metadata__", {}).get("about")
    if inner is not None and rng.random() < 0.6:
        header["__metadata__"]["about"] = text_of(tree_of(rng, json.loads(inner))).decode()
    else:
        header = tree_of(rng, header)
    text = text_of(header)
    if rng.random() < 0.1:
        text = text.replace(b"{", b'{"__metadata__":{},', 1)
    claimed = len(text) if rng.random() < 0.8 else rng.choice((*INTEGERS, len(text) + 1, len(text) - 1, 100_000_000))
    if rng.random() < 0.1:
        rest = rest[: rng.randrange(len(rest) + 1)] + bytes(rng.choice((0, 1, 1000)))
    return struct.pack("<Q", claimed % 2**64) + text + rest


Member = tuple[str, bytes]  # of a zip archive


def npz_of(rng: Random, data: bytes) -> bytes:
    """An npz file with mangled members: headers, claims, names, pickles, bombs."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    sound = set(range(len(members)))
    for _ in range(rng.randint(1, 2)):
        at = rng.choice(sorted(sound))
        sound.discard(at)
        name, content = members[at]
        pick = rng.random()
        if name == "meta.npy" and pick < 0.8:
            members[at] = name, _meta(rng, content)
        elif pick < 0.25:
            members[at] = name, _values(rng, content)
        elif pick < 0.5:
            members[at] = name, _array_header(rng, content)
        elif pick < 0.65:
            members[at] = name, bytes_of(rng, content)
        elif pick < 0.75:
            members.append((name, rng.choice(members)[1]))
        elif pick < 0.85:
            members.append((rng.choice(_NAMES), content))
        elif pick < 0.9:
            members[at] = f"no-{name}", content
        else:
            members[at] = name, _pickle()
    packed = _zip(rng, members)
    return rng.choice((bytes_of, _zip_records))(rng, packed) if rng.random() < 0.3 else packed


_NAMES = (
    *("../../escape.npy", "/etc/passwd", "experts", "experts.npy/", "weights.npy"),
    *("predicted.npy", "step.npy", "\0.npy", "é.npy", "x" * 60_000),
)
_SHAPES = (
    *("(-1, 2, 2)", "(0, 0, 0)", "(0,)", "()", "(1,)", "(4611686018427387904, 2, 2)", "(2147483647, 3, 2)"),
    *("(100000000000,)", "(65536, 65536, 65536, 65536)", "(True, 1, 1)", "(2.0, 3, 2)", "('a',)", "None"),
    *("(1, 60000, 1)", "(60000, 1, 1)", "(1,) * 10**9", "(" * 90 + ")" * 90, "(" * 4000, "[" * 900 + "]" * 900),
    *("(10, 3, 2)", "(1, 1, 60)", "(20, 3, 1)"),
)
_DESCRS = (
    *("'<u2'", "'<i8'", "'>u2'", "'|O'", "'<f8'", "'<f2'", "'|V1000000000'", "'<U500000000'", "'|S0'", "'<U0'"),
    *("'<M8[ns]'", "'<c16'", "'|b1'", "[('a', '<u2')]", "[('a', '|O')]", "('<u2', (3,))", "('<u2', (1000000000,))"),
    *("{'a': 1}", "None", "'<u3'", "'\\x00'", "[" * 500 + "]" * 500, "'<f16'"),
)


def _values(rng: Random, content: bytes) -> bytes:
    """An array with other values, as often as not values that it may have."""
    array = np.load(io.BytesIO(content))
    for _ in range(rng.choice((1, 3, array.size))):
        if array.dtype.kind == "f":
            value = rng.choice((0.0, -1.0, 6e4, float("nan"), float("inf"), rng.random()))
        else:
            most = int(np.iinfo(array.dtype).max)
            value = rng.choice((0, 1, rng.randrange(8), rng.randrange(8), most, rng.randrange(most)))
        array.flat[rng.randrange(array.size)] = value
    if rng.random() < 0.3:
        array = array.astype(rng.choice((np.int64, np.float64, np.uint8, np.int8, ">i4", bool, np.complex64)))
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _array_header(rng: Random, content: bytes) -> bytes:
    """An .npy member whose header says something else, or whose array is another."""
    length = int.from_bytes(content[8:10], "little")
    header = content[10 : 10 + length].decode("latin-1").strip()
    descr, shape = header.split("'descr': ")[1].split(", 'fortran")[0], header.split("'shape': ")[1].rsplit(", }", 1)[0]
    pick = rng.random()
    if pick < 0.45:
        shape = rng.choice(_SHAPES)
    elif pick < 0.8:
        descr = rng.choice(_DESCRS)
    elif pick < 0.9:
        shape, descr = rng.choice(_SHAPES), rng.choice(_DESCRS)
    order = rng.choice(("False", "False", "True", "1", "x"))
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    if rng.random() < 0.1:
        header = bytes_of(rng, header.encode()).decode("latin-1")[:60_000]
    version = rng.choice((1, 1, 1, 2, 3, 0, 255))
    encoded = header.encode("latin-1", "replace") + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(encoded) % 2**16)
    body = content[10 + length :]
    body = rng.choice((body, body, bytes(120_000), bytes(len(body)), b"\xff" * len(body), body[: len(body) // 2]))
    return b"\x93NUMPY" + bytes((version, 0)) + size + encoded + body


def _npy(descr: str, shape: str, body: bytes) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode("latin-1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def _meta(rng: Random, content: bytes) -> bytes:
    length = int.from_bytes(content[8:10], "little")
    meta = json.loads(content[10 + length :].decode("utf-32-le"))
    text = text_of(tree_of(rng, meta)).decode()
    if rng.random() < 0.1:
        return _npy("<U1", rng.choice(("()", "(1, 1, 1)", f"({len(text)},)", "(0,)")), text.encode("utf-32-le"))
    if rng.random() < 0.1:
        return _npy(f"|S{len(text)}", "()", text.encode())
    if rng.random() < 0.05:  # not a character of Unicode
        return _npy("<U4", "()", struct.pack("<4I", 0x110000, 0xD800, 0xFFFFFFFF, 65))
    return _npy(f"<U{len(text)}", "()", text.encode("utf-32-le"))


def _pickle() -> bytes:
    # `cos\nsystem\n…`: what an attacker would write.
    return _npy("|O", "(1,)", b"cos\nsystem\n(S'true'\ntR.")


@cache
def _zeros(num_bytes: int) -> bytes:
    """So many zeros in a raw deflate stream: the same flushed block again and again."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    return block * (num_bytes >> 20) + compressor.flush()


BOMB_BYTES = 1 << 30


def bomb(members: Mapping[str, bytes], num_bytes: int = BOMB_BYTES) -> bytes:
    """An npz file of about a thousandth of `num_bytes` whose experts are so many zeros, truthfully declared."""
    tokens = num_bytes // 12
    head = _npy("<u2", f"({tokens}, 3, 2)", b"")
    return _stored({**members, "experts.npy": b""}, {"experts.npy": (head, num_bytes)})


def _stored(members: Mapping[str, bytes], zeros: Mapping[str, tuple[bytes, int]]) -> bytes:
    """A zip archive written by hand, so that no zeros have to be compressed for each."""
    body, directory = io.BytesIO(), io.BytesIO()
    for name, content in members.items():
        encoded, method, size = name.encode(), 0, len(content)
        crc = zlib.crc32(content)
        if name in zeros:
            head, num_zeros = zeros[name]
            # A stored block of deflate with the header, then the compressed zeros.
            packed = b"\x00" + struct.pack("<HH", len(head), len(head) ^ 0xFFFF) + head + _zeros(num_zeros)
            method, size, content, crc = 8, len(head) + num_zeros, packed, 0
        offset = body.tell()
        common = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 33, crc, len(content), size, len(encoded), 0)
        body.write(b"PK\x03\x04" + common + encoded + content)
        directory.write(b"PK\x01\x02\x14\x00" + common + struct.pack("<HHHII", 0, 0, 0, 0, offset) + encoded)
    count, start, length = len(members), body.tell(), directory.tell()
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, length, start, 0)
    return body.getvalue() + directory.getvalue() + end


def _zip(rng: Random, members: list[Member]) -> bytes:
    if rng.random() < 0.03:
        return bomb(dict(members))
    method = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # names that are there twice
        for name, content in members:
            info = zipfile.ZipInfo(name.replace("\0", "\x01"))
            info.compress_type = method
            archive.writestr(info, content)
    return buffer.getvalue()


def _zip_records(rng: Random, data: bytes) -> bytes:
    """Another number in a field of a local header, of the directory or of its end."""
    signature = rng.choice((b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"))
    starts = [at for at in range(len(data)) if data.startswith(signature, at)]
    if not starts:
        return data
    place = rng.choice(starts) + rng.randrange(4, 46)
    width = rng.choice((1, 2, 4))
    number = rng.choice((*INTEGERS, rng.randrange(100))) % (1 << 8 * width)
    return data[:place] + number.to_bytes(width, "little") + data[place + width :]
