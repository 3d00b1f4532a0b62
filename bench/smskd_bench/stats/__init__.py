"""Statistics of few seeds: intervals, paired differences, verdicts, seeds needed. Numbers only."""
