"""Bundled plugins, written as a third-party author would write them: they import `quire.sdk`, layers and operations."""
