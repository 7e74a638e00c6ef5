"""Finds out why a job does not run, or runs slowly, and says what to do about it."""
