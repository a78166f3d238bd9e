"""The command line: one short file per verb; holds no arithmetic."""
