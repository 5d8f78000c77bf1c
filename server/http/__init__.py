"""The HTTP server: application, routes, request and response bodies, streams."""
