"""Ten models of transformers 5 in PyTorch: small configurations, random weights."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import transformers

# By its name, because type checkers find this folder, which is also named torch.
torch: Any = importlib.import_module("torch")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and what it is called with.

    Args:
      make: makes it.
      inputs: by keyword.
      slide: the window, for models whose scores at every position make sense.
      export: whether the test exports it.
    """

    make: Callable[[], Any]
    inputs: dict[str, Any]
    slide: int | None = None
    export: bool = False


_VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
}
_TEXT = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _drawn(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.manual_seed(1))


def _images(size: int) -> dict[str, Any]:
    return {"pixel_values": _drawn(1, 3, size, size)}


def _resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        layer_type="basic",
        num_labels=5,
    )
    return transformers.ResNetForImageClassification(config)


def _convnext() -> Any:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, num_labels=5
    )
    return transformers.ConvNextForImageClassification(config)


def _swin() -> Any:
    config = transformers.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        num_labels=5,
    )
    return transformers.SwinForImageClassification(config)


def _bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=16,
    )
    return transformers.BertModel(config)


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        **_TEXT,
        d_model=24,
        encoder_layers=1,
        encoder_attention_heads=3,
        encoder_ffn_dim=40,
        num_mel_bins=8,
        max_source_positions=10,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForAudioClassification(config).encoder


def _segformer() -> Any:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 12],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=5,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def _mobilenet() -> Any:
    config = transformers.MobileNetV2Config(
        image_size=32, depth_multiplier=0.1, num_labels=5
    )
    return transformers.MobileNetV2ForImageClassification(config)


CASES = {
    "ResNet": Case(_resnet, _images(32), slide=32, export=True),
    "ViT": Case(
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**_VIT, intermediate_size=40, num_labels=5)
        ),
        _images(16),
        export=True,
    ),
    "ConvNeXt": Case(_convnext, _images(32), slide=32, export=True),
    "Swin": Case(_swin, _images(16)),
    "MobileNetV2": Case(_mobilenet, _images(32)),
    "BERT": Case(_bert, {"input_ids": torch.tensor([[3, 5, 8, 13, 21, 34, 2]])}),
    "CLIP vision": Case(
        lambda: transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**_VIT, intermediate_size=40)
        ),
        _images(16),
    ),
    "Whisper encoder": Case(_whisper, {"input_features": _drawn(1, 8, 20)}),
    "SegFormer": Case(_segformer, _images(32)),
    "DINOv2": Case(
        lambda: transformers.Dinov2ForImageClassification(
            transformers.Dinov2Config(**_VIT, mlp_ratio=2, num_labels=5)
        ),
        _images(16),
        export=True,
    ),
}


def made(case: Case) -> Any:
    """The model in eval mode, with norms that are not those of a fresh one."""
    torch.manual_seed(0)
    model = case.make().eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.01, 0.1)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return model
