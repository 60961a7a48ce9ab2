"""Narrowing and products, equal on the GPU and in Triton's interpreter.

The interpreter (TRITON_INTERPRET=1; seen in 3.6, 3.7 and 3.9) keeps bfloat16 as uint16 and is wrong
about it twice: ``x.to(tl.bfloat16)`` truncates, twice the error of rounding, and ``tl.dot``
multiplies the bit patterns as integers.  Compiled code takes neither detour below.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)  # a NaN stays as it is
        result = (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def dot(a, b, acc):
    """acc + a b with products of the input type and sums in float32; float32 is not cut to tf32."""
    if INTERPRETED:
        # In float64, or the order in which numpy's BLAS sums would count as the kernel's error.
        product = tl.dot(
            a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64), out_dtype=tl.float64
        )
        result = acc + product.to(tl.float32)
    else:
        result = tl.dot(a, b, acc, input_precision="ieee")
    return result
