"""Small prepared datasets with content, and small random models saved to disk."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from distrec.data.dataset import Dataset, write_part
from distrec.data.manifest import FORMAT, Manifest, write_manifest
from distrec.data.storage import open_folder

WORDS = [
    "a",
    "the",
    "small",
    "large",
    "red",
    "green",
    "round",
    "lamp",
    "chair",
    "table",
    "of",
    "wood",
    "glass",
    "for",
    "garden",
    "kitchen",
    "and",
    "with",
    "soft",
    "bright",
]


def texts(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    dice = np.random.default_rng(seed)
    return [f"item {at} " + " ".join(dice.choice(WORDS, dice.integers(1, longest))) for at in range(count)]


def jpeg(seed: int, width: int = 48, height: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(sink, "JPEG")
    return sink.getvalue()


def write_dataset(
    path: str, text: Sequence[str | None] | None = None, image: Sequence[bytes | None] | None = None, parts: int = 2
) -> str:
    """A dataset for its content only: one user with one interaction per split."""
    items = len(text if text is not None else image or ())
    folder, files = open_folder(path), {}
    columns = {
        "text": pa.array(text or [None] * items, pa.string()),
        "image": pa.array(image or [None] * items, pa.binary()),
    }
    content = pa.table({"item": pa.array(np.arange(items, dtype=np.int32)), **columns})
    step = -(-items // parts)
    for part, start in enumerate(range(0, items, step)):
        name = f"content/part-{part:05d}.parquet"
        files[name] = write_part(folder, name, content.slice(start, step), row_group_rows=7)
    table = pa.table(
        {
            "index": pa.array(np.arange(items, dtype=np.int32)),
            "original": [f"sku-{at}" for at in range(items)],
            "title": pa.nulls(items, pa.string()),
        }
    )
    files["items.parquet"] = write_part(folder, "items.parquet", table)
    files["users.parquet"] = write_part(
        folder, "users.parquet", pa.table({"index": pa.array([0], pa.int32()), "original": ["u"]})
    )
    for item, split in enumerate(("train", "valid", "test")):
        name = f"interactions/{split}/part-00000.parquet"
        row = {"user": pa.array([0], pa.int32()), "item": pa.array([item], pa.int32()), "timestamp": pa.array([item])}
        files[name] = write_part(folder, name, pa.table(row))
    manifest = Manifest(
        format=FORMAT, name="tiny", users=1, items=items, interactions={"train": 1, "valid": 1, "test": 1},
        split="given", id_order="sorted", features={}, config={}, files=files,
        content={name: items - column.null_count for name, column in columns.items()},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return path


def rows(path: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    dataset = Dataset.open(path)
    return dataset.feature_rows(name, 0, dataset.items)


def text_model(folder: Path, seed: int = 0, kind: str = "Bert", **settings: float) -> str:
    """A BERT (or similar model) of 24 dimensions and its word-piece tokenizer; `settings` go to its config."""
    import torch
    import transformers
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        "item",
        *"0123456789",
        *(f"##{n}" for n in range(10)),
    ]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    shape |= {"vocab_size": len(pieces), "max_position_embeddings": 40, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(initializer_range=0.3, **shape, **settings)
    getattr(transformers, f"{kind}Model")(config).eval().save_pretrained(folder)
    return str(folder)


def vit_model(folder: Path, kind: str = "ViT") -> str:
    """A ViT (or similar model) of 16 dimensions on 32 x 32 pixels."""
    import torch
    import transformers
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(image_size=32, patch_size=8, initializer_range=0.3, **shape)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def clip_model(folder: Path) -> str:
    """A CLIP whose two towers share 12 dimensions, with a BERT tokenizer, which AutoTokenizer also reads."""
    import torch
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    text_model(folder)
    torch.manual_seed(2)
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vocabulary = len((folder / "vocab.txt").read_text().split())
    config = CLIPConfig(
        text_config={**tower, "vocab_size": vocabulary, "max_position_embeddings": 20, "eos_token_id": 3},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def resnet_model(folder: Path) -> str:
    """A ResNet whose last feature map has 12 channels of 4 x 4 cells."""
    import torch
    from transformers import ResNetConfig, ResNetModel
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    torch.manual_seed(3)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder)
    return str(folder)
