"""Engines: transport of requests within a process, to worker processes, and between hospitals."""
