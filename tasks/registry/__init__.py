"""MLflow's only home: runs, versions, cards, aliases."""
