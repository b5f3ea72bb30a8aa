"""The model card: what a reviewer reads in MLflow before saying yes (Mitchell 2019, arXiv:1810.03993)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render_card(template: Path, facts: dict[str, Any]) -> str:
    """Return the card's Markdown from the template in ``mlflow/``; a fact that is missing is an error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(template.read_text()).render(facts)
