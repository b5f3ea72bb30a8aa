"""From a source to a dataset revision: ingest, clean, validate data, validate labels, version."""
