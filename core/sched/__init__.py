"""The scheduler, which turns the grants of a batching policy into steps."""
