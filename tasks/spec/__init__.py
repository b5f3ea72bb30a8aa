"""What workload files, settings and step requests may say: frozen values, extra fields forbidden, no I/O."""
