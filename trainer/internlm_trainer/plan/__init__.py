"""What a layout costs in memory and in communication, before anything runs.  Pure arithmetic."""
