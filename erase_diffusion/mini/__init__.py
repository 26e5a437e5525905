"""The embedded model: a picture-book world drawn by code, and a Stable Diffusion trained on it."""
