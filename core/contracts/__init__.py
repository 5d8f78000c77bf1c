"""What each kind of plugin promises, one file a kind. The engine talks to plugins through these classes alone."""
