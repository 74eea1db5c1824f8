"""A real Kubernetes cluster on one Linux machine, for tests. See README.md beside this file."""
