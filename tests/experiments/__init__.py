"""What the README says of learning, measured: `python -m tests.experiments --help`.

Each experiment prints a Markdown table. Its runs are lines of JSON in a file, so that an experiment
that was interrupted goes on, and several processes may share one. Not tests: they take hours.
"""
