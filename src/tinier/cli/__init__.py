"""The command line: one file a verb, no logic. Start at `main.py`."""
