"""Rules and evidence in, a verdict out. Pure."""
