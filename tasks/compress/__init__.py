"""Compression: trained weights in, a model package and its report out, for each variant."""
