"""Measurements of what the library costs, against what it must cost."""
