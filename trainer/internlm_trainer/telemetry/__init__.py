"""What a run tells: a live display, log lines, reports to the operator, a last message."""
