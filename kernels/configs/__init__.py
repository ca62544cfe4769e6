"""Tuned configurations, one JSON file a device."""
