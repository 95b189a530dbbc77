"""The operation: Dagster definitions, sensors, the detached trainer, tracking, and the commands that start services."""
