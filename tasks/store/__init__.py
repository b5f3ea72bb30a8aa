"""Rooms, manifests written last, signatures, whole-file writes and the event log."""
