"""Personal data on its way into the raw table: found, then kept, dropped, masked, hashed or generalised, and counted.

It happens before the first byte is written, so that no room, repair log, quarantine, data doc or report behind it can
hold what was taken out; what a killed step leaves can't either. The source itself is its owner's to guard.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from tasks.data.personal import HINTS, Found, find
from tasks.spec.errors import BadRequest, IntegrityLost
from tasks.spec.privacy import Finding, PrivateColumn, Receipt
from tasks.spec.requests import IngestRequest

if TYPE_CHECKING:
    import pyarrow as pa

# Where nothing is to be done but to tell, the first rows tell enough.
WATCHED_ROWS = 20_000
HASH_DIGITS = 16
SUSPECTED = re.compile(
    r"(?i)(^|[_\W])(name|surname|e?mail|phone|mobile|address|street|birth\w*|dob|ssn|passport|iban|card|salary|gender|"
    r"ethnicity|religion)($|[_\W])|(first|last|full|user)name|身份证|姓名|手机|电话|地址|生日"
)


def key_id(key: bytes) -> str:
    """Return what a key is known by; nothing about the key can be told from it."""
    return hmac.new(key, b"drydock privacy key id", hashlib.sha256).hexdigest()[:12]


class Protection:
    """What becomes of each table of an ingest; ``receipt`` says in the end what that was."""

    def __init__(self, request: IngestRequest, key: bytes) -> None:
        self._privacy, self._key = request.privacy, key
        if request.privacy.hashes and key_id(key) != request.privacy_key_id:
            raise IntegrityLost("data.privacy: the key that hashes changed since the run was planned; start a new run")
        self._hints = "|".join(f"(?:{HINTS[kind]})" for kind in request.privacy.kinds)
        # The label is one of the declared classes, the split's name one of three.
        annotators = request.label.annotators.columns if request.label.annotators else ()
        self._left = {request.label.column, request.split_column, *annotators}
        # Each word there has a tag: their number must stay.
        self._words = request.feature.columns[0] if request.feature.kind == "tokens" else None
        self._rows = self._scanned = 0
        self._columns: dict[str, None] = {}
        self._cells, self._found = Counter[Any](), Counter[Any]()
        self._suspected: dict[str, None] = {}

    def applied(self, table: pa.Table, file: str) -> pa.Table:
        """Return a table as it may be written.

        Raises:
            BadRequest: a kind is there that is to be refused; the message names file and column, never the value.
        """
        scanned = self._privacy.is_active or self._scanned < WATCHED_ROWS
        for place, field in enumerate(table.schema):
            column, declared = table.column(place), self._privacy.columns.get(field.name)
            if declared is not None:
                table = table.set_column(place, field, self._whole(field.name, column, declared).cast(field.type))
                continue
            if field.name in self._left:
                continue
            if SUSPECTED.search(field.name):
                self._suspected[field.name] = None
            if str(field.type) == "string" and self._privacy.kinds and scanned:
                self._columns[field.name] = None
                table = table.set_column(place, field, self._texts(field.name, column, file))
        self._rows += table.num_rows
        self._scanned += table.num_rows if scanned and self._columns else 0
        return table

    def receipt(self) -> Receipt:
        """Return what was found and done."""
        findings = tuple(
            Finding(column=column, kind=kind, action=action, cells=cells, found=self._found[column, kind, action])
            for (column, kind, action), cells in sorted(self._cells.items())
        )
        return Receipt(
            rows=self._rows,
            scanned_rows=self._scanned,
            scanned_columns=tuple(self._columns),
            kinds=self._privacy.kinds,
            findings=findings,
            suspected=tuple(self._suspected),
            key_id=key_id(self._key) if self._privacy.hashes else None,
        )

    def _whole(self, name: str, column: pa.ChunkedArray, declared: PrivateColumn) -> Any:
        """A column that is personal in every cell."""
        import pyarrow as pa
        import pyarrow.compute as pc

        there = len(column) - column.null_count
        if there:
            self._count(name, declared.kind, declared.action, 1, there)
        if declared.action == "drop":
            return pa.nulls(len(column), column.type)
        if declared.width is not None:
            return pc.multiply(pc.floor(pc.divide(column, declared.width)), declared.width)
        if declared.first is not None:
            return pc.utf8_slice_codeunits(column, 0, declared.first)
        if declared.action == "mask":
            return pc.if_else(column.is_valid(), f"[{declared.kind}]", None)
        texts = column.to_pylist()
        return pa.array([None if text is None else self._digest(declared.kind, text.strip()) for text in texts])

    def _texts(self, name: str, column: pa.ChunkedArray, file: str) -> pa.ChunkedArray:
        """A column of texts, in which personal data may stand anywhere."""
        import pyarrow as pa
        import pyarrow.compute as pc

        hit = pc.fill_null(pc.match_substring_regex(column, self._hints), False)
        if not pc.any(hit).as_py():
            return column
        texts, changed = column.to_pylist(), False
        for row in pc.indices_nonzero(hit).to_pylist():
            found = find(texts[row], self._privacy.kinds, self._privacy.regions)
            if found:
                self._tell(name, found, file, row)
                new = self._rewritten(texts[row], found, name == self._words)
                changed, texts[row] = changed or new != texts[row], new
        return pa.chunked_array([pa.array(texts, column.type)]) if changed else column

    def _tell(self, name: str, found: list[Found], file: str, row: int) -> None:
        for kind, count in Counter(item.kind for item in found).items():
            action = self._privacy.action_of(kind)
            if action == "refuse":
                where = f"{file}: column {name!r}, row {self._rows + row + 1} of the data set"
                raise BadRequest(f"{where}: holds personal data ({kind}), which data.privacy refuses; take it out")
            self._count(name, kind, action, count)

    def _count(self, column: str, kind: str, action: str, found: int, cells: int = 1) -> None:
        self._cells[column, kind, action] += cells
        self._found[column, kind, action] += found * cells

    def _rewritten(self, text: str, found: list[Found], is_words: bool) -> str:
        parts, end = [], 0
        for item in found:
            written = text[item.start : item.end]
            new = self._instead(written, item)
            if is_words and new != written:
                one = new.replace(" ", "_") or f"[{item.kind}]"
                new = " ".join([one] * (written.count(" ") + 1))
            parts += [text[end : item.start], new]
            end = item.end
        return "".join([*parts, text[end:]])

    def _instead(self, written: str, item: Found) -> str:
        action = self._privacy.action_of(item.kind)
        if action == "keep":
            return written
        if action == "drop":
            return ""
        if action == "hash":
            return f"[{item.kind}:{self._digest(item.kind, item.canonical)}]"
        return coarse(item) if action == "generalise" else f"[{item.kind}]"

    def _digest(self, kind: str, value: str) -> str:
        """A keyed digest (HMAC, RFC 2104): without the key no list of telephone numbers finds them again."""
        return hmac.new(self._key, f"{kind}\0{value}".encode(), hashlib.sha256).hexdigest()[:HASH_DIGITS]


def coarse(item: Found) -> str:
    """Return what of a finding names many: a mail's domain, a number's country, a network, a province."""
    value = item.canonical
    if item.kind == "email":
        return f"[email @{value.rpartition('@')[2]}]"
    if item.kind == "phone":
        import phonenumbers

        return f"[phone +{phonenumbers.parse(value).country_code}]"
    if item.kind == "ip":
        bits = 48 if ":" in value else 24
        return f"[ip {ipaddress.ip_network(f'{value}/{bits}', strict=False)}]"
    if item.kind in ("iban", "resident_id"):
        return f"[{item.kind} {value[:2]}]"
    if item.kind == "card":
        return f"[card of {len(value)} digits]"
    return f"[{item.kind}]"
