"""Traces: requests with their arrivals and lengths, from recordings, public data sets and distributions."""
