"""Airflow's only home in the package: operators, trigger, notifier, trigger forms, the REST client."""
