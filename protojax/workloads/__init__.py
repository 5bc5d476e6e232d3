"""One file a workload: it maps the names of its configurations to code and says what the summary and the report hold.

`experiment.py` dispatches here; docs/adding_a_method.md says how to add one.
"""
