"""The demo model's training text: seven kinds from Debian packages, CPython's library and GSM8K.

Every document keeps its kind (the "task" label that schedulers and eMoE need). Near-duplicates are dropped before the
split, and the split is by source, so that no held-out text has a sibling in training.
`python -m harness.demo.corpus --root DIR` prints the sizes.
"""

from __future__ import annotations

import argparse
import gettext
import hashlib
import html
import json
import lzma
import re
import struct
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.errors import ExpertFlowError, cli_main

PIECE_CHARS = 8_000
MIN_CHARS = 500
KIND_CHARS = 8_000_000
HELD_OUT_PERCENT = {"german": 10}
DEFAULT_HELD_OUT_PERCENT = 4
DUPLICATE_FRACTION = 0.3
LEAK_FRACTION = 0.05
GSM8K = Path(__file__).parent / "gsm8k_train.jsonl.xz"


class CorpusError(ExpertFlowError):
    """A package that the training text comes from is not there."""


@dataclass(frozen=True)
class Document:
    """A piece of text: `kind` is its domain, `source` the file or chapter group it is from (the unit of the split)."""

    kind: str
    source: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents: no source in both, and < 5 % of a held-out document's 13-grams in training."""

    train: list[Document]
    held_out: list[Document]


def _installed(root: Path, pattern: str, package: str) -> list[Path]:
    """Files of a Debian package under `root`; the error says how to get the package without installing it."""
    found = sorted(root.glob(pattern))
    if not found:
        raise CorpusError(
            f"no {pattern} under {root}: get the Debian package {package}, e.g. "
            f"`apt-get download {package} && dpkg -x {package}_*.deb DIR`, and pass --root DIR"
        )
    return found


def _strip_markup(markup: str) -> str:
    text = re.sub(r"(?s)<(note|script|style|svg|title)\b.*?</\1>", " ", markup)
    text = re.sub(r'(?i)<(/p|/li|/h\d|br|tr|lb|l |chapter|div [^>]*type="x-p")[^>]*>', "\n", text)
    text = re.sub(r"</?transChange[^>]*>", " ", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = re.sub(r"[ \t]+([,.;:?!])", r"\1", re.sub(r"[ \t]+", " ", text))
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _sword_chapters(index: Path) -> Iterator[tuple[str, str]]:
    """(book, text) per chapter of a SWORD module: 12-byte index records (offset, size, raw size) and zlib blocks."""
    blocks = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
    for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
        block = zlib.decompress(blocks[offset : offset + size]).decode("utf-8", "ignore") if size else ""
        for chapter in re.split(r'(?=<chapter [^>]*osisID=")', block)[1:]:
            name = re.search(r'osisID="(\w+)\.', chapter)
            yield (name.group(1) if name else index.stem), _strip_markup(chapter)


def _pack(kind: str, source: str, texts: Iterable[str], separator: str = "\n\n") -> Iterator[Document]:
    """Short texts joined to documents of about PIECE_CHARS, each its own source."""
    batch: list[str] = []
    number = 0
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= PIECE_CHARS:
            yield Document(kind, f"{source}/{number:04d}", separator.join(batch))
            batch, number = [], number + 1
    if batch:
        yield Document(kind, f"{source}/{number:04d}", separator.join(batch))


def _sword(kind: str, root: Path, module: str, package: str) -> Iterator[Document]:
    for index in _installed(root, f"usr/share/sword/modules/*/*/{module}/*zs", package):
        books: dict[str, list[str]] = {}
        for book, text in _sword_chapters(index):
            books.setdefault(book, []).append(text)
        for book, chapters in books.items():
            yield from _pack(kind, f"{module}/{book}", chapters)


def _english(root: Path) -> Iterator[Document]:
    yield from _sword("english", root, "tdavid", "sword-comm-tdavid")
    yield from _sword("english", root, "engWEB2015eb", "sword-text-web")


def _spanish(root: Path) -> Iterator[Document]:
    yield from _sword("spanish", root, "spaRV1909eb", "sword-text-sparv")


def _german(root: Path) -> Iterator[Document]:
    """PostgreSQL's German messages, in a fixed shuffled order (the catalogue itself is sorted by the English text)."""
    packages = {"postgres-*.mo": "postgresql-15", "psql-*.mo": "postgresql-client-15"}
    for name, package in packages.items():
        _installed(root, f"usr/share/locale/de/LC_MESSAGES/{name}", package)
    messages: set[str] = set()
    for path in sorted(root.glob("usr/share/locale/de/LC_MESSAGES/*.mo")):
        if re.match(r"(postgres|psql|pg|plpgsql|initdb|libpq|ecpg)", path.name):
            with path.open("rb") as file:
                catalogue: dict[object, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
            messages.update(text for key, text in catalogue.items() if key and text)
    yield from _pack("german", "postgresql", sorted(messages, key=_digest), "\n")


def _files(kind: str, base: Path, paths: Iterable[Path], clean: Callable[[str], str]) -> Iterator[Document]:
    for path in sorted(paths):
        try:
            yield Document(kind, str(path.relative_to(base)), clean(path.read_text("utf-8")).strip())
        except (UnicodeDecodeError, IsADirectoryError):
            continue


def _python(root: Path) -> Iterator[Document]:
    del root
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
    paths = [path for path in library.rglob("*.py") if not skipped & set(path.relative_to(library).parts)]
    yield from _files("python", library, paths, lambda text: text)


def _go(root: Path) -> Iterator[Document]:
    paths = _installed(root, "usr/share/go-*/src/**/*.go", "golang-1.19-src")
    base = paths[0].parents[len(paths[0].relative_to(root).parts) - 4]
    handwritten = [path for path in paths if "testdata" not in path.parts and "vendor" not in path.parts]
    for document in _files("go", base, handwritten, lambda text: re.sub(r"\A(// .*\n)+\n", "", text)):
        if "Code generated" not in document.text and "DO NOT EDIT" not in document.text:
            yield document


def _docs(root: Path) -> Iterator[Document]:
    pages = _installed(root, "usr/share/doc/sqlite3/**/*.html", "sqlite3-doc")
    texts = [path for path in pages if not re.search(r"crossref|requirements|keyword|toc", path.name)]
    yield from _files("docs", root / "usr/share/doc", texts, _strip_markup)
    sources = _installed(root, "usr/share/doc/python3*/html/_sources/**/*.rst.txt", "python3.11-doc")
    yield from _files("docs", root / "usr/share/doc", sources, lambda text: text)


def _maths(root: Path) -> Iterator[Document]:
    del root
    with lzma.open(GSM8K, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    texts = (f"Question: {problem['question']}\nAnswer: {problem['answer']}" for problem in problems)
    yield from _pack("maths", "gsm8k", texts)


KINDS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "english": _english,
    "spanish": _spanish,
    "german": _german,
    "python": _python,
    "go": _go,
    "docs": _docs,
    "maths": _maths,
}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_prose_or_code(text: str) -> bool:
    """False for tables and data: too short, mostly digits, or very long lines."""
    digits = sum(character.isdigit() for character in text)
    lines = text.count("\n") + 1
    return len(text) >= MIN_CHARS and digits < 0.15 * len(text) and len(text) / lines < 4_000


def shingles(text: str, width: int) -> np.ndarray:
    """Hashes (uint64, one per position) of all `width`-word windows, equal in every process."""
    words = re.findall(r"\w+", text.lower())
    ids = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    count = max(len(ids) - width + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(width):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + count]
    return hashes ^ (hashes >> np.uint64(29))


def drop_near_duplicates(documents: Iterable[Document], width: int = 8, sample: int = 8) -> list[Document]:
    """Documents in order, less those that share > 30 % of their 8-grams (one in `sample` is seen) with kept ones."""
    seen: set[int] = set()
    kept: list[Document] = []
    for document in documents:
        hashes = shingles(document.text, width)
        sampled = hashes[hashes % np.uint64(sample) == 0].tolist()
        if sampled and sum(item in seen for item in sampled) > DUPLICATE_FRACTION * len(sampled):
            continue
        seen.update(sampled)
        kept.append(document)
    return kept


def split(documents: Iterable[Document]) -> Corpus:
    """Split by source; held-out documents that share >= 5 % of their 13-grams with training are dropped altogether."""
    train: list[Document] = []
    candidates: list[Document] = []
    for document in documents:
        percent = HELD_OUT_PERCENT.get(document.kind, DEFAULT_HELD_OUT_PERCENT)
        held = int(_digest(f"{document.kind}/{document.source}")[:8], 16) % 100 < percent
        (candidates if held else train).append(document)
    fractions = leak_fractions(train, candidates)
    return Corpus(train, [doc for doc, leaked in zip(candidates, fractions, strict=True) if leaked < LEAK_FRACTION])


def leak_fractions(train: Iterable[Document], held_out: list[Document], width: int = 13) -> list[float]:
    """For each held-out document the fraction of its 13-grams that occur in training."""
    grams = [shingles(document.text, width) for document in held_out]
    wanted = np.unique(np.concatenate([*grams, np.full(1, np.iinfo(np.uint64).max, np.uint64)]))
    leaked = np.zeros(len(wanted), dtype=bool)
    for document in train:
        candidates = shingles(document.text, width)
        positions = np.searchsorted(wanted, candidates)
        leaked[positions[wanted[positions] == candidates]] = True
    return [float(leaked[np.searchsorted(wanted, gram)].mean()) if len(gram) else 0.0 for gram in grams]


def cut(document: Document) -> Iterator[Document]:
    """Pieces of about PIECE_CHARS, cut at line ends; all keep the document's source."""
    start, text = 0, document.text
    while len(text) - start > 1.5 * PIECE_CHARS:
        end = text.rfind("\n", start + PIECE_CHARS // 2, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
        yield Document(document.kind, document.source, text[start:end].strip())
        start = end
    yield Document(document.kind, document.source, text[start:].strip())


def collect(kind: str, root: Path) -> list[Document]:
    """Documents of one kind, in a fixed shuffled order, without tables and near-duplicates, up to KIND_CHARS."""
    whole = sorted(KINDS[kind](root), key=lambda document: _digest(document.source))
    pieces = (piece for document in whole for piece in cut(document) if _is_prose_or_code(piece.text))
    kept: list[Document] = []
    total = 0
    for document in drop_near_duplicates(pieces):
        if total >= KIND_CHARS:
            break
        kept.append(document)
        total += len(document.text)
    return kept


def build(root: Path) -> Corpus:
    """The whole corpus, from packages unpacked or installed under `root`. Raises CorpusError naming a missing one."""
    return split(document for kind in KINDS for document in collect(kind, root))


def main(arguments: list[str] | None = None) -> None:
    """Print characters and documents per kind and side."""
    parser = argparse.ArgumentParser(prog="python -m harness.demo.corpus", description=__doc__)
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="where the Debian packages are unpacked (default /)"
    )
    corpus = build(parser.parse_args(arguments).root)
    for kind in KINDS:
        for side, documents in (("train", corpus.train), ("held out", corpus.held_out)):
            texts = [document.text for document in documents if document.kind == kind]
            print(f"{kind:8} {side:8} {len(texts):6} documents {sum(map(len, texts)):10} characters")


if __name__ == "__main__":
    raise SystemExit(cli_main(main))
