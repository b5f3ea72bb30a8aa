"""A model card as MLflow keeps it."""

from __future__ import annotations

from tasks.registry.versions import CARD_CHARACTERS, CUT, fitting


def test_a_card_is_as_long_as_mlflows_column():
    """MLflow on PostgreSQL refuses a longer one; a picture's example request alone may be."""
    assert fitting("short") == "short"
    assert fitting("x" * CARD_CHARACTERS) == "x" * CARD_CHARACTERS
    long = fitting("x" * (CARD_CHARACTERS + 1))
    assert (len(long), long.endswith(CUT)) == (CARD_CHARACTERS, True)
