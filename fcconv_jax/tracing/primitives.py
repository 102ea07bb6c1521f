"""Facts about JAX's primitives: one table, read by everything that walks a trace.

A new primitive is entered here, in its family. A reader handles families where it can;
what a reader cannot do with a known primitive is listed in :data:`LEFT_OUT` with the
reason. ``tests/tracing/test_primitives.py`` runs each entry through every reader.

Names that the present JAX lacks stay: older and newer versions have them.
"""

from __future__ import annotations

from collections.abc import Mapping


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Output i is operand i: the equation names, places or orders it, or makes a copy.
SAME = _names(
    """
    checkpoint_name copy copy_p device_put layout_constraint mesh_cast name
    optimization_barrier pvary reshard sharding_constraint stop_gradient
    """
)
# The operand's numbers in another precision.
ROUNDING = _names("convert_element_type reduce_precision")
# Entry i of the output is a function of entry i of the operands alone.
ELEMENTWISE = _names(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj cos cosh digamma div eq eq_to erf erf_inv erfc exp
    exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le
    le_to lgamma log log1p logistic lt lt_to max min mul mulhi ne neg nextafter not
    one_minus_square or polygamma population_count pow real regularized_incomplete_beta
    rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign
    sin sinh sqrt square sub tan tanh xor zeta
    """
)
# All three: an axis of the output is the same axis of the operands.
ENTRYWISE = SAME | ROUNDING | ELEMENTWISE

# Entries of the one operand, in another place, each once or several times or not.
MOVES = _names(
    """
    broadcast_in_dim expand_dims reshape rev slice split squeeze tile transpose unstack
    """
)
# Entries of several operands side by side; ``pad`` puts a number around them.
JOINS = _names("concatenate pad stack")
# Windows along axes that stay: pools.
POOLS = _names(
    """
    reduce_window reduce_window_max reduce_window_min reduce_window_sum
    """
)
# Along one axis, which stays; the others are a batch.
SCANS = _names("cumlogsumexp cummax cummin cumprod cumsum")
# Over whole axes, which go; one axis after another gives the same.
REDUCTIONS = _names(
    "reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor"
)
# Over one axis, which goes.
POSITIONS = _names("argmax argmin")

MATMULS = _names("conv_general_dilated dot_general")

# Calls of one sub-jaxpr on their operands, one to one. The custom derivative rules
# among them do not change the value that is computed.
REMATS = _names("checkpoint remat remat2")
CUSTOM_VJPS = _names("custom_vjp_call custom_vjp_call_jaxpr")
CALLS = (
    REMATS
    | CUSTOM_VJPS
    | _names("call closed_call core_call core_closed_call custom_jvp_call jit pjit")
)
CONTROL = _names("cond scan while")

# Parameters that place a result on devices, and change none of its numbers.
PLACES = _names("out_sharding sharding dst_sharding src_sharding")

FAMILIES: Mapping[str, frozenset[str]] = {
    "same": SAME,
    "rounding": ROUNDING,
    "elementwise": ELEMENTWISE,
    "moves": MOVES,
    "joins": JOINS,
    "pools": POOLS,
    "scans": SCANS,
    "reductions": REDUCTIONS,
    "positions": POSITIONS,
    "matmuls": MATMULS,
    "calls": CALLS,
    "control": CONTROL,
}

_NO_OPERATION = "no runtime for edge devices has the operation"
_UNKNOWN_STEPS = "what a loop carries may be anything after its steps"

# What a reader cannot do with a primitive, and why.
LEFT_OUT: Mapping[str, Mapping[str, str]] = {
    "slide": {
        "custom_vjp_call": "its derivative rule is written for the array of one crop",
        "reduce_window": "its combination is code of its own, of unknown neutral value",
        "while": "the number of steps may differ from crop to crop",
    },
    "flatten": {"scan": _UNKNOWN_STEPS, "while": _UNKNOWN_STEPS},
    "export": {
        **dict.fromkeys(
            _names(
                """
                acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt clz
                complex conj cosh cumlogsumexp cummax cummin cumprod digamma erf_inv
                igamma igamma_grad_a igammac imag lgamma nextafter polygamma
                population_count real reduce_window reduce_xor
                regularized_incomplete_beta shift_left shift_right_arithmetic
                shift_right_logical sinh tan xor zeta
                """
            ),
            _NO_OPERATION,
        ),
        "while": "the number of steps is not known",
    },
    "reading": {"reduce_window": "its combination is code of its own"},
}
