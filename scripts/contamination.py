"""How many of a recipe's scored rows are among the rows trained on; nothing is trained.

    python scripts/contamination.py recipes/glue/minilm/stsb.yaml --data.path path/to/stsb

Values of the recipe are overridden as `distill run` does it. The last line is one JSON object.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from distill.data.load import load_data
from distill.evaluation.contamination import contamination_of, find_matches
from distill.recipes.recipe import load_recipe


def main() -> None:
    """Print examples, the most alike first, and how many rows of each split there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    given, more = parser.parse_known_args()
    overrides = {name.removeprefix("--"): value for name, value in zip(more[::2], more[1::2], strict=True)}
    recipe = load_recipe(given.recipe, overrides)
    data = load_data(recipe.task, recipe.data)
    matches = find_matches(data)
    if matches is None:
        raise SystemExit("there are no rows to train on")
    found = contamination_of(data, matches, {})
    for example in found.examples or ():
        print(f"{example['similarity']:.3f} {example['split']} {example['row']}: {example['text']}")
        print(f"      {example['trained_split']} {example['trained_row']}: {example['trained_text']}")
    trained = {split: len(data.splits[split]) for split in ("train", "unlabelled") if split in data.splits}
    print(json.dumps({"trained": trained, "scored": asdict(found)["splits"]}))


if __name__ == "__main__":
    main()
