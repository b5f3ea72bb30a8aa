"""Grey images as PNG data for a page, without an imaging library (PNG, ISO/IEC 15948)."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from tasks.spec.feature import ImageFeature


def data_uri(pixels: np.ndarray, feature: ImageFeature) -> str:
    """Return one image, uint8 [N], as a ``data:`` address that an HTML page can show."""
    import numpy as np

    grey = (pixels.reshape(feature.height, feature.width) * (255.0 / feature.max_value)).clip(0, 255)
    # Each line begins with its filter's number: 0, none.
    lines = np.hstack([np.zeros((feature.height, 1), np.uint8), grey.astype(np.uint8)])
    header = struct.pack(">IIBBBBB", feature.width, feature.height, 8, 0, 0, 0, 0)
    parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)), _chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
