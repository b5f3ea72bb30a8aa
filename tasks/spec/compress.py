"""Section ``compress``: which candidates are made of one training, and which of those that pass is taken."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from tasks.spec.value import Value

Variant = Literal["fp32", "int8"]


class Compress(Value):
    variants: tuple[Variant, ...] = Field(default=("fp32", "int8"), min_length=1)
    objective: Literal["quality", "latency", "size"] = Field(
        default="size", description="which passing candidate is taken"
    )

    @field_validator("variants")
    @classmethod
    def _distinct(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        if len(set(variants)) != len(variants):
            raise ValueError(f"{list(variants)}, must be distinct")
        return variants
