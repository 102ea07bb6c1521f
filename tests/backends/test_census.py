import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from conftest import needs

from fcconv_jax.backends.census import OpCounts, count_hlo, count_stablehlo


class _Net(nn.Module):
    conv: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding="VALID")(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        if self.conv:
            return nn.Conv(5, (1, 1), padding="VALID")(x[:, None, None])[:, 0, 0]
        return nn.Dense(5)(x)


def _lowered(conv):
    net, x = _Net(conv), jnp.ones((2, 6, 5, 3))
    params = net.init(jax.random.key(0), x)
    return jax.jit(net.apply).lower(params, x)


def test_dense_and_conv_nets():
    texts = (_lowered(form).as_text() for form in (False, True))
    dense, conv = map(count_stablehlo, texts)
    assert (dense.dots, dense.convolutions) == (1, 1)
    assert (conv.dots, conv.convolutions) == (0, 2)


@needs("jax", "0.8.0")  # 0.7 compiles a 1x1 convolution as a dot
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA's choice on CPU")
def test_dense_and_conv_nets_as_compiled():
    texts = (_lowered(form).compile().as_text() for form in (False, True))
    dense, conv = map(count_hlo, texts)
    assert (dense.dots, dense.convolutions) == (1, 1)
    assert (conv.dots, conv.convolutions) == (0, 2)


def test_a_function_counts_for_each_call_and_a_loop_body_once():
    dot = jax.jit(lambda a: a @ a)

    def f(a):
        a, _ = jax.lax.scan(lambda c, _: (c @ c, None), a, None, length=7)
        return dot(dot(a))

    text = jax.jit(f).lower(jnp.ones((3, 3))).as_text()
    assert count_stablehlo(text).dots == 3


def test_library_calls_are_counted_by_name():
    hlo = """
  %call.1 = (f32[8,4]{1,0}, s8[4194304]{0}) custom-call(f32[8,8]{1,0} %a, %b), \
custom_call_target="__cublas$gemm", backend_config={"dot(": 1}
  ROOT %conv = (f32[8,4]{1,0}, u8[0]{0}) custom-call(%a, %b), window={size=1x1}, \
custom_call_target="__cudnn$convForward"
  %convolution.3 = f32[1,2,2,4]{3,2,1,0} convolution(%x, %y), dim_labels=b01f_01io
  %dotted_fusion = f32[8,4]{1,0} fusion(%p0, %p1), kind=kLoop, calls=%fused_dot
  %gemm = f32[8,4]{1,0} fusion(%p0, %p1), kind=kCustom, calls=%gemm_computation, \
backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  %copy.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} copy(%args)
  %copy-start = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}) copy-start(%args)
"""
    calls = {
        "__cublas$gemm": 1,
        "__cudnn$convForward": 1,
        "__triton_nested_gemm_fusion": 1,
    }
    assert count_hlo(hlo) == OpCounts(0, 1, calls, copies=1, fusions=2)
    stablehlo = """
  func.func public @main(%a: tensor<2xf32>) -> tensor<2xf32> {
    %0 = stablehlo.custom_call @foo(%a) : (tensor<2xf32>) -> tensor<2xf32>
    %1 = "stablehlo.convolution"(%a, %b) : (tensor<2xf32>) -> tensor<2xf32>
  }
"""
    assert count_stablehlo(stablehlo) == OpCounts(0, 1, {"foo": 1})


def test_collectives_are_counted_by_kind_and_size():
    hlo = """
  %all-reduce.1 = (f32[8,4]{1,0}, bf16[4]{0}) all-reduce(%a, %b), to_apply=%add
  %start.2 = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%p), dimensions={0}
  %done.2 = f32[8,4]{1,0:T(8,128)S(1)} all-gather-done(%start.2)
  ROOT %permute = pred[3]{0} collective-permute(%q), source_target_pairs={{0,1}}
  %r = s4[3]{0} reduce-scatter(%q), dimensions={0}
  %fusion = f32[8,4]{1,0} fusion(%all-reduce.1), calls=%all-to-all
"""
    found = count_hlo(hlo)
    assert found.collectives == {
        "all-gather": 1,
        "all-reduce": 1,
        "collective-permute": 1,
        "reduce-scatter": 1,
    }
    assert found.collective_bytes == {
        "all-gather": 128,
        "all-reduce": 136,
        "collective-permute": 3,
        "reduce-scatter": 2,
    }


def test_a_collective_in_several_parts_counts_once():
    """As XLA for TPUs writes one: several fusions on one channel."""
    line = "  %g.{} = f32[256,1,16]{{2,1,0}} {}(%p), channel_id={}, dimensions={{0}}"
    hlo = "\n".join(
        line.format(number, kind, channel)
        for number, (kind, channel) in enumerate(
            [
                ("all-gather", 6),
                ("all-gather", 6),
                ("all-gather", 16),
                ("all-gather", 6),
                ("all-to-all", 6),
            ]
        )
    )
    found = count_hlo(hlo)
    assert found.collectives == {"all-gather": 2, "all-to-all": 1}
    assert found.collective_bytes == {"all-gather": 2 * 16384, "all-to-all": 16384}
