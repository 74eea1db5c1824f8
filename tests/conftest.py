"""What every test may use: the test cluster's fixtures, started only where a test asks for them."""

from hypothesis import settings

pytest_plugins = ["cluster.fixtures"]

# A busy machine is no mistake of the code's.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
