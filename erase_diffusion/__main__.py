"""`python -m erase_diffusion`, for launchers that start modules: the commands of `erase-diffusion`."""

from erase_diffusion.cli import erase_diffusion

if __name__ == "__main__":
    erase_diffusion(prog_name="erase-diffusion")
