"""Drydock: models are built, inspected, refitted, launched and recalled here."""
