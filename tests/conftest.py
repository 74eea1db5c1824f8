"""What every test may use: the test cluster's fixtures, started only where a test asks for them."""

pytest_plugins = ["cluster.fixtures"]
