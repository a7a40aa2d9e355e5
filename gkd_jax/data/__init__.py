"""Data: sources of raw examples, tasks, vocabularies, and the pipeline that makes batches."""
