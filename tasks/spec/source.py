"""Where a workload's rows come from. Secrets are references, resolved where a source is opened, never kept."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tasks.spec.value import Value, register_tags

SECRET = re.compile(r"\$\{secret:([A-Za-z0-9_.-]+)\}")
# A password written out in a URL: user:password@host.
PASSWORD = re.compile(r"://[^/@:]*:(?!\$\{secret:)[^/@]+@")
ColumnType = Literal["text", "number"]
Format = Literal["csv", "tsv", "jsonl", "parquet", "npz", "text"]


def _without_password(url: str) -> str:
    if PASSWORD.search(url):
        raise ValueError("holds a password, which belongs into a secret: write ${secret:NAME} in its place")
    return url


class BundledSource(Value):
    """A data set that ships inside scikit-learn."""

    kind: Literal["sklearn"]
    name: Literal["digits"]


class Encoded(Value):
    """What is said about files of rows; both are found out where they are not said."""

    format: Format | None = Field(default=None, description="default: the file's ending")
    encoding: str | None = Field(default=None, description="of CSV, TSV, JSON lines and texts; default: detected")
    row: Literal["line", "paragraph"] = Field(
        default="line", description="of a plain text: what becomes a row of the column text; empty ones are left out"
    )

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, encoding: str | None) -> str | None:
        try:
            # base64 and its like are codecs too, but not of texts; this refuses both.
            "".encode(encoding or "utf-8")
        except LookupError:
            raise ValueError(f"{encoding!r} is no encoding that Python knows, such as utf-8 or latin-1") from None
        return encoding


class FilesSource(Encoded):
    """CSV, TSV, JSON lines, Parquet, NPZ or texts: a path or glob, absolute or relative to the workload's folder."""

    kind: Literal["files"]
    path: str = Field(min_length=1)


class ArraysSource(Value):
    """One NPY or IDX file (also gzipped) for each column; row N is the Nth item of every one."""

    kind: Literal["arrays"]
    columns: dict[str, str] = Field(min_length=1, description="column: path")


class FoldersSource(Value):
    """Images in folders: ``path/<class>/<any name>``. The folder's name becomes the label."""

    kind: Literal["folders"]
    path: str = Field(min_length=1)
    fit: Literal["refuse", "resize"] = Field(default="refuse", description="an image of another size")


class SqlSource(Value):
    """What a query gives, from any database that SQLAlchemy opens (PostgreSQL: ``postgresql+pg8000://``)."""

    kind: Literal["sql"]
    url: str = Field(min_length=1, description="may be or hold a ${secret:NAME}")
    query: str = Field(min_length=1)

    _url = field_validator("url")(_without_password)

    @field_validator("query")
    @classmethod
    def _has_an_order(cls, query: str) -> str:
        # A row's id is its place: without an order the same rows would be another dataset each time.
        if not re.search(r"\border\s+by\b", query, re.IGNORECASE):
            raise ValueError("has no ORDER BY; the same rows must come in the same order")
        return query


class S3Source(Encoded):
    """Objects under ``s3://bucket/prefix``; without keys, those of the environment are used."""

    kind: Literal["s3"]
    url: str = Field(pattern=r"^s3://[^/]+/.+$")
    endpoint: str | None = Field(default=None, description="of a store that is not Amazon's: http://host:port")
    region: str | None = None
    access_key: str | None = None
    secret_key: str | None = None

    @field_validator("access_key", "secret_key")
    @classmethod
    def _is_a_reference(cls, key: str | None) -> str | None:
        if key is not None and not SECRET.fullmatch(key):
            raise ValueError("must be a ${secret:NAME}, never the key itself")
        return key


class HttpSource(Encoded):
    """One file behind an HTTP(S) address, whose SHA-256 is known beforehand."""

    kind: Literal["http"]
    url: str = Field(pattern=r"^(https?://|\$\{secret:)", description="may be or hold a ${secret:NAME}")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    _url = field_validator("url")(_without_password)


class RevisionSource(Value):
    """A revision of data in a Git repository with DVC: of this site's data sets, or of another's on this machine."""

    kind: Literal["dvc"]
    revision: str = Field(min_length=1, description="a tag, a branch or a commit; of this site: drydock data list")
    repository: str | None = Field(default=None, description="its folder; none: this site's own data sets")
    path: str | None = Field(default=None, description="the file's path there; none: the revision's own data")
    format: Format | None = Field(default=None, description="default: the file's ending")

    @model_validator(mode="after")
    def _another_needs_a_path(self) -> RevisionSource:
        if self.repository and not self.path:
            raise ValueError("path is missing; name the file of that repository")
        return self


class HuggingFaceSource(Value):
    """A folder that ``datasets`` saved to disk: one data set, or one for each split, then with a column ``split``.

    Classes that the data set names are read by their names.
    """

    kind: Literal["huggingface"]
    path: str = Field(min_length=1)


Source = Annotated[
    BundledSource
    | FilesSource
    | ArraysSource
    | FoldersSource
    | SqlSource
    | S3Source
    | HttpSource
    | RevisionSource
    | HuggingFaceSource,
    Field(discriminator="kind"),
]
register_tags("sklearn", "files", "arrays", "folders", "sql", "s3", "http", "dvc", "huggingface")


def secrets_of(source: Value) -> list[str]:
    """Return the fields of a source that hold a secret's reference."""
    return [text for text in source.model_dump(mode="json").values() if isinstance(text, str) and SECRET.search(text)]
