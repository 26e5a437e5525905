"""How the embedded model is trained: one file for each component, driven by `train_mini.py`."""
