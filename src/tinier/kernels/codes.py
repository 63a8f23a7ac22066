"""The code nearest to a scaled number, in Triton, for kernels that round weights. Start at `nearest_code`.

The plain torch version is `tinier.quantization.scales.round_scaled`.
"""

import triton
import triton.language as tl


@triton.jit
def round_to_even(x):  # type: ignore[no-untyped-def]
    # adding 1.5 · 2^23 leaves no bits for a fraction
    return (x + 12582912.0) - 12582912.0


@triton.jit  # type: ignore[untyped-decorator]
def nearest_code(x, zero, lowest, highest, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """As float32. KIND: of `code_kind`; a float grid reaches from -highest to highest."""
    if KIND == 0:  # integers
        code = tl.minimum(tl.maximum(round_to_even(x) + zero, lowest), highest)
    else:
        size = tl.minimum(tl.abs(x), highest)
        # the power of two at or below the number, not below that of the smallest normal one
        least = 1.0 if KIND == 1 else 0.015625 if KIND == 2 else 0.00006103515625
        bits = tl.maximum(size, least).to(tl.int32, bitcast=True) & 0x7F800000
        # 1 bit after the leading one in E2M1, 3 in E4M3, 2 in E5M2
        unit = bits.to(tl.float32, bitcast=True) * (
            0.5 if KIND == 1 else 0.125 if KIND == 2 else 0.25
        )
        code = round_to_even(tl.div_rn(size, unit)) * unit
        code = tl.where(x < 0, -code, code)
    return code


def code_kind(kind: str, bits: int) -> int:
    """What a grid's kind and bits are called in kernels: 0 integers, 1 E2M1, 2 E4M3, 3 E5M2."""
    if kind == "int":
        return 0
    return 3 if kind == "e5m2" else 1 if bits == 4 else 2
