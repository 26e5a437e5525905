"""The parts of `benchmark_erasers.py`: what is measured of a method, on the CLIP itself, and how it is shown."""
