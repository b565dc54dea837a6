"""Images of one class each: they become pixels whenever they are read."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import BaseImageProcessor

from distill.tasks.base import Batch, EncodeOptions, Task, pipeline_usage
from distill.tasks.classification import CLASS_LINES, CLASSIFICATION


def encode_images(
    batch: Batch, numbers: Sequence[int], task: Task, processor: BaseImageProcessor, options: EncodeOptions
) -> Batch:
    """Turn images into `pixel_values`, with their labels.

    Args:
        batch: the task's column of images and `label`.
        numbers: of the rows; they change nothing here.
        task: which column is read.
        processor: the model's image processor.
        options: change nothing here.
    """
    images = [image.convert("RGB") for image in batch[task.text[0]]]  # as `pipeline` reads them
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": list(pixels), "labels": batch["label"]}


IMAGE_CLASSIFICATION = replace(
    CLASSIFICATION,
    columns=("image",),
    pairs=False,
    reads="images",
    unlabelled=False,
    stored_predictions=False,
    encode=encode_images,
    prediction=replace(CLASS_LINES, encode=encode_images),
    metrics=("accuracy", "f1_macro"),
    auto_class="AutoModelForImageClassification",
    architectures=("ForImageClassification",),
    peft_task=None,
    heads=("classifier",),
    pipeline_tag="image-classification",
    usage=pipeline_usage("image-classification", '"photo.jpg"'),
    engine_usage=None,
)
