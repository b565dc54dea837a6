"""Image classification: folders of images, vision transformers and convolutional students, and a whole run."""

import json
from dataclasses import asdict

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import MobileNetV2Config, ResNetConfig, ViTConfig, ViTImageProcessor, pipeline

from distill.cli import main
from distill.data.load import DataOptions, load_data
from distill.errors import InputError
from distill.models.load import load_processor
from distill.recipes.plan import make_plan
from distill.recipes.recipe import load_recipe
from distill.reports.report import write_report
from distill.runs.run import run_plan

CONFIGS = {
    "vit": ViTConfig(
        image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    ),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "mobilenet": MobileNetV2Config(image_size=8, depth_multiplier=0.25),
}


def draw(folder, split, count, seed):
    """Bright images are of one class, dark ones of the other."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        name = ("dark", "bright")[number % 2]
        pixels = generator.integers(0, 120, (8, 8, 3)) + 130 * (name == "bright")
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    draw(folder / "data", "train", 48, 0)
    draw(folder / "data", "validation", 24, 1)
    for name, config in CONFIGS.items():
        config.save_pretrained(folder / name)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / name)
    return folder


def test_images_are_read_as_pipeline_reads_them(folder):
    data = load_data(None, DataOptions(kind="image-classification", path=str(folder / "data")))
    assert data.task.label_names == ("bright", "dark")
    processor = load_processor(str(folder / "vit"), "image-classification")
    rows = data.tokenized("validation", processor)
    images = sorted((folder / "data" / "validation").glob("*/*.png"))
    shown = pipeline("image-classification", model=_saved(folder), image_processor=processor)
    expected = shown.preprocess(str(images[3]))["pixel_values"][0]
    assert np.array_equal(rows[3]["pixel_values"], expected)
    assert len(rows) == len(images)


def _saved(folder):
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_config(CONFIGS["vit"])


def test_files_may_name_their_images(folder, tmp_path):
    draw(tmp_path, "pictures", 8, 0)
    rows = [{"image": str(path.relative_to(tmp_path)), "label": path.parent.name}
            for path in sorted(tmp_path.glob("pictures/*/*.png"))]  # fmt: skip
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(None, DataOptions(kind="image-classification", path=str(tmp_path)))
    assert data.splits["train"][0]["image"].size == (8, 8)
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "nowhere.png", "label": "dark"}) + "\n")
    with pytest.raises(InputError, match=r"names .*nowhere.png, and there is no such file"):
        load_data(None, DataOptions(kind="image-classification", path=str(tmp_path)))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_image_paths_stay_beside_their_file(tmp_path, suffix):
    draw(tmp_path, "elsewhere", 2, 0)
    draw(tmp_path / "data [x]", "pictures", 2, 0)
    folder = tmp_path / "data [x]"
    secret = tmp_path / "elsewhere" / "dark" / "0.png"
    (folder / "link.png").symlink_to(secret)
    (folder / "inner.png").symlink_to(folder / "pictures" / "dark" / "0.png")

    def load(name):
        table = datasets.Dataset.from_dict({"image": [name, "pictures/bright/1.png"], "label": ["dark", "bright"]})
        write = {".jsonl": table.to_json, ".csv": table.to_csv, ".parquet": table.to_parquet}[suffix]
        for split in ("train", "validation"):
            write(str(folder / f"{split}{suffix}"))
        return load_data(None, DataOptions(kind="image-classification", path=str(folder)))

    for name in ("pictures/dark/0.png", "inner.png"):
        assert load(name).splits["train"][0]["image"].size == (8, 8)
    for name in (str(secret), "../elsewhere/dark/0.png", "pictures/../../elsewhere/dark/0.png", "file:///etc/passwd"):
        with pytest.raises(InputError, match=r"names '.*' in row 1; write paths that start at .*, without \.\."):
            load(name)
    with pytest.raises(InputError, match=r"link.png in row 1, a link out of"):
        load("link.png")


def test_the_fingerprint_follows_the_images_that_rows_name(tmp_path):
    draw(tmp_path, "pictures", 2, 0)
    rows = [{"image": f"pictures/{name}", "label": name[0]} for name in ("dark/0.png", "bright/1.png")]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = DataOptions(kind="image-classification", path=str(tmp_path))
    before = load_data(None, options).train_fingerprint
    assert load_data(None, options).train_fingerprint == before
    (tmp_path / "pictures" / "dark" / "0.png").write_bytes((tmp_path / "pictures" / "bright" / "1.png").read_bytes())
    assert load_data(None, options).train_fingerprint != before


def test_stored_images_are_read_and_their_paths_stay_inside(tmp_path):
    draw(tmp_path, "pictures", 2, 0)
    image = tmp_path / "pictures" / "dark" / "0.png"

    def load(stored):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        rows = {"image": [stored, stored], "label": ["dark", "bright"]}
        for split in ("train", "validation"):
            table = datasets.Dataset.from_dict(rows, features=features)
            pq.write_table(table.data.table, tmp_path / f"{split}.parquet")
        return load_data(None, DataOptions(kind="image-classification", path=str(tmp_path)))

    assert load({"bytes": image.read_bytes(), "path": None}).splits["train"][0]["image"].size == (8, 8)
    assert load({"bytes": None, "path": "pictures/dark/0.png"}).splits["train"][0]["image"].size == (8, 8)
    with pytest.raises(InputError, match=r"write paths that start at"):
        load({"bytes": None, "path": "/etc/passwd"})


@pytest.mark.parametrize("name", ["val", "dev"])
def test_folders_of_validation_images_under_their_other_names(tmp_path, name):
    draw(tmp_path, "train", 4, 0)
    draw(tmp_path, name, 2, 1)
    data = load_data(None, DataOptions(kind="image-classification", path=str(tmp_path)))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 4, "validation": 2}


def test_a_folder_without_images_is_told(tmp_path):
    (tmp_path / "train" / "dark").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no class folders with images"):
        load_data(None, DataOptions(kind="image-classification", path=str(tmp_path)))


def plan_of(folder, tmp_path, steps):
    path = tmp_path / "images.yaml"
    path.write_text(f"""
output_dir: {tmp_path / "run"}
data: {{kind: image-classification, path: {folder / "data"}}}
benchmark: {{throughput_batch_size: 2, rounds: 1}}
steps:
  teacher: {{run: finetune, model: {folder / "vit"}, from_scratch: true, max_steps: 40, learning_rate: 2e-3}}
  {steps}
""")
    return make_plan(load_recipe(path, draft=True))


def test_a_whole_run(folder, tmp_path):
    options = "max_steps: 40, learning_rate: 2e-3, hard_weight: 0.5"
    steps = f"student: {{run: distill, teacher: teacher, num_layers: 2, hidden_weight: 0.5, {options}}}"
    for name in ("resnet", "mobilenet"):
        model = f"model: {folder / name}, from_scratch: true"
        steps += f"\n  {name}: {{run: distill, teacher: teacher, {model}, {options}}}"
    steps += "\n  small: {run: quantize, model: student, format: int8}"
    steps += "\n  pruned: {run: prune, model: teacher, heads: 0.5, neurons: 0.5}"
    steps += f"\n  recovered: {{run: distill, model: pruned, teacher: teacher, hidden_weight: 0.5, {options}}}"
    steps += "\n  resnet-bf16: {run: quantize, model: resnet, format: bf16}"
    made = plan_of(folder, tmp_path, steps)
    run_plan(made)
    by_name = {model["name"]: model for model in asdict(write_report(made))["models"]}
    assert by_name["teacher"]["metrics"]["accuracy"] == 1.0
    assert by_name["student"]["metrics"]["accuracy"] == 1.0
    assert by_name["recovered"]["metrics"]["accuracy"] == 1.0
    assert by_name["recovered"]["flops_per_sample"] == by_name["pruned"]["flops_per_sample"]
    assert by_name["recovered"]["flops_per_sample"] < 0.6 * by_name["teacher"]["flops_per_sample"]
    assert by_name["resnet"]["metrics"]["accuracy"] > 0.8
    assert by_name["resnet-bf16"]["metrics"]["accuracy"] == by_name["resnet"]["metrics"]["accuracy"]
    assert by_name["student"]["flops_per_sample"] < by_name["teacher"]["flops_per_sample"]
    images = sorted((folder / "data" / "validation" / "dark").glob("*.png"))
    for name in ("student", "resnet", "resnet-bf16", "mobilenet", "recovered"):
        classify = pipeline("image-classification", str(made.steps[name].folder))
        found = classify(str(images[0]))
        assert {each["label"] for each in found} == {"bright", "dark"}
    assert pipeline("image-classification", str(made.steps["student"].folder))(str(images[0]))[0]["label"] == "dark"


def test_a_distillation_of_patches_can_be_checked(folder, tmp_path, capsys):
    step = "{run: distill, teacher: teacher, num_layers: 2, max_steps: 2, hidden_weight: 0.5}"
    plan_of(folder, tmp_path, f"student: {step}")
    assert main(["check", str(tmp_path / "images.yaml")]) == 0
    assert "hidden loss: 1→2, 2→4" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["hidden_weight", "attention_weight", "contrastive_weight"])
def test_what_is_inside_of_a_convolutional_student_is_not_compared(folder, tmp_path, part):
    step = f"student: {{run: distill, teacher: teacher, model: {folder / 'resnet'}, from_scratch: true, {part}: 1.0}}"
    with pytest.raises(InputError, match=f"{part}: resnet has no transformer blocks to compare; set it to 0"):
        plan_of(folder, tmp_path, step)


def test_patches_of_two_sizes_are_not_compared(folder, tmp_path):
    other = tmp_path / "other"
    settings = CONFIGS["vit"].to_dict() | {"patch_size": 2}
    type(CONFIGS["vit"])(**settings).save_pretrained(other)
    (other / "preprocessor_config.json").write_bytes((folder / "vit" / "preprocessor_config.json").read_bytes())
    step = f"student: {{run: distill, teacher: teacher, model: {other}, from_scratch: true, hidden_weight: 1.0}}"
    with pytest.raises(InputError, match=r"hidden_weight: compares patch .* of 2 pixels and the teacher of 4"):
        plan_of(folder, tmp_path, step)


def test_two_image_processors_are_refused(folder, tmp_path):
    other = tmp_path / "other"
    CONFIGS["resnet"].save_pretrained(other)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(other)
    with pytest.raises(InputError, match="its image processor is not that of teacher"):
        plan_of(folder, tmp_path, f"student: {{run: distill, teacher: teacher, model: {other}, from_scratch: true}}")


@pytest.mark.slow
def test_an_export_of_an_image_model_is_scored_with_its_processor(folder, tmp_path):
    steps = "served: {run: export, model: teacher, format: int8, agreement: 0.9, divergence: 0.1}"
    steps += "\n  plain: {run: export, model: teacher, engine: openvino}"
    made = plan_of(folder, tmp_path, steps)
    run_plan(made)
    by_name = {model["name"]: model for model in asdict(write_report(made))["models"]}
    assert by_name["plain"]["metrics"] == by_name["teacher"]["metrics"]
    assert by_name["served"]["metrics"]["accuracy"] >= 0.9
    assert by_name["served"]["flops_per_sample"] == by_name["teacher"]["flops_per_sample"]
    for name in ("served", "plain"):
        location = made.steps[name].folder
        assert (location / "preprocessor_config.json").is_file()
        assert "load_exported" in (location / "README.md").read_text()
    options = f"teacher: teacher, model: {folder / 'resnet'}, from_scratch: true, max_steps: 1"
    steps = f"resnet: {{run: distill, {options}}}\n  served: {{run: export, model: resnet, format: int8}}"
    with pytest.raises(InputError, match="format: int8 is for layers in transformer blocks; ResNetForImage"):
        plan_of(folder, tmp_path, steps)
