"""The attention of well-known models, one call of each kind that takes time, with its source.

Sizes that a model leaves to its user (pixels, frames, prompt, cache) are those of its examples or
its training. Guidance that doubles the batch is counted where the model's pipeline batches it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

from .problem import Problem


@dataclass(frozen=True)
class Preset:
    """The calls of one model.

    Attributes:
        source: where the sizes come from.
    """

    name: str
    about: str
    dtype: str
    source: str
    calls: tuple[Problem, ...]

    @property
    def problems(self) -> list[Problem]:
        """The calls with the dtype that the model runs in, under the preset's name."""
        return [
            replace(call, dtype=self.dtype, name=f"{self.name} {call.name}") for call in self.calls
        ]


def _call(name: str, shape: str, **others: Any) -> Problem:
    return replace(Problem.parse(shape), name=name, **others)


def _prefill(name: str, shape: str) -> Problem:
    return _call(name, shape, causal=True)


def _decode(name: str, shape: str) -> Problem:
    return _call(name, shape, layout="heads")


def _windows_of_a_sphere(resolution: int, radius: int, window: int) -> tuple[int, ...]:
    """Voxels of a sphere's surface in each cubic window that has any: windowed sparse attention.

    A voxel counts if the surface passes between its nearest and its farthest corner. Windows fill
    the grid without a shift, so that the eight octants are alike.
    """
    counts: dict[tuple[int, int, int], int] = {}
    for x, y in itertools.product(range(resolution // 2), repeat=2):
        near = radius**2 - x**2 - y**2
        far = radius**2 - (x + 1) ** 2 - (y + 1) ** 2
        if near < 0:
            continue
        for z in range(math.isqrt(max(far, 0)), math.isqrt(near) + 1):
            window_of_voxel = (x // window, y // window, z // window)
            counts[window_of_voxel] = counts.get(window_of_voxel, 0) + 1
    return tuple(counts.values()) * 8


_TRELLIS_WINDOWS = _windows_of_a_sphere(resolution=64, radius=24, window=8)
# The flow transformer joins 2x2x2 voxels to a token.
_TRELLIS_TOKENS = sum(_windows_of_a_sphere(resolution=32, radius=12, window=8))

PRESETS = (
    Preset(
        "sd15",
        "Stable Diffusion 1.5, 512x512 pixels, classifier-free guidance",
        "f16",
        "configs/stable-diffusion/v1-inference.yaml of github.com/CompVis/stable-diffusion",
        (
            _call("self 64x64", "2x4096x8x40"),
            _call("self 32x32", "2x1024x8x80"),
            _call("self 16x16", "2x256x8x160"),
            _call("text 64x64", "2x4096:77x8x40"),
        ),
    ),
    Preset(
        "sdxl",
        "Stable Diffusion XL base, 1024x1024 pixels, classifier-free guidance",
        "f16",
        "configs/inference/sd_xl_base.yaml of github.com/Stability-AI/generative-models",
        (
            _call("self 64x64", "2x4096x10x64"),
            _call("self 32x32", "2x1024x20x64"),
            _call("text 64x64", "2x4096:77x10x64"),
            _call("text 32x32", "2x1024:77x20x64"),
        ),
    ),
    Preset(
        "flux",
        "FLUX.1, 512 text tokens joined to those of the image",
        "bf16",
        "FluxTransformer2DModel of diffusers; patches of 16x16 pixels",
        (
            _call("512x512", "1x1536x24x128"),
            _call("1024x1024", "1x4608x24x128"),
        ),
    ),
    Preset(
        "wan",
        "Wan 2.2 text to video: A14B, 81 frames; TI2V-5B, 121 frames",
        "bf16",
        "wan/configs of github.com/Wan-Video/Wan2.2; strides 4x8x8 and 4x16x16, patches 1x2x2",
        (
            _call("A14B 480x832", "1x32760x40x128"),
            _call("A14B 720x1280", "1x75600x40x128"),
            _call("5B 704x1280", "1x27280x24x128"),
            _call("A14B text", "1x32760:512x40x128"),
        ),
    ),
    Preset(
        "hunyuan3d",
        "Hunyuan3D 2.1 shape generation, 4096 latents, and decoding of a chunk of points",
        "f16",
        "hy3dshape/configs of github.com/Tencent-Hunyuan/Hunyuan3D-2.1 (hunyuandit, 4096)",
        (
            _call("self", "2x4097x16x128"),
            _call("image", "2x4097:1370x16x128"),
            _call("points", "1x8000:4096x16x64"),
        ),
    ),
    Preset(
        "trellis",
        "TRELLIS: the surface of a sphere in 64x64x64 voxels, in windows of 8x8x8 and as a whole",
        "f16",
        "configs/vae (swin8_B) and configs/generation (img_dit_L) of github.com/microsoft/TRELLIS",
        (
            _call(
                "decoder windows",
                f"1x{max(_TRELLIS_WINDOWS)}x12x64",
                lengths=_TRELLIS_WINDOWS,
            ),
            _call("flow self", f"1x{_TRELLIS_TOKENS}x16x64"),
        ),
    ),
    Preset(
        "llama3",
        "Llama 3 8B: prompts, and one token after a cache",
        "bf16",
        "Grattafiori et al., The Llama 3 Herd of Models, arXiv:2407.21783, table 3",
        (
            _prefill("prefill 2k", "1x2048x32/8x128"),
            _prefill("prefill 8k", "1x8192x32/8x128"),
            _decode("decode 2k", "1x1:2048x32/8x128"),
            _decode("decode 8k", "1x1:8192x32/8x128"),
        ),
    ),
    Preset(
        "qwen3",
        "Qwen 3 0.6B and 8B: prompts, and one token after a cache",
        "bf16",
        "Yang et al., Qwen3 Technical Report, arXiv:2505.09388, table 1",
        (
            _prefill("0.6B prefill 4k", "1x4096x16/8x128"),
            _decode("0.6B decode 4k", "1x1:4096x16/8x128"),
            _prefill("8B prefill 4k", "1x4096x32/8x128"),
            _decode("8B decode 32k", "1x1:32768x32/8x128"),
        ),
    ),
    Preset(
        "whisper",
        "Whisper large: 30 seconds of sound, and the decoder's last token",
        "f16",
        "Radford et al., arXiv:2212.04356, table 1; n_audio_ctx, n_text_ctx of "
        "github.com/openai/whisper",
        (
            _call("encoder", "1x1500x20x64"),
            _decode("decoder cross", "1x1:1500x20x64"),
            _decode("decoder self", "1x1:448x20x64"),
        ),
    ),
    Preset(
        "modernbert",
        "ModernBERT base at its longest input: a layer in three is global, the others local",
        "bf16",
        "ModernBertConfig of transformers; Warner et al., arXiv:2412.13663",
        (
            _call("global 8k", "1x8192x12x64"),
            _call("local 8k", "1x8192x12x64", window=(64, 64)),
            _call("global 512", "8x512x12x64"),
        ),
    ),
)


def find(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: there is none.
    """
    for preset in PRESETS:
        if preset.name == name:
            return preset
    allowed = ", ".join(preset.name for preset in PRESETS)
    raise ValueError(f"--preset is {name!r}; allowed: {allowed}")
