"""`kubectl internlm`: what `kubectl` alone does not show of jobs, with the user's own rights."""
