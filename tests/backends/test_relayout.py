"""Compiled programs, read: texts as XLA writes them for a TPU, a GPU and a CPU."""

import jax
import jax.numpy as jnp
import pytest

from fcconv_jax.backends.relayout import relayout_bytes

TPU = """
%fused_computation.1 (p: f32[8,14,14,256]) -> bf16[8,14,14,256] {
  %p = f32[8,14,14,256]{3,0,2,1:T(8,128)} parameter(0)
  ROOT %copy.4 = bf16[8,14,14,256]{3,2,1,0:T(8,128)(2,1)} copy(%p), metadata={x="(%q)"}
}

%fused_computation (p0: f32[8,14,14,256], p1: f32[256,512]) -> f32[8,14,14,512] {
  %p0 = f32[8,14,14,256]{3,0,2,1:T(8,128)} parameter(0)
  %fusion = bf16[8,14,14,256]{3,2,1,0:T(8,128)(2,1)} fusion(%p0), kind=kLoop, \
calls=%fused_computation.1
  %p1 = f32[256,512]{1,0:T(8,128)S(1)} parameter(1)
  %bitcast = f32[256,512,1,1]{1,0,3,2:T(8,128)} bitcast(%p1)
  ROOT %convolution.1 = f32[8,14,14,512]{3,2,1,0:T(8,128)} convolution(%fusion, \
%bitcast), window={size=1x1}, dim_labels=01bf_io01->01bf
}

ENTRY %main.2 (x: f32[8,14,14,256], w: f32[256,512]) -> f32[8,14,14,512] {
  %w = f32[256,512]{1,0:T(8,128)} parameter(1), sharding={replicated}
  %copy-start = (f32[256,512]{1,0:T(8,128)S(1)}, f32[256,512]{1,0:T(8,128)}, \
u32[]{:S(2)}) copy-start(%w), cross_program_prefetch_index=0
  %x = f32[8,14,14,256]{3,0,2,1:T(8,128)} parameter(0)
  %copy-done = f32[256,512]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %convolution_fusion = f32[8,14,14,512]{3,2,1,0:T(8,128)S(1)} fusion(%x, \
%copy-done), kind=kOutput, calls=%fused_computation, backend_config={"window_config":\
{"estimated_cycles":"8904"}}
  ROOT %copy.1 = f32[8,14,14,512]{3,0,2,1:T(8,128)} copy(%convolution_fusion), \
backend_config={"window_config":{"estimated_cycles":"10109"}}
}
"""

GPU = """
%gemm (p0: f32[32,16], p1: f32[16,8]) -> f32[32,8] {
  %p0 = f32[32,16]{1,0} parameter(0)
  %p1 = f32[16,8]{1,0} parameter(1)
  ROOT %dot.1 = f32[32,8]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}
}

%wrapped_transpose_computation (p: f32[1,16,8]) -> f32[8,1,16] {
  %p = f32[1,16,8]{2,1,0} parameter(0)
  ROOT %transpose.1 = f32[8,1,16]{2,1,0} transpose(%p), dimensions={2,0,1}
}

ENTRY %main (x: f32[32,16], w: f32[16,8]) -> f32[32,8] {
  %x = f32[32,16]{1,0} parameter(0)
  %w = f32[16,8]{1,0} parameter(1)
  %gemm_fusion = f32[32,8]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm, \
backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %b = f32[1,16,8]{2,1,0} bitcast(%w)
  %wrapped_transpose = f32[8,1,16]{2,1,0} fusion(%b), kind=kInput, \
calls=%wrapped_transpose_computation
  %cudnn = (f32[32,1,8]{2,1,0}, u8[0]{0}) custom-call(%x, %wrapped_transpose), \
custom_call_target="__cudnn$convForward"
  ROOT %r = f32[32,1,8]{2,1,0} get-tuple-element(%cudnn), index=0
}
"""


def test_the_bytes_of_all_layout_copies():
    # Neither the prefetch, nor the copy that the product takes in on the way.
    assert relayout_bytes(TPU) == 4 * 8 * 14 * 14 * 512
    assert relayout_bytes(GPU) == 4 * 8 * 16


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        # Axes of size 1 lie anywhere.
        ("%c = f32[4,1,8]{2,1,0} copy(%x.{2,0,1})", 0),
        ("%c = f32[4,1,8]{0,1,2} copy(%x.{2,0,1})", 128),
        ("%c = f32[4,1,8]{2,0,1:S(1)} copy(%x.{2,0,1})", 0),
        ("%c = f32[8,1,4]{2,1,0} transpose(%x.{2,0,1}), dimensions={2,1,0}", 128),
    ],
)
def test_which_copies_change_the_order_in_memory(line, moved):
    text = f"""ENTRY %main (x: f32[4,1,8]) -> f32[4,1,8] {{
  %x = f32[4,1,8]{{2,0,1}} parameter(0)
  ROOT {line.replace("%x.{2,0,1}", "%x")}
}}"""
    assert relayout_bytes(text) == moved


def test_bodies_of_loops_count_once():
    copy = "%c = f32[4,8]{0,1} copy(%x)"
    text = f"""%body (x: f32[4,8]) -> f32[4,8] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  ROOT {copy}
}}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  ROOT %w = f32[4,8]{{0,1}} while(%x), condition=%none, body=%body
}}"""
    assert relayout_bytes(text) == 4 * 8 * 4


def test_xla_fuses_a_transpose_into_a_copy():
    x = jnp.ones((32, 64))
    moved = jax.jit(lambda x: x.T).lower(x).compile().as_text()
    assert relayout_bytes(moved) in (0, x.nbytes)  # a bitcast where XLA may choose
    kept = jax.jit(lambda x: x + 1).lower(x).compile().as_text()
    assert relayout_bytes(kept) == 0
