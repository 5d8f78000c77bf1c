"""The HTTP server and the command line. Imports core, never plugins."""
