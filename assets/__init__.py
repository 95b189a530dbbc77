"""The nouns of the loop as Dagster assets. Each one resolves its inputs, calls one stage, and reports the manifest."""
