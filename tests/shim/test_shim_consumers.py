"""The whole shim with torch, and the probes of the projects that import flash_attn."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

SERVED = [
    "flash_attn",
    "flash_attn.bert_padding",
    "flash_attn.flash_attn_interface",
    "flash_attn.layers",
    "flash_attn.layers.rotary",
    "flash_attn.losses",
    "flash_attn.losses.cross_entropy",
    "flash_attn.ops",
    "flash_attn.ops.activations",
    "flash_attn.ops.rms_norm",
    "flash_attn.ops.triton",
    "flash_attn.ops.triton.cross_entropy",
    "flash_attn.ops.triton.rotary",
    "flash_attn_2_cuda",
]

# Lines of real projects, as they stand there.
IMPORTS = """
from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from flash_attn import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func
from flash_attn import flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.bert_padding import index_put_first_axis, index_first_axis_residual
from flash_attn.bert_padding import unpad_input_for_concatenated_sequences
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward
from flash_attn.flash_attn_interface import _wrapped_flash_attn_backward
from flash_attn.flash_attn_interface import _wrapped_flash_attn_forward, _get_block_size_n
from flash_attn.flash_attn_interface import flash_attn_unpadded_func, flash_attn_varlen_func
from flash_attn.layers.rotary import ApplyRotaryEmb, ApplyRotaryEmbKV_, ApplyRotaryEmbQKV_
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb, apply_rotary_emb_func
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.activations import swiglu
from flash_attn.ops.rms_norm import DropoutAddRMSNorm, RMSNorm, dropout_add_rms_norm, rms_norm
from flash_attn.ops.triton.rotary import apply_rotary
import flash_attn_2_cuda
"""


def test_everything_served_can_be_imported(run_installed: Any) -> None:
    code = IMPORTS + (
        """
import pkgutil
import flash_attn
walked = [x.name for x in pkgutil.walk_packages(flash_attn.__path__, "flash_attn.")]
report(sorted(x for x in [*walked, "flash_attn", "flash_attn_2_cuda"] if "._" not in x))
"""
    )
    assert run_installed(code, MTLFLASHATTN_SHIM="on") == SERVED


def test_a_call_through_flash_attn(run_installed: Any) -> None:
    code = """
import torch
from flash_attn import flash_attn_func
q, k, v = (torch.randn(2, 7, 4, 32) for _ in range(3))
out = flash_attn_func(q, k, v, causal=True)
expected = torch.nn.functional.scaled_dot_product_attention(
    *(x.double().transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
report([flash_attn_func.__module__.partition(".")[0], float((out - expected).abs().max())])
"""
    module, error = run_installed(code, MTLFLASHATTN_SHIM="on")
    assert module == "metal_flash_attn"
    # Sums over 32 features and 7 keys of numbers below 4, in fp32.
    assert error <= (32 + 7) * 4 * 2.0**-24


def test_classes_can_be_pickled_under_the_names_of_flash_attn(run_installed: Any) -> None:
    code = """
import pickle
from flash_attn.layers.rotary import RotaryEmbedding
copy = pickle.loads(pickle.dumps(RotaryEmbedding(8)))
report([type(copy).__module__, type(copy) is RotaryEmbedding])
"""
    found = run_installed(code, MTLFLASHATTN_SHIM="on")
    assert found == ["flash_attn.layers.rotary", True]


def test_transformers_takes_remote_code_that_imports_flash_attn(
    run_installed: Any, tmp_path: Any
) -> None:
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    remote = tmp_path / "modeling_remote.py"
    remote.write_text("import torch\nimport flash_attn\n" + IMPORTS)
    code = f"""
from transformers.dynamic_module_utils import check_imports
report(check_imports({str(remote)!r}))
"""
    assert run_installed(code, MTLFLASHATTN_SHIM="on", HF_HUB_OFFLINE="1") == []


def test_transformers_can_be_imported_and_asked(run_installed: Any) -> None:
    # transformers 5.5 looks flash_attn up among the distributions while it is imported, without a
    # default. Without CUDA every version answers no.
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    code = """
import torch
from transformers.utils import import_utils
package = import_utils._is_package_available("flash_attn", return_version=True)
available = import_utils.is_flash_attn_2_available()
report([package, available == torch.cuda.is_available()])
"""
    found = run_installed(code, MTLFLASHATTN_SHIM="on", HF_HUB_OFFLINE="1")
    assert found == [[True, "2.8.3"], True]


def test_the_conditions_of_diffusers_hold(run_installed: Any) -> None:
    # Package, version of the distribution, then four names; the version is at least 2.6.3.
    code = """
import importlib.metadata, importlib.util, inspect
assert importlib.util.find_spec("flash_attn") is not None
version = tuple(map(int, importlib.metadata.version("flash_attn").split(".")))
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.flash_attn_interface import _wrapped_flash_attn_backward
from flash_attn.flash_attn_interface import _wrapped_flash_attn_forward
wanted = ["q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size"]
wanted.append("return_attn_probs")
names = inspect.signature(flash_attn_func).parameters
report([version >= (2, 6, 3), [x for x in wanted if x not in names]])
"""
    assert run_installed(code, MTLFLASHATTN_SHIM="on") == [True, []]


def test_diffusers_runs_its_flash_backend(run_installed: Any) -> None:
    if find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    code = """
import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
q, k, v = (torch.randn(2, 64, 4, 32, dtype=torch.bfloat16) for _ in range(3))
expected = torch.nn.functional.scaled_dot_product_attention(
    *(x.float().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
errors = []
for backend in ("flash", "flash_varlen"):
    with attention_backend(backend):
        out = dispatch_attention_fn(q, k, v)
    errors.append(float((out.float() - expected).abs().max()))
report(errors)
"""
    # The outputs are means of numbers below 4, rounded once to bfloat16.
    for error in run_installed(code, MTLFLASHATTN_SHIM="on", HF_HUB_OFFLINE="1"):
        assert error <= 4 * 2.0**-8


def test_the_probe_of_a_denied_transformers_sees_nothing(run_installed: Any) -> None:
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    code = """
import flash_attn
from transformers.utils import import_utils
report(import_utils._is_package_available("flash_attn", return_version=True))
"""
    env = {"MTLFLASHATTN_SHIM_DENY": "transformers", "HF_HUB_OFFLINE": "1"}
    assert run_installed(code, MTLFLASHATTN_SHIM="on", **env) == [False, "N/A"]


# What projects do with flash_attn once they have found it, in short.
USES = {
    "SeedVR2 asks for the compiled module, too": """
import importlib.util
found = all(importlib.util.find_spec(x) for x in ("flash_attn", "flash_attn_2_cuda"))
import flash_attn_2_cuda
assert found
""",
    "esm imports three parts one by one, and takes each for granted on a CPU": """
found = []
try:
    from flash_attn import flash_attn_varlen_qkvpacked_func
    found.append("attention")
except ImportError: pass
try:
    from flash_attn.bert_padding import pad_input, unpad_input
    found.append("padding")
except ImportError: pass
try:
    from flash_attn.ops.triton.rotary import apply_rotary
    found.append("rotary")
except ImportError: pass
assert found == ["attention", "padding", "rotary"]
x = torch.randn(2, 5, 3, 2, 8)
kept = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
packed, indices, cu_seqlens, longest, _ = unpad_input(x, kept)
angles = torch.randn(5, 4)
q = apply_rotary(packed[:, 0], angles.cos(), angles.sin(), cu_seqlens=cu_seqlens, max_seqlen=5)
out = flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, longest, softmax_scale=0.3)
assert pad_input(out, indices, 2, 5).shape == (2, 5, 2, 8) and q.shape == packed[:, 0].shape
""",
    "TRELLIS attends in thousands of windows": """
from flash_attn import flash_attn_varlen_qkvpacked_func
lengths = torch.randint(1, 9, (2000,))
cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
qkv = torch.randn(int(lengths.sum()), 3, 2, 8).half()
assert flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max(lengths.tolist())).isfinite().all()
""",
    "stable-audio-tools passes a window as a list": """
from flash_attn import flash_attn_func
q = torch.randn(1, 6, 2, 8)
assert torch.equal(flash_attn_func(q, q, q, window_size=[-1, -1]), flash_attn_func(q, q, q))
""",
    "the tests of flash_attn pass a window as a tensor": """
from flash_attn import flash_attn_func
q = torch.randn(1, 6, 2, 8)
same = flash_attn_func(q, q, q, window_size=(2, 1))
assert torch.equal(flash_attn_func(q, q, q, window_size=torch.tensor([2, 1])), same)
""",
    "HunyuanVideo merges by the second of four results": """
from flash_attn.flash_attn_interface import _flash_attn_forward
q = torch.randn(1, 6, 2, 8)
out, lse, mask, state = _flash_attn_forward(
    q, q, q, dropout_p=0.0, softmax_scale=0.3, causal=False, window_size_left=-1,
    window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False)
assert out.shape == q.shape and lse.shape == (1, 2, 6)
""",
    "Wan and FLASH_ATTENTION_DETERMINISTIC ask for determinism": """
from flash_attn import flash_attn_varlen_func
q = torch.randn(6, 2, 8)
cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
flash_attn_varlen_func(q, q, q, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=4,
                       max_seqlen_k=4, deterministic=True, dropout_p=0.0, causal=False)
""",
    "transformers learns from a signature what it may pass": """
import inspect
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
names = inspect.signature(flash_attn_varlen_func).parameters
for name in ("dropout_p", "softmax_scale", "causal", "window_size", "softcap", "deterministic",
             "block_table", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"):
    assert name in names, name
assert "cache_seqlens" in inspect.signature(flash_attn_with_kvcache).parameters
""",
    "ModernBERT compares the version of the distribution": """
import importlib.metadata
from packaging.version import parse
assert parse(importlib.metadata.version("flash_attn")) >= parse("2.5.7")
assert "flash-attn" in importlib.metadata.packages_distributions()["flash_attn"]
""",
}


def test_what_projects_do_with_it(run_installed: Any) -> None:
    code = f"""
import traceback, torch
failed = {{}}
for name, text in {USES!r}.items():
    try:
        exec(text, {{"torch": torch}})
    except BaseException:
        failed[name] = traceback.format_exc()
report(failed)
"""
    assert run_installed(code, MTLFLASHATTN_SHIM="on") == {}
