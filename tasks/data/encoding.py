"""The encoding of a text file: declared, marked, or found out over the whole file; and the file as UTF-8."""

from __future__ import annotations

import codecs
import io
from typing import BinaryIO

from tasks.spec.errors import BadRequest
from tasks.store.files import CHUNK_BYTES

# Longest marks first: that of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What is looked for where a file is not UTF-8. More would be guessing among look-alikes: cp1250, say, is told from
# cp1252 by few letters, and has to be declared.
CANDIDATES = ["latin_1", "cp1252", "cp1251", "gb18030", "big5", "shift_jis", "euc_jp", "euc_kr"]
SAMPLE_BYTES = 256 << 10
UTF8 = ("utf-8", "utf-8-sig")


def detect(name: str, stream: BinaryIO, declared: str | None) -> str:
    """Return a text file's encoding, in Python's name; the stream is at its start after.

    Raises:
        BadRequest: bytes that the encoding has no text for, NUL bytes, or an encoding that can't be told.
    """
    stream.seek(0)
    head = stream.read(4)
    found = declared or next((encoding for mark, encoding in MARKS if head.startswith(mark)), "utf-8")
    found = codecs.lookup(found).name
    try:
        bad = _first_bad_byte(name, stream, found)
        if bad is None:
            return found
        if declared or found not in UTF8:
            raise BadRequest(f"{name}: byte {bad} is no {found}; save the file as UTF-8 or set data.source.encoding")
        return _guessed(name, stream, bad)
    finally:
        stream.seek(0)


def as_utf8(stream: BinaryIO, encoding: str) -> BinaryIO:
    """Return the stream itself where it is UTF-8, or one that transcodes it piece by piece."""
    if encoding in UTF8:
        return stream
    return io.BufferedReader(_Transcoded(stream, encoding), CHUNK_BYTES)


def _first_bad_byte(name: str, stream: BinaryIO, encoding: str) -> int | None:
    """Where decoding stops, or None. NUL is refused: no text has one, and it cuts strings short elsewhere."""
    decoder = codecs.getincrementaldecoder(encoding)()
    stream.seek(0)
    place = 0
    while True:
        chunk = stream.read(CHUNK_BYTES)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            return max(place + error.start, 0)
        if "\0" in text:
            what = "it is no text, or UTF-16 without a mark: set data.source.encoding"
            raise BadRequest(f"{name}: holds a NUL character after byte {place + text.index(chr(0))}; {what}")
        if not chunk:
            return None
        place += len(chunk)


def _guessed(name: str, stream: BinaryIO, bad: int) -> str:
    """The encoding of a file that is not UTF-8, from a sample around its first odd byte."""
    from charset_normalizer import from_bytes

    stream.seek(max(0, bad - SAMPLE_BYTES // 2))
    sample = stream.read(SAMPLE_BYTES)
    reason = f"{name}: is not UTF-8 (byte {bad} is none)"
    if any(ord(char) > 127 and char != "\ufffd" for char in sample.decode("utf-8", "replace")):
        # Most of it is UTF-8: another encoding would turn those texts into rubbish.
        raise BadRequest(f"{reason}, yet other parts are; correct that byte and save the file as UTF-8")
    best = from_bytes(sample, cp_isolation=CANDIDATES, threshold=0.2).best()
    letters = sum(byte > 127 for byte in sample)
    if best is None or letters < 3:
        raise BadRequest(f"{reason}, nor can another encoding be told; save it as UTF-8 or set data.source.encoding")
    return codecs.lookup(best.encoding).name


class _Transcoded(io.RawIOBase):
    """A stream in some encoding, read as UTF-8. It can only be sought back to its start."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream, self._encoding = stream, encoding
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset or whence:
            raise io.UnsupportedOperation("a transcoded stream is only sought to its start")
        self._stream.seek(0)
        self._decoder = codecs.getincrementaldecoder(self._encoding)()
        self._ready, self._ended = b"", False
        return 0

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready and not self._ended:
            chunk = self._stream.read(CHUNK_BYTES)
            self._ended = not chunk
            self._ready = self._decoder.decode(chunk, final=self._ended).encode()
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
