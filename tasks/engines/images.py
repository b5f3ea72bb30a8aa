"""The list of images that may run: a name, and the digest that it stands for. ``images/build`` writes it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tasks.spec.errors import BadRequest, IntegrityLost

LIST = "images.json"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def allowed_images(home: Path) -> dict[str, str]:
    """Return name -> digest; empty where no image was built yet.

    Raises:
        IntegrityLost: the list can't be read.
    """
    path = home / LIST
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise IntegrityLost(f"{path}: is no readable JSON; run images/build again") from None
    if not isinstance(found, dict) or not all(_DIGEST.fullmatch(str(digest)) for digest in found.values()):
        raise IntegrityLost(f"{path}: must map names to sha256 digests; run images/build again")
    return found


def digest_of_image(name: str | None, home: Path) -> str:
    """Return the digest of an allowed image. An image that is named by tag, or is not on the list, is refused.

    Raises:
        BadRequest: the message lists the allowed names.
    """
    allowed = allowed_images(home)
    if name is None or name not in allowed:
        known = ", ".join(sorted(allowed)) or "none yet: run images/build"
        raise BadRequest(f"image = {name!r}, must be on the list of allowed images ({known})")
    return allowed[name]
