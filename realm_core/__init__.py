"""REALM without an orchestrator: text, corpus, data, model, index, training, evaluation, and one file a stage."""

__version__ = "0.1.0"
