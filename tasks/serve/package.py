"""The model package: one folder that is verified as a whole, opened, and asked.

model.onnx       input [B, N] -> probabilities [B, K], of tagged words [B, K, T]; or a number [B, 1]; its data inside
signature.json   what it reads and answers
tokenizer.json   for texts and tagged words; ids.json, the known ones, for ids
golden.json      rows as a client sends them, and the answer
bom.json         what it was made of (CycloneDX), where whoever made it told
manifest.json    size and SHA-256 of each; its own digest is the package's digest
manifest.sig     its Ed25519 signature (a candidate has none yet)

B rows   N input width   K classes (1: a number)   T pieces   W words of all rows
"""

from __future__ import annotations

import hashlib
import itertools
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.serve.onnx_file import refuse_external_data
from tasks.serve.session import session_errors, start_session
from tasks.serve.signature import NEXT_PIECE, NUM_PARTS, Golden, Signature, Tensor, line
from tasks.spec.errors import BadRequest, DrydockError, IntegrityLost
from tasks.spec.feature import VOCABULARIES, check_texts, encode
from tasks.spec.ids import KnownIds
from tasks.spec.tokens import ask_words, words_of
from tasks.spec.value import Value
from tasks.store.files import write_json
from tasks.store.manifest import NAME, SIGNATURE, verify, write_manifest
from tasks.store.sign import PUBLIC, verify_folder_signature

if TYPE_CHECKING:
    import numpy as np

MODEL, PAPER, GOLDEN = "model.onnx", "signature.json", "golden.json"
BOM = "bom.json"
# Rounding: a softmax in float32 may end a hair above one.
ROUNDING = 1e-5
# A bound of a number's range may be rounded too, to a float16; of its size.
NUMBER_ROUNDING = 1e-3
ONNX_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}

T = TypeVar("T", bound=Value)


class Package:
    """An opened package. Only ``open_package`` makes one, so every byte behind it was verified."""

    def __init__(
        self, folder: Path, digest_sha256: str, papers: tuple[Signature, Golden], session: Any, tokenizer: Any
    ) -> None:
        self.folder = folder
        self.digest_sha256 = digest_sha256
        self.signature, self.golden = papers
        self._session = session
        self.tokenizer = tokenizer
        # A graph for texts that takes any width is not asked for more than the longest of a batch needs.
        is_fixed = isinstance(session.get_inputs()[0].shape[1], int)
        self._any_width = self.signature.feature.holds == "texts" and not is_fixed

    def predict(self, rows: Any) -> np.ndarray:
        """Return float32 probabilities [B, K] for B >= 1 rows in client form (see ``feature.encode``); of tagged words
        [W, K], row by row; or numbers [B, 1].

        Raises:
            BadRequest: rows that the feature does not allow.
            DrydockError: the graph failed, or answered what is no probability; such an answer never leaves.
        """
        return self.answer(self.validate(rows))

    def validate(self, rows: Any) -> Any:
        """Return rows that ``answer`` takes, and that may stand in one batch with others: float32 [B, N], int64
        [B, 2] of ids, or texts (tagged words: with one space between two).

        Raises:
            BadRequest: rows that the feature does not allow.
        """
        feature = self.signature.feature
        if not hasattr(rows, "__len__") or isinstance(rows, str) or not len(rows):
            raise BadRequest(f"{feature.kind} input: found no rows, must be 1 or more")
        if feature.kind == "tokens":
            return [" ".join(words) for words in words_of(feature, rows)]
        return check_texts(feature, rows) if feature.kind == "text" else encode(feature, rows, self.tokenizer)

    def answer(self, rows: Any) -> np.ndarray:
        """Return float32 probabilities for validated rows, as ``predict``.

        Raises:
            DrydockError: as ``predict``.
        """
        feature = self.signature.feature
        if feature.kind == "tokens":
            return ask_words(feature, [row.split() for row in rows], self.tokenizer, self._run, self._any_width)
        if feature.kind == "text":
            rows = encode(feature, rows, self.tokenizer, pad_to_longest=self._any_width)
        return self._run(rows)

    def continued(self, texts: list[str], most: list[int]) -> list[str]:
        """Return how each text goes on, by its likeliest next piece at each step (greedy): at most so many pieces, up
        to the end of the text or of the places that the graph has. A text that fills all of these goes on by nothing.

        Raises:
            DrydockError: the graph failed.
        """
        import numpy as np

        width = self.signature.feature.max_tokens
        told = [encoding.ids[:width] for encoding in self.tokenizer.encode_batch(texts)]
        starts = [len(ids) for ids in told]
        ends = [min(start + more, width) for start, more in zip(starts, most, strict=True)]
        going = [row for row in range(len(texts)) if starts[row] < ends[row]]
        while going:
            x = np.zeros((len(going), max(1, *(len(told[row]) for row in going))), dtype=np.int64)
            for place, row in enumerate(going):
                x[place, : len(told[row])] = told[row]
            pieces = dict(zip(going, self._ask(NEXT_PIECE.name, x)[:, 0].tolist(), strict=True))
            going = [row for row in going if pieces[row]]
            for row in going:
                told[row].append(pieces[row])
            going = [row for row in going if len(told[row]) < ends[row]]
        return [self.tokenizer.decode(ids[start:]) for ids, start in zip(told, starts, strict=True)]

    def num_answers(self, rows: Any) -> int:
        """Return how many answers ``predict`` gives to rows in client form: one for each, or for each word."""
        return sum(len(row.split()) for row in rows) if self.signature.feature.kind == "tokens" else len(rows)

    def best(self, answers: np.ndarray) -> list[int]:
        """Return for each answer the place of its class, or of the part of the range that its number is in."""
        import numpy as np

        number = self.signature.number
        if number is None:
            return answers.argmax(axis=1).tolist()
        parts = ((answers[:, 0] - number.min) * (NUM_PARTS / number.span)).astype(int)
        return np.clip(parts, 0, NUM_PARTS - 1).tolist()

    def labels(self, rows: Any, best: list[int], answers: np.ndarray) -> list[str]:
        """Return what each row is told, of its answers and the places of their classes: one name, or a tag for each
        word with a space between two; or a number in digits."""
        if self.signature.number is not None:
            return [f"{value:.7g}" for value in answers[:, 0].tolist()]
        names = [self.signature.classes[k] for k in best]
        if self.signature.feature.kind != "tokens":
            return names
        answers = iter(names)
        return [" ".join(itertools.islice(answers, self.num_answers([row]))) for row in rows]

    def _run(self, x: np.ndarray) -> np.ndarray:
        """Ask the graph: encoded input [B, N] -> [B, K], of tagged words [B, K, N]."""
        answer = self._ask(self.signature.graph_output.name, x)
        places = x.shape[1:] if self.signature.feature.kind == "tokens" else ()
        return self._checked(answer, (len(x), self.signature.graph_output.shape[1], *places))

    def _ask(self, name: str, x: np.ndarray) -> np.ndarray:
        try:
            return self._session.run([name], {"input": x})[0]
        except session_errors() as error:
            raise DrydockError(f"{self._name}: the graph failed: {error}") from error

    def width(self, rows: Any) -> int:
        """Return what the dearest of validated rows costs beside others: 1, or its characters where the graph takes
        any width and the batch is padded to the longest."""
        return max([1, *map(len, rows)]) if self._any_width else 1

    def check_golden(self) -> None:
        """Ask the golden rows and compare.

        Raises:
            IntegrityLost: an answer differs by more than the tolerance: other bytes or another runtime.
        """
        import numpy as np

        found, wanted = self.predict(self.golden.rows), np.asarray(self.golden.probabilities)
        if found.shape != wanted.shape:
            raise IntegrityLost(f"{self._name}: golden answer is {found.shape}, must be {wanted.shape}")
        difference = float(np.abs(found - wanted).max())
        if not difference <= self.golden.tolerance:
            limit = self.golden.tolerance
            raise IntegrityLost(f"{self._name}: golden answer differs by {difference:.3g}, limit {limit:.3g}")

    def _checked(self, answer: np.ndarray, wanted: tuple[int, ...]) -> np.ndarray:
        import numpy as np

        if answer.shape != wanted:
            raise DrydockError(f"{self._name}: the graph answered shape {answer.shape}, must be {wanted}")
        low, high = float(np.minimum.reduce(answer, axis=None)), float(np.maximum.reduce(answer, axis=None))
        least, most, slack = self._range
        # Written so that NaN fails it.
        if not (low >= least - slack and high <= most + slack):
            found = f"the graph answered {low:.3g} to {high:.3g}"
            raise DrydockError(f"{self._name}: {found}, must be {least:g} to {most:g}")
        return answer if low >= least and high <= most else np.clip(answer, least, most)

    @cached_property
    def _range(self) -> tuple[float, float, float]:
        """Between what answers are, and how much a bound may be rounded."""
        number = self.signature.number
        if number is None:
            return 0, 1, ROUNDING
        return number.min, number.max, NUMBER_ROUNDING * max(abs(number.min), abs(number.max))

    @property
    def _name(self) -> str:
        return f"{self.signature.workload} package {self.digest_sha256[:12]}"


def open_package(folder: Path, digest_sha256: str | None, keys: Path | None, threads: int = 1) -> Package:
    """Open a package after every byte was held against its manifest.

    ``digest_sha256`` is the package that must be found (None: any); with ``keys`` its signature is verified
    too (only the public half is read). ``threads`` is what one prediction may use.

    Raises:
        IntegrityLost: changed, missing, extra or linked files, another package, another signer.
        BadRequest: a format that no package may hold.
    """
    if keys is not None and not (keys / PUBLIC).is_file():
        raise BadRequest(f"{keys}: has no {PUBLIC}; name the folder that holds the public signing key")
    digest = verify(folder, digest_sha256)
    if keys is not None:
        verify_folder_signature(folder, keys)
    files = _read_verified(folder, digest)
    signature = _parse(files, folder, PAPER, Signature)
    _check_formats(folder, set(files), signature)
    golden = _parse(files, folder, GOLDEN, Golden)
    refuse_external_data(files[MODEL], str(folder / MODEL))
    name = VOCABULARIES.get(signature.feature.holds)
    tokenizer = _open_vocabulary(files[name], folder / name) if name else None
    session = _open_session(files[MODEL], signature, str(folder / MODEL), threads)
    return Package(folder, digest, (signature, golden), session, tokenizer)


def write_package(folder: Path, signature: Signature, golden: Golden) -> str:
    """Complete a folder that holds ``model.onnx`` (texts: ``tokenizer.json`` too, ids: ``ids.json``); return the
    package digest.

    Raises:
        BadRequest: a file is missing, or is of a format that no package may hold.
    """
    write_json(folder / PAPER, signature.model_dump(mode="json"))
    write_json(folder / GOLDEN, golden.model_dump(mode="json"))
    (folder / SIGNATURE).unlink(missing_ok=True)  # it was over another manifest
    _check_formats(folder, {path.name for path in folder.iterdir()} - {NAME, SIGNATURE}, signature)
    refuse_external_data((folder / MODEL).read_bytes(), str(folder / MODEL))
    return write_manifest(folder)


def _read_verified(folder: Path, digest_sha256: str) -> dict[str, bytes]:
    """Read the package once, each file held against the manifest again: what is loaded is what was verified,
    even if someone writes into the folder meanwhile."""
    manifest = (folder / NAME).read_bytes()
    listed = json.loads(manifest)["files"]
    files = {name: (folder / name).read_bytes() for name in listed}
    stated = {name: entry["sha256"] for name, entry in listed.items()}
    if _sha256(manifest) != digest_sha256 or {name: _sha256(files[name]) for name in files} != stated:
        raise IntegrityLost(f"{folder}: changed while it was opened")
    return files


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_formats(folder: Path, found: set[str], signature: Signature) -> None:
    """Refuse by name: what is not known to be safe (a pickle, say) has no place here, listed or not."""
    wanted = {MODEL, PAPER, GOLDEN, *(name for holds, name in VOCABULARIES.items() if holds == signature.feature.holds)}
    if extra := sorted(found - wanted - {BOM}):
        allowed = ", ".join(sorted(wanted | {BOM}))
        raise BadRequest(f"{folder}: {extra[0]} is not part of a model package, must be one of {allowed}")
    if missing := sorted(wanted - found):
        raise BadRequest(f"{folder}: {missing[0]} is missing, a model package needs it")


def _parse(files: dict[str, bytes], folder: Path, name: str, kind: type[T]) -> T:
    if name not in files:
        raise BadRequest(f"{folder}: {name} is missing, a model package needs it")
    try:
        return kind.parse(json.loads(files[name]), str(folder / name))
    except (ValueError, RecursionError):
        raise BadRequest(f"{folder / name}: is no JSON") from None


def _open_vocabulary(content: bytes, path: Path) -> Any:
    if path.name == VOCABULARIES["ids"]:
        return KnownIds.parse(content.decode(errors="replace"), str(path))
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing narrower
        raise BadRequest(f"{path}: is no tokenizer: {error}") from error


def _open_session(content: bytes, signature: Signature, where: str, threads: int) -> Any:
    session = start_session(content, where, threads)
    answers = [signature.graph_output, *([NEXT_PIECE] if signature.tells_next else [])]
    _check_tensors(where, "input", session.get_inputs(), [signature.graph_input])
    _check_tensors(where, "output", session.get_outputs(), answers)
    return session


def _check_tensors(where: str, side: str, found: list[Any], wanted: list[Tensor]) -> None:
    names = [item.name for item in wanted]
    if [item.name for item in found] != names:
        raise BadRequest(f"{where}: has {side}s {[item.name for item in found]}, must be {names}")
    for one, tensor in zip(found, wanted, strict=True):
        _check_tensor(where, side, one, tensor)


def _check_tensor(where: str, side: str, found: Any, wanted: Tensor) -> None:
    shape, kind = list(found.shape), found.type
    # A size that the graph leaves open shows as a name or None; the width may be open, the batch must be.
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    fits = len(sizes) == len(wanted.shape) and all(
        size in (-1, asked) for size, asked in zip(sizes, wanted.shape, strict=True)
    )
    if kind != ONNX_TYPES[wanted.dtype] or not fits:
        raise BadRequest(f"{where}: its {side} is {kind} {shape}, must be {line(wanted)} with a free batch")
