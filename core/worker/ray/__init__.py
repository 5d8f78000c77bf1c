"""Ranks on several hosts: Ray places them and watches over their nodes; what they are told does not go through it."""
