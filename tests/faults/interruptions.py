"""Processes killed, stopped and restarted: F1 to F4, F12, F15."""
