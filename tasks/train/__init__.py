"""Training: ``fit`` on the platform's side, ``rank`` on every rank's side."""
