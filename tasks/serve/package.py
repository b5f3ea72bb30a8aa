"""The model package: one folder that is verified as a whole, opened, and asked.

model.onnx       input [B, N] -> probabilities [B, K], of tagged words [B, K, T]; all of its data inside
signature.json   what it reads and answers
tokenizer.json   for texts and tagged words
golden.json      rows as a client sends them, and the answer
bom.json         what it was made of (CycloneDX), where whoever made it told
manifest.json    size and SHA-256 of each; its own digest is the package's digest
manifest.sig     its Ed25519 signature (a candidate has none yet)

B rows   N input width   K classes   T pieces   W words of all rows
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from tasks.serve.onnx_file import refuse_external_data
from tasks.serve.session import session_errors, start_session
from tasks.spec.errors import BadRequest, DrydockError, IntegrityLost
from tasks.spec.feature import Feature, check_texts, encode
from tasks.spec.tokens import ask_words, words_of
from tasks.spec.value import Value
from tasks.store.files import write_json
from tasks.store.manifest import NAME, SIGNATURE, verify, write_manifest
from tasks.store.sign import PUBLIC, verify_folder_signature

if TYPE_CHECKING:
    import numpy as np

MODEL, PAPER, TOKENIZER, GOLDEN = "model.onnx", "signature.json", "tokenizer.json", "golden.json"
BOM = "bom.json"
# Rounding: a softmax in float32 may end a hair above one.
ROUNDING = 1e-5
ONNX_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}

T = TypeVar("T", bound=Value)


class Tensor(Value):
    """One input or output of the graph; -1 stands for the batch."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int, ...] = Field(min_length=2, max_length=3)

    @field_validator("shape")
    @classmethod
    def _is_a_batch(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[0] != -1 or min(shape[1:]) < 1:
            raise ValueError(f"{list(shape)}, must be [-1, a width of 1 or more]")
        return shape


class Signature(Value):
    """What a package's graph reads and answers. ``classes`` are names, in the order of the outputs."""

    format: Literal[1] = 1
    workload: str = Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")
    variant: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,39}$")
    feature: Feature
    classes: tuple[str, ...] = Field(min_length=2)
    graph_input: Tensor
    graph_output: Tensor

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Signature:
        asked, answered = sides_of(self.feature, len(self.classes))
        if self.graph_input != asked:
            raise ValueError(f"graph_input = {_line(self.graph_input)}, must be {_line(asked)}")
        if self.graph_output != answered:
            raise ValueError(f"graph_output = {_line(self.graph_output)}, must be {_line(answered)}")
        return self


def sides_of(feature: Feature, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return what a graph for a feature reads and answers."""
    dtype = "int64" if feature.holds == "texts" else "float32"
    places = feature.shape if feature.kind == "tokens" else ()
    return (
        Tensor(name="input", dtype=dtype, shape=(-1, *feature.shape)),
        Tensor(name="probabilities", dtype="float32", shape=(-1, num_classes, *places)),
    )


class Golden(Value):
    """Rows in client form with the package's own answer; null is a missing number of a table."""

    rows: tuple[str, ...] | tuple[tuple[float | None, ...], ...] = Field(min_length=1)
    probabilities: tuple[tuple[float, ...], ...] = Field(min_length=1)
    tolerance: float = Field(default=1e-3, ge=0, le=1)

    @field_validator("rows", mode="before")
    @classmethod
    def _missing_is_null(cls, rows: Any) -> Any:
        if not isinstance(rows, list | tuple):
            return rows
        # NaN, which JSON can't say, is the one value that differs from itself.
        return tuple(
            tuple(None if value != value else value for value in row) if isinstance(row, list | tuple) else row
            for row in rows
        )


class Package:
    """An opened package. Only ``open_package`` makes one, so every byte behind it was verified."""

    def __init__(
        self, folder: Path, digest_sha256: str, papers: tuple[Signature, Golden], session: Any, tokenizer: Any
    ) -> None:
        self.folder = folder
        self.digest_sha256 = digest_sha256
        self.signature, self.golden = papers
        self._session = session
        self._tokenizer = tokenizer
        # A graph for texts that takes any width is not asked for more than the longest of a batch needs.
        self._any_width = tokenizer is not None and not isinstance(session.get_inputs()[0].shape[1], int)

    def predict(self, rows: Any) -> np.ndarray:
        """Return float32 probabilities [B, K] for B >= 1 rows in client form (see ``feature.encode``); of tagged words
        [W, K], row by row.

        Raises:
            BadRequest: rows that the feature does not allow.
            DrydockError: the graph failed, or answered what is no probability; such an answer never leaves.
        """
        return self.answer(self.validate(rows))

    def validate(self, rows: Any) -> Any:
        """Return rows that ``answer`` takes, and that may stand in one batch with others: float32 [B, N] or texts
        (tagged words: with one space between two).

        Raises:
            BadRequest: rows that the feature does not allow.
        """
        feature = self.signature.feature
        if not hasattr(rows, "__len__") or isinstance(rows, str) or not len(rows):
            raise BadRequest(f"{feature.kind} input: found no rows, must be 1 or more")
        if feature.kind == "tokens":
            return [" ".join(words) for words in words_of(feature, rows)]
        return check_texts(feature, rows) if feature.kind == "text" else encode(feature, rows)

    def answer(self, rows: Any) -> np.ndarray:
        """Return float32 probabilities for validated rows, as ``predict``.

        Raises:
            DrydockError: as ``predict``.
        """
        feature = self.signature.feature
        if feature.kind == "tokens":
            return ask_words(feature, [row.split() for row in rows], self._tokenizer, self._run, self._any_width)
        if self._tokenizer is not None:
            rows = encode(feature, rows, self._tokenizer, pad_to_longest=self._any_width)
        return self._run(rows)

    def num_answers(self, rows: Any) -> int:
        """Return how many answers ``predict`` gives to rows in client form: one for each, or for each word."""
        return sum(len(row.split()) for row in rows) if self.signature.feature.kind == "tokens" else len(rows)

    def labels(self, rows: Any, best: list[int]) -> list[str]:
        """Return what each row is told, of the places of its answers' classes: one name, or a tag for each word with a
        space between two."""
        names = [self.signature.classes[k] for k in best]
        if self.signature.feature.kind != "tokens":
            return names
        answers = iter(names)
        return [" ".join(itertools.islice(answers, self.num_answers([row]))) for row in rows]

    def _run(self, x: np.ndarray) -> np.ndarray:
        """Ask the graph: encoded input [B, N] -> [B, K], of tagged words [B, K, N]."""
        try:
            (answer,) = self._session.run(["probabilities"], {"input": x})
        except session_errors() as error:
            raise DrydockError(f"{self._name}: the graph failed: {error}") from error
        places = x.shape[1:] if self.signature.feature.kind == "tokens" else ()
        return self._checked(answer, (len(x), len(self.signature.classes), *places))

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
        # Written so that NaN fails it.
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            raise DrydockError(f"{self._name}: the graph answered {low:.3g} to {high:.3g}, must be 0 to 1")
        return answer if low >= 0 and high <= 1 else np.clip(answer, 0, 1)

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
    tokenizer = _open_tokenizer(files[TOKENIZER], folder / TOKENIZER) if TOKENIZER in files else None
    session = _open_session(files[MODEL], signature, str(folder / MODEL), threads)
    return Package(folder, digest, (signature, golden), session, tokenizer)


def write_package(folder: Path, signature: Signature, golden: Golden) -> str:
    """Complete a folder that holds ``model.onnx`` (texts: ``tokenizer.json`` too); return the package digest.

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
    wanted = {MODEL, PAPER, GOLDEN} | ({TOKENIZER} if signature.feature.holds == "texts" else set())
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


def _open_tokenizer(content: bytes, path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing narrower
        raise BadRequest(f"{path}: is no tokenizer: {error}") from error


def _open_session(content: bytes, signature: Signature, where: str, threads: int) -> Any:
    session = start_session(content, where, threads)
    _check_tensor(where, "input", session.get_inputs(), signature.graph_input)
    _check_tensor(where, "output", session.get_outputs(), signature.graph_output)
    return session


def _check_tensor(where: str, side: str, found: list[Any], wanted: Tensor) -> None:
    if [item.name for item in found] != [wanted.name]:
        raise BadRequest(f"{where}: has {side}s {[item.name for item in found]}, must be [{wanted.name!r}]")
    shape, kind = list(found[0].shape), found[0].type
    # A size that the graph leaves open shows as a name or None; the width may be open, the batch must be.
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    fits = len(sizes) == len(wanted.shape) and all(
        size in (-1, asked) for size, asked in zip(sizes, wanted.shape, strict=True)
    )
    if kind != ONNX_TYPES[wanted.dtype] or not fits:
        raise BadRequest(f"{where}: its {side} is {kind} {shape}, must be {_line(wanted)} with a free batch")


def _line(tensor: Tensor) -> str:
    return f"{tensor.name} {tensor.dtype} {list(tensor.shape)}"
