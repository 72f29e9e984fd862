"""How asks travel: within a process, to worker processes, between hospitals."""
