"""One file a stage: `run(config, *, inputs…, out, sink) -> Manifest`. The command line, DVC and Dagster call the same functions.

This module stays free of heavy imports: orchestration reads the code versions when it loads.
"""

# Raise a stage's number when its result changes for equal inputs and settings.
CODE = {
    "corpus": "2",
    "grow": "1",
    "questions": "2",
    "ict": "4",
    "pretrain": "4",
    "reembed": "1",
    "index": "1",
    "qualify": "1",
    "drift": "1",
    "finetune": "5",
    "evaluate": "2",
}
