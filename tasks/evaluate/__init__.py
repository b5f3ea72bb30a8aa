"""Evaluation: one package on the holdout, measured on the very package that would be served."""
