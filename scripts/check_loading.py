"""Load a drop-in strictly with whatever transformers and diffusers are installed, without erase-diffusion.

    python scripts/check_loading.py FOLDER [PIPELINE_FOLDER]

Fails when a key is missing or unknown. Prints the versions and the encoder's output on one prompt (mean and
norm), so that two environments can be compared; with a pipeline folder, draws one picture as well.
"""

import sys
from pathlib import Path

import diffusers
import torch
import transformers
from transformers import CLIPTextModel, CLIPTokenizer


def main() -> None:
    folder = Path(sys.argv[1])
    model, info = CLIPTextModel.from_pretrained(
        folder, subfolder="text_encoder", use_safetensors=True, output_loading_info=True
    )
    problems = {k: v for k, v in info.items() if v}
    if problems:
        sys.exit(f"not a strict fit: {problems}")
    model = model.float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    length = model.config.max_position_embeddings
    ids = tokenizer(["a red car in the snow"], padding="max_length", max_length=length, return_tensors="pt").input_ids
    with torch.no_grad():
        states = model(input_ids=ids).last_hidden_state
    print(f"transformers {transformers.__version__}, diffusers {diffusers.__version__}: ids {ids[0, :8].tolist()}")
    print(f"output mean {states.mean():.5f} norm {states.norm():.4f}")
    if len(sys.argv) > 2:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            sys.argv[2], text_encoder=model, torch_dtype=torch.float32
        )
        generator = torch.Generator().manual_seed(0)
        image = pipe("a red car in the snow", num_inference_steps=3, generator=generator, output_type="np").images[0]
        print(f"picture mean {image.mean():.4f} std {image.std():.4f}")


if __name__ == "__main__":
    main()
