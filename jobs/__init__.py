"""Entry points: parse flags, call the pipeline, print."""
