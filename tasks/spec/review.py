"""Section ``review``: whether a person decides on a version before it is released, and who may."""

from __future__ import annotations

from pydantic import Field, model_validator

from tasks.spec.value import Value


class Review(Value):
    required: bool = True
    approvers: tuple[str, ...] = Field(default=(), description="Airflow users who may decide; empty: any")
    two_person: bool = Field(default=False, description="who asked for the training or the release may not approve it")
    days: int = Field(default=14, ge=1, le=365, description="how long a release waits for the answer, then it fails")
    accept_unnamed: bool = Field(
        default=False, description="an approval by a tag in MLflow counts, which carries no author"
    )

    @model_validator(mode="after")
    def _tags_have_no_author(self) -> Review:
        if self.two_person and self.accept_unnamed:
            raise ValueError(
                "accept_unnamed = true, must be false where two_person is true: a tag has no author"
            )
        return self
