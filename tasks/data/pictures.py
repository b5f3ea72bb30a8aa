"""Images in folders: each becomes one row, grey, upright, of the declared size; its folder is its label."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.data.known import Known, changed_at, state_of
from tasks.data.rejects import Rejects
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.requests import IngestRequest, SourceFile

if TYPE_CHECKING:
    import pyarrow as pa

# What Pillow may try. Its others run programs (EPS) or are rare enough to be an attack.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 16 << 20
BATCH_BYTES = 8 << 20
BLOCK_FILES = 1024
# Each may hold an image of MAX_PIXELS in colours, so they are few.
MAX_THREADS = 4


def resolve_folders(folder: Path, known: Known) -> SourceFile:
    """Return one digest over the names and the bytes of all images; they are not read where all are as they were.

    Raises:
        BadRequest: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise BadRequest(f"{folder}: is no folder; name one that holds a folder of images for each class")
    states, changed = hashlib.sha256(), 0.0
    for path in _images(folder):
        try:
            found = path.lstat()
        except OSError as error:
            reason = f"can't be read: {error.strerror}; keep the folder as it is during a run"
            raise BadRequest(f"{path}: {reason}") from None
        states.update(f"{path.parent.name}/{path.name}\0{state_of(found)}\n".encode(errors="surrogateescape"))
        changed = max(changed, changed_at(found))
    return known.read(str(folder), states.hexdigest(), changed, lambda: _read_folder(folder))


def _read_folder(folder: Path) -> SourceFile:
    digest, size, count = hashlib.sha256(), 0, 0
    for seen in _seen(folder, len, BLOCK_FILES):
        digest.update(seen.digest)
        size, count = size + seen.found, count + 1
    if not count:
        raise BadRequest(f"{folder}: holds no image as <class>/<name>{{{','.join(ENDINGS)}}}; bring some")
    return SourceFile(name=str(folder), sha256=digest.hexdigest(), bytes=size)


def picture_batches(request: IngestRequest, rejects: Rejects) -> Iterator[pa.RecordBatch]:
    """Yield the image and the label column.

    Raises:
        BadRequest: an image that can't be read or is of another size, unless such are kept aside.
        IntegrityLost: the folder is not what it was when the run was planned.
    """
    file, folder = request.files[0], Path(request.files[0].name)
    digest, rows = hashlib.sha256(), []
    limit = max(1, BATCH_BYTES // request.feature.shape[0])
    for number, seen in enumerate(_seen(folder, partial(_pixels, request), min(limit, BLOCK_FILES)), 1):
        digest.update(seen.digest)
        if isinstance(seen.found, BadRequest):
            rejects.unread(number, f"{seen.path.relative_to(folder)}: {seen.found}", str(seen.path))
        else:
            rows.append((seen.found, seen.path.parent.name))
        if len(rows) == limit:
            yield _batch(request, rows)
            rows = []
    if digest.hexdigest() != file.sha256:
        raise IntegrityLost(f"{folder}: changed since the run was planned; start a new run")
    if rows:
        yield _batch(request, rows)


class _Seen(NamedTuple):
    """One image: the digest of its name and bytes, 64 bytes, and what was found in it, or why nothing can be."""

    path: Path
    digest: bytes
    found: Any


def _seen(folder: Path, look: Callable[[bytes], Any], block_files: int) -> Iterator[_Seen]:
    """Read every image, some at a time, and ``look`` into it; they come in their order, ``block_files`` at once."""
    cores = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    paths = _images(folder)
    with ThreadPoolExecutor(cores) as pool:
        while block := list(itertools.islice(paths, block_files)):
            # An image is a small thing to hand to a thread: each takes some.
            parts = [block[start::cores] for start in range(min(cores, len(block)))]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                done = list(pool.map(lambda part: [_looked_into(folder, path, look) for path in part], parts))
            yield from (done[place % cores][place // cores] for place in range(len(block)))


def _looked_into(folder: Path, path: Path, look: Callable[[bytes], Any]) -> _Seen:
    content = _read(path)
    name = os.fsencode(f"{path.parent.name}/{path.name}")
    digest = hashlib.sha256(name).digest() + hashlib.sha256(content).digest()
    try:
        return _Seen(path, digest, look(content))
    except BadRequest as error:
        return _Seen(path, digest, error)


def _batch(request: IngestRequest, rows: list[tuple[bytes, str]]) -> pa.RecordBatch:
    import pyarrow as pa

    pixels, labels = zip(*rows, strict=True)
    return pa.record_batch({request.feature.columns[0]: pa.array(pixels), request.label.column: pa.array(labels)})


def _images(folder: Path) -> Iterator[Path]:
    """The images by class, then by name. Links are not followed: they may lead out of the folder."""
    for group in sorted(item for item in folder.iterdir() if item.is_dir() and not item.is_symlink()):
        with os.scandir(group) as entries:
            names = sorted(item.name for item in entries if item.is_file(follow_symlinks=False))
        yield from (group / name for name in names if name.lower().endswith(ENDINGS))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadRequest(f"{path}: can't be read: {error.strerror}; give this user the right to read it") from None


def _pixels(request: IngestRequest, content: bytes) -> bytes:
    """One image as H*W bytes, scaled to the declared greatest value. Warnings are to be errors around it."""
    from PIL import Image, ImageOps

    feature, resize = request.feature, request.source.fit == "resize"  # type: ignore[union-attr]
    if len(content) > MAX_FILE_BYTES:
        raise BadRequest(f"has more than {MAX_FILE_BYTES} bytes")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check(image, feature, resize)
        grey = ImageOps.exif_transpose(image).convert("L")
    except (OSError, ValueError, SyntaxError, Warning, EOFError, Image.DecompressionBombError) as error:
        raise BadRequest(f"is no whole image ({' '.join(str(error).split())[:120]})") from None
    if grey.size != (feature.width, feature.height):
        if not resize:
            raise BadRequest(_size(grey.size, feature))
        grey = grey.resize((feature.width, feature.height), Image.Resampling.BILINEAR)
    if feature.max_value == 255:
        return grey.tobytes()
    return bytes(value * feature.max_value // 255 for value in grey.tobytes())


def _check(image: Any, feature: Any, resize: bool) -> None:
    """What the header says, before anything is unpacked."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadRequest(f"has {width} x {height} pixels, must be {MAX_PIXELS} or fewer")
    if not resize and sorted((width, height)) != sorted((feature.width, feature.height)):
        raise BadRequest(_size((width, height), feature))
    if getattr(image, "n_frames", 1) > 1:
        raise BadRequest(f"has {image.n_frames} frames, must be one still image")


def _size(found: tuple[int, int], feature: Any) -> str:
    wanted = f"must be {feature.width} x {feature.height} pixels (or data.source.fit: resize)"
    return f"has {found[0]} x {found[1]}, {wanted}"
